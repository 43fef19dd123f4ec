"""The life of a group of processes. Oracle: the operating system's list of this process's threads."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.processes import ENVIRONMENT, ROOT, free_port

PROGRAM = """
import contextlib
import gc
import pathlib
import torch
import torch.distributed
from purelm.dist import world

def gloo_threads():
    names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]

class Cycle:  # what only Python's collector takes away
    pass

def work():
    x = torch.ones(3, requires_grad=True)  # a tensor that Python knows
    cycle = Cycle()
    cycle.self, cycle.work = cycle, torch.distributed.all_reduce(x.detach(), async_op=True)
    cycle.work.wait()
    print(len(gloo_threads()) > 0)  # the one that took the message has its name by now
    {work}

with contextlib.suppress(RuntimeError), world.start("cpu"):
    work()
{after}
print(gloo_threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed by Linux")
@pytest.mark.parametrize(
    ("work", "after"),
    [
        ("pass", ""),
        ("torch.compile(lambda y: y + 1, backend='eager')(x)", ""),  # dynamo loads modules that look for a group
        ("raise RuntimeError", "gc.collect()"),  # the error's frames held the message until now
    ],
)
def test_no_thread_of_the_group_outlives_start(work, after):
    """One that lives while the interpreter goes down aborts the process, now and then: after a run, whole and saved."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "1"}
    program = PROGRAM.replace("{work}", work).replace("{after}", after)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**ENVIRONMENT, **where}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True", "[]"]
