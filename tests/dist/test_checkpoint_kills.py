"""Ranks killed while they save a checkpoint. Oracle: purelm.checkpoint, which reads what the file system has left."""

import json
import select
import subprocess
import sys
from pathlib import Path

import pytest

from purelm import checkpoint as one_process
from tests.dist.processes import TIMEOUT, free_port

ROOT = Path(__file__).resolve().parents[2]

# Forks the ranks of each case that it reads, so that torch is imported once for all of them.
GROUPS = """
import json, os, signal, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from purelm.checkpoint import shards
from purelm.dist import checkpoint
torch.set_num_threads(1)
def work(rank, root, where, killed):
    # The other one ends since this one is gone: the group itself would wait for ten hours.
    dist.init_process_group("gloo", timeout=timedelta(hours=10))
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
    real = shards.write
    def write(path, tensors):
        if where == "before": os._exit(9)
        if where == "during": shards.hashlib = type("H", (), {"sha256": Digest})
        real(path, tensors)
        os._exit(9)
    if rank == killed:
        shards.write = write
    try:
        save(2, 2.0)
    except RuntimeError as error:
        print("error:", str(error).splitlines()[0], flush=True)
        os._exit(3)
for line in sys.stdin:
    root, where, killed, port = json.loads(line)
    ranks = []
    for rank in range(2):
        readable, writable = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(writable, 1)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK=str(rank))
            try:
                work(rank, root, where, killed)
            finally:
                os._exit(1)
        os.close(writable)
        ranks.append((pid, os.fdopen(readable)))
    said = ["", ""]
    if where == "loop":
        said = [out.readline() for _, out in ranks]
        time.sleep(killed)
        for pid, _ in ranks[::-1]:
            os.kill(pid, signal.SIGKILL)
    said = [some + out.read() for some, (_, out) in zip(said, ranks)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid, _ in ranks]
    print(json.dumps([codes, said]), flush=True)
"""


@pytest.fixture(scope="module")
def group():
    """group(root, where, killed) -> (exit statuses, what was printed) of two ranks."""
    process = subprocess.Popen(
        [sys.executable, "-c", GROUPS], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run(root, where, killed):
        process.stdin.write(json.dumps([str(root), where, killed, str(free_port())]) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], TIMEOUT)
        assert ready, "a rank hangs"
        return json.loads(process.stdout.readline())

    yield run
    process.kill()
    process.communicate()


@pytest.mark.parametrize(("where", "killed"), [("before", 1), ("during", 1), ("after", 1), ("during", 0)])
def test_a_rank_that_dies_leaves_the_previous_checkpoint_and_the_other_ends(tmp_path, group, where, killed):
    codes, said = group(tmp_path, where, killed)
    assert codes[killed] == 9 and said[killed] == "saved\n"
    assert codes[1 - killed] == 3, said
    assert "error: save of step 2: a rank is gone or late" in said[1 - killed]
    assert one_process.steps(tmp_path) == [1]
    trees, meta = one_process.load(tmp_path)
    assert (trees["x"]["v"] == 1.0).all() and len(trees["x"]["v"]) == 200_001 and meta["value"] == 1.0
    one_process.save(tmp_path, 3, {"x": {}})  # clears what was left
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("delay", [0.0, 0.013, 0.05])
def test_a_group_killed_at_any_instant_leaves_a_whole_checkpoint(tmp_path, group, delay):
    codes, said = group(tmp_path, "loop", delay)
    assert codes == [-9, -9] and said == ["saved\n", "saved\n"]
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
