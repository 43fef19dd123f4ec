"""experiments.scaling.serve. Oracles: its exit status and lines; a client of the process, which is killed."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import torch

pytest.importorskip("uvicorn")

from experiments.scaling import serve
from experiments.scaling.client import Client, InvalidKey
from experiments.scaling.serve import Serve, prepared, slots_of
from experiments.scaling.service.store import FILE, open_store
from tests.programs import run_here
from tests.scaling.service_parts import config, until


def run(folder, *args):
    return run_here("experiments.scaling.serve", "--folder", folder, "--backend", "surrogate", *args)


def test_keys_are_added_listed_and_removed(tmp_path):
    folder = tmp_path / "service"
    first = run(folder, "--add-key", "ada", "--budget-seconds", 60)
    assert first.returncode == 0 and re.fullmatch(r"\d{8}\n", first.stdout)
    long = run(folder, "--add-key", "ben", "--long-keys", "--key-seed", 3)
    assert re.fullmatch(r"[\w-]{43}\n", long.stdout)
    assert run(folder, "--list-keys").stdout.splitlines() == [
        "ada: 0 of 60 device-seconds used or reserved", "ben: 0 of 43200 device-seconds used or reserved"
    ]  # fmt: skip
    again = run(folder, "--add-key", "ada")
    assert again.returncode == 2 and "there is a key for 'ada' already" in again.stderr
    assert run(folder, "--remove-key", "ada").returncode == 0
    assert run(folder, "--remove-key", "ada").returncode == 2
    assert run(folder, "--list-keys").stdout.startswith("ben")
    with open_store(folder).read() as db:
        assert db.execute("SELECT seed FROM keys WHERE name = 'ben'").fetchone()[0] == 3


def test_a_key_that_cannot_be_shown_or_stored_is_none(tmp_path, monkeypatch):
    """It is shown once: on a full disk it was stored, and nobody knew it. /dev/full is one; the database another."""
    folder = tmp_path / "service"
    run(folder, "--add-key", "ben")
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "w") as full, redirect_stdout(full):
        serve.manage(Serve(folder=folder, backend="surrogate", add_key="ada"))
    assert run(folder, "--list-keys").stdout.startswith("ben")
    taken = run(folder, "--remove-key", "ben", "--add-key", "ben")  # both or none
    assert taken.returncode == 0 and re.fullmatch(r"\d{8}\n", taken.stdout)

    def add_key(*args):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(serve.keys, "add_key", add_key)
    done = run(folder, "--add-key", "ada", "--remove-key", "ben")
    assert done.returncode == 2 and "the disk is full: free some space" in done.stderr
    assert "no key was added or removed" in done.stderr and run(folder, "--list-keys").stdout.startswith("ben")


@pytest.mark.parametrize("args, text", [
    (["--list-keys"], "there is no service in it"),
    (["--host", "0.0.0.0"], "host 0.0.0.0: others can reach it"),
    (["--port", "70000"], "port must be at least 0 and at most 65,535"),
    (["--data", "x.bin"], "the surrogate trains on nothing"),
    (["--backend", "real"], "give --data and --val"),
    (["--final", "nan"], "final must be a finite number"),
])  # fmt: skip
def test_what_is_refused(tmp_path, args, text):
    done = run(tmp_path / "service", *args)
    assert done.returncode == 2 and text in done.stderr
    assert not (tmp_path / "service").exists()


def test_a_folder_keeps_its_back_end_and_rules(tmp_path):
    """Its losses would else not be comparable. The hidden law's secret is drawn once."""
    args = Serve(folder=tmp_path / "a", backend="surrogate")
    with prepared(args) as (store, ready):
        secret = ready.settings.secret
    with prepared(Serve(folder=tmp_path / "a", backend="surrogate", time_scale=0.5)) as (store, ready):
        assert ready.settings.secret == secret and ready.settings.time_scale == 0.5
        assert run(tmp_path / "a", "--port", 0).returncode == 2  # one server at a time
    done = run(tmp_path / "a", "--seq-len", 256)
    assert done.returncode == 2 and "was made with rules" in done.stderr
    with prepared(Serve(folder=tmp_path / "b", backend="surrogate")) as (_, other):
        assert other.settings.secret != secret
    store = open_store(tmp_path / "a")
    with store.write() as db:
        db.execute("UPDATE meta SET value = '\"real\"' WHERE name = 'backend'")
    assert "was made with backend real" in run(tmp_path / "a").stderr


def test_the_index_of_the_log_stays_while_a_server_does(tmp_path):
    """An error closes its connection, which may be the last; a full disk does not take the index again."""
    with prepared(Serve(folder=tmp_path / "a", backend="surrogate")) as (store, _):
        with pytest.raises(KeyError), store.write():
            raise KeyError
        store.close()
        assert (tmp_path / "a" / f"{FILE}-shm").exists()
    assert not (tmp_path / "a" / f"{FILE}-shm").exists()


def test_slots(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cpu = slots_of(Serve(backend="surrogate", slots=3))
    assert cpu == [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}] * 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert len(slots_of(Serve())) == 1
    with pytest.raises(ValueError, match="there is no GPU here"):
        slots_of(Serve(device="cuda"))
    for device in ("auto", "cpu"):
        with pytest.raises(ValueError, match="graph yes: needs a GPU"):
            slots_of(Serve(device=device, graph="yes"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [x["CUDA_VISIBLE_DEVICES"] for x in slots_of(Serve())] == ["0", "1", "2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    assert [x["CUDA_VISIBLE_DEVICES"] for x in slots_of(Serve(slots=1))] == ["6"]
    with pytest.raises(ValueError, match="slots must be at most 2"):
        slots_of(Serve(slots=3))
    assert len(slots_of(Serve(device="cpu", slots=3))) == 3


@pytest.fixture
def server(tmp_path):
    """Start the program; kill what is left at the end."""
    begun = []

    def start(*args):
        command = [sys.executable, "-m", "experiments.scaling.serve", "--backend", "surrogate", "--port", "0",
                   "--folder", str(tmp_path / "service"), *map(str, args)]  # fmt: skip
        begun.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        line = begun[-1].stderr.readline()
        found = re.match(r"(http://127.0.0.1:\d+)  dashboard: \1/dashboard  back end: surrogate  slots: 2\n", line)
        assert found, line + begun[-1].stderr.read()
        return begun[-1], found[1]

    yield start
    for process in begun:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.slow  # four processes that import torch
def test_a_server_is_killed_and_comes_back(tmp_path, server):
    """kill -9 with runs under way and queued: all end, each is charged once. SIGTERM ends it in order."""
    key = run(tmp_path / "service", "--add-key", "ada", "--budget-seconds", 1000).stdout.strip()
    process, url = server("--slots", 2, "--time-scale", 1.0)
    client = Client(url, key, tries=1)
    with pytest.raises(InvalidKey):
        Client(url, "x").budget()
    rest = dict(val_batch_size=64, max_runtime_seconds=100)  # some tenths of a second each
    shape = dict(head_dim=64, hidden_size=512, num_attention_heads=8, num_key_value_heads=8, intermediate_size=1536)
    ids = [client.submit(config(shape, model_seed=i, total_train_tokens=512 * 8 * 400, **rest))["experiment_id"]
           for i in range(6)]  # fmt: skip
    until(lambda: any(x["status"]["status_type"] == "running" for x in client.experiments()))
    process.kill()
    process.wait()
    process, url = server("--slots", 2)
    client = Client(url, key)
    found = client.wait(ids, every=0.1, timeout=600)
    assert [x["status"]["status_type"] for x in found] == ["completed"] * 6
    charged = sum(max(1.0, x["status"]["used_runtime_seconds"]) for x in found)
    assert client.budget()["used_seconds"] == pytest.approx(charged, rel=1e-12)
    with open_store(tmp_path / "service").read() as db:
        ends = db.execute("SELECT run, COUNT(*) FROM events WHERE kind = 'completed' GROUP BY run").fetchall()
        assert [tuple(row) for row in ends] == [(i, 1) for i in ids]
    process.send_signal(signal.SIGTERM)
    assert process.wait(600) == 128 + signal.SIGTERM
    assert (tmp_path / "service" / FILE).exists() and not list((tmp_path / "service" / "alive").iterdir())


def test_importing_the_server_does_not_need_its_extra():
    """fastapi and uvicorn are asked for when it serves: its flags can be read without."""
    code = "import sys; sys.modules.update(fastapi=None, uvicorn=None); import experiments.scaling.serve, purelm"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert serve.Serve().host == "127.0.0.1"
