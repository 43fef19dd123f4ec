"""What the programs say. Oracles: a clock that is moved by hand, and texts written out."""

import doctest
import re
import subprocess
import sys
import unicodedata

import pytest
import torch

from experiments import console
from experiments.console import line_progress, pick_device, program
from experiments.loop import train
from experiments.setup import start
from tests.experiments.small import small


def test_examples():
    assert doctest.testmod(console).failed == 0 < doctest.testmod(console).attempted


def lines_of(total, updates, capsys):
    """(seconds, completed) ... -> [(seconds at which a line came, line)]."""
    now = [0.0]
    update = line_progress("training", total, now=lambda: now[0])
    found = []
    for now[0], completed in updates:
        update(completed, "loss 1.0")
        found += [(now[0], line) for line in capsys.readouterr().err.splitlines()]
    return found


def test_the_time_left_is_said_from_the_first_steps_on(capsys):
    """A second a step, counted from the end of the first: after three, 97 s are left, and so on every 15 s."""
    found = lines_of(100, [(10 + i, i) for i in range(1, 101)], capsys)
    assert [at - 10 for at, _ in found] == [3, 18, 33, 48, 63, 78, 93, 100]
    assert found[0][1] == "training: 3/100  loss 1.0  0:02 passed, 1:37 left"
    assert found[1][1] == "training: 18/100  loss 1.0  0:17 passed, 1:22 left"
    assert found[-1][1] == "training: 100/100  loss 1.0  1:39 passed"


def test_lines_are_few_whether_steps_are_slow_or_fast(capsys):
    """A step of a minute: one line each. A thousand a second: the first after two seconds. An end comes once."""
    assert len(lines_of(20, [(60 * i, i) for i in range(1, 21)], capsys)) == 18
    fast = lines_of(10**6, [(i / 1000, i) for i in range(1, 50_000)], capsys)
    assert [round(at) for at, _ in fast] == [2, 17, 32, 47]
    long = lines_of(10**6, [(i, i) for i in range(1, 40_000)], capsys)
    assert len(long) < 150  # every twentieth of what has passed
    assert len(lines_of(2, [(0, 1), (1, 2), (2, 2)], capsys)) == 1
    assert lines_of(0, [(i, i) for i in range(5)], capsys)[0][1] == "training: 2  loss 1.0  0:02 passed"


def test_a_resumed_run_is_measured_by_its_own_steps(capsys):
    found = lines_of(100, [(i, 50 + i) for i in range(1, 51)], capsys)
    assert found[0][1] == "training: 53/100  loss 1.0  0:02 passed, 0:47 left"


def test_compilation_is_said_apart(tmp_path, capsys):
    """The first step of a run that says that it compiles, and of one that does not."""
    cfg = small(tmp_path, steps=2, heldout=None)
    ready = start(cfg)
    train(cfg, ready)
    assert "compiling" not in capsys.readouterr().err
    train(cfg, ready._replace(compiled=True))
    err = capsys.readouterr().err
    assert re.match(r"compiling the step \.\.\.\ncompiling the step \.\.\. \d+ s\ntraining: 2/2 ", err), err


@pytest.mark.parametrize("name", ["tpu", "meta", "", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "mps", "cuda:\u0663"])
def test_an_unknown_device_is_one_line(name):
    with pytest.raises(ValueError, match=f"device must be auto, cpu, cuda or cuda:N, got {re.escape(repr(name))}"):
        pick_device(name)


def test_devices(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device 'cuda:1': this torch .* sees no GPU"):
        pick_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1") and pick_device("cuda") == torch.device("cuda")
    with pytest.raises(ValueError, match="device 'cuda:2': there are 2 GPUs"):
        pick_device("cuda:2")


@pytest.mark.parametrize(
    "error,status,line",
    [
        (ValueError("x must be y"), 2, "error: x must be y"),
        (FileNotFoundError("/nowhere: no such file"), 2, "error: /nowhere: no such file"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
            1,
            "error: no memory left: [enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: "
            "you tried; make the model or the batch smaller",
        ),
        (MemoryError(), 1, "error: no memory left: MemoryError; make the model or the batch smaller"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
def test_errors_of_users_and_of_memory_are_one_line(error, status, line, capsys):
    @program
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == status and capsys.readouterr().err == line + "\n"


def test_errors_of_ours_keep_their_traceback():
    @program
    def main():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")

    with pytest.raises(RuntimeError, match="mat1"):
        main()


def test_an_end_with_a_line_of_its_own_passes():
    """Such as that of a process whose peer is gone."""

    class OfAPeer(SystemExit, RuntimeError):
        pass

    @program
    def main():
        raise OfAPeer("another process can't allocate memory")

    with pytest.raises(OfAPeer, match="another process"):
        main()


def test_auto_is_bf16_on_gpus_with_units_for_it_alone(monkeypatch):
    """Whatever the CPU has: fp32. Asked for is asked for."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for native in (False, True):
        monkeypatch.setattr(console, "multiplies_natively", lambda dtype, device, native=native: native)
        assert console.in_bf16("auto", cuda) == native
        assert not console.in_bf16("auto", cpu) and not console.in_bf16("fp32", cuda)
        assert console.in_bf16("bf16", cpu)


def test_output_that_nobody_reads_ends_a_program_quietly():
    """Oracle: a shell's status of a process that SIGPIPE ended, 128 + 13."""
    code = "from experiments.console import program\n@program\ndef main():\n    while True: print('x' * 1000)\nmain()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
    assert (process.wait(), error) == (141, b"")


def test_another_broken_pipe_is_an_error(capsys):
    """Such as that of a connection, while the output is read."""

    @program
    def main():
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "Broken pipe" in capsys.readouterr().err


def test_control_characters_reach_no_terminal(monkeypatch):
    """Oracle: Unicode's category Cc but for tab and line feed; a file gets what was said."""
    text = "".join(map(chr, range(0x180)))
    assert console.safe(text) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    shown = "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\t\n" else c for c in text)
    assert console.safe(text) == shown
