"""Spend a budget of the training service, foretell the best run of a larger one, and see.

    python -m experiments.scaling.serve --backend real ... &
    PURELM_API_KEY=12345678 python -m experiments.scaling.study --name cpu --out results/scaling/cpu \
        --forecasts results/scaling/forecasts.jsonl --widths 32 48 64 96 128 --final-widths 64 96 128 192 256

It goes in steps, each from the results of those before: two short runs for the device's speed; learning rates of a
small and a middle model and of longer runs, for a law of them; --widths at three times; the law of loss, by variable
projection, with bootstraps of all runs and of parts of them; the shape and the number of tokens that are best in
--multiple times the budget; the prediction of their loss, which is appended to FORECASTS and submitted; the final run;
the outcome.

Experiments lie on the server: the same command goes on where it stopped, since a configuration runs once. It leaves
study.json, study.md and study.png in OUT.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from experiments.console import program, progress_bar, say
from experiments.limits import Count, Place, Range, Seed, Share, Text
from experiments.lock import locked
from experiments.scaling import study_page
from experiments.scaling.client import Client, Conflict, Failure, given_key
from experiments.scaling.decide import (
    HEAD_DIM,
    RateLaw,
    Shape,
    Speed,
    best_run,
    counted,
    rate_of,
    runs_of,
    seconds_of,
    shapes,
    speed_of,
)
from experiments.scaling.forecasts import Forecast, read_rows, register, renew_page, settle
from experiments.scaling.service.schemas import MAX_SECONDS, Experiment, TrainingConfig
from experiments.scaling.study_steps import Server, Sizes, device_speed, ended, last, learning_rates
from purelm import random, track
from purelm.scaling.forecast import fitted, forecast
from purelm.scaling.laws import Law
from purelm.scaling.runs import Runs

Width = Annotated[int, Range(16, 16_384)]
Rate = Annotated[float, Range(0, 10, open_low=True)]

USED_SHARE = 0.8  # of what is left is planned for: runs reserve more than they use, and may take longer
LEVELS = (1.0, 3.0, 9.0)  # times of the grid, relative
TRIES = 9  # of a request: some 100 s
FREE = ("out", "forecasts", "url", "key", "device", "bootstrap", "coverage", "seed")  # arguments that plan no run
OWN = ("max_runtime_seconds",)  # of a final run: the service's own


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
    """of the runs that the law is fitted to: at least 4 different ones"""
    final_widths: tuple[Width, ...] = (48, 64, 96, 128, 160, 192, 256)
    """among which the final one is chosen"""
    aspect: Annotated[int, Range(8, 1024)] = 32
    """layers of a model are its width divided by this, 2 at least"""
    head_dim: Annotated[int, Range(8, 256)] = HEAD_DIM
    """widths are multiples of it; kernels of a GPU want 64"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of weights, activations and moments alike, as the course has it"""
    rates: tuple[Rate, ...] = (2e-3, 4e-3, 8e-3, 1.6e-2)
    """learning rates that are tried"""
    batch: Count = 16
    """sequences"""
    evals: Count = 2
    """of each run"""
    least_steps: Count = 50
    """updates of a run, under which a law of loss would be one of warmups"""
    multiple: Annotated[float, Range(0.1, 100)] = 4.0
    """the final run's time, relative to the budget"""
    margin: Annotated[float, Range(0.1, 1)] = 0.85
    """share of the final time that is planned for: devices are not always equally fast"""
    bootstrap: Annotated[int, Range(100, 100_000)] = 1000
    coverage: Share = 0.9
    """of the interval"""
    seed: Seed = 0
    """of the bootstrap"""


@program
def main(args: Args) -> None:
    _checked(args)
    key = given_key(args.key)
    with locked(args.out, "--out"):
        try:
            carry_out(args, patient(args.url, key))
        except Failure as error:
            raise ValueError(f"the service at {args.url}: {error}") from None


def patient(url: str, key: str) -> Client:
    """A client that waits for a server which is started again; an address or a key that is wrong now is told soon."""
    Client(url, key).budget()
    return Client(url, key, tries=TRIES)


def _checked(args: Args) -> None:
    for name in ("name", "widths", "final_widths", "rates"):
        if not getattr(args, name):
            raise ValueError(f"{name}: must not be empty")
    if len(set(args.widths)) < 4:
        raise ValueError(f"widths: at least 4 different ones determine a law, got {args.widths}")
    if len(set(args.rates)) < 3:
        raise ValueError(f"rates: a parabola needs 3 different ones, got {args.rates}")
    _shapes(args, (*args.widths, *args.final_widths))
    if args.forecasts.suffix != ".jsonl":
        raise ValueError(f"forecasts {args.forecasts}: must end in .jsonl")
    read_rows(args.forecasts)
    args.out.mkdir(parents=True, exist_ok=True)


def carry_out(args: Args, client: Client) -> None:
    """The whole study; every step that was done before is taken from the server."""
    server = Server(client, Sizes(args.batch, args.evals, args.least_steps, args.dtype), args.out / "plan.json")
    if server.final_budgets is not None and args.multiple > server.final_budgets:
        raise ValueError(
            f"multiple {args.multiple:g}: this server's final runs take {server.final_budgets:g} budgets at most: give "
            f"--multiple {server.final_budgets:g}, or start the server with --final {args.multiple:g}"
        )
    among = _shapes(args, args.widths)
    shaped = {k: v for k, v in dataclasses.asdict(args).items() if k not in FREE}
    server.begin({**shaped, "backend": client.backend, "budget": server.total, "rules": server.rules.model_dump()})
    say(f"{client.backend} back end, {server.total:,.0f} s of budget; {server.rules}")
    speed = device_speed(server, among, min(args.rates) / 4)
    rates, tuned = learning_rates(server, among, args.rates, speed)
    grid = _grid(server, among, rates)
    done = {x.experiment_id: (x.training_config, value) for x in [*tuned, *grid] if (value := last(x)) is not None}
    runs = runs_of(list(done.values()))
    fits = fitted(random.key(args.seed), runs, args.bootstrap)
    law, laws = fits.whole.law, fits.whole.laws
    speed = speed_of(server.done.values(), server.rules)
    final = _final(args, server, law, speed, rates)
    n, d = counted(final.architecture_config), final.total_train_tokens
    predicted = forecast(random.fold_in(random.key(args.seed), 1), fits, n, d, args.coverage)
    say(f"law {law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f}")
    say(f"final run: {n:,} parameters, {d:,} tokens, {seconds_of(final, speed, server.rules):,.0f} s")
    row = _foretold(args, server, final, runs, predicted)
    value, low, high = written = (row["loss"], row["low"], row["high"])  # once, by whatever samples
    say(f"predicted loss {value:.4f}, {100 * row['coverage']:.0f} % within {low:.4f} and {high:.4f}")
    measured, held = _measured(args, server), None
    if measured is not None:
        held = row["low"] <= measured[0] <= row["high"]
        if not _rows(args, "outcome"):
            settle(args.forecasts, args.name, *measured)
        renew_page(args.forecasts)
        say(f"measured {measured[0]:.4f} after {measured[1]:,.0f} s: the interval {'held' if held else 'did not hold'}")
    result = {
        "name": args.name, "device": args.device, "backend": client.backend, "rules": server.rules.model_dump(),
        "budget": client.budget(), "law": law._asdict(), "speed": speed._asdict(), "rate": rates._asdict(),
        "predicted": written, "coverage": row["coverage"], "final": final.model_dump(mode="json"),
        "final_parameters": n, "final_seconds": args.multiple * server.total, "measured": measured, "held": held,
        "final_run": client.final_run(),
        "experiments": [x.model_dump(mode="json") for x in sorted(server.done.values(), key=lambda x: x.experiment_id)],
    }  # fmt: skip
    track.write_text(args.out / "study.json", json.dumps(result, indent=1) + "\n")
    track.write_text(args.out / "study.md", study_page.page(result, runs, law))
    study_page.draw(args.out / "study.png", runs, law, laws, (n, d), written, measured and measured[0])
    say(f"wrote {args.out / 'study.md'}")


def _shapes(args: Args, widths: Sequence[int]) -> tuple[Shape, ...]:
    return shapes(sorted(set(widths)), args.aspect, args.head_dim)


def _grid(server: Server, among: Sequence[Shape], rates: RateLaw) -> list[Experiment]:
    """Every model at times that rise; the speed and what is left of the budget are known better with each level."""
    found: list[Experiment] = []
    for i, level in enumerate(LEVELS):
        speed = speed_of(server.done.values(), server.rules)
        left = server.client.budget()["remaining_seconds"]
        seconds = USED_SHARE * left * level / sum(LEVELS[i:]) / len(among)
        most = left - (len(among) - 1) * seconds  # so that the last one can be reserved, too
        kind = f"grid, level {i + 1}"
        plan = server.plan(kind, partial(_level, server, among, seconds, rates, speed, most))
        found += server.run(kind, plan)
    return found


def _level(
    server: Server, among: Sequence[Shape], seconds: float, rates: RateLaw, speed: Speed, most: float
) -> list[TrainingConfig]:
    return [server.planned(shape, seconds, rates, speed, most) for shape in among]


def _final(args: Args, server: Server, law: Law, speed: Speed, rates: RateLaw) -> TrainingConfig:
    """The best that fits in the time; as it was submitted, if it was."""

    def best() -> list[TrainingConfig]:
        seconds, among = args.margin * args.multiple * server.total, _shapes(args, args.final_widths)
        shape, tokens, *_ = best_run(law, speed, among, seconds, server.rules, batch=args.batch, evals=args.evals)
        n = counted(server.config(shape, 1, 1.0, 2.0).architecture_config)
        # The service gives the final run its own time, whatever is said here.
        return [server.config(shape, tokens, rate_of(rates, n, tokens), min(args.multiple * server.total, MAX_SECONDS))]

    return server.plan("final", best)[0]


def _rows(args: Args, kind: str) -> list[dict[str, Any]]:
    return [x for x in read_rows(args.forecasts) if x["name"] == args.name and x["kind"] == kind]


def _foretold(
    args: Args, server: Server, final: TrainingConfig, runs: Runs, what: tuple[float, float, float]
) -> dict[str, Any]:
    """Write the forecast down and submit it, once; the row. ValueError where the final run is known of already."""
    n, d = counted(final.architecture_config), final.total_train_tokens
    asked, config = server.client.final_run(), final.model_dump(mode="json")

    def check(asked: dict[str, Any] | None) -> None:
        if asked is not None and any(asked["training_config"][k] != v for k, v in config.items() if k not in OWN):
            raise ValueError("the final run that was asked for with this key is not this study's: take another key")

    check(asked)
    if not _rows(args, "forecast"):
        if asked is not None:
            raise ValueError(f"name {args.name!r}: the final run was asked for already, and can be foretold no more")
        register(args.forecasts, Forecast(
            args.name, args.device or str(server.client.backend), server.total, args.multiple * server.total, n, d,
            *what, args.coverage, len(runs.loss), float(np.max(runs.flops)), 6.0 * n * d,
        ))  # fmt: skip
    row = _rows(args, "forecast")[0]
    if (row["parameters"], row["tokens"], row["budget_seconds"]) != (n, d, server.total):
        raise ValueError(f"forecasts {args.forecasts}: {args.name!r} is of another run: give another --name")
    if asked is None:
        server.client.submit_final(config, row["loss"])
        with contextlib.suppress(Conflict):  # asked for before an answer was lost, or by another study of this key
            server.client.start_final_run()
        check(server.client.final_run())
    return row


def _measured(args: Args, server: Server) -> tuple[float, float] | None:
    """(last loss, seconds) of the final run, once it has ended; None if it failed."""
    with progress_bar("final run", args.evals, "evaluations") as update:
        while True:
            found = server.client.final_run()
            assert found is not None
            update(len(found["status"].get("val_losses", ())))
            if ended(found):
                break
            time.sleep(1.0)
    status = found["status"]
    if status["status_type"] != "completed":
        say(f"the final run failed: {json.dumps(status)[:300]}")
        return None
    return status["val_losses"][-1], status["used_runtime_seconds"]


if __name__ == "__main__":
    main(tyro.cli(Args))
