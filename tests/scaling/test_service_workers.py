"""Workers and their supervisor. Oracle: the fake back end's losses 1 + 1/k and its seconds; kill -9 is real."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from experiments.scaling.service import alive, dispatch, ledger, supervisor, worker
from experiments.scaling.service.alive import Alive, lives
from experiments.scaling.service.backend import Done
from experiments.scaling.service.schemas import Rules
from experiments.scaling.service.store import open_store
from experiments.scaling.service.supervisor import Supervisor
from experiments.scaling.service.worker import Plan, work
from tests.scaling.fake_backend import Fake, backend
from tests.scaling.service_parts import make_store, parsed, until

LOSSES = [2.0, 1.5, 1.0 + 1 / 3, 1.25]


def plan_of(folder, **changes):
    return Plan(folder, backend, Fake(**changes), Rules())


def submit(store, key, **changes):
    with store.write() as db:
        return ledger.submit(db, key, parsed(**changes), time.time()).experiment_id


def status(store, key, id_):
    with store.read() as db:
        return ledger.experiment(db, key, id_).status


def over(store, key, id_):
    found = status(store, key, id_)
    return found if found.status_type in ("completed", "failed") else None


def events(store, id_):
    with store.read() as db:
        return Counter(row["kind"] for row in db.execute("SELECT kind FROM events WHERE run = ?", (id_,)))


def work_until_idle(plan, store, n):
    """work() in this process until n runs are over."""
    work(plan._replace(runs=n), threading.Event())


def test_runs_to_each_end(tmp_path):
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada)
    submit(store, ada, max_runtime_seconds=2.5)
    submit(store, ada, model_seed=3)
    submit(store, ada, model_seed=5)
    work_until_idle(plan_of(tmp_path), store, 4)
    done, late, diverged, broken = (status(store, ada, i) for i in (1, 2, 3, 4))
    assert (done.val_losses, done.used_runtime_seconds) == (LOSSES, 4.0)
    assert (late.reason.partial_val_losses, late.used_runtime_seconds) == (LOSSES[:2], 2.0)
    assert diverged.reason.failure == "diverged: validation loss 3 is nan; the one before was 1.5000"
    assert (broken.reason.failure, broken.used_runtime_seconds) == ("as told", 1.0)
    assert list((tmp_path / "alive").iterdir()) == []


def test_after_an_exception_the_process_ends(tmp_path, capfd):
    """What a failed run leaves in a process, on a GPU above all, is not known."""
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada, model_seed=1)
    submit(store, ada)
    work_until_idle(plan_of(tmp_path), store, 2)
    failed = status(store, ada, 1)
    assert failed.reason.failure == "ArithmeticError: no such number" and failed.used_runtime_seconds == 1.0
    assert status(store, ada, 2).status_type == "queued" and "Traceback" in capfd.readouterr().err


def test_a_preempted_run_is_taken_up_from_its_folder(tmp_path):
    """Asked to leave after two evaluations: the other two follow in the next attempt, and the clock goes on."""
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada)
    leave, plan = threading.Event(), plan_of(tmp_path)

    def make(settings):
        inner = backend(settings)

        def run(cfg, rules, control):
            def evaluated(losses, seconds):
                control.evaluated(losses, seconds)
                if len(losses) == 2:
                    leave.set()

            return inner.run(cfg, rules, control._replace(evaluated=evaluated))

        return inner._replace(run=run)

    work(plan._replace(make=make), leave)
    assert status(store, ada, 1).status_type == "queued"
    with store.read() as db:
        assert ledger.budget(db, ada).used_seconds == 20.0  # still reserved
    work_until_idle(plan, store, 1)
    done = status(store, ada, 1)
    assert (done.val_losses, done.used_runtime_seconds) == (LOSSES, 4.0)
    assert events(store, 1) == Counter(queued=1, claimed=2, started=2, preempted=1, completed=1)


def test_a_stale_report_stops_the_run(tmp_path):
    """Its attempt is given to another meanwhile: it is told to stop, and changes nothing."""
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada)
    asked = []

    def make(settings):
        def run(cfg, rules, control):
            with store.write() as db:
                dispatch.lost(db, dispatch.under_way(db)[0], 0.0)
                dispatch.ended(db, dispatch.claim(db, "other", 0.0), Done(3.0, (7.0,)), 1.0)
            asked.append(control.stop())
            control.evaluated([5.0], 1.0)
            asked.append(control.stop())
            return Done(1.0, (5.0,))

        return backend(settings)._replace(run=run)

    work(plan_of(tmp_path)._replace(make=make, runs=1), threading.Event())
    assert asked == [False, True]
    assert status(store, ada, 1).val_losses == [7.0] and events(store, 1)["completed"] == 1


def test_a_final_run_may_take_longer_than_its_configuration_says(tmp_path):
    store, (ada, _) = make_store(tmp_path)
    with store.write() as db:
        ledger.set_final_submission(db, ada, parsed(max_runtime_seconds=2.0), 1.5, 0.0)
        ledger.start_final_run(db, ada, 400.0, 0.0)
    work_until_idle(plan_of(tmp_path), store, 1)
    with store.read() as db:
        assert ledger.final_run(db, ada)["measured_final_loss"] == 1.25


def test_busy_or_full_is_tried_again(tmp_path, capfd):
    """The last word of a run is not lost while another process holds the database."""
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada)
    with store.write() as db:
        job = dispatch.claim(db, "r", 0.0)
    impatient = open_store(tmp_path, busy=0.01)
    thread = threading.Thread(target=worker._insist, args=(
        impatient, lambda db: dispatch.ended(db, job, Done(1.0, (1.0,)), 1.0), threading.Event()))  # fmt: skip
    with store.write():
        thread.start()
        until(lambda: "trying again" in capfd.readouterr().out)
    thread.join()
    assert status(store, ada, 1).status_type == "completed"


def test_locks_outlast_nothing(tmp_path):
    """Oracle: a process that holds one and is killed."""
    mine = Alive(tmp_path, "w")
    assert lives(tmp_path, mine.run_id)
    code = f"from pathlib import Path; from experiments.scaling.service.alive import Alive; import time; " \
           f"print(Alive(Path({str(tmp_path)!r}), 'x').run_id, flush=True); time.sleep(600)"  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        run_id = process.stdout.readline().strip()
        assert lives(tmp_path, run_id)
        process.kill()
    assert not lives(tmp_path, run_id) and not lives(tmp_path, "never")
    alive.remove_dead(tmp_path)
    assert [p.name for p in (tmp_path / "alive").iterdir()] == [mine.run_id]
    mine.end()
    assert not lives(tmp_path, mine.run_id)
    alive.check_locks(tmp_path)


@pytest.fixture
def supervised(tmp_path):
    """Start a supervisor on a folder; all are stopped at the end."""
    begun = []

    def start(store, plan, slots=1, **options):
        begun.append(Supervisor(store, plan, [{"SLOT": str(i)} for i in range(slots)], say=said.append, **options))
        begun[-1].start()
        return begun[-1]

    said = []
    start.said = said
    yield start
    for one in begun:
        one.stop(5.0)


def test_a_killed_worker_loses_nothing(tmp_path, supervised):
    """kill -9 after its first evaluation: the run is taken up by another process and charged for four evaluations."""
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada)
    watched = supervised(store, plan_of(tmp_path, scale=0.3))
    until(lambda: len(getattr(status(store, ada, 1), "val_losses", ())) >= 1)
    (pid,) = watched.pids()
    os.kill(pid, signal.SIGKILL)
    done = until(lambda: over(store, ada, 1))
    assert (done.val_losses, done.used_runtime_seconds) == (LOSSES, 4.0)
    found = events(store, 1)
    assert (found["lost"], found["claimed"], found["completed"]) == (1, 2, 1) and pid not in watched.pids()


def test_the_next_worker_is_there_when_its_turn_comes(tmp_path, supervised):
    """One run for each process. The one that was started during a run has the next; one that was lost is replaced."""
    store, (ada, _) = make_store(tmp_path)
    watched = supervised(store, plan_of(tmp_path, scale=0.2)._replace(runs=1), ahead=True)
    (slot,) = watched._slots
    waiting = []
    for i in range(3):
        submit(store, ada, model_seed=10 + i)
        until(lambda i=i: len(getattr(status(store, ada, i + 1), "val_losses", ())) >= 1)
        waiting.append(slot.next.pid)
        if i == 1:
            assert watched.pids() == [waiting[0]]
            os.kill(waiting[1], signal.SIGKILL)  # lost while it waits
        if i == 2:
            assert watched.pids() != [waiting[1]]
        assert until(lambda i=i: over(store, ada, i + 1)).val_losses == LOSSES
    assert len(set(waiting)) == 3 and not supervised.said
    watched.stop(30.0)
    assert watched.pids() == [] and slot.next is None
    for pid in waiting:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_worker_that_is_never_told_a_plan_leaves():
    """As where the server was killed meanwhile. Its module is imported before."""
    command = [sys.executable, "-m", "experiments.scaling.service.worker"]
    done = subprocess.run([*command, "tests.scaling.fake_backend"], input=b"", capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = subprocess.run([*command, "no.such.module"], input=b"", capture_output=True, timeout=60)
    assert done.returncode and b"No module named 'no'" in done.stderr


def test_a_run_that_ends_its_process_fails_after_some_times(tmp_path, supervised):
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada, model_seed=2)
    submit(store, ada)
    supervised(store, plan_of(tmp_path), most_lost=2)
    failed = until(lambda: over(store, ada, 1))
    assert failed.reason.failure.startswith("its process was lost, time 2 of 2 ") and failed.used_runtime_seconds == 1.0
    assert until(lambda: over(store, ada, 2)).status_type == "completed"  # and it holds up nobody
    assert any("ended with status -9" in line for line in supervised.said)


def test_a_run_over_its_time_is_killed(tmp_path, supervised, monkeypatch):
    """One that never looks at its clock: all of its time is charged, the losses so far stay."""
    monkeypatch.setattr(supervisor, "hard_limit", lambda seconds: 0.5)
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada, model_seed=4)
    watched = supervised(store, plan_of(tmp_path))
    late = until(lambda: over(store, ada, 1))
    assert late.reason.partial_val_losses == [9.0] and late.used_runtime_seconds == 20.0
    submit(store, ada)
    assert until(lambda: over(store, ada, 2)).status_type == "completed" and len(watched.pids()) == 1


def test_a_stopped_supervisor_puts_runs_aside(tmp_path, supervised):
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada)
    watched = supervised(store, plan_of(tmp_path, scale=0.3), slots=2)
    until(lambda: len(getattr(status(store, ada, 1), "val_losses", ())) >= 1)
    watched.stop(30.0)
    assert status(store, ada, 1).status_type == "queued" and watched.pids() == []
    assert events(store, 1)["preempted"] == 1 and events(store, 1)["lost"] == 0
    supervised(store, plan_of(tmp_path))
    assert until(lambda: over(store, ada, 1)).val_losses == LOSSES


def test_what_a_dead_server_left_is_taken_up_once(tmp_path, supervised):
    """A claimed run whose process is gone waits again at the start; one whose process lives is left alone."""
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada)
    submit(store, ada, model_seed=7)
    living = Alive(tmp_path, "orphan")
    with store.write() as db:
        dispatch.claim(db, "gone-1", 1.0)
        orphan = dispatch.claim(db, living.run_id, 1.0)
    supervised(store, plan_of(tmp_path))
    assert until(lambda: over(store, ada, 1)).val_losses == LOSSES
    assert status(store, ada, 2).run_id == living.run_id
    with store.write() as db:
        assert dispatch.ended(db, orphan, Done(2.0, (6.0,)), 3.0)  # its report is taken
    living.end()
    assert status(store, ada, 2).val_losses == [6.0] and events(store, 2)["claimed"] == 1


def test_a_worker_of_an_earlier_server_is_left_its_run(tmp_path, monkeypatch):
    """Over its time too: it leaves by itself, and no one else can end its process."""
    monkeypatch.setattr(supervisor, "hard_limit", lambda seconds: 0.0)
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada)
    living = Alive(tmp_path, "0.orphan")
    with store.write() as db:
        dispatch.started(db, dispatch.claim(db, living.run_id, 1.0), 0.0, 1.0)
    watched = Supervisor(store, plan_of(tmp_path), [])
    for _ in range(3):
        watched.tick()
    assert status(store, ada, 1).status_type == "running"
    living.end()
    watched.tick()
    assert status(store, ada, 1).status_type == "queued"


def test_a_run_that_is_never_ready_is_given_up(tmp_path, supervised):
    """One that loads or compiles for ever has no clock; its process is killed after `setup` seconds."""
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada, model_seed=6)
    supervised(store, plan_of(tmp_path), setup=0.3, most_lost=1)
    failed = until(lambda: over(store, ada, 1))
    assert failed.reason.failure.startswith("its process was lost, time 1 of 1 ")
    assert supervised.said[0] == "run 1: not ready after 0.3 s, killed"


def test_a_slot_has_one_process(tmp_path):
    """The next one waits until the worker of an earlier server has left; asked to leave meanwhile, it does."""
    store, (ada, _) = make_store(tmp_path)
    submit(store, ada)
    here, leave = threading.Event(), threading.Event()
    with alive.only_one(tmp_path / "slots" / "0", threading.Event()) as mine:
        assert mine
        impatient = threading.Thread(target=work, args=(plan_of(tmp_path), leave))
        waiting = threading.Thread(target=work, args=(plan_of(tmp_path, scale=0.0)._replace(runs=1), here))
        impatient.start()
        waiting.start()
        work(plan_of(tmp_path)._replace(slot="1", runs=0), threading.Event())  # another place is free
        leave.set()
        impatient.join()
        assert status(store, ada, 1).status_type == "queued" and waiting.is_alive()
    waiting.join()
    assert status(store, ada, 1).status_type == "completed"


def test_a_worker_that_cannot_start_is_told(tmp_path, supervised):
    store, _ = make_store(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    supervised(store, plan_of(tmp_path / "elsewhere"))  # where there is no database
    until(lambda: any("ended with status 1" in line for line in supervised.said))
    assert "no such file" in (tmp_path / "elsewhere" / "logs" / "slot-0.log").read_text()


def test_a_back_end_of_main_is_refused(tmp_path):
    def make(settings):
        raise AssertionError

    make.__module__ = "__main__"
    store, _ = make_store(tmp_path)
    with pytest.raises(ValueError, match="not of __main__"):
        Supervisor(store, plan_of(tmp_path)._replace(make=make), [{}])
