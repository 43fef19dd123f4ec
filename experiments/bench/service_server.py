"""The server that experiments.bench.service measures and kills: the service on a back end that waits.

python -m experiments.bench.service_server FOLDER PORT SLOTS SECONDS

SECONDS is what an evaluation of a run takes. It imports no torch, so that it is back soon after a kill.
"""

import importlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.scaling.service.app import create_app
from experiments.scaling.service.backend import Backend, Control, Done, Outcome, Stopped
from experiments.scaling.service.running import bind, serve
from experiments.scaling.service.schemas import Rules, TrainingConfig
from experiments.scaling.service.store import open_store
from experiments.scaling.service.supervisor import Supervisor
from experiments.scaling.service.worker import Plan

__all__ = ["Wait", "backend", "expected"]

EACH = 2.0  # device-seconds of an evaluation, so that a run's charge is known


@dataclass(frozen=True)
class Wait:
    seconds: float


def expected(cfg: TrainingConfig) -> tuple[float, ...]:
    """The losses of a run."""
    return tuple(1.0 + 1.0 / (2 + cfg.model_seed + k) for k in range(cfg.n_evals))


def backend(settings: Wait) -> Backend:
    """Runs that wait, and keep in their folder how far they are."""

    def run(cfg: TrainingConfig, rules: Rules, control: Control) -> Outcome:
        state, losses = control.folder / "done", expected(cfg)
        done = json.loads(state.read_text()) if state.exists() else 0
        control.started(EACH * done)
        while done < cfg.n_evals:
            if control.stop():
                return Stopped(EACH * done)
            time.sleep(settings.seconds)
            done += 1
            control.evaluated(losses[:done], EACH * done)
            new = state.with_suffix(".new")
            new.write_text(json.dumps(done))
            os.replace(new, state)
        return Done(EACH * done, losses)

    return Backend("surrogate", run)


def _main() -> None:
    here = importlib.import_module("experiments.bench.service_server")  # workers cannot find a function of __main__
    folder, port, slots, seconds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    store, rules = open_store(folder), Rules()
    plan = Plan(folder, here.backend, here.Wait(seconds), rules)
    # No limit to lost processes: the benchmark kills more of them than a machine would.
    supervisor = Supervisor(store, plan, [{}] * slots, most_lost=1000)
    serve(create_app(store, rules, "surrogate"), supervisor, bind("127.0.0.1", port))


if __name__ == "__main__":
    _main()
