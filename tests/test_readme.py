"""The README's programs, as they stand there. Oracle of the one for many processes: one process."""

import re
import subprocess
import sys

import numpy as np
import pytest

from tests.dist.processes import ENVIRONMENT, ROOT, script_launcher

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
TWENTY_LINES, FLASH, MANY, SHARDED, TENSOR = BLOCKS
STRATEGY = "model, strategy = transformer.make(cfg), ddp.strategy()\n"


def run(folder, program, n_ranks=1):
    script = folder / "train.py"
    script.write_text(program)
    command = [sys.executable] if n_ranks == 1 else script_launcher(n_ranks)
    done = subprocess.run([*command, str(script)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_twenty_lines(tmp_path):
    """It beats the entropy of this text's letters, their order not known."""
    n_params, loss = run(tmp_path, TWENTY_LINES).splitlines()
    assert (
        n_params.endswith(" parameters") and float(loss.split()[1]) < entropy((ROOT / "README.md").read_bytes()) - 0.5
    )


def entropy(text):
    p = np.bincount(np.frombuffer(text, dtype=np.uint8)) / len(text)
    return -(p[p > 0] * np.log(p[p > 0])).sum()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"), MANY)


def test_many_processes_print_what_one_does(tmp_path, alone):
    """fp32 sums in another order: 50 steps differ after the fourth digit at most."""
    assert float(alone.split()[1]) < entropy((ROOT / "README.md").read_bytes())
    assert float(run(tmp_path, MANY, n_ranks=2).split()[1]) == pytest.approx(float(alone.split()[1]), abs=2e-4)


def with_strategy(lines, imports):
    program = MANY.replace(STRATEGY, lines).replace("from purelm.dist import ddp, world", imports)
    assert lines in program and imports in program
    return program


@pytest.mark.slow
@pytest.mark.parametrize("way", ["zero", "fsdp", "tensor parallel"])
def test_other_strategies(tmp_path, alone, way):
    """fp32, as above. The one of tensor parallelism in a mesh whose other axis is one rank, which sees all rows."""
    dist = "from purelm.dist import ddp, fsdp, tensor_parallel, world, zero\nfrom purelm.ops import REFERENCE\n"
    dist += "from purelm.transforms import remat"
    if way == "zero":
        program = with_strategy(STRATEGY.replace("ddp.strategy", "zero.strategy"), dist)
    else:
        # Groups are there when the world has started: what is made of them stands inside.
        lines = SHARDED if way == "fsdp" else TENSOR.replace("model_group", "None").replace("data_group", "alone")
        head, rest = MANY.split("step = make_step")
        step, rest = rest.split("\n", 1)
        before, inside = rest.split("with world.start() as here:\n")
        if way == "tensor parallel":
            lines = "alone = [torch.distributed.new_group([i]) for i in range(here.size)][here.rank]\n" + lines
        lines += f"step = make_step{step}\n"
        program = head.replace(STRATEGY, "").replace("from purelm.dist import ddp, world", dist) + before
        program += "with world.start() as here:\n" + "".join(f"    {line}\n" for line in lines.splitlines()) + inside
        if way == "tensor parallel":
            program = program.replace("start.chunk(here.size)[here.rank]", "start")
    assert float(run(tmp_path, program, n_ranks=2).split()[1]) == pytest.approx(float(alone.split()[1]), abs=2e-4)
