"""Ranks killed while they save a checkpoint. Oracle: purelm.checkpoint, which reads what the file system has left."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from purelm import checkpoint as one_process
from tests.dist.processes import free_port

ROOT = Path(__file__).resolve().parents[2]

GROUP = """
import os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from purelm import _shards
from purelm.dist import checkpoint
rank, root, where = int(os.environ["RANK"]), sys.argv[1], sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=20))
like = {"x": {"v": torch.empty(200_001)}, "y": [torch.empty(3)]}
def save(step, value):
    part = {"x": {"v": torch.full((100_001,), value)}, "y": [torch.full((2,), value)]}
    checkpoint.save(root, step, part, like=like, meta={"value": value})
save(1, 1.0)
print("saved", flush=True)
if where == "loop":
    for i in range(10**6):
        save(i % 2 + 1, float(i))
class Digest:
    n = 0
    def __init__(self, *args): pass
    def update(self, data):
        Digest.n += 1
        if Digest.n == 4: os._exit(9)  # with half of the file written
real = _shards.write
def write(path, tensors):
    if where == "before": os._exit(9)
    if where == "during": _shards.hashlib = type("H", (), {"sha256": Digest})
    real(path, tensors)
    os._exit(9)
if rank == int(sys.argv[3]):
    _shards.write = write
try:
    save(2, 2.0)
except RuntimeError as error:
    print("error:", str(error).splitlines()[0], flush=True)
    os._exit(3)
"""


def start_group(tmp_path, *args):
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", GROUP, str(tmp_path), *map(str, args)],
            env={**env, "RANK": str(rank)}, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize(("where", "killed"), [("before", 1), ("during", 1), ("after", 1), ("during", 0)])
def test_a_rank_that_dies_leaves_the_previous_checkpoint_and_the_other_ends(tmp_path, where, killed):
    processes = start_group(tmp_path, where, killed)
    begin = time.monotonic()
    outputs = [p.communicate(timeout=60)[0] for p in processes]
    assert time.monotonic() - begin < 40
    assert processes[killed].returncode == 9 and outputs[killed] == "saved\n"
    assert processes[1 - killed].returncode == 3, outputs
    assert "error: save of step 2: a rank is gone or late" in outputs[1 - killed]
    assert one_process.steps(tmp_path) == [1]
    trees, meta = one_process.load(tmp_path)
    assert (trees["x"]["v"] == 1.0).all() and len(trees["x"]["v"]) == 200_001 and meta["value"] == 1.0
    one_process.save(tmp_path, 3, {"x": {}})  # clears what was left
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("delay", [0.0, 0.013, 0.05])
def test_a_group_killed_at_any_instant_leaves_a_whole_checkpoint(tmp_path, delay):
    processes = start_group(tmp_path, "loop", 0)
    for p in processes:
        assert p.stdout.readline() == "saved\n"
    time.sleep(delay)
    processes[1].kill()
    processes[0].kill()
    for p in processes:
        p.communicate(timeout=30)
    assert one_process.steps(tmp_path)
    for step in one_process.steps(tmp_path):
        trees, meta = one_process.load(tmp_path, step)
        assert (trees["x"]["v"] == meta["value"]).all() and (trees["y"][0] == meta["value"]).all()


STEPS = """
import os, sys
import torch
from purelm import checkpoint as one
from purelm.dist import checkpoint
torch.set_num_threads(1)
root, left = sys.argv[1], [0]
def counted(f):
    def g(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0: os._exit(9)
        return f(*args, **kwargs)
    return g
def save(value, step=5):
    t = {"x": {"v": torch.full((9,), value)}, "y": [torch.full((), value)]}
    checkpoint.save(root, step, t, like=t, meta={"value": value}, keep_last=1)
save(1.0)
n = 0
while True:
    n += 1
    value = float(n + 1)
    pid = os.fork()
    if pid == 0:
        left[0] = n
        for name in ("rename", "fsync", "unlink", "rmdir", "mkdir", "open"):
            setattr(os, name, counted(getattr(os, name)))
        save(value, 5 + n % 2)
        os._exit(0)
    done = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    found = one.steps(root)
    assert found, n
    trees, meta = one.load(root)
    assert (trees["x"]["v"] == meta["value"]).all() and trees["y"][0] == meta["value"]
    if done == 0: break
    save(value, 5)
print(n)
"""


def test_a_kill_at_every_call_of_the_file_system(tmp_path):
    """One rank, replaced and new steps in turn: after each rename, fsync, unlink, mkdir or open, something loads."""
    done = subprocess.run([sys.executable, "-c", STEPS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 8
