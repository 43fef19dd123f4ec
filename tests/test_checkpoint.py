"""Checkpoints: exact round trips, refusal of damaged or foreign ones, and survival of kill -9 during a save.

Oracle: torch.equal with what was saved; the file system after each interruption.
"""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import checkpoint, tree
from purelm.testing import strategies as plm


class State(NamedTuple):
    step: torch.Tensor
    mu: dict


def make(seed=0, width=5):
    generator = torch.Generator().manual_seed(seed)
    params = {
        "w": torch.randn(3, width, generator=generator),
        "layers": [{"b": torch.randn(width, generator=generator).bfloat16()} for _ in range(12)],
        "none": None,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
    }
    return {"params": params, "opt_state": (State(torch.tensor(7), {"w": params["w"] * 2}), ())}


def same(a, b):
    assert tree.structure(a) == tree.structure(b)
    for path, x, y in zip(tree.paths(a), tree.leaves(a), tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y), path


def test_round_trip_is_exact_with_the_given_structure(tmp_path):
    trees = make()
    checkpoint.save(tmp_path, 1000, trees, meta={"config": {"d": 5}})
    assert (tmp_path / "step-00001000").is_dir()
    loaded, meta = checkpoint.load(tmp_path, like=make(seed=1))
    same(trees, loaded)
    assert isinstance(loaded["opt_state"][0], State)
    assert meta == {"config": {"d": 5}, "step": 1000}


def test_without_like_the_stored_structure_comes_back(tmp_path):
    trees = make()
    checkpoint.save(tmp_path, 1, trees)
    loaded, _ = checkpoint.load(tmp_path)
    same(trees["params"], loaded["params"])
    assert set(loaded["opt_state"][0]) == {"step", "mu"}
    only, _ = checkpoint.load(tmp_path, only=["params"])
    assert list(only) == ["params"]


keys = st.text(alphabet="abcxyz_0", min_size=1, max_size=4)
leaves = plm.tensors(
    dtype=(*plm.FLOATS, *plm.INTEGERS),
    values=("small", "normal", "extreme"),
    layouts=("contiguous", "transposed", "sliced", "expanded"),
)
nodes = plm.trees(leaves, names=keys, containers=("dict", "list"), max_leaves=8)


@given(nodes)
def test_any_tree_survives(tmp_path_factory, value):
    root = tmp_path_factory.mktemp("any")
    checkpoint.save(root, 3, {"t": value})
    loaded, _ = checkpoint.load(root)
    same({"t": value}, loaded)


def test_aliased_and_strided_leaves_are_stored_by_value(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    value = {"a": base, "b": base, "t": base.T, "row": base[1], "expanded": torch.ones(1).expand(3)}
    checkpoint.save(tmp_path, 1, {"x": value})
    same({"x": value}, checkpoint.load(tmp_path)[0])


def test_keep_last_and_latest(tmp_path):
    for step in (1, 2, 30, 4):
        checkpoint.save(tmp_path, step, make(), keep_last=3)
    assert checkpoint.steps(tmp_path) == [2, 4, 30]
    assert checkpoint.latest(tmp_path) == 30
    assert checkpoint.latest(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        checkpoint.save(tmp_path, 5, make(), keep_last=0)


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, 5, make(seed=0))
    checkpoint.save(tmp_path, 5, make(seed=1))
    same(make(seed=1), checkpoint.load(tmp_path, like=make())[0])
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


def test_replacement_interrupted_between_the_renames_is_still_found(tmp_path):
    checkpoint.save(tmp_path, 5, make(seed=0))
    os.rename(tmp_path / "step-00000005", tmp_path / "step-00000005.replaced")
    assert checkpoint.latest(tmp_path) == 5
    same(make(seed=0), checkpoint.load(tmp_path, like=make())[0])


@pytest.mark.parametrize("name", ["params.safetensors", "opt_state.safetensors", "manifest.json"])
@pytest.mark.parametrize("where", [0.0, 0.5, 0.97])
def test_a_flipped_byte_is_named(tmp_path, name, where):
    checkpoint.save(tmp_path, 1, make(), meta={"seed": 12345})
    path = tmp_path / "step-00000001" / name
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        checkpoint.load(tmp_path)


def test_truncated_missing_and_foreign_files_are_named(tmp_path):
    checkpoint.save(tmp_path, 1, make())
    path = tmp_path / "step-00000001" / "params.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=r"params\.safetensors: \d+ bytes, the manifest says \d+"):
        checkpoint.load(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"params\.safetensors: missing"):
        checkpoint.load(tmp_path)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint.load(tmp_path / "empty")
    with pytest.raises(ValueError, match="no checkpoint of step 9"):
        checkpoint.load(tmp_path, 9)
    with pytest.raises(ValueError, match="has no 'key'"):
        checkpoint.load(tmp_path, only=["key"])


def test_a_checkpoint_of_another_config_is_refused_by_leaf(tmp_path):
    checkpoint.save(tmp_path, 1, make(width=5))
    with pytest.raises(ValueError, match=r"layers\.0\.b is \(5,\) torch.bfloat16, the given config needs \(6,\)"):
        checkpoint.load(tmp_path, like=make(width=6))
    more = make()
    more["params"]["extra"] = torch.zeros(2)
    with pytest.raises(ValueError, match="lacks extra"):
        checkpoint.load(tmp_path, like=more)
    fewer = make()
    del fewer["params"]["w"]
    with pytest.raises(ValueError, match="holds w"):
        checkpoint.load(tmp_path, like=fewer)


def test_unknown_format(tmp_path):
    checkpoint.save(tmp_path, 1, make())
    path = tmp_path / "step-00000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["format"] = 99
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="format 99; this version reads 1"):
        checkpoint.load(tmp_path)


# Forks what it kills, so that torch is imported once.
KILLS = """
import os, signal, sys, time
import torch
from purelm import checkpoint
torch.set_num_threads(1)
for i in range(12):
    root = f"{sys.argv[1]}/{i}"
    start = {"x": {"v": torch.full((200_000,), -1.0)}, "y": [torch.zeros(200_000)]}
    checkpoint.save(root, 1, start, meta={"n": -1})
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writable, b"!")
        for step in range(1, 10**6):
            x = torch.full((200_000,), float(step))
            checkpoint.save(root, step % 3 + 1, {"x": {"v": x}, "y": [x + 1]}, meta={"n": step})
    os.read(readable, 1)
    time.sleep(0.004 * i)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert checkpoint.steps(root)
    for step in checkpoint.steps(root):
        trees, meta = checkpoint.load(root, step)
        assert (trees["x"]["v"] == meta["n"]).all() and (trees["y"][0] == meta["n"] + 1).all()
    # What the kill left is cleared by the next save.
    checkpoint.save(root, 50, {"x": {}})
    assert not [name for name in os.listdir(root) if name.startswith(".tmp-")]
"""


def test_kill_at_any_instant_leaves_a_loadable_checkpoint(tmp_path):
    """Every complete checkpoint found after SIGKILL is whole and self-consistent (values agree with the manifest)."""
    done = subprocess.run([sys.executable, "-c", KILLS, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.iterdir())) == 12
