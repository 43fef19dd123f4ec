"""What a quickstart replaces, and when. Oracles: hashes of every file before and after, and the uninterrupted run."""

import json
import os
import shutil
import signal

import pytest

from experiments import quickstart
from purelm import checkpoint
from tests.experiments.small import contents, rows
from tests.experiments.test_signals import with_signal
from tests.programs import run_here

SMALL = ["--d-model", "32", "--n-layers", "1", "--n-heads", "2", "--batch-size", "4", "--vocab-size", "300"]
FLAGS = [*SMALL, "--stories", "100", "--steps", "6", "--context-length", "32"]
EAGER = {"PATH": "/nowhere"}  # no compiler on the path


def quick(folder, *flags):
    return run_here("experiments.quickstart", "--run", folder, *FLAGS, *flags, env=EAGER)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """An earlier quickstart, on the user's text."""
    folder = tmp_path_factory.mktemp("quickstart")
    text = "<|endoftext|>".join(f"caf\xe9 number {i} has tea and cake" for i in range(200))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    done = quick(folder / "run", "--data", folder / "text.txt")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def old(before, tmp_path):
    shutil.copytree(before, tmp_path / "old")
    return tmp_path / "old"


def bad_in_the_end(folder):
    """Good documents, and one that is no UTF-8 after more of them than are looked at first."""
    text = b"<|endoftext|>".join(b"story %d of tea and cake" % i for i in range(1500))
    (folder / "bad.txt").write_bytes(text + b"<|endoftext|>caf\xe9")
    return "--data", folder / "bad.txt"


def data_of(old):
    return json.loads((old / "run" / quickstart.MARK).read_text())["corpus"]["data"]


FAULTS = {
    "typo.txt: no such file": lambda old: ("--data", old / "typo.txt"),
    "bad.txt: not utf-8 at byte": bad_in_the_end,
    "lies in the folder of the run": lambda old: ("--data", old / "run" / "data" / "train.txt"),
    "lies in the folder that is read": lambda old: ("--data", old),
    "stories must be at least 20, got 1": lambda old: ("--stories", "1"),
    "n_heads must divide d_model": lambda old: ("--n-heads", "3"),
    "tokens; context_length=1000000 needs": lambda old: ("--context-length", "1000000", "--batch-size", "1"),
    "optim.clip must be": lambda old: ("--optim.clip", "nan"),
    "device must be": lambda old: ("--device", "meta"),
    "--resume: data None is not that of the run": lambda old: ("--resume",),
    "seed 1 is not that of the run, 0": lambda old: ("--resume", "--data", data_of(old), "--seed", "1"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_cannot_be_done_leaves_the_earlier_run_as_it_was(old, message):
    flags = FAULTS[message](old)
    found = contents(old)
    done = quick(old / "run", *flags)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr
    assert contents(old) == found


def test_a_folder_of_another_is_refused_and_a_new_one_is_not_left_behind(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert "was not made by quickstart" in quick(tmp_path / "mine").stderr
    assert contents(tmp_path) == {"mine/notes.txt": contents(tmp_path / "mine")["notes.txt"]}
    assert quick(tmp_path / "new", "--data", tmp_path / "typo").returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_next_one_takes_the_place_of_all_that_was_there(old):
    """As in an empty folder; what a killed one left in its way is cleared, and a file of the old run's is gone."""
    (old / "run" / ".new").mkdir()
    (old / "run" / ".new" / "half.txt").write_text("of one that was killed")
    (old / "run" / "extra").mkdir()
    assert quick(old / "run").returncode == 0
    assert quick(old / "fresh").returncode == 0
    names = [sorted(p.name for p in (old / name).rglob("*")) for name in ("run", "fresh")]
    assert names[0] == names[1] and ".lock" not in names[0] and ".new" not in names[0]
    assert rows(old / "run") == rows(old / "fresh")
    paths = json.loads((old / "run" / "config.json").read_text())
    assert paths["train"] == str(old / "run" / "data" / "train.bin") and paths["run"] == str(old / "run")


def test_one_that_was_stopped_goes_on(old, monkeypatch):
    """Oracle: the one that was not. Then it is finished, and more steps make it go on."""
    assert quick(old / "whole").returncode == 0
    start = quickstart.start
    monkeypatch.setattr(quickstart, "start", lambda job: with_signal(start(job), signal.SIGTERM, 4))
    done = quick(old / "run")
    assert done.returncode == 143 and "--resume go on from there" in done.stderr
    monkeypatch.setattr(quickstart, "start", start)
    assert checkpoint.latest(old / "run" / "checkpoints") == 4
    assert quick(old / "run", "--resume").returncode == 0
    assert rows(old / "run") == rows(old / "whole")
    found = contents(old / "run")
    assert "is finished: 6 of 6 steps" in quick(old / "run", "--resume").stderr
    assert contents(old / "run") == found
    assert quick(old / "run", "--resume", "--steps", "7").returncode == 0
    assert checkpoint.latest(old / "run" / "checkpoints") == 7


def test_two_at_a_time(old):
    from experiments.lock import locked

    found = contents(old)
    with locked(old / "run"):
        assert f"is being written by process {os.getpid()}" in quick(old / "run").stderr
    assert contents(old) == found
