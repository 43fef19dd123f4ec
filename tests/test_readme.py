"""The README's programs, each copied into a file and run. Oracles: what they say that they print; of the one for many
processes, one process."""

import re
import subprocess
import sys

import numpy as np
import pytest

from tests.dist.processes import ENVIRONMENT, ROOT, script_launcher

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
TWENTY_LINES, FLASH, LAWS, DAPO, MANY = BLOCKS  # a new program gets a test
WAYS = re.findall(r'way == "(\w+)":', MANY)


def run(folder, program, *args, n_ranks=1):
    script = folder / "train.py"
    script.write_text(program)
    command = [sys.executable] if n_ranks == 1 else script_launcher(n_ranks)
    done = subprocess.run([*command, str(script), *args], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_fenced_block_is_a_program():
    """What is a listing, and not a program, is indented and not fenced."""
    assert len(re.findall("^```", (ROOT / "README.md").read_text(), re.MULTILINE)) == 2 * len(BLOCKS)


def entropy(text):
    p = np.bincount(np.frombuffer(text, dtype=np.uint8)) / len(text)
    return -(p[p > 0] * np.log(p[p > 0])).sum()


def test_twenty_lines(tmp_path):
    """It beats the entropy of this text's letters, their order not known."""
    n_params, loss = run(tmp_path, TWENTY_LINES).splitlines()
    assert n_params.endswith(" parameters")
    assert float(loss.split()[1]) < entropy((ROOT / "README.md").read_bytes()) - 0.5


def test_one_op(tmp_path):
    """fp32: 256 summands of order 1, in another order."""
    assert float(run(tmp_path, FLASH).split()[-1]) < 1e-5


def test_a_fault_of_a_layer_is_found_by_its_law(tmp_path):
    """Sums of 512 squares in bf16: what the comment beside the print says, and no other law."""
    (line,) = run(tmp_path, LAWS).splitlines()
    assert line.startswith("check_op: dtypes: in torch.bfloat16, the value")


def test_an_objective(tmp_path):
    """Oracle: the formulas of DAPO (arXiv:2503.14476), token by token, on the tensors that the program makes."""
    names: dict = {}
    exec(DAPO.replace("import torch\n", "import torch\ntorch.manual_seed(1)\n", 1), names)
    found = names["rewards_B"].double().view(2, 2)
    advantages = ((found - found.mean(1, keepdim=True)) / (found.std(1, keepdim=True) + 1e-6)).flatten()
    ratio = (names["log_probs_BT"] - names["old_BT"]).detach().double().exp()
    total, n = 0.0, 0
    for b in range(4):
        for t in range(int(names["mask_BT"][b].sum())):
            w, a = float(ratio[b, t]), float(advantages[b])
            total, n = total - min(w * a, min(max(w, 0.8), 1.28) * a), n + 1
    assert float(names["loss"].detach()) == pytest.approx(total / n, rel=1e-5)
    assert "clipped_high" in run(tmp_path, DAPO)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return loss_of(run(tmp_path_factory.mktemp("alone"), MANY))


def loss_of(printed):
    (line,) = printed.splitlines()  # of one rank
    return float(re.fullmatch(r"loss (\S+) nats per byte", line)[1])


def test_two_processes_print_what_one_does(tmp_path, alone):
    """fp32 sums in another order: 50 steps differ after the fourth digit at most."""
    assert alone < entropy((ROOT / "README.md").read_bytes())
    assert loss_of(run(tmp_path, MANY, n_ranks=2)) == pytest.approx(alone, abs=2e-4)


def test_another_way_is_refused_by_name(tmp_path):
    with pytest.raises(AssertionError, match="'fspd' is none of ddp, zero, fsdp and tensor"):
        run(tmp_path, MANY, "fspd")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[1:])
def test_every_way_does(tmp_path, alone, way):
    """fp32, as above."""
    assert WAYS == ["ddp", "zero", "fsdp", "tensor"]
    assert loss_of(run(tmp_path, MANY, way, n_ranks=2)) == pytest.approx(alone, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[1:])
def test_every_way_runs_alone(tmp_path, alone, way):
    assert loss_of(run(tmp_path, MANY, way)) == pytest.approx(alone, abs=2e-4)
