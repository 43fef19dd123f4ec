"""One run at a time in a folder. Oracles: a process that is killed; the folder before and after."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import pretrain
from experiments.lock import LOCK, locked
from tests.experiments.small import contents, small

ROOT = Path(__file__).resolve().parents[2]
HOLD = "import sys; from experiments.lock import locked\nwith locked(__import__('pathlib').Path(sys.argv[1])):\n"
HOLD += "    print('held', flush=True); sys.stdin.read()"


def test_the_second_one_is_refused_by_the_name_of_the_first(tmp_path):
    run = tmp_path / "run"
    with locked(run):
        with pytest.raises(ValueError, match=rf"run .*run is being written by process {os.getpid()} on "):
            with locked(run):
                raise AssertionError("two at a time")
        (run / "kept").write_text("x")
    with locked(run):
        pass
    assert [path.name for path in run.iterdir()] == ["kept"]


def test_a_second_run_changes_nothing(tmp_path, capsys):
    cfg = small(tmp_path)
    pretrain.main(cfg)
    before = contents(tmp_path)
    with locked(cfg.run), pytest.raises(SystemExit) as end:
        pretrain.main(small(tmp_path, resume=True, steps=6))
    assert end.value.code == 2
    assert f"run {cfg.run} is being written by process {os.getpid()} on " in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_kill_releases_it(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"process {process.pid} on"):
        with locked(tmp_path / "run"):
            pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "run" / LOCK).exists()
    with locked(tmp_path / "run"):
        pass


def test_a_folder_in_which_nothing_was_written_is_gone_again(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "new"):
        assert (tmp_path / "new" / LOCK).exists()
        raise KeyError
    (tmp_path / "empty").mkdir()
    with locked(tmp_path / "empty"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file, not a folder"), locked(tmp_path / "file"):
        pass


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path, monkeypatch):
    """The holder ends, and removes its file, between our opening it and locking it: we look again."""
    flock, calls = fcntl.flock, []

    def late(file, how):
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(how)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path):
        assert len(calls) == 2 and (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(ValueError, match="being written"), locked(tmp_path):
            pass
