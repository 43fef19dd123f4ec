"""The service on a full disk. Oracles: /dev/full, statvfs as it would be, and errors that name ENOSPC."""

import errno
import os
import resource
import sqlite3
import threading
from collections import Counter

import pytest

from experiments.lock import held, locked
from experiments.scaling.service import dispatch, room, worker
from experiments.scaling.service.room import Teller, await_room, has_room, is_full, reason
from experiments.scaling.service.store import FILE, create, open_store
from experiments.scaling.service.supervisor import Supervisor
from experiments.scaling.service.worker import work
from tests.scaling.fake_backend import backend
from tests.scaling.service_parts import make_store, until
from tests.scaling.test_service_workers import events, over, plan_of, status, submit

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Full:
    """os.statvfs of a disk without room, until `free`."""

    def __init__(self, monkeypatch):
        self.looks, self.is_free, real = 0, False, os.statvfs

        def statvfs(path):
            self.looks += 1
            found = real(path)
            if self.is_free:
                return found
            return os.statvfs_result((*found[:3], 0, 0, *found[5:]))

        monkeypatch.setattr(room.os, "statvfs", statvfs)
        monkeypatch.setattr(room, "LOOK", 0.01)


def test_which_errors_mean_a_full_disk():
    assert is_full(NO_SPACE) and is_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert is_full(RuntimeError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'))
    try:
        try:
            raise NO_SPACE
        except OSError as error:
            raise ValueError("the checkpoint could not be written") from error
    except ValueError as error:
        assert is_full(error)
    assert not is_full(OSError(errno.EIO, "Input/output error")) and not is_full(ValueError("128 devices"))


def test_a_line_is_repeated_once_a_minute_and_breaks_nothing():
    said, now = [], [0.0]
    tell = Teller(said.append, 60.0, lambda: now[0])
    for now[0] in (0.0, 1.0, 59.0, 60.0, 61.0):
        tell("full")
        tell("other") if now[0] == 1.0 else None
    assert Counter(said) == {"full": 2, "other": 1}
    for i in range(1000):
        tell(str(i))
    assert len(tell._said) == room.MOST_LINES
    with pytest.raises(OSError), open("/dev/full", "w") as full:  # by close(), which tries once more
        Teller(lambda text: print(text, file=full, flush=True))("a line that fails")
        said.append("gone on")
    assert said[-1] == "gone on"


def test_a_worker_waits_for_room(tmp_path, monkeypatch, capfd):
    """It claims nothing meanwhile, and goes on by itself."""
    full = Full(monkeypatch)
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada)
    thread = threading.Thread(target=work, args=(plan_of(tmp_path)._replace(runs=1), threading.Event()))
    thread.start()
    until(lambda: full.looks > 20)
    assert status(store, ada, 1).status_type == "queued" and not list(tmp_path.glob("alive/*"))
    full.is_free = True
    thread.join()
    assert status(store, ada, 1).status_type == "completed"
    full.is_free, leave = False, threading.Event()
    leave.set()
    assert not has_room(tmp_path) and not await_room(tmp_path, leave, print)
    assert capfd.readouterr().out.count("waiting for room on the disk") >= 1


def failing(tmp_path, error):
    """A back end without room for what it writes."""

    def make(settings):
        def run(cfg, rules, control):
            control.started(0.0)
            control.evaluated([2.0], 1.0)
            raise error

        return backend(settings)._replace(run=run)

    return plan_of(tmp_path)._replace(make=make)


def test_a_run_without_room_waits_again(tmp_path, monkeypatch):
    """It is no failure of the run, unless it comes again and again; the process ends all the same."""
    monkeypatch.setattr(worker, "PAUSE", 0.0)
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada)
    work(failing(tmp_path, NO_SPACE), threading.Event())
    assert status(store, ada, 1).status_type == "queued"
    assert events(store, 1) == Counter(queued=1, claimed=1, started=1, lost=1)
    work(plan_of(tmp_path)._replace(runs=1), threading.Event())
    assert status(store, ada, 1).status_type == "completed"
    submit(store, ada, model_seed=9)
    for _ in range(dispatch.MOST_LOST):
        work(failing(tmp_path, NO_SPACE), threading.Event())
    failed = status(store, ada, 2)
    assert failed.reason.failure.startswith("the disk had no room for it, time 5 of 5 (OSError: [Errno 28] ")
    assert failed.used_runtime_seconds == 1.0


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    """Without room the run waits again; for another reason it has failed, and the worker is not lost with it."""
    monkeypatch.setattr(worker, "PAUSE", 0.0)
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada)
    submit(store, ada, model_seed=9)
    (tmp_path / "runs").write_text("no folder")
    work(plan_of(tmp_path), threading.Event())
    assert status(store, ada, 1).reason.failure.startswith("NotADirectoryError")
    (tmp_path / "runs").unlink()
    real = worker.Path.mkdir

    def mkdir(path, *args, **kwargs):
        if path.parent.name == "runs":
            raise NO_SPACE
        real(path, *args, **kwargs)

    monkeypatch.setattr(worker.Path, "mkdir", mkdir)
    work(plan_of(tmp_path), threading.Event())
    assert status(store, ada, 2).status_type == "queued" and events(store, 2)["lost"] == 1


def test_a_log_without_room_ends_no_run(tmp_path, monkeypatch):
    """The line about a busy or full database cannot be written either."""
    monkeypatch.setattr(worker, "say", Teller(lambda text: (_ for _ in ()).throw(NO_SPACE)))
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada)
    fails = iter([True, True, False])

    class Impatient:
        def write(self):
            if next(fails):
                raise sqlite3.OperationalError("database or disk is full")
            return store.write()

    assert worker._insist(Impatient(), lambda db: dispatch.claim(db, "r", 0.0), threading.Event()).id == 1


def test_a_worker_that_leaves_a_full_disk_fails_no_run(tmp_path, monkeypatch):
    """Its run is lost and taken up again, where it was said to have failed once the disk had room again."""
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada)
    leave = threading.Event()

    def make(settings):
        def run(cfg, rules, control):
            leave.set()
            control.started(0.0)
            raise AssertionError

        return backend(settings)._replace(run=run)

    def started(*args):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(dispatch, "started", started)
    work(plan_of(tmp_path)._replace(make=make), leave)
    assert status(store, ada, 1).status_type == "running"
    Supervisor(store, plan_of(tmp_path), []).tick()
    assert status(store, ada, 1).status_type == "queued"


def test_a_supervisor_outlives_its_log_and_the_database(tmp_path, monkeypatch):
    """Its thread goes on: a run whose process is gone is queued again once the store can be written."""
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada)
    with store.write() as db:
        dispatch.claim(db, "gone-1", 0.0)
    left = [sqlite3.OperationalError("database or disk is full"), sqlite3.DatabaseError("x"), KeyError("y"), None]
    real = dispatch.lost

    def lost(*args):
        if error := left.pop(0):
            raise error
        return real(*args)

    def say(text):
        raise NO_SPACE

    monkeypatch.setattr(dispatch, "lost", lost)
    watched = Supervisor(store, plan_of(tmp_path), [], say=say)
    watched.start()
    until(lambda: not left)
    watched.stop()
    assert status(store, ada, 1).status_type == "queued"


def test_a_slot_without_a_log_does_not_stop_the_others(tmp_path):
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada)
    said = []
    watched = Supervisor(store, plan_of(tmp_path), [{}, {}], say=said.append)
    (tmp_path / "logs" / "slot-0.log").mkdir(parents=True)
    (tmp_path / "logs" / "slot-1.log").write_bytes(b"x" * (2**20 + 1))
    try:
        watched.tick()
        assert len(watched.pids()) == 1 and said[0].startswith("slot 0: no worker can be started: ")
        assert until(lambda: over(store, ada, 1)).status_type == "completed"
    finally:
        watched.stop(5.0)
    assert (tmp_path / "logs" / "slot-1.log.1").stat().st_size == 2**20 + 1  # begun anew
    assert (tmp_path / "logs" / "slot-1.log").stat().st_size < 2**20


def test_a_full_disk_is_told_as_such(tmp_path, monkeypatch):
    """SQLite says "disk I/O error" where it cannot make the file beside; and where the device is broken."""
    io = sqlite3.OperationalError("disk I/O error")
    io.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE
    assert reason(io, tmp_path) == "disk I/O error"
    full = Full(monkeypatch)
    assert reason(io, tmp_path).startswith("the disk is full: free some space")
    assert reason(sqlite3.OperationalError("database is locked"), tmp_path) == "database is locked"
    full.is_free = True
    assert reason(sqlite3.OperationalError("database or disk is full"), tmp_path).startswith("the disk is full")


@pytest.mark.parametrize("what", ["create", "open"])
def test_a_store_on_a_full_disk_is_one_line(tmp_path, monkeypatch, what):
    def connect(*args):
        raise sqlite3.OperationalError("database or disk is full")

    if what == "open":
        create(tmp_path, {}).close()
    monkeypatch.setattr("experiments.scaling.service.store.connect", connect)
    with pytest.raises(ValueError, match="the disk is full: free some space"):
        create(tmp_path, {}) if what == "create" else open_store(tmp_path)
    assert [x.name for x in tmp_path.iterdir()] == ([FILE] if what == "open" else [])


def test_a_folder_is_locked_on_a_full_disk_too(tmp_path):
    """Oracle: a file that may have 0 bytes, by the limit of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with locked(tmp_path / "a"):
            found = held(tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found and not held(tmp_path / "a")
