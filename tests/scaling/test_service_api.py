"""The service's routes. Oracle: the contract of CS336's third assignment, status by status."""

import asyncio
import json
import sqlite3
import time
from unittest.mock import patch

import pytest

pytest.importorskip("fastapi")
from starlette.testclient import TestClient

from experiments.scaling.service import dispatch, keys, ledger
from experiments.scaling.service.access import Throttle, network
from experiments.scaling.service.app import create_app
from experiments.scaling.service.backend import Broken, Done, Late
from experiments.scaling.service.guard import Guard
from experiments.scaling.service.schemas import Rules
from tests.scaling.service_parts import TEXT, config, make_store

ADA, BEN = ({"X-API-Key": TEXT[name]} for name in ("ada", "ben"))


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path)[0]


@pytest.fixture
def client(store):
    with TestClient(create_app(store, Rules(), "surrogate"), base_url="http://localhost") as client:
        client.headers.update(ADA)
        yield client


def claim(store):
    with store.write() as db:
        return dispatch.claim(db, f"run {time.monotonic_ns()}", time.time())


def end(store, outcome):
    job = claim(store)
    with store.write() as db:
        assert dispatch.ended(db, job, outcome, time.time())


def test_a_submission_reserves_and_its_end_releases(client, store):
    """clip(used, 1, max) of what has ended, max of what has not."""
    total = {"total_budget_seconds": 100.0}
    assert client.get("/budget").json() == {"used_seconds": 0.0, "remaining_seconds": 100.0, **total}
    answer = client.post("/submit", json=config())
    assert answer.status_code == 200
    expected = {"used_seconds": 20.0, "remaining_seconds": 80.0, **total}
    assert answer.json() == {"experiment_id": 1, "budget_summary": expected}
    for seed in (1, 2, 3):
        client.post("/submit", json=config(model_seed=seed))
    for outcome, used in ((Done(7.5, (2.0,)), 67.5), (Late(21.0, (2.0,)), 67.5), (Broken(0.1, "x"), 48.5)):
        end(store, outcome)
        assert client.get("/budget").json()["used_seconds"] == used
    assert client.get("/budget", headers=BEN).json()["used_seconds"] == 0.0


def test_budget_comes_before_duplicate(client):
    assert client.post("/submit", json=config(max_runtime_seconds=60)).status_code == 200
    answer = client.post("/submit", json=config(max_runtime_seconds=60))
    assert answer.status_code == 400
    assert answer.json() == {"detail": {
        "message": "insufficient budget",
        "budget_summary": {"used_seconds": 60.0, "remaining_seconds": 40.0, "total_budget_seconds": 100.0},
    }}  # fmt: skip
    assert answer.headers["X-Experiment-Id"] == "1"
    assert client.post("/submit", json=config(max_runtime_seconds=40)).status_code == 200  # all that remains
    assert "X-Experiment-Id" not in client.post("/submit", json=config(max_runtime_seconds=1)).headers


def test_duplicates(client):
    """By all fields with their defaults: a default that is spelled out is no other configuration, a seed is."""
    assert client.post("/submit", json=config()).status_code == 200
    answer = client.post("/submit", json=config(optimizer_config={"weight_decay": 0.1, "beta1": 0.9}))
    assert answer.status_code == 409
    assert answer.json() == {"detail": "experiment already exists for this training config"}
    assert answer.headers["X-Experiment-Id"] == "1"
    assert client.post("/submit", json=config(model_seed=1)).status_code == 200
    assert client.post("/submit", json=config(max_runtime_seconds=21)).status_code == 200
    assert client.post("/submit", json=config(), headers=BEN).status_code == 200


ROUTES = [
    ("POST", "/submit"), ("GET", "/budget"), ("GET", "/experiments"), ("GET", "/experiment/1"),
    ("POST", "/final_submission"), ("GET", "/final_submission"), ("POST", "/final_run"), ("GET", "/final_run"),
]  # fmt: skip


def test_without_a_key(store):
    app = create_app(store, Rules(), "real", throttle=Throttle(burst=100))
    with TestClient(app, base_url="http://localhost") as client:
        for method, path in ROUTES:
            for headers in ({}, {"X-API-Key": ""}, {"X-API-Key": "00000000"}, {"X-API-Key": "x" * 999}):
                answer = client.request(method, path, headers=headers, json={} if method == "POST" else None)
                assert (answer.status_code, answer.json()) == (401, {"detail": "invalid API key"}), (path, headers)
                assert answer.headers["X-Backend"] == "real"


def test_experiments_of_others_are_not_found(client):
    client.post("/submit", json=config())
    assert client.get("/experiment/1").json()["experiment_id"] == 1
    for id_, headers in ((1, BEN), (2, ADA), (0, ADA), (-1, ADA), (10**30, ADA)):
        answer = client.get(f"/experiment/{id_}", headers=headers)
        assert (answer.status_code, answer.json()) == (404, {"detail": "not found"})
    assert client.get("/experiment/x").status_code == 422
    assert client.get("/experiments", headers=BEN).json() == []


BAD = {
    "forbidden extra field": config(extra=1),
    "forbidden extra field within": config({"extra": 1}),
    "grouped queries": config({"num_key_value_heads": 1}),
    "hidden size": config({"hidden_size": 48}),
    "odd head": config({"head_dim": 15, "hidden_size": 30}),
    "narrow feed-forward": config({"intermediate_size": 16}),
    "tokens by batch": config(total_train_tokens=8 * 512 * 8 + 1),
    "updates by evaluations": config(n_evals=3),
    "validation by batch": config(val_batch_size=3),
    "time too short": config(max_runtime_seconds=0.5),
    "time too long": config(max_runtime_seconds=43_201),
    "dtype": config({"dtype": "float16"}),
    "too many tokens": config(total_train_tokens=8 * 512 * 8 * 10**9),
    "too large": config({"vocab_size": 10**13}),
    "no optimizer": {k: v for k, v in config().items() if k != "optimizer_config"},
    "negative lr": config(optimizer_config={"lr_scheduler": {"peak_value": -1.0}, "weight_decay": 0.1}),
}


def test_configurations_that_are_refused(client):
    for name, cfg in BAD.items():
        final = {"training_config": cfg, "predicted_final_loss": 2.0}
        for path, body in (("/submit", cfg), ("/final_submission", final)):
            answer = client.post(path, json=body)
            assert answer.status_code == 422, name
            detail = answer.json()["detail"]
            assert detail and all({"type", "loc", "msg", "input"} <= set(x) and x["loc"][0] == "body" for x in detail)
    assert client.get("/experiments").json() == [] and client.get("/final_submission").json() is None


def test_bodies_that_are_none(client):
    nan, inf = json.dumps(config(max_runtime_seconds=float("nan"))), json.dumps(config(optimizer_config={"eps": 1e999}))
    deep = '{"architecture_config": ' + "[" * 900 + "]" * 900 + "}"
    half = '{"\\ud800": "\\udfff"}'  # of a pair, as a name and as a value
    for text in (nan, inf, deep, half, "[" * 30_000, "{" * 10, "", "null", "[]", "9" * 10_000):
        answer = client.post("/submit", content=text.encode(), headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422) and answer.json()["detail"], text[:50]


def test_status_in_each_state(client, store):
    for seed in range(4):
        client.post("/submit", json=config(model_seed=seed, max_runtime_seconds=5))
    kinds = [x["status"]["status_type"] for x in client.get("/experiments").json()]
    assert kinds == ["queued"] * 4 and set(client.get("/experiment/1").json()["status"]) == {"queued_at", "status_type"}
    end(store, Done(3.0, (2.0, 1.5)))
    end(store, Late(5.5, (2.5,)))
    end(store, Broken(2.0, "no\nmemory"))
    job = claim(store)
    with store.write() as db:
        dispatch.evaluated(db, job, [9.0, 8.0], 1.0)
    done, late, broken, running = [x["status"] for x in client.get("/experiments").json()]
    common = {"queued_at", "dispatched_at", "run_id", "status_type"}
    assert set(done) == common | {"used_runtime_seconds", "val_losses", "completed_at"}
    assert (done["used_runtime_seconds"], done["val_losses"]) == (3.0, [2.0, 1.5])
    assert set(late) == set(broken) == common | {"used_runtime_seconds", "reason", "failed_at"}
    assert late["reason"] == {"reason": "timeout", "partial_val_losses": [2.5]}
    assert broken["reason"] == {"reason": "unexpected", "failure": "no memory"}
    assert set(running) == common | {"val_losses"} and running["val_losses"] == [9.0, 8.0]
    assert done["queued_at"].endswith("Z")


def test_final_submission_is_replaced_and_then_locked(store):
    told = []

    def reveal(cfg, rules, seed, budget):
        told.append((cfg.max_runtime_seconds, cfg.model_seed, seed, budget))
        return {"law": 1}

    with TestClient(create_app(store, Rules(), "surrogate", reveal=reveal), base_url="http://localhost") as client:
        client.headers.update(ADA)
        assert client.get("/final_submission").json() is None and client.get("/final_run").json() is None
        assert client.post("/final_run").json() == {"detail": "not found"}
        for seed, loss in ((1, 3.0), (2, 2.5)):
            body = {"training_config": config(model_seed=seed), "predicted_final_loss": loss}
            answer = client.post("/final_submission", json=body).json()
            assert answer["predicted_final_loss"] == loss and answer["submitted_at"].endswith("Z")
            assert client.get("/final_submission").json() == answer
        for loss in (0.0, -1.0, None):
            assert client.post("/final_submission", json={**body, "predicted_final_loss": loss}).status_code == 422
        assert told == []
        answer = client.post("/final_run")
        assert answer.status_code == 200 and answer.json()["status"]["status_type"] == "queued"
        assert answer.json()["revealed"] == {"law": 1} and told == [(400.0, 2, 7, 400.0)]
        assert client.post("/final_run").status_code == client.post("/final_submission", json=body).status_code == 409
        end(store, Done(399.0, (2.75,)))
        found = client.get("/final_run").json()
        assert (found["measured_final_loss"], found["error"], found["max_runtime_seconds"]) == (2.75, 0.25, 400.0)
        assert found["revealed"] == {"law": 1} and len(told) == 1
        assert client.get("/budget").json()["used_seconds"] == 0.0 and client.get("/experiments").json() == []
        assert client.get("/final_run", headers=BEN).json() is None


def test_other_hosts_are_not_answered_for(store):
    """DNS rebinding: the page's own name is in the Host header."""
    app = create_app(store, Rules(), "surrogate")
    with TestClient(app, base_url="http://localhost") as client:
        for host, status in (("evil.example", 400), ("evil.example:8000", 400), ("localhost.evil.example", 400),
                             ("", 400), ("localhost:8000", 200), ("LOCALHOST", 200), ("127.0.0.1:1", 200),
                             ("[::1]:8000", 200)):  # fmt: skip
            answer = client.get("/budget", headers={"Host": host, **ADA})
            assert answer.status_code == status, host
            assert answer.headers["X-Backend"] == "surrogate"
    with TestClient(create_app(store, Rules(), "surrogate", hosts=None), base_url="http://any") as client:
        assert client.get("/budget", headers=ADA).status_code == 200


def test_large_bodies_are_not_read(client):
    """Whether their length is told or they come in chunks; one byte less is read."""
    limit = 64 * 1024

    def chunks(n):
        yield from (b" " * 1024 for _ in range(n // 1024))
        yield b" " * (n % 1024)

    for n, status in ((limit, 422), (limit + 1, 413)):
        for content in (b" " * n, chunks(n)):
            answer = client.post("/submit", content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == status and answer.headers["X-Backend"] == "surrogate"


def test_a_length_that_is_too_large_is_refused_unread():
    """Oracle: an app and a receive that must not be called."""
    sent = []

    async def never(*args):
        raise AssertionError

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-length", b"65537")]
    scope = {"type": "http", "method": "POST", "path": "/submit", "headers": headers}
    asyncio.run(Guard(never, {})(scope, never, send))
    assert sent[0]["status"] == 413


def test_headers_of_every_answer(client):
    for path, status in (("/budget", 200), ("/nothing", 404), ("/experiment/9", 404), ("/dashboard", 200),
                         ("/docs", 200), ("/openapi.json", 200), ("/rules", 200)):  # fmt: skip
        answer = client.get(path)
        assert answer.status_code == status
        assert answer.headers["X-Backend"] == "surrogate" and answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers and answer.headers["Content-Security-Policy"]
    assert client.get("/", follow_redirects=False).headers["Location"] == "/dashboard"
    assert client.get("/rules").json() == {**Rules().model_dump(mode="json"), "final_budgets": 4.0}
    asked = {"Origin": "http://x.example", "Access-Control-Request-Method": "POST"}
    preflight = client.options("/submit", headers=asked)
    assert preflight.status_code == 405 and "access-control-allow-origin" not in preflight.headers


def test_wrong_keys_are_tried_slowly(store):
    """Ten at once, then one every ten seconds; a right key that is known passes."""
    now = [0.0]
    app = create_app(store, Rules(), "surrogate", throttle=Throttle(now=lambda: now[0]))
    with TestClient(app, base_url="http://localhost") as client:
        assert client.get("/budget", headers=ADA).status_code == 200

        def status(key):
            return client.get("/budget", headers={"X-API-Key": key}).status_code

        assert [status(f"{i:08}") for i in range(12)] == [401] * 10 + [429] * 2
        assert status(TEXT["ben"]) == 429 and status(TEXT["ada"]) == 200
        assert client.get("/budget", headers={"X-API-Key": "1" * 8}).headers["Retry-After"] == "11"
        now[0] = 10.0
        assert [status("22222222"), status("33333333")] == [401, 429]
        now[0] = 20.0
        assert [status(TEXT["ben"]), status("44444444"), status("55555555")] == [200, 401, 429]
        now[0] = 1e6
        assert [status(f"{i:08}") for i in range(11)] == [401] * 10 + [429]


def test_addresses_are_counted_by_household():
    throttle = Throttle(now=lambda: 0.0)
    for _ in range(10):
        throttle.failed("a")
    assert throttle.wait("a") == 10.0 and throttle.wait("b") == 0.0
    assert network("2001:db8::1") == network("2001:db8::ffff:1") != network("2001:db8:0:1::1")
    for i in range(5000):  # forgets the oldest, and does not grow
        throttle.failed(str(i))
    assert throttle.wait("a") == 0.0


def test_a_removed_key_opens_nothing(client, store):
    assert client.get("/budget").status_code == 200
    with store.write() as db:
        keys.remove_key(db, "ada", 1.0)
    assert client.get("/budget").status_code == 401


def test_a_database_that_cannot_be_written_is_told(client):
    for text, status in (("database is locked", 503), ("database or disk is full", 507)):
        with patch.object(ledger, "submit", side_effect=sqlite3.OperationalError(text)):
            answer = client.post("/submit", json=config())
        assert answer.status_code == status and "nothing was changed" in answer.json()["detail"]
        assert answer.headers["Retry-After"]
    assert client.post("/submit", json=config()).status_code == 200
