"""Spend a budget of the training service, foretell the best run of a larger one, and see.

    python -m experiments.scaling.serve --backend real ... &
    PURELM_API_KEY=12345678 python -m experiments.scaling.study --name cpu --out results/scaling/cpu \
        --forecasts results/scaling/forecasts.jsonl --widths 32 48 64 96 128 --final-widths 64 96 128 192 256

It goes in steps, each from the results of those before: two short runs for the device's speed; learning rates of a
small and of a middle model, for a law of them; --widths at three times; the law of loss, by variable
projection, with its bootstrap; the shape and the number of tokens that are best in --multiple times the budget; the
prediction of their loss, which is appended to FORECASTS and submitted; the final run; the outcome.

Experiments lie on the server: the same command goes on where it stopped, since a configuration runs once. It leaves
study.json, study.md and study.png in OUT.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro

from experiments.console import program, progress_bar, say
from experiments.limits import Count, Place, Range, Seed, Share, Text
from experiments.scaling import study_page
from experiments.scaling.client import Client, Failure, InsufficientBudget
from experiments.scaling.decide import (
    Choice,
    Shape,
    Speed,
    best_rate,
    best_run,
    config,
    counted,
    forecast,
    rate_law,
    runs_of,
    seconds_of,
    shapes,
    speed_of,
)
from experiments.scaling.forecasts import Forecast, register, settle
from experiments.scaling.service.schemas import Completed, Experiment, Rules, TrainingConfig, total_steps
from purelm import random, track
from purelm.scaling import variable_projection
from purelm.scaling.bootstrap import resampled
from purelm.scaling.laws import Law, loss
from purelm.scaling.runs import Runs

Width = Annotated[int, Range(16, 16_384)]
Rate = Annotated[float, Range(0, 10, open_low=True)]

RATES_SHARE = 0.2  # of the budget
USED_SHARE = 0.8  # of what is left is planned for: runs reserve more than they use, and may take longer
LEVELS = (1.0, 2.5, 6.25)  # times of the grid, relative
MOST_WIDER = 3  # runs that are added where the best learning rate is an end of those tried
SLACK = 1.6  # reserved for a run, over what the law of speed says


@dataclass(frozen=True)
class Args:
    """Spend a budget, foretell the best run of a larger one, and see."""

    name: Text
    """of the forecast"""
    out: Place
    forecasts: Place
    """.jsonl; the page is beside it"""
    url: Text = "http://127.0.0.1:8000"
    key: Text = ""
    """default: the environment's PURELM_API_KEY"""
    device: Text = ""
    """for the table, such as the name of the processor"""
    widths: Annotated[tuple[Width, ...], tyro.conf.arg(metavar="INT [INT ...]")] = (32, 48, 64, 96, 128)
    """of the runs that the law is fitted to: multiples of 16, at least 4"""
    final_widths: tuple[Width, ...] = (48, 64, 96, 128, 160, 192, 256)
    """among which the final one is chosen"""
    rates: tuple[Rate, ...] = (2e-3, 4e-3, 8e-3, 1.6e-2)
    """learning rates that are tried"""
    batch: Count = 16
    """sequences"""
    evals: Count = 2
    """of each run"""
    least_steps: Count = 50
    """updates of a run, under which a law of loss would be one of warmups"""
    multiple: Annotated[float, Range(1, 100)] = 4.0
    """the final run's time, relative to the budget"""
    margin: Annotated[float, Range(0.1, 1)] = 0.85
    """share of the final time that is planned for: devices are not always equally fast"""
    bootstrap: Annotated[int, Range(100, 100_000)] = 1000
    coverage: Share = 0.9
    """of the interval"""
    seed: Seed = 0
    """of the bootstrap"""


class Study:
    """The server's side of a study: what was submitted, and what came of it."""

    def __init__(self, args: Args):
        self.args = args
        self.client = Client(args.url, args.key or os.environ.get("PURELM_API_KEY", ""))
        self.rules = Rules.model_validate(self.client.rules())
        self.total = self.client.budget()["total_budget_seconds"]
        self.done: dict[int, Experiment] = {}

    def config(self, shape: Shape, tokens: float, rate: float, seconds: float) -> TrainingConfig:
        """Limits are whole numbers of seconds."""
        tokens = min(int(tokens), self.rules.max_train_tokens)
        limit = max(2.0, math.ceil(seconds))
        cfg = config(
            shape, tokens, rate, self.rules, batch=self.args.batch, evals=self.args.evals, seconds=limit
        )
        if cfg.total_train_tokens > self.rules.max_train_tokens:
            step = cfg.total_train_tokens // max(1, round(tokens / (self.rules.seq_len * self.args.batch)))
            raise ValueError(f"the data hold {self.rules.max_train_tokens:,} tokens, fewer than {step:,} of one run")
        return cfg

    def run(self, what: str, configs: Sequence[TrainingConfig]) -> list[Experiment]:
        """Submit what is new, as far as the budget's reservations allow; wait for all; say which failed."""
        ids: list[int] = []
        with progress_bar(what, len(configs), "runs") as update:
            for i, cfg in enumerate(configs):
                number = self._submitted(cfg, ids)
                if number is None:
                    say(f"{what}: the budget is spent, {i} of {len(configs)} runs were submitted")
                    break
                ids.append(number)
            found = self.client.wait(ids, lambda rows: update(sum(_ended(x) for x in rows)))
        runs = [Experiment.model_validate(x) for x in found]
        self.done |= {x.experiment_id: x for x in runs}
        for x in runs:
            if not isinstance(x.status, Completed):
                say(f"experiment {x.experiment_id} failed: {json.dumps(x.status.model_dump(mode='json'))[:300]}")
        return runs

    def _submitted(self, cfg: TrainingConfig, before: Sequence[int]) -> int | None:
        """Its number. While the budget is short, runs before it are awaited: they reserve more than they use.

        None if it stays short.
        """
        while True:
            try:
                return self.client.submit(cfg.model_dump(mode="json"), known=True)["experiment_id"]
            except InsufficientBudget:
                if all(_ended(self.client.experiment(x)) for x in before):
                    return None
                time.sleep(0.5)

    def planned(self, shape: Shape, seconds: float, rate: float, speed: Speed) -> TrainingConfig:
        """A run of about so many seconds, by the law of speed."""
        one = self.config(shape, 1, rate, 2.0)
        evals = self.args.evals * self.rules.n_val_tokens / 3
        tokens = seconds / (speed.a_token + speed.a_parameter * counted(one.architecture_config)) - evals
        cfg = self.config(shape, max(tokens, 1), rate, 2.0)
        if (steps := total_steps(cfg, self.rules)) < self.args.least_steps:
            raise ValueError(
                f"width {shape.width}: {seconds:.1f} s are enough for {steps} updates, fewer than least_steps "
                f"{self.args.least_steps}: give the key more seconds, or smaller --widths, --evals or n_val_tokens"
            )
        limit = max(2.0, math.ceil(SLACK * seconds_of(cfg, speed, self.rules)))
        return cfg.model_copy(update={"max_runtime_seconds": float(limit)})

    def submitted(self, kind: str) -> list[TrainingConfig] | None:
        """The configurations of a step, as planned the first time: what is measured later must not move them."""
        file = self.args.out / "plan.json"
        plan = json.loads(file.read_text()) if file.is_file() else {}
        return [TrainingConfig.model_validate(x) for x in plan[kind]] if kind in plan else None

    def plan(self, kind: str, configs: Iterable[TrainingConfig]) -> list[TrainingConfig]:
        """Those of the first time, or these, written down."""
        if (known := self.submitted(kind)) is not None:
            return known
        file, configs = self.args.out / "plan.json", list(configs)
        plan = json.loads(file.read_text()) if file.is_file() else {}
        plan[kind] = [x.model_dump(mode="json") for x in configs]
        track.write_text(file, json.dumps(plan, indent=1) + "\n")
        return configs


def _ended(row: dict[str, Any]) -> bool:
    return row["status"]["status_type"] in ("completed", "failed")


def _last(run: Experiment) -> float | None:
    return run.status.val_losses[-1] if isinstance(run.status, Completed) else None


@program
def main(args: Args) -> None:
    _checked(args)
    try:
        _main(args)
    except Failure as error:
        raise ValueError(f"the service at {args.url}: {error}") from None


def _checked(args: Args) -> None:
    for name in ("name", "widths", "final_widths", "rates"):
        if not getattr(args, name):
            raise ValueError(f"{name}: must not be empty")
    if len(set(args.widths)) < 4:
        raise ValueError(f"widths: at least 4 different ones determine a law, got {args.widths}")
    if len(set(args.rates)) < 3:
        raise ValueError(f"rates: a parabola needs 3 different ones, got {args.rates}")
    shapes((*args.widths, *args.final_widths))
    if args.forecasts.suffix != ".jsonl":
        raise ValueError(f"forecasts {args.forecasts}: must end in .jsonl")
    args.out.mkdir(parents=True, exist_ok=True)


def _main(args: Args) -> None:
    study = Study(args)
    among = shapes(sorted(set(args.widths)))
    say(f"{study.client.backend} back end, {study.total:,.0f} s of budget; {study.rules}")
    rate, tuned = _rates(study, among, _speed(study, among))
    grid: list[Experiment] = []
    for i, level in enumerate(LEVELS):  # the speed and what is left are known better with each
        speed = speed_of(study.done.values(), study.rules)
        left = USED_SHARE * study.client.budget()["remaining_seconds"]
        seconds = left * level / sum(LEVELS[i:]) / len(among)
        planned = (study.planned(shape, seconds, _rate(rate, study, shape), speed) for shape in among)
        grid += study.run(f"grid, level {i + 1}", study.plan(f"grid, level {i + 1}", planned))
    done = {x.experiment_id: (x.training_config, value) for x in [*tuned, *grid] if (value := _last(x)) is not None}
    runs = runs_of(list(done.values()))
    law = variable_projection.fit(runs)
    laws = resampled(random.key(args.seed), runs, law, args.bootstrap)
    speed = speed_of(study.done.values(), study.rules)
    choice, final = _final(study, law, speed, rate)
    n, d = counted(final.architecture_config), final.total_train_tokens
    where = random.fold_in(random.key(args.seed), 1)
    predicted, low, high = forecast(where, law, laws, runs, n, d, args.coverage)
    say(f"law {_short(law)}; final run: {choice.shape}, {n:,} parameters, {d:,} tokens, {choice.seconds:.0f} s")
    say(f"predicted loss {predicted:.4f}, {100 * args.coverage:.0f} % within {low:.4f} and {high:.4f}")
    _foretold(study, final, runs, (predicted, low, high))
    measured = _measured(study)
    held = None
    if measured is not None:
        held = settle(args.forecasts, args.name, *measured) if not _settled(args) else low <= measured[0] <= high
        say(f"measured {measured[0]:.4f} after {measured[1]:.0f} s: the interval {'held' if held else 'did not hold'}")
    result = {
        "name": args.name, "device": args.device, "backend": study.client.backend, "rules": study.rules.model_dump(),
        "budget": study.client.budget(), "law": law._asdict(), "speed": speed._asdict(),
        "rate": {"coefficient": rate[0], "exponent": rate[1]}, "predicted": [predicted, low, high],
        "coverage": args.coverage, "final": final.model_dump(mode="json"), "final_parameters": n,
        "measured": measured, "held": held, "final_run": study.client.final_run(),
        "experiments": [x.model_dump(mode="json") for x in sorted(study.done.values(), key=lambda x: x.experiment_id)],
    }  # fmt: skip
    track.write_text(args.out / "study.json", json.dumps(result, indent=1) + "\n")
    track.write_text(args.out / "study.md", study_page.page(result, runs, law))
    study_page.draw(args.out / "study.png", runs, law, laws, (n, d), (predicted, low, high), measured and measured[0])
    say(f"wrote {args.out / 'study.md'}")


def _short(law: Law) -> str:
    return f"{law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f}"


def _rate(rate: tuple[float, float], study: Study, shape: Shape) -> float:
    """By the law of rates, in three digits."""
    n = counted(study.config(shape, 1, 1.0, 2.0).architecture_config)
    return float(f"{rate[0] * n ** -rate[1]:.3g}")


def _speed(study: Study, among: Sequence[Shape]) -> Speed:
    """From a run of few tokens for the smallest and the largest model."""
    tokens = study.rules.seq_len * study.args.batch * study.args.evals * 4
    limit = max(2.0, study.total / 5)  # reserved, not used
    middle = sorted(study.args.rates)[len(study.args.rates) // 2]
    study.run("speed", study.plan("speed", (study.config(x, tokens, middle, limit) for x in (among[0], among[-1]))))
    return speed_of(study.done.values(), study.rules)


def _rates(study: Study, among: Sequence[Shape], speed: Speed) -> tuple[tuple[float, float], list[Experiment]]:
    """The law of the best learning rate, from a small and a middle model, and the best run of each."""
    pair, rates = (among[0], among[len(among) // 2]), sorted(study.args.rates)
    seconds = RATES_SHARE * study.total / (len(rates) * len(pair))
    configs = study.plan("rates", (study.planned(shape, seconds, rate, speed) for shape in pair for rate in rates))
    found = study.run("learning rates", configs)
    sizes, best, tuned = [], [], []
    for i, shape in enumerate(pair):
        mine = _widened(study, f"rates of {shape.width}", found[i * len(rates) : (i + 1) * len(rates)])
        sizes.append(float(counted(study.config(shape, 1, 1.0, 2.0).architecture_config)))
        best.append(best_rate(*zip(*_tried(mine), strict=True)))
        tuned.append(min((x for x in mine if _last(x) is not None), key=lambda x: _last(x) or 0.0))
    law = rate_law(sizes, best)
    say(f"best learning rates {', '.join(f'{x:.3g}' for x in best)}: {law[0]:.3g} N^-{law[1]:.2f}")
    return law, tuned


def _tried(found: Iterable[Experiment]) -> list[tuple[float, float]]:
    """(rate, loss) of the runs that were completed."""
    rows = [(x.training_config.optimizer_config.lr_scheduler.peak_value, _last(x)) for x in found]
    return sorted((rate, value) for rate, value in rows if value is not None)


def _widened(study: Study, kind: str, found: list[Experiment]) -> list[Experiment]:
    """The runs, and more while the best rate is the least or the greatest: each time one twice as far out."""
    for i in range(MOST_WIDER):
        tried = _tried(found)
        if len(tried) < 2:
            raise ValueError(f"{len(tried)} runs of {kind} were completed: give other --rates")
        at = min(range(len(tried)), key=lambda i: tried[i][1])
        if 0 < at < len(tried) - 1:
            break
        rate = tried[at][0] * (2.0 if at else 0.5)
        cfg = found[0].training_config
        scheduler = cfg.optimizer_config.lr_scheduler.model_copy(update={"peak_value": rate})
        optimizer = cfg.optimizer_config.model_copy(update={"lr_scheduler": scheduler})
        wider = study.plan(f"{kind}, {i}", [cfg.model_copy(update={"optimizer_config": optimizer})])
        found = [*found, *study.run(kind, wider)]
    return found


def _final(study: Study, law: Law, speed: Speed, rate: tuple[float, float]) -> tuple[Choice, TrainingConfig]:
    args = study.args
    seconds = args.multiple * study.total
    among = shapes(sorted(set(args.final_widths)))
    choice = best_run(
        law, speed, among, args.margin * seconds, study.rules, batch=args.batch, evals=args.evals
    )
    cfg = study.config(choice.shape, choice.tokens, _rate(rate, study, choice.shape), min(seconds, 43_200.0))
    known = study.plan("final", [cfg])[0]
    n = counted(known.architecture_config)
    there = float(loss(law, n, known.total_train_tokens))
    shape = Shape(known.architecture_config.hidden_size, known.architecture_config.num_hidden_layers)
    return Choice(shape, known.total_train_tokens, there, seconds_of(known, speed, study.rules)), known


def _foretold(study: Study, final: TrainingConfig, runs: Runs, what: tuple[float, float, float]) -> None:
    """Write the forecast down and submit it, once."""
    args = study.args
    if not any(row["name"] == args.name for row in track.read_rows(args.forecasts)):
        n, d = counted(final.architecture_config), final.total_train_tokens
        register(args.forecasts, Forecast(
            args.name, args.device or str(study.client.backend), study.total, final.max_runtime_seconds, n, d, *what,
            args.coverage, len(runs.loss), float(np.max(runs.flops)), 6.0 * n * d,
        ))  # fmt: skip
    if study.client.final_run() is None:
        study.client.submit_final(final.model_dump(mode="json"), what[0])
        study.client.start_final_run()


def _settled(args: Args) -> bool:
    return any(row["name"] == args.name and row["kind"] == "outcome" for row in track.read_rows(args.forecasts))


def _measured(study: Study) -> tuple[float, float] | None:
    """(last loss, seconds) of the final run, once it has ended; None if it failed."""
    evals = study.args.evals
    with progress_bar("final run", evals, "evaluations") as update:
        while not _ended(found := study.client.final_run() or {}):
            update(len(found["status"].get("val_losses", ())))
            time.sleep(1.0)
    status = found["status"]
    if status["status_type"] != "completed":
        say(f"the final run failed: {json.dumps(status)[:300]}")
        return None
    return status["val_losses"][-1], status["used_runtime_seconds"]


if __name__ == "__main__":
    main(tyro.cli(Args))
