"""The life of a group of processes. Oracle: the operating system's list of this process's threads."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from purelm.dist import world
from tests.dist.processes import ENVIRONMENT, ROOT, TIMEOUT, free_port, script_launcher

PROGRAM = """
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

with world.start("cpu"):
    work()
print(gloo_threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed by Linux")
@pytest.mark.parametrize(
    "work",
    [
        "pass",
        "torch.compile(lambda y: y + 1, backend='eager')(x)",  # dynamo loads modules that look for a group
    ],
)
def test_no_thread_of_the_group_outlives_start(work):
    """One that lives while the interpreter goes down aborts the process, now and then: after a run, whole and saved."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "1"}
    program = PROGRAM.replace("{work}", work)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**ENVIRONMENT, **where}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True", "[]"]


FAILS = """
import os
import sys
import time
import torch
import torch.distributed
from purelm.dist import collectives, world
from tests.dist.processes import take_gpu

if sys.argv[1] == "cuda":
    take_gpu(int(os.environ["RANK"]), 2)
with world.start(sys.argv[1], timeout=600.0) as here:
    x = torch.ones(1 << 20, device=here.device)
    collectives.all_reduce(x)
    if here.rank == 1:
        work = torch.distributed.all_reduce(x, async_op=True)  # nobody else comes to it
        raise RuntimeError("in the middle")
    time.sleep(600)
"""


def fails_in_the_middle(folder, device):
    """What two ranks print, of which one fails while a message is under way."""
    script = folder / "fails.py"
    script.write_text(FAILS)
    command = [*script_launcher(2), str(script), device]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT).stderr


def test_an_error_does_not_wait_for_messages_under_way(tmp_path):
    """They would be given up after the timeout, ten minutes, and the error be printed only then."""
    said = fails_in_the_middle(tmp_path, "cpu")
    assert "RuntimeError: in the middle" in said and "rank      : 1" in said


@pytest.mark.parametrize("case", ["port in use", "no rank 1", "no rank 0"])
def test_what_keeps_processes_apart_is_said_in_one_line(case, monkeypatch):
    """Oracle: the line. It is a SystemExit, which a program prints without a traceback, and a RuntimeError."""
    port = free_port()
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "2"}
    for name, value in {**where, "RANK": "1" if case == "no rank 0" else "0"}.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as s:
        if case == "port in use":
            s.bind(("", port))
            s.listen()
        with pytest.raises(world.PeerError) as error, world.start("cpu", timeout=1.0):
            pass
    assert isinstance(error.value, SystemExit) and isinstance(error.value, RuntimeError)
    (line,) = str(error.value).splitlines()
    if case == "port in use":
        assert line.startswith(f"rank 0 of 2: port {port} is in use, by another run perhaps: give another one")
    else:
        who, where = f"rank {os.environ['RANK']} of 2", f"at 127.0.0.1:{port} within 1 s"
        assert line.startswith(f"{who}: not all of the 2 processes joined {where}")


LOSES = """
import os, torch
from purelm.dist import collectives, world
with world.start("cpu", timeout=600.0) as here:
    x = torch.ones(1 << 20)
    collectives.all_reduce(x)
    if here.rank == 1:
        os._exit(9)
    collectives.all_reduce(x)
"""


def test_survivors_say_one_line():
    """Oracle: what is printed. One line that names the place; the process that died has said why, or cannot."""
    where = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LOSES], cwd=ROOT, env={**where, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [p.communicate(timeout=TIMEOUT)[1] for p in ranks]
    assert [p.returncode for p in ranks] == [1, 9]
    lines = [line for line in said[0].splitlines() if not re.match(r"(\[rank\d\]:)?\[[WE]", line)]  # torch's own log
    assert "Traceback" not in said[0] and len(lines) == 1, said[0]
    assert lines[0].startswith("rank 0 of 2: another process is gone, or did not join a collective in ")
