"""The walk-through of experiments/scaling/README.md, on the surrogate. Oracle: its own commands and code, run."""

import json
import re
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

from experiments.scaling import client as module
from experiments.scaling.serve import Serve, prepared
from experiments.scaling.service.worker import Plan, work
from tests.programs import run_here
from tests.scaling.service_parts import served

README = (Path(__file__).resolve().parents[2] / "experiments/scaling/README.md").read_text()


def test_the_walk_through(tmp_path, monkeypatch):
    folder, sleep = tmp_path / "practice", time.sleep
    command = re.search(r"experiments\.scaling\.serve (--backend surrogate .*--add-key.*)", README)[1]
    key = run_here("experiments.scaling.serve", *command.replace("runs/practice", str(folder)).split()).stdout.strip()
    monkeypatch.setenv("PURELM_API_KEY", key)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: sleep(0.02))
    submit, final = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    with prepared(Serve(folder=folder, backend="surrogate")) as (store, ready), served(store) as url:
        leave = threading.Event()
        plan = Plan(folder, ready.module.backend, ready.settings, ready.rules)
        worker = threading.Thread(target=work, args=(plan, leave))
        worker.start()
        try:
            names = {}
            exec(submit.replace("http://127.0.0.1:8000", url), names)
            found = names["client"].experiments()
            exec(final, names)
            while (last := names["client"].final_run())["status"]["status_type"] in ("queued", "running"):
                sleep(0.02)
        finally:
            leave.set()
            worker.join()
        assert run_here("experiments.scaling.collect", tmp_path / "runs.json", "--url", url).returncode == 0
    kinds = [x["status"]["status_type"] for x in found]
    assert kinds == ["completed"] * 15 and last["status"]["status_type"] == "completed"
    assert last["error"] == last["measured_final_loss"] - 4.0
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert len(runs) == 15 and all(0 < r["loss"] < 12 for r in runs)
    assert run_here("experiments.scaling.fit", tmp_path / "runs.json", "--bootstrap", 10).returncode == 0
