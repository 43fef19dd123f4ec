"""The README's programs, as they stand there. Oracle of the one for many processes: one process."""

import re
import subprocess
import sys

import numpy as np
import pytest

from tests.dist.processes import ENVIRONMENT, ROOT, script_launcher

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
TWENTY_LINES, FLASH, MANY, SHARDED = BLOCKS


def run(folder, program, n_ranks=1):
    script = folder / "train.py"
    script.write_text(program)
    command = [sys.executable] if n_ranks == 1 else script_launcher(n_ranks)
    done = subprocess.run([*command, str(script)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_twenty_lines(tmp_path):
    """Eagerly, as a line of it allows. It beats the entropy of this text's letters, their order not known."""
    eager = re.sub("step = jit.*leave out.*\n", "", TWENTY_LINES)
    assert eager != TWENTY_LINES
    n_params, loss = run(tmp_path, eager).splitlines()
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


@pytest.mark.slow
def test_state_in_parts(tmp_path, alone):
    program = MANY.replace("adamw(weight_decay=0.1)", "zero.sharded(adamw(weight_decay=0.1), reduce=None)")
    program = program.replace("import collectives, ddp,", "import collectives, ddp, zero,")
    assert program.count("zero") == 2
    assert float(run(tmp_path, program, n_ranks=2).split()[1]) == pytest.approx(float(alone.split()[1]), abs=2e-4)


@pytest.mark.slow
def test_fully_sharded(tmp_path, alone):
    """bf16 has three digits: 50 steps of it end within 0.05 of fp32's."""
    imports = "from functools import partial\n" + MANY.replace(
        "import collectives, ddp,", "import collectives, ddp, fsdp,"
    )
    indented = "".join(f"    {line}\n" for line in SHARDED.splitlines())
    program = re.sub(r"    state = init_state\(collectives.*\n", lambda _: indented, imports)
    assert "fsdp.plan" in program
    assert float(run(tmp_path, program, n_ranks=2).split()[1]) == pytest.approx(float(alone.split()[1]), abs=0.05)
