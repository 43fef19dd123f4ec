"""The service's memory: one SQLite file in WAL mode, written in transactions that begin with the write lock.

    store = create(folder, {"backend": "surrogate", ...}) or open_store(folder)
    with store.write() as db: ...      # BEGIN IMMEDIATE; COMMIT, or ROLLBACK on an exception
    with store.read() as db: ...       # a snapshot
    commits.submit(change).result()    # changes of many callers, few transactions, one flush to the disk each

A change is on the disk when its transaction has ended (synchronous = FULL): it outlasts kill -9 and a loss of power.
"""

import contextlib
import json
import os
import queue
import secrets
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from experiments.scaling.service.room import reason

__all__ = ["BUSY", "FILE", "Commits", "Store", "connect", "create", "open_store"]

T = TypeVar("T")

FILE = "service.sqlite3"
APPLICATION = 0x70754C4D  # "puLM", SQLite's application_id
VERSION = 1  # of the tables, SQLite's user_version
BUSY = 10.0  # seconds to wait for the write lock
LOOK = 0.0005  # seconds from one look at the write lock to the next
LARGE = 4_000_000  # bytes of the log
MOST_LOG = 20_000  # pages of the log at which a transaction that ends copies them itself, and takes as long
MOST_AT_ONCE = 64  # changes in one transaction

SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE keys (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  name TEXT NOT NULL,
  hash TEXT NOT NULL UNIQUE,          -- of the key, which is stored nowhere
  budget REAL NOT NULL CHECK (budget > 0),
  seed INTEGER NOT NULL,              -- what a surrogate's hidden law is drawn from
  created_at REAL NOT NULL,           -- all times: seconds since 1970, UTC
  removed_at REAL
) STRICT;
CREATE UNIQUE INDEX key_names ON keys (name) WHERE removed_at IS NULL;
CREATE TABLE runs (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  key INTEGER NOT NULL REFERENCES keys (id),
  kind TEXT NOT NULL CHECK (kind IN ('experiment', 'final')),
  config TEXT NOT NULL,
  digest TEXT NOT NULL,
  seconds REAL NOT NULL CHECK (seconds >= 1),  -- the most it may use
  state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'completed', 'timeout', 'failed')),
  queued_at REAL NOT NULL,
  dispatched_at REAL,
  ended_at REAL,
  run_id TEXT,                        -- of the last attempt
  clock REAL,                         -- seconds of earlier attempts; NULL: the clock does not run yet
  lost INTEGER NOT NULL DEFAULT 0,    -- attempts whose process ended without a word
  val_losses TEXT NOT NULL DEFAULT '[]',
  used REAL NOT NULL DEFAULT 0,       -- device-seconds that are known of
  failure TEXT,
  UNIQUE (key, kind, digest),
  CHECK (state = 'queued' OR (run_id IS NOT NULL AND dispatched_at IS NOT NULL)),
  CHECK ((ended_at IS NOT NULL) = (state IN ('completed', 'timeout', 'failed')))
) STRICT;
CREATE UNIQUE INDEX one_final ON runs (key) WHERE kind = 'final';
CREATE INDEX runs_by_state ON runs (state, key, queued_at, id);
CREATE INDEX runs_by_key ON runs (key, kind, state, seconds, used);
CREATE TABLE finals (
  key INTEGER PRIMARY KEY REFERENCES keys (id),
  config TEXT NOT NULL,
  predicted REAL NOT NULL CHECK (predicted > 0),
  submitted_at REAL NOT NULL
) STRICT;
CREATE TABLE events (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  at REAL NOT NULL,
  run INTEGER REFERENCES runs (id),
  kind TEXT NOT NULL,
  detail TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX events_by_run ON events (run);
"""


class Store:
    """Connections to one file, kept for reuse; any thread may use it.

    durable: a change outlasts a loss of power too. Without it the last ones may be undone by that, in order; kill -9
        undoes none.
    """

    def __init__(self, path: Path, busy: float = BUSY, durable: bool = True):
        self.path = path
        self.busy = busy
        self.durable = durable
        self._idle: deque[sqlite3.Connection] = deque()

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock from its beginning: what it reads cannot change before it writes.

        sqlite3.OperationalError after `busy` seconds without the lock.
        """
        with self._transaction(self._begin_to_write) as db:
            yield db

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A snapshot: all that is read in it is of one moment. It waits for no writer."""
        with self._transaction(lambda db: db.execute("BEGIN")) as db:
            yield db

    def _begin_to_write(self, db: sqlite3.Connection) -> None:
        """SQLite's own waiting for the lock sleeps longer and longer, up to 0.1 s, while others come and go."""
        until = time.monotonic() + self.busy
        db.execute("PRAGMA busy_timeout = 0")
        try:
            while True:
                try:
                    db.execute("BEGIN IMMEDIATE")
                    return
                except sqlite3.OperationalError as error:
                    # The low byte is the kind: the others tell recovery and snapshots apart.
                    if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                        raise
                time.sleep(LOOK)
        finally:
            db.execute(f"PRAGMA busy_timeout = {int(1000 * self.busy)}")

    @contextlib.contextmanager
    def _transaction(self, begin: Callable[[sqlite3.Connection], Any]) -> Iterator[sqlite3.Connection]:
        try:
            db = self._idle.pop()
        except IndexError:
            db = connect(self.path, self.busy, self.durable)
        try:
            begin(db)
            yield db
            db.execute("COMMIT")
        except BaseException:
            # An error such as a full disk may have ended the transaction already.
            if db.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
            db.close()
            raise
        self._idle.append(db)

    def meta(self) -> dict[str, Any]:
        """What was fixed when the file was made."""
        with self.read() as db:
            return {row["name"]: json.loads(row["value"]) for row in db.execute("SELECT name, value FROM meta")}

    def checkpoint(self) -> None:
        """Copy what the log of changes holds into the file, if that is much; writers and readers go on meanwhile."""
        log = Path(f"{self.path}-wal")
        if log.exists() and log.stat().st_size > LARGE:
            with contextlib.closing(connect(self.path, self.busy)) as db:
                db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def close(self) -> None:
        """Close the connections that are not in use."""
        while self._idle:
            self._idle.pop().close()


def connect(path: Path, busy: float, durable: bool = True) -> sqlite3.Connection:
    """A connection to a file that exists; nothing is begun or committed but by name."""
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=busy, isolation_level=None, check_same_thread=False
    )
    db.row_factory = sqlite3.Row
    db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
    db.execute("PRAGMA foreign_keys = ON")
    db.execute(f"PRAGMA wal_autocheckpoint = {MOST_LOG}")
    return db


def create(folder: Path, facts: dict[str, Any]) -> Store:
    """A new file in `folder`, readable by its owner alone; ValueError where there is one.

    facts: what all runs of the folder share; see `same_facts`. A salt for the hashes of keys is added.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path, staged = folder / FILE, folder / f".{FILE}-{secrets.token_hex(8)}"
    if path.exists():
        raise ValueError(f"{path}: is there already")
    os.close(os.open(staged, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    try:
        with contextlib.closing(connect(staged, BUSY)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(f"PRAGMA application_id = {APPLICATION}")
            db.execute(f"PRAGMA user_version = {VERSION}")
            db.executescript(SCHEMA)
            rows = {**facts, "salt": secrets.token_hex(16)}
            db.executemany("INSERT INTO meta VALUES (?, ?)", [(k, json.dumps(v)) for k, v in rows.items()])
        # With its last connection closed the file is whole. A link, since it replaces no file that came meanwhile.
        try:
            os.link(staged, path)
        except FileExistsError:
            raise ValueError(f"{path}: is there already") from None
    except sqlite3.OperationalError as error:
        raise ValueError(f"{path}: cannot be made: {reason(error, folder)}") from None
    finally:
        for name in (staged, *(Path(f"{staged}{end}") for end in ("-wal", "-shm"))):
            name.unlink(missing_ok=True)
    return Store(path)


def open_store(folder: Path, *, busy: float = BUSY, durable: bool = True, check: bool = True) -> Store:
    """The file in `folder`; ValueError if it is none of ours, of another version, or damaged.

    check: read it whole and compare tables with indexes and references.
    """
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    store = Store(path, busy, durable)
    try:
        with store.read() as db:
            application, version = (
                db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
            )
            if application != APPLICATION:
                raise ValueError(f"{path}: is no file of this service")
            if version != VERSION:
                raise ValueError(f"{path}: has tables of version {version}, and this program reads version {VERSION}")
            if check:
                found = [row[0] for row in db.execute("PRAGMA integrity_check(3)") if row[0] != "ok"]
                bad = db.execute("PRAGMA foreign_key_check").fetchall()
                found += [f"{row[0]} refers to a missing row of {row[2]}" for row in bad]
                if found:
                    raise ValueError(f"{path}: is damaged: {'; '.join(found[:3])}")
    except sqlite3.OperationalError as error:  # locked, or no permission: says nothing about the contents
        raise ValueError(f"{path}: cannot be read: {reason(error, folder)}") from None
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path}: is damaged: {error}") from None
    return store


class Commits:
    """Changes of many threads, carried out by one in the order they came: those that wait share a transaction.

    Each change is whole or not at all, whatever the others do. Its future has a result once it is on the disk.
    """

    def __init__(self, store: Store):
        self._store = store
        self._changes: queue.SimpleQueue[tuple[Callable[[sqlite3.Connection], Any], Future] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._work, name="commits", daemon=True)
        self._thread.start()

    def submit(self, change: Callable[[sqlite3.Connection], T]) -> "Future[T]":
        """The future of change(db)."""
        future: Future[T] = Future()
        self._changes.put((change, future))
        return future

    def close(self) -> None:
        """Carry out what came so far, and end."""
        self._changes.put(None)
        self._thread.join()

    def _work(self) -> None:
        open_ = True
        while open_:
            batch = [self._changes.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < MOST_AT_ONCE and batch[-1] is not None:
                    batch.append(self._changes.get_nowait())
            if batch[-1] is None:
                open_ = False
            # One whose caller has given up is left out; the others can be given up no more.
            self._together([x for x in batch if x is not None and x[1].set_running_or_notify_cancel()])

    def _together(self, batch: list[tuple[Callable[[sqlite3.Connection], Any], Future]]) -> None:
        ended: list[tuple[Future, bool, Any]] = []
        try:
            with self._store.write() as db:
                for change, future in batch:
                    db.execute("SAVEPOINT one")
                    try:
                        ended.append((future, True, change(db)))
                    except Exception as error:
                        db.execute("ROLLBACK TO one")  # fails, and with it all of them, if a full disk has ended it all
                        ended.append((future, False, error))
                    db.execute("RELEASE one")
        except Exception as error:
            ended = [(future, False, error) for _, future in batch]
        for future, good, value in ended:
            future.set_result(value) if good else future.set_exception(value)
