"""experiments.bench.service with few submissions. Oracle: its own check, which is shown to find what is wrong."""

import asyncio
import json
import time

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("psutil")

from experiments.bench import service
from experiments.bench.service import Args, Found, body, check, measure
from experiments.bench.service_server import EACH, expected
from experiments.scaling.service import dispatch, ledger
from experiments.scaling.service.backend import Done
from experiments.scaling.service.schemas import TrainingConfig
from experiments.scaling.service.store import open_store
from tests.scaling.service_parts import make_store

GOOD = dict(lost=0, doubled=0, unfinished=0, other_losses=0, charged_otherwise=0)


def test_kills_lose_nothing(tmp_path):
    """One of the server and one of a worker; a run takes long enough to be found under way on any machine."""
    args = Args(submissions=24, clients=4, keys=2, slots=1, evals=2, seconds=0.1, kills=2)
    found, killed = asyncio.run(measure(args, tmp_path))
    assert killed == {"server": 1, "worker": 1} and check(args, tmp_path, found) == GOOD
    assert len(found.ids) == 24


def test_kills_end_with_the_runs(tmp_path):
    """A worker is to be killed, and nothing is left to run: fewer kills are told, and none is waited for."""
    make_store(tmp_path)[0].close()

    class Idle:
        folder, killed = tmp_path, 0

        def kill(self):
            self.killed += 1

    idle, looks = Idle(), iter([False, False, True])
    told = asyncio.run(service.killing(Args(kills=5), idle, lambda: next(looks, True)))
    assert told == {"server": 1} and idle.killed == 1


def test_a_server_that_does_not_start_is_told(tmp_path, monkeypatch):
    """The clients wait for it no longer, and its log is in the message."""
    monkeypatch.setattr(service.sys, "executable", "false")
    with pytest.raises(ValueError, match="ended with status 1"):
        asyncio.run(measure(Args(submissions=2, clients=2), tmp_path))


@pytest.mark.parametrize("sql, bad", [
    ("SELECT 1", {}),
    ("DELETE FROM runs WHERE id = 2", {"lost": 1, "charged_otherwise": 1}),
    ("UPDATE runs SET used = 5 WHERE id = 2", {"charged_otherwise": 2}),
    ("UPDATE runs SET state = 'queued', ended_at = NULL WHERE id = 2", {"unfinished": 1}),
    ("UPDATE runs SET val_losses = '[1.5]' WHERE id = 2", {"other_losses": 1}),
    ("INSERT INTO events (at, run, kind) VALUES (0, 2, 'completed')", {"doubled": 1}),
])  # fmt: skip
def test_the_check_finds_what_is_wrong(tmp_path, sql, bad):
    store, (ada, _) = make_store(tmp_path, budget=1e6)
    args, ids = Args(submissions=3, evals=2), {}
    with store.write() as db:
        for i in range(3):
            cfg = TrainingConfig.model_validate(body(i, args.evals))
            ids[i] = ledger.submit(db, ada, cfg, time.time()).experiment_id
            job = dispatch.claim(db, f"r{i}", time.time())
            dispatch.ended(db, job, Done(EACH * args.evals, expected(cfg)), time.time())
    store.close()
    damaged = open_store(tmp_path)
    with damaged.write() as db:
        db.execute("PRAGMA defer_foreign_keys = ON")
        if sql.startswith("DELETE"):
            db.execute("DELETE FROM events WHERE run = 2")
        db.execute(sql)
    damaged.close()
    assert check(args, tmp_path, Found(ids, [])) == {**GOOD, **bad}


def test_the_program_fails_where_something_is_lost(tmp_path, monkeypatch, capsys):
    async def nothing(args, folder):
        store, _ = make_store(folder)
        store.close()
        (folder / "server.log").write_text("")
        return Found({0: 1, 1: 2}, [0.001, 0.002], wall=1.0), service.Counter()

    monkeypatch.setattr(service, "measure", nothing)
    with pytest.raises(SystemExit) as end:
        service.main(Args(submissions=2, json=tmp_path / "rows.json"))
    assert end.value.code == 2
    rows = {r["metric"].split(": ")[1]: r["value"] for r in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["lost"] == 2 and rows["rate"] == 2.0
    assert rows["p50"] == pytest.approx(1.5) and rows["slowest"] == 2.0
