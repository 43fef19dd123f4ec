"""The service's store, ledger and dispatch. Oracles: SQLite's own files and errors; a model of plain dicts."""

import json
import math
import shutil
import sqlite3
import stat
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from experiments.scaling.service import dispatch, keys, ledger
from experiments.scaling.service.backend import Broken, Done, Late, Stopped
from experiments.scaling.service.store import FILE, Commits, create, open_store
from tests.scaling.service_parts import TEXT, make_store, parsed


def test_only_the_owner_may_read(tmp_path):
    store, _ = make_store(tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    with store.write() as db:
        ledger.note(db, 0.0, None, "test")
    names = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert set(names) == {FILE, f"{FILE}-wal", f"{FILE}-shm"} and set(names.values()) == {0o600}


def test_a_file_is_not_made_twice(tmp_path):
    create(tmp_path, {"a": 1})
    with pytest.raises(ValueError, match="is there already"):
        create(tmp_path, {"a": 2})
    assert open_store(tmp_path).meta()["a"] == 1 and [p.name for p in tmp_path.iterdir() if p.name[0] == "."] == []


def test_other_versions_and_other_files_are_refused(tmp_path):
    store, _ = make_store(tmp_path)
    store.close()
    db = sqlite3.connect(tmp_path / FILE)
    for pragma, text in (("user_version = 2", "version 2, and this program reads version 1"),
                         ("application_id = 1", "is no file of this service")):  # fmt: skip
        db.execute(f"PRAGMA {pragma}")
        db.commit()
        with pytest.raises(ValueError, match=text):
            open_store(tmp_path)
    db.close()
    (tmp_path / FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(ValueError, match="is damaged"):
        open_store(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        open_store(tmp_path / "nothing")


def test_damage_is_found_at_the_start(tmp_path):
    """Oracle: an index that lacks a row, a reference to no row."""
    store, (ada, _) = make_store(tmp_path)
    with store.write() as db:
        ledger.submit(db, ada, parsed(), 0.0)
    store.close()
    shutil.copytree(tmp_path, tmp_path / "copy")
    db = sqlite3.connect(tmp_path / FILE)
    db.execute("DELETE FROM keys WHERE name = 'ada'")  # foreign keys are not held by default
    db.commit()
    db.close()
    with pytest.raises(ValueError, match="damaged: runs refers to a missing row of keys"):
        open_store(tmp_path)
    data = (tmp_path / "copy" / FILE).read_bytes()
    page = 4096
    for start in range(page, len(data), page):  # a page of the tables or of an index is emptied
        (tmp_path / "copy" / FILE).write_bytes(data[:start] + bytes(page) + data[start + page :])
        with pytest.raises(ValueError, match="is damaged"):
            open_store(tmp_path / "copy")


def test_an_exception_undoes_the_transaction(tmp_path):
    store, (ada, _) = make_store(tmp_path)
    with pytest.raises(RuntimeError), store.write() as db:
        ledger.submit(db, ada, parsed(), 0.0)
        raise RuntimeError
    with store.read() as db:
        assert ledger.experiments(db, ada) == [] and not db.execute("SELECT * FROM events").fetchall()


def test_a_busy_file_is_an_error_after_a_time(tmp_path):
    make_store(tmp_path)
    one, other = open_store(tmp_path), open_store(tmp_path, busy=0.01)
    with one.write():
        with pytest.raises(sqlite3.OperationalError, match="locked"), other.write():
            pass
        with other.read() as db:  # readers wait for nobody
            assert db.execute("SELECT COUNT(*) FROM keys").fetchone()[0] == 2
    with other.write() as db:
        ledger.note(db, 0.0, None, "now")


def test_the_log_is_copied_into_the_file(tmp_path):
    """Beside a writer, which is not disturbed; only where there is much of it."""
    store, (ada, _) = make_store(tmp_path, budget=1e9)

    def fill(first, n):
        for i in range(first, first + n):
            with store.write() as db:
                ledger.submit(db, ada, parsed(model_seed=i), 0.0)

    def size():
        return (tmp_path / FILE).stat().st_size

    fill(0, 3)
    small = size()
    store.checkpoint()
    assert size() == small
    while (tmp_path / f"{FILE}-wal").stat().st_size < 4_100_000:
        fill(int(1e6) + (tmp_path / f"{FILE}-wal").stat().st_size, 40)
    with store.write() as db:
        store.checkpoint()
        ledger.note(db, 0.0, None, "mine")
    assert size() > small
    with open_store(tmp_path).read() as db:
        assert db.execute("SELECT COUNT(*) FROM events WHERE kind = 'mine'").fetchone()[0] == 1


def test_changes_together_are_each_whole(tmp_path):
    """One that fails leaves nothing, and the others of its transaction stay."""
    store, (ada, _) = make_store(tmp_path, budget=1000.0)
    commits = Commits(store)

    def failing(db):
        ledger.submit(db, ada, parsed(model_seed=99), 0.0)
        raise KeyError("mine")

    gate = threading.Event()
    first = commits.submit(lambda db: gate.wait(10))  # the rest waits, and is one transaction
    some = [commits.submit(lambda db, i=i: ledger.submit(db, ada, parsed(model_seed=i), 0.0)) for i in range(5)]
    bad = commits.submit(failing)
    again = commits.submit(lambda db: ledger.submit(db, ada, parsed(model_seed=3), 0.0))
    left = commits.submit(lambda db: ledger.submit(db, ada, parsed(model_seed=50), 0.0))
    assert left.cancel()  # as when a client's connection breaks
    last = commits.submit(lambda db: ledger.submit(db, ada, parsed(model_seed=5), 0.0))
    gate.set()
    assert first.result() and [f.result().experiment_id for f in some] == [1, 2, 3, 4, 5]
    assert isinstance(bad.exception(), KeyError) and isinstance(again.exception(), ledger.Duplicate)
    assert last.result().budget_summary.used_seconds == 120.0
    commits.close()
    with store.read() as db:
        assert [x.training_config.model_seed for x in ledger.experiments(db, ada)] == [0, 1, 2, 3, 4, 5]


def test_a_full_disk_is_everybodys_error_and_changes_nothing(tmp_path):
    store, (ada, _) = make_store(tmp_path, budget=1e9)
    with store.write() as db:  # this connection is the next one used, too
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
    commits = Commits(store)
    futures = []
    for i in range(200):
        futures.append(commits.submit(lambda db, i=i: ledger.submit(db, ada, parsed(model_seed=i), 0.0)))
        if futures[-1].exception() is not None:
            break
    error = futures[-1].exception()
    assert isinstance(error, sqlite3.OperationalError) and "full" in str(error)
    commits.close()
    with store.read() as db:
        assert len(ledger.experiments(db, ada)) == len(futures) - 1  # all that were accepted, and no other
    open_store(tmp_path)


def test_keys_are_stored_as_hashes_alone(tmp_path):
    """Oracle: the bytes of the files."""
    store, (ada, _) = make_store(tmp_path)
    with store.read() as db:
        assert keys.find_key(db, keys.hashed(TEXT["ada"], store.meta()["salt"])) == ada
        assert keys.find_key(db, keys.hashed(TEXT["ada"], "00" * 16)) is None
    assert not any(TEXT["ada"].encode() in path.read_bytes() for path in tmp_path.iterdir())
    assert len({keys.new_key(True) for _ in range(9)}) == 9 and len(keys.new_key(True)) == 43
    assert all(len(k) == 8 and k.isdigit() for k in (keys.new_key(False) for _ in range(99)))


def test_names_hashes_and_budgets_of_keys(tmp_path):
    store, _ = make_store(tmp_path)
    for name, hash_, budget in (("ada", "x", 1.0), ("", "x", 1.0), ("a\nb", "x", 1.0), ("c", "x", 0.0),
                                ("c", "x", math.inf), ("c", "x", math.nan)):  # fmt: skip
        with pytest.raises(ValueError), store.write() as db:
            keys.add_key(db, name, hash_, budget, 0, 0.0)
    with store.write() as db:
        keys.remove_key(db, "ada", 1.0)
        assert [k.name for k in keys.all_keys(db)] == ["ben"]
        with pytest.raises(ValueError, match="in use, or was"):
            keys.add_key(db, "ada", keys.hashed(TEXT["ada"], store.meta()["salt"]), 1.0, 0, 0.0)
        keys.add_key(db, "ada", "another", 1.0, 0, 0.0)
        with pytest.raises(ValueError, match="no key for 'eve'"):
            keys.remove_key(db, "eve", 1.0)


def test_fair_share_then_time(tmp_path):
    """Fewest runs under way first, then the oldest: ada's first, ben's, ada's second, and none of a removed key."""
    store, (ada, ben) = make_store(tmp_path)
    with store.write() as db:
        a = [ledger.submit(db, ada, parsed(model_seed=i), float(i)).experiment_id for i in range(3)]
        b = [ledger.submit(db, ben, parsed(model_seed=i), 10.0 + i).experiment_id for i in range(2)]
        jobs = [dispatch.claim(db, f"r{i}", 20.0) for i in range(3)]
        assert [j.id for j in jobs] == [a[0], b[0], a[1]] and {j.seed for j in jobs} == {7}
        dispatch.ended(db, jobs[0], Done(1.0, ()), 21.0)
        dispatch.ended(db, jobs[2], Done(1.0, ()), 21.0)
        assert dispatch.claim(db, "r3", 22.0).id == a[2]
        assert dispatch.waits(db)
        keys.remove_key(db, "ben", 23.0)
        assert dispatch.claim(db, "r4", 24.0) is None and not dispatch.waits(db)


def test_a_clock_that_is_set_changes_no_order(tmp_path):
    """Oracle: the order of submission, and the seconds that each run told."""
    store, (ada, _) = make_store(tmp_path)
    with store.write() as db:
        ids = [ledger.submit(db, ada, parsed(model_seed=i), at).experiment_id
               for i, at in enumerate((5e8, 1e3, 4e9, 2e3))]  # fmt: skip
        for id_ in ids:
            job = dispatch.claim(db, f"r{id_}", 10.0)
            assert job.id == id_ and dispatch.started(db, job, 0.0, 1e9)
            assert dispatch.ended(db, job, Done(2.5, (2.0,)), 5.0)  # before it began
        assert [x.experiment_id for x in ledger.experiments(db, ada)] == ids
        assert ledger.budget(db, ada).used_seconds == 10.0


def test_a_preempted_run_keeps_its_place(tmp_path):
    store, (ada, _) = make_store(tmp_path)
    with store.write() as db:
        first = ledger.submit(db, ada, parsed(), 0.0).experiment_id
        ledger.submit(db, ada, parsed(model_seed=1), 1.0)
        job = dispatch.claim(db, "r0", 2.0)
        dispatch.ended(db, job, Stopped(3.0), 5.0)
        assert dispatch.claim(db, "r1", 6.0).id == first


def test_a_run_may_be_lost_some_times(tmp_path):
    """Preemptions do not count."""
    store, (ada, _) = make_store(tmp_path)
    with store.write() as db:
        ledger.submit(db, ada, parsed(), 0.0)
        for i in range(dispatch.MOST_LOST):
            assert ledger.experiments(db, ada)[0].status.status_type == "queued"
            dispatch.ended(db, dispatch.claim(db, f"p{i}", 1.0), Stopped(1.0), 2.0)
            dispatch.claim(db, f"r{i}", 3.0)
            (run,) = dispatch.under_way(db)
            assert dispatch.lost(db, run, 4.0) and not dispatch.lost(db, run, 4.0)
        failed = ledger.experiments(db, ada)[0].status
        assert failed.reason.failure.startswith("its process was lost, time 5 of 5 ")
        assert dispatch.claim(db, "more", 5.0) is None


def test_a_final_run_has_its_own_time_and_no_cost(tmp_path):
    store, (ada, _) = make_store(tmp_path)
    with store.write() as db:
        with pytest.raises(ledger.Missing):
            ledger.start_final_run(db, ada, 400.0, 0.0)
        ledger.set_final_submission(db, ada, parsed(), 2.0, 1.0)
        ledger.set_final_submission(db, ada, parsed(model_seed=1), 3.0, 2.0)
        ledger.start_final_run(db, ada, 400.0, 3.0)
        with pytest.raises(ledger.Locked):
            ledger.start_final_run(db, ada, 400.0, 3.0)
        with pytest.raises(ledger.Locked):
            ledger.set_final_submission(db, ada, parsed(), 2.0, 4.0)
        ledger.submit(db, ada, parsed(model_seed=1), 5.0)  # the same as an experiment is another run
        job = dispatch.claim(db, "r0", 6.0)
        assert job.cfg.max_runtime_seconds == 400.0 and job.cfg.model_seed == 1
        dispatch.ended(db, job, Done(300.0, (4.0, 3.5)), 7.0)
        found = ledger.final_run(db, ada)
        assert (found["measured_final_loss"], found["error"], found["predicted_final_loss"]) == (3.5, 0.5, 3.0)
        assert ledger.budget(db, ada).used_seconds == 20.0 and len(ledger.experiments(db, ada)) == 1
        with pytest.raises(ledger.Missing):
            ledger.experiment(db, ada, job.id)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_what_is_no_number_is_not_written(tmp_path, value):
    store, (ada, _) = make_store(tmp_path)
    with store.write() as db:
        ledger.submit(db, ada, parsed(), 0.0)
        job = dispatch.claim(db, "r0", 1.0)
        for call in (
            lambda: dispatch.started(db, job, value, 1.0),
            lambda: dispatch.evaluated(db, job, [1.0], value),
            lambda: dispatch.ended(db, job, Broken(value, "x"), 1.0),
            lambda: dispatch.evaluated(db, job, [abs(value) if value == -1 else value, math.nan], 1.0),
        ):
            with pytest.raises(ValueError, match="must be finite"):
                call()
        assert ledger.experiment(db, ada, job.id).status.val_losses == []


class Budgets(RuleBasedStateMachine):
    """Any order of submissions, claims, reports (stale ones too) and losses, beside dicts that do the same."""

    runs = Bundle("runs")
    attempts = Bundle("attempts")

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        create(self.folder, {}).close()
        self.store = open_store(self.folder, durable=False, check=False)
        with self.store.write() as db:
            self.keys = [keys.add_key(db, name, name, 100.0, 7, 0.0) for name in ("ada", "ben")]
        self.model = {}  # id -> dict
        self.clock = 0.0
        self.n = 0

    def teardown(self):
        self.store.close()
        shutil.rmtree(self.folder)

    def now(self):
        self.clock += 1.0
        return self.clock

    def used(self, key):
        return sum(r["seconds"] if r["state"] in ("queued", "running") else min(max(r["used"], 1.0), r["seconds"])
                   for r in self.model.values() if r["key"] == key)  # fmt: skip

    @rule(target=runs, who=st.integers(0, 1), seed=st.integers(0, 3), seconds=st.sampled_from([1.0, 10.0, 35.0, 100.5]))
    def submit(self, who, seed, seconds):
        cfg, key = parsed(model_seed=seed, max_runtime_seconds=seconds), self.keys[who]
        same = [i for i, r in self.model.items() if r["key"] == who and r["cfg"] == cfg]
        now = self.now()
        try:
            with self.store.write() as db:
                answer = ledger.submit(db, key, cfg, now)
        except ledger.InsufficientBudget as error:
            assert seconds > 100.0 - self.used(who) == error.summary.remaining_seconds
            return multiple()
        except ledger.Duplicate as error:
            assert [error.id] == same and seconds <= 100.0 - self.used(who)
            return multiple()
        assert not same and seconds <= 100.0 - self.used(who)
        id_ = answer.experiment_id
        assert id_ not in self.model
        self.model[id_] = dict(key=who, cfg=cfg, seconds=seconds, state="queued", at=now, used=0.0, losses=[], lost=0)
        assert answer.budget_summary.used_seconds == self.used(who)
        return id_

    @rule(target=attempts)
    def claim(self):
        self.n += 1
        with self.store.write() as db:
            job = dispatch.claim(db, f"r{self.n}", self.now())
        waiting = [(i, r) for i, r in self.model.items() if r["state"] == "queued"]
        if job is None:
            assert not waiting
            return multiple()
        busy = [sum(r["state"] == "running" and r["key"] == who for r in self.model.values()) for who in (0, 1)]
        assert job.id == min(waiting, key=lambda x: (busy[x[1]["key"]], x[1]["at"], x[0]))[0]
        self.model[job.id].update(state="running", run_id=job.run_id)
        return job

    def mine(self, job):
        run = self.model[job.id]
        return run["state"] == "running" and run["run_id"] == job.run_id

    @rule(job=attempts, n=st.integers(0, 4), seconds=st.floats(0, 200))
    def evaluate(self, job, n, seconds):
        with self.store.write() as db:
            assert dispatch.evaluated(db, job, [1.5] * n, seconds) == self.mine(job)
        if self.mine(job):
            self.model[job.id].update(losses=[1.5] * n, used=seconds)

    @rule(job=attempts, seconds=st.floats(0, 200), how=st.sampled_from(["Done", "Late", "Broken", "Stopped"]))
    def end(self, job, seconds, how):
        outcome, state = {
            "Done": (Done(seconds, (2.0,)), "completed"), "Late": (Late(seconds, (2.0,)), "timeout"),
            "Broken": (Broken(seconds, "x\ny"), "failed"), "Stopped": (Stopped(seconds), "queued"),
        }[how]  # fmt: skip
        with self.store.write() as db:
            assert dispatch.ended(db, job, outcome, self.now()) == self.mine(job)
        if self.mine(job):
            self.model[job.id].update(state=state, used=seconds)
            if how in ("Done", "Late"):
                self.model[job.id]["losses"] = [2.0]

    @rule(job=attempts, killed=st.booleans())
    def gone(self, job, killed):
        with self.store.write() as db:
            known = [run for run in dispatch.under_way(db) if run.id == job.id]
            run = known[0] if known else dispatch.Under(job.id, job.run_id, 1.0, 0.0, 0.0)
            run = run._replace(run_id=job.run_id)
            did = dispatch.overtime(db, run, self.now()) if killed else dispatch.lost(db, run, self.now(), 3)
        assert did == self.mine(job)
        if did:
            r = self.model[job.id]
            if killed:
                r.update(state="timeout", used=max(r["used"], r["seconds"]))
            else:
                r["lost"] += 1
                r["state"] = "failed" if r["lost"] == 3 else "queued"

    @rule(job=consumes(attempts))
    def forget(self, job):
        pass

    @invariant()
    def agree(self):
        with self.store.read() as db:
            for who, key in enumerate(self.keys):
                found = ledger.budget(db, key)
                assert found.used_seconds == pytest.approx(self.used(who), abs=1e-9)
                assert found.used_seconds <= 100.0 and found.used_seconds + found.remaining_seconds == 100.0
                mine = {i: r for i, r in self.model.items() if r["key"] == who}
                listed = ledger.experiments(db, key)
                assert [x.experiment_id for x in listed] == sorted(mine, key=lambda i: (mine[i]["at"], i))
                for x in listed:
                    r, told = mine[x.experiment_id], x.status.model_dump()
                    assert x.training_config == r["cfg"]
                    type_ = {"timeout": "failed"}.get(r["state"], r["state"])
                    assert told["status_type"] == type_
                    if r["state"] in ("running", "completed"):
                        assert told["val_losses"] == r["losses"]
                    if r["state"] == "timeout":
                        assert told["reason"] == {"reason": "timeout", "partial_val_losses": r["losses"]}
                    if r["state"] in ("completed", "timeout", "failed"):
                        assert told["used_runtime_seconds"] == r["used"]


Budgets.TestCase.settings = settings(max_examples=25, stateful_step_count=25)
TestBudgets = Budgets.TestCase


def test_every_change_is_in_the_log(tmp_path):
    store, (ada, _) = make_store(tmp_path)
    with store.write() as db:
        ledger.submit(db, ada, parsed(), 0.0)
        job = dispatch.claim(db, "r0", 1.0)
        dispatch.started(db, job, 0.0, 1.0)
        dispatch.lost(db, dispatch.under_way(db)[0], 2.0)
        dispatch.ended(db, job, Done(1.0, (1.0,)), 3.0)
        dispatch.ended(db, dispatch.claim(db, "r1", 4.0), Done(1.0, (1.0,)), 5.0)
        found = [row["kind"] for row in db.execute("SELECT kind FROM events ORDER BY id")]
        assert found == ["queued", "claimed", "started", "lost", "refused", "claimed", "completed"]
        assert json.loads(db.execute("SELECT val_losses FROM runs").fetchone()[0]) == [1.0]
