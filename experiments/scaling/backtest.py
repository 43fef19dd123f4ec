"""How often forecasts hold, on runs that are finished: the large ones are foretold from the small ones.

    python -m experiments.scaling.backtest runs.csv --drop-highest 5 --sizes 14 40

Runs are put in the order of their FLOPs. For each of --shares the first so many are known, all of them or --sizes drawn
from them, --repeats times; those with more than --beyond times the FLOPs of the largest known one are foretold, --most
of them at most. Two intervals stand side by side: of bootstrap samples of the known runs, and of these and of two
ranges of them (`purelm.scaling.forecast`). An interval that is well made holds as often as it says, and is no wider
than it must be. Forecasts of one draw share their law and are not independent: repeats count, not forecasts.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray
from torch import Tensor

import purelm
from experiments import limits
from experiments.console import line_progress, program, say
from experiments.limits import Count, Place, Range, Seed, Share, Whole
from experiments.scaling.count import Counting
from experiments.scaling.read import read_runs
from purelm import random, track
from purelm.scaling.forecast import Ranges, fitted, forecast
from purelm.scaling.runs import Runs, taken, without_highest

WAYS = ("all runs", "all runs and two ranges")
Part = Annotated[float, Range(0.0, 1.0, open_low=True, open_high=True)]


@dataclass(frozen=True)
class Args:
    """How often forecasts hold, on runs that are finished."""

    runs: tyro.conf.Positional[Place]
    """.json, .jsonl or .csv, as of experiments.scaling.fit"""
    shares: tuple[Part, ...] = (0.2, 0.4, 0.6)
    """of the runs, in the order of FLOPs, that are known"""
    sizes: tuple[Annotated[int, Range(8, 1_000_000)], ...] = ()
    """also draw so many of the known ones, as a study with a small budget has them"""
    repeats: Count = 3
    """draws of each of --sizes"""
    beyond: Annotated[float, Range(1, 1e12)] = 5.0
    """times the FLOPs of the largest known run"""
    most: Count = 20
    """runs that are foretold from one draw"""
    coverage: Share = 0.9
    bootstrap: Annotated[int, Range(20, 100_000)] = 200
    counting: Counting = "all"
    drop_highest: Whole = 0
    """runs of the highest losses that are left out"""
    seed: Seed = 0
    out: Place | None = None
    """.json; none: print alone"""


class Told(NamedTuple):
    """One forecast and what came of it."""

    size: int  # 0: all that were known
    way: str
    held: bool
    width: float  # ln(high / low)
    error: float  # ln(loss / foretold)


@program
def main(args: Args) -> None:
    limits.check(args)
    if not 0 < args.coverage < 1:
        raise ValueError(f"coverage must be between 0 and 1, got {args.coverage}")
    if not args.shares:
        raise ValueError("shares: must not be empty")
    runs = read_runs(args.runs, args.counting)
    runs = without_highest(runs, args.drop_highest)
    draws = list(known(args, runs))
    told: list[Told] = []
    update = line_progress("draws", len(draws))
    for i, (size, at) in enumerate(draws):
        told += foretold(args, random.fold_in(random.key(args.seed), i), runs, size, at)
        update(i + 1)
    if not told:
        raise ValueError(f"beyond: no run has {args.beyond:g} times the FLOPs of the known ones: give less")
    rows = [row for size in (0, *args.sizes) for way in WAYS if (row := _row(told, size, way)) is not None]
    print(table(rows, args.coverage))
    if args.out is not None:
        settings = {k: v for k, v in dataclasses.asdict(args).items() if k not in ("runs", "out")}
        track.write_json(args.out, {"purelm": purelm.__version__, "settings": settings, "rows": rows})
        say(f"wrote {args.out}")


def known(args: Args, runs: Runs) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(size, places of the known runs) of each draw."""
    order = np.argsort(runs.flops, kind="stable")
    key = random.fold_in(random.key(args.seed), 1 << 20)
    for i, share in enumerate(args.shares):
        first = order[: math.ceil(share * len(order))]
        yield 0, first
        for j, size in enumerate(args.sizes):
            for k in range(args.repeats if size < len(first) else 0):
                drawn = random.permutation(_folded(key, i, j, k), len(first)).numpy()[:size]
                yield size, first[np.sort(drawn)]


def foretold(args: Args, key: Tensor, runs: Runs, size: int, at: NDArray[np.int64]) -> list[Told]:
    """Forecasts of the runs beyond, by both ways."""
    some = taken(runs, at)
    far = np.flatnonzero(runs.flops > args.beyond * some.flops.max())
    if not len(far):
        return []
    try:
        fits = fitted(random.fold_in(key, 0), some, args.bootstrap)
    except ValueError as error:
        say(f"{len(at)} runs: {error}")
        return []
    told = []
    chosen = far[np.sort(random.permutation(random.fold_in(key, 1), len(far)).numpy()[: args.most])]
    for j in chosen:
        for way, ways in zip(WAYS, (Ranges(fits.whole, ()), fits), strict=True):
            n, d = float(runs.parameters[j]), float(runs.tokens[j])
            value, low, high = forecast(_folded(key, 2, int(j)), ways, n, d, args.coverage)
            measured = float(runs.loss[j])
            told.append(Told(size, way, low <= measured <= high, math.log(high / low), math.log(measured / value)))
    return told


def _folded(key: Tensor, *numbers: int) -> Tensor:
    for number in numbers:
        key = random.fold_in(key, number)
    return key


def _row(told: list[Told], size: int, way: str) -> dict[str, Any] | None:
    some = [x for x in told if (x.size, x.way) == (size, way)]
    if not some:
        return None
    return {
        "known": size or "all", "way": way, "forecasts": len(some), "held": float(np.mean([x.held for x in some])),
        "width": float(np.median([x.width for x in some])),
        "error": float(np.sqrt(np.mean([x.error**2 for x in some]))),
    }  # fmt: skip


def table(rows: list[dict[str, Any]], coverage: float) -> str:
    """The rows in Markdown; widths and errors in percent of the loss."""
    lines = [
        f"| known runs | interval of | forecasts | held, of {100 * coverage:g} % | median width | RMS error |",
        "|---|---|---|---|---|---|",
    ]
    for x in rows:
        lines.append(
            f"| {x['known']} | {x['way']} | {x['forecasts']} | {100 * x['held']:.0f} % | {100 * x['width']:.1f} % "
            f"| {100 * x['error']:.1f} % |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Args))
