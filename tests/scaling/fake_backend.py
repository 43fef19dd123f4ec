"""A back end for tests: losses fall as 1/k, the seconds of a run are a number in its configuration.

A run takes `eps` of its AdamW x 1e6 seconds of its own clock for each evaluation, which pass in no time unless
`scale` is set. Its model_seed says how it goes: 1 raises, 2 ends its process, 3 diverges, 4 never looks at its time,
6 is never ready.
"""

import json
import os
import signal
import time
from dataclasses import dataclass

from experiments.scaling.service.backend import Backend, Broken, Done, Late, Stopped


@dataclass(frozen=True)
class Fake:
    each: float = 1.0  # seconds of the run's clock for an evaluation
    scale: float = 0.0  # real seconds for one of them


def backend(settings: Fake) -> Backend:
    def run(cfg, rules, control):
        state = control.folder / "state.json"
        used, losses = json.loads(state.read_text()) if state.exists() else (0.0, [])
        while cfg.model_seed == 6:
            time.sleep(0.05)
        control.started(used)
        if cfg.model_seed == 4:
            control.evaluated([9.0], 1.0)
            while True:
                time.sleep(0.05)
        while len(losses) < cfg.n_evals:
            if control.stop():
                return Stopped(used)
            if used + settings.each > cfg.max_runtime_seconds:
                return Late(used, tuple(losses))
            time.sleep(settings.each * settings.scale)
            used += settings.each
            losses.append(1.0 + 1.0 / (1 + len(losses)))
            if cfg.model_seed == 1 and len(losses) == 2:
                raise ArithmeticError("no such\nnumber")
            if cfg.model_seed == 2 and len(losses) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            if cfg.model_seed == 3 and len(losses) == 3:
                losses[-1] = float("nan")
            if cfg.model_seed == 5:
                return Broken(used, "as told")
            control.evaluated(losses, used)
            new = state.with_suffix(".new")
            new.write_text(json.dumps((used, losses)))
            os.replace(new, state)
        return Done(used, tuple(losses))

    def reveal(cfg, rules, seed, budget):
        return {"seed": seed, "budget": budget}

    return Backend("surrogate", run, reveal)
