"""The client against a server in this process. Oracle: what the server has in its store; the course's JSON."""

import http.server
import json
import socket
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

pytest.importorskip("uvicorn")

from experiments.scaling import client as module
from experiments.scaling import study
from experiments.scaling.client import (
    Client,
    Conflict,
    Duplicate,
    Failure,
    InsufficientBudget,
    Invalid,
    InvalidKey,
    NotFound,
    Unavailable,
)
from experiments.scaling.collect import runs_of
from experiments.scaling.service import dispatch
from experiments.scaling.service.backend import Broken, Done, Late
from experiments.scaling.service.schemas import Experiment, TrainingConfig, n_parameters
from tests.programs import run_here
from tests.scaling.service_parts import TEXT, config, make_store, served


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path)[0]


@pytest.fixture
def url(store):
    with served(store) as url:
        yield url


def end_all(store, *outcomes):
    for outcome in outcomes:
        with store.write() as db:
            dispatch.ended(db, dispatch.claim(db, f"r{time.monotonic_ns()}", time.time()), outcome, time.time())


def test_errors_have_names(url):
    client = Client(url, TEXT["ada"])
    first = client.submit(config())
    assert first == {"experiment_id": 1, "budget_summary": client.budget()} and client.backend == "surrogate"
    with pytest.raises(InsufficientBudget) as short:
        client.submit(config(max_runtime_seconds=81))
    assert short.value.budget == client.budget() and short.value.status == 400
    with pytest.raises(Duplicate) as twice:
        client.submit(config())
    assert twice.value.experiment_id == 1 and isinstance(twice.value, Conflict)
    assert client.submit(config(), known=True) == first
    spent = client.submit(config(max_runtime_seconds=client.budget()["remaining_seconds"]))
    with pytest.raises(InsufficientBudget) as short:  # the service looks at the budget first
        client.submit(config())
    assert short.value.experiment_id == 1
    assert client.submit(config(), known=True) == {**spent, "experiment_id": 1}
    with pytest.raises(Invalid, match=r"architecture_config.*num_key_value_heads must equal") as invalid:
        client.submit(config({"num_key_value_heads": 1}))
    assert len(invalid.value.errors) == 1
    with pytest.raises(Invalid, match="must be divisible by n_evals"):
        client.submit(config(n_evals=3))
    for call in (lambda: client.experiment(3), client.start_final_run, lambda: client.wait([1, 3])):
        with pytest.raises(NotFound):
            call()
    with pytest.raises(InvalidKey):
        Client(url, "00000000").budget()
    with pytest.raises(ValueError, match="url must begin with"):
        Client("localhost:8000")


def test_wait_gives_experiments_in_the_order_asked_for(store, url):
    client = Client(url, TEXT["ada"])
    ids = [client.submit(config(model_seed=i))["experiment_id"] for i in range(3)]
    seen = []

    def progress(found):
        seen.append([x["status"]["status_type"] for x in found])
        if len(seen) == 1:
            end_all(store, Done(1.0, (2.0,)), Late(1.0, ()), Broken(1.0, "x"))

    found = client.wait(reversed(ids), progress, every=0.01)
    assert [x["experiment_id"] for x in found] == [3, 2, 1]
    assert seen == [["queued"] * 3, ["failed", "failed", "completed"]]
    assert client.wait([]) == []
    client.submit(config(model_seed=9))
    with pytest.raises(TimeoutError, match=r"\[4\]"):
        client.wait([4], every=0.01, timeout=0.02)


def test_final_submission_and_run(store, url):
    client = Client(url, TEXT["ada"])
    assert client.final_submission() is None and client.final_run() is None
    assert client.submit_final(config(), 2.5) == client.final_submission()
    assert client.start_final_run()["status"]["status_type"] == "queued"
    with pytest.raises(Conflict, match="asked for already"):
        client.start_final_run()
    end_all(store, Done(1.0, (2.0,)))
    assert client.final_run()["error"] == -0.5


def test_runs_for_the_fit(store, url, tmp_path):
    """Oracle: n_parameters of the schemas, which counts all; those of the tables are 2 V d."""
    client = Client(url, TEXT["ada"])
    for i in range(3):
        client.submit(config({"tie_word_embeddings": i == 2, "attention_bias": i == 2}, model_seed=i))
    end_all(store, Done(3.0, (2.0, 1.5)), Late(1.0, (3.0,)), Done(4.0, (1.0,)))
    found = client.experiments()
    whole = runs_of(found, embeddings=True)
    assert [(r["experiment"], r["loss"], r["tokens"], r["seconds"]) for r in whole] == [
        (1, 1.5, 32768, 3.0), (3, 1.0, 32768, 4.0)
    ]  # fmt: skip
    all_of_it = [n_parameters(Experiment.model_validate(x).training_config.architecture_config) for x in found]
    assert [r["parameters"] for r in whole] == [all_of_it[0], all_of_it[2]]
    assert {r["counting"] for r in whole} == {"all"} and {r["counting"] for r in runs_of(found)} == {"blocks"}
    assert [r["parameters"] for r in runs_of(found)] == [all_of_it[0] - 2 * 100 * 32, all_of_it[2] - 100 * 32]
    done = collect(tmp_path / "runs.json", "--url", url, "--key", TEXT["ada"])
    assert done.returncode == 0 and json.loads((tmp_path / "runs.json").read_text()) == runs_of(found)
    assert "2 completed runs, by the surrogate back end" in done.stderr
    assert collect(tmp_path / "no.json", "--url", url, "--key", "1").returncode == 2
    assert not (tmp_path / "no.json").exists()


def collect(*args):
    return run_here("experiments.scaling.collect", *args)


def test_a_submission_is_the_same_when_it_comes_back(url):
    """What the server answers is what may be sent again: as a TrainingConfig, equal."""
    client = Client(url, TEXT["ada"])
    for optimizer in ({"lr_scheduler": {}}, {"lr_scheduler": {}, "grad_clip_norm": None}, {}, {"eps_root": 0.0}):
        cfg = config(optimizer_config=optimizer, max_runtime_seconds=1)
        id_ = client.submit(cfg)["experiment_id"]
        back = client.experiment(id_)["training_config"]
        assert TrainingConfig.model_validate(back) == TrainingConfig.model_validate(cfg)
        assert ("beta1" in back["optimizer_config"]) == ("lr_scheduler" not in optimizer)
        with pytest.raises(Duplicate):
            client.submit(back)


@contextmanager
def answering(*answers):
    """A server that gives these (status, headers, body) one after another, the last one for ever."""
    left, seen = list(answers), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("X-API-Key")))
            status, headers, body = left.pop(0) if len(left) > 1 else left[0]
            if status is None:  # the connection breaks
                return
            self.send_response(status)
            for pair in headers.items():
                self.send_header(*pair)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_what_is_tried_again(monkeypatch):
    """A broken connection, an answer cut short, 503: as often as `tries`; other errors at once."""
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    busy = (503, {"Retry-After": "5"}, b'{"detail": "busy"}')
    good = (200, {}, b'{"used_seconds": 1}')
    with answering((None, {}, b""), busy, (200, {"Content-Length": "99"}, b'{"a'), good) as (url, seen):
        assert Client(url, "k").budget() == {"used_seconds": 1} and seen == [("/budget", "k")] * 4
    with answering(busy) as (url, seen):
        with pytest.raises(Unavailable, match="busy"):
            Client(url, "k", tries=3).budget()
        assert len(seen) == 3
    with answering((500, {}, b"what?")) as (url, seen):
        with pytest.raises(Failure, match="500"):
            Client(url, "k").budget()
        assert len(seen) == 1
    with pytest.raises(Unavailable):
        Client(url, "k", tries=1).budget()  # nobody is there any more


def test_no_redirect_is_followed():
    """The key would be sent along."""
    with answering((200, {}, b"{}")) as (other, seen):
        with answering((302, {"Location": other}, b"")) as (url, _), pytest.raises(Failure, match="302"):
            Client(url, "k").budget()
        assert seen == []


def test_a_proxy_is_not_asked_about_this_machine(url, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert Client(url, TEXT["ada"], tries=1).budget()["used_seconds"] == 0.0


@pytest.mark.parametrize(("value", "words"), [
    (float("nan"), "optimizer_config.weight_decay: must be a finite number, got nan"),
    (np.float32("inf"), "optimizer_config.weight_decay: must be a finite number, got inf"),
    ({1.0}, "optimizer_config.weight_decay: JSON has no set"),
    ({1: 2}, "optimizer_config.weight_decay: names must be strings, got 1"),
    (np.zeros(2), "optimizer_config.weight_decay: JSON has no ndarray"),
])  # fmt: skip
def test_what_json_has_not_is_named(value, words):
    """Before anything is sent: nobody listens there."""
    with pytest.raises(ValueError, match=words):
        Client("http://127.0.0.1:1", "k").submit(config(optimizer_config={"weight_decay": value}))
    with pytest.raises(ValueError, match="predicted_final_loss: must be a finite number"):
        Client("http://127.0.0.1:1", "k").submit_final(config(), float("nan"))


def test_numbers_of_numpy_and_torch_are_numbers(url):
    """The same experiment as with Python's own."""
    client = Client(url, TEXT["ada"])
    made = client.submit(config(max_runtime_seconds=20))
    same = config(
        {"hidden_size": np.int64(32), "tie_word_embeddings": np.bool_(False), "rms_norm_eps": np.float64(1e-6)},
        train_batch_size=torch.tensor(8), max_runtime_seconds=np.float32(20), n_evals=4.0, model_seed=np.uint8(0),
    )  # fmt: skip
    with pytest.raises(Duplicate) as twice:
        client.submit(same)
    assert twice.value.experiment_id == made["experiment_id"] == client.experiment(np.int64(1))["experiment_id"]
    with pytest.raises(TypeError):
        client.experiment(1.7)


@pytest.mark.parametrize("url", [
    "localhost:8000", "http://", "http://127.0.0.1:80a", "http://127.0.0.1:99999", "http://a b", "http://x:1?y=2",
    "http://me@127.0.0.1", "http://[::1", "http://127.0.0.1\n",
])  # fmt: skip
def test_an_address_that_is_none(url):
    with pytest.raises(ValueError, match="url "):
        Client(url, "k")


@pytest.mark.parametrize("key", ["12345678\n", "1234 5678", "schl\u00fcssel", "\u0661\u0662", "a\x00b"])
def test_a_key_that_no_header_takes(key):
    """Told at once, and not in whole."""
    with pytest.raises(ValueError, match="at place ") as error:
        Client("http://127.0.0.1:1", key)
    assert key not in str(error.value)


def test_odd_answers_are_failures_by_name(monkeypatch):
    """Of a proxy, or of another program at that port."""
    slept = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    short = (503, {"Content-Length": "99"}, b'{"detail": "bu')
    date = (503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, b"")
    with answering(short, date, (503, {"Retry-After": "-1"}, b""), (200, {}, b"null")) as (url, _):
        assert Client(url, "k").final_run() is None and slept == [1.0, 1.0, 1.0]
    with answering((200, {}, b"<html>hello</html>")) as (url, seen):
        with pytest.raises(Unavailable, match=r"no JSON .* is the training service there"):
            Client(url, "k", tries=2).budget()
        assert len(seen) == 2
    for answer in ((400, {}, b'{"detail": {"a": 1}}'), (422, {}, b'{"detail": ["a"]}'), (409, {}, b"[]")):
        with answering((answer[0], {"X-Experiment-Id": "x"}, answer[2])) as (url, _), pytest.raises(Failure):
            Client(url, "k").budget()
    monkeypatch.setattr(module, "LARGEST", 1000)
    with answering((200, {}, b"[" + b"1," * 1000 + b"1]")) as (url, seen):
        with pytest.raises(Failure, match="more than 1,000 bytes"):
            Client(url, "k").experiments()
        assert len(seen) == 1


def test_a_server_that_says_nothing(monkeypatch):
    """It takes the connection and answers nobody: each try ends after `timeout`."""
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(Unavailable, match="timed out"):
            Client(f"http://127.0.0.1:{silent.getsockname()[1]}", "k", tries=2, timeout=0.05).budget()


def test_experiments_of_another_key_are_not_waited_for(url):
    client = Client(url, TEXT["ada"])
    id_ = client.submit(config())["experiment_id"]
    with pytest.raises(NotFound, match=r"no experiments \[1\]"):
        Client(url, TEXT["ben"]).wait([id_])


def test_a_server_that_is_started_again_is_waited_for(store, monkeypatch):
    """For more than a minute once the study goes; an address where nobody was is told within seconds."""
    slept = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    with served(store) as url:
        with pytest.raises(InvalidKey):
            study.patient(url, "0")
        there = study.patient(url, TEXT["ada"])
    with pytest.raises(Unavailable):
        there.budget()
    assert 60 < sum(slept) < 300
    slept.clear()
    with pytest.raises(Unavailable):
        study.patient(url, TEXT["ada"])
    assert sum(slept) < 10
