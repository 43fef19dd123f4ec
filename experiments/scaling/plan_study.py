"""What planning is worth: the error of the predicted best size, of planned runs and of an IsoFLOP grid of equal cost.

    python -m experiments.scaling.plan_study --out experiments/results/scaling

The law is known (that of CS336's isoflops_curves.json), and so N* at the target. Both ways begin with the same runs of
the lowest budgets and their noise, and may then spend the same FLOPs: on the rest of the grid, or on what
`purelm.scaling.planner` proposes from the law fitted to the runs so far, in some rounds. Planned runs have the grid's
range of parameters, tokens a parameter and budgets. Repeated over seeds of the noise. It leaves plan_study.json and
plan_study.md in OUT.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

import purelm
from experiments.console import line_progress, program, say
from experiments.limits import Count, Place, Range, Seed
from experiments.scaling.fit import Flops
from purelm import random, track
from purelm.scaling import isoflop, planner, variable_projection
from purelm.scaling.laws import FLOPS, Law, loss, optimum, power
from purelm.scaling.runs import Runs, taken

LAW = Law(2.69, 1606.4, 3210.7, 0.34, 0.36)
GRID = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)


@dataclass(frozen=True)
class Args:
    """Compare planned runs with an IsoFLOP grid of equal cost."""

    out: Place
    seeds: Annotated[int, Range(1, 10_000)] = 50
    noise: Annotated[float, Range(1e-6, 0.1)] = 0.005
    """standard deviation of ln loss"""
    target: Flops = 1e24
    sizes: Annotated[int, Range(3, 100)] = 8
    """of each budget of the grid"""
    width: Annotated[float, Range(1.1, 1000)] = 8.0
    """a budget's sizes reach from the best over this to the best times this"""
    first: Annotated[int, Range(1, 8)] = 3
    """budgets of the grid that both ways begin with"""
    rounds: Annotated[int, Range(1, 10)] = 3
    """of planning; each may spend an equal part"""
    repeats: Count = 1
    """how often one candidate may be taken in a round"""
    seed: Seed = 0


@program
def main(args: Args) -> None:
    grid = _grid(args)
    rest_cost = float(grid.flops[args.first * args.sizes :].sum())
    true = optimum(LAW, args.target).parameters
    found: dict[str, list[float]] = {}
    counts: dict[str, list[int]] = {}
    update = line_progress("seeds", args.seeds)
    for i, key in enumerate(random.split(random.key(args.seed), args.seeds)):
        for name, runs in _ways(args, grid, rest_cost, key).items():
            law = variable_projection.fit(runs)
            found.setdefault(name, []).append(math.log(optimum(law, args.target).parameters / true))
            counts.setdefault(name, []).append(len(runs.loss))
            if name == "grid":
                try:
                    n = power(isoflop.laws_of(isoflop.minima(runs))[0], args.target)
                except ValueError:  # noise made a parabola open downwards
                    n = math.nan
                found.setdefault("grid, parabolas", []).append(math.log(n / true))
                counts.setdefault("grid, parabolas", []).append(len(runs.loss))
        update(i + 1)
    rows = [_row(name, np.array(x), counts[name]) for name, x in found.items()]
    result = {
        "purelm": purelm.__version__, "settings": {k: v for k, v in dataclasses.asdict(args).items() if k != "out"},
        "law": LAW._asdict(), "parameters": true, "flops_of_the_grid": float(grid.flops.sum()), "ways": rows,
        "cost_for_the_grid's_deviation": _equal_cost(args, grid, rest_cost),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    text = report(result)
    track.write_json(args.out / "plan_study.json", result)
    track.write_text(args.out / "plan_study.md", text)
    print(text)
    say(f"{args.out}: plan_study.json, plan_study.md")


def _grid(args: Args) -> Runs:
    """The IsoFLOP grid, without noise, by rising budgets."""
    c = np.repeat(GRID, args.sizes)
    spread = np.tile(np.geomspace(1 / args.width, args.width, args.sizes), len(GRID))
    n = optimum(LAW, c).parameters * spread
    return Runs(n, c / (FLOPS * n), loss(LAW, n, c / (FLOPS * n)))


def _candidates(args: Args, grid: Runs) -> planner.Points:
    each = grid.tokens / grid.parameters
    return planner.grid(
        (grid.parameters.min(), grid.parameters.max()), (GRID[0], GRID[-1]), 24, 12,
        tokens_each=(each.min(), each.max()),
    )  # fmt: skip


def _ways(args: Args, grid: Runs, cost: float, key: random.Key) -> dict[str, Runs]:
    """The runs of each way, with noise."""
    k_grid, k_plan, k_few = random.split(key, 3)
    whole = _noisy(grid, args.noise, k_grid)
    first = taken(whole, slice(0, args.first * args.sizes))
    points = _candidates(args, grid)

    def planned(key: random.Key, n: int | None) -> Runs:
        runs, left = first, cost
        for i, k in enumerate(random.split(key, args.rounds)):
            law = variable_projection.fit(runs)
            some = None if n is None else (n - len(runs.loss) + len(first.loss)) // (args.rounds - i)
            plan = planner.propose(
                runs, law, args.target, left / (args.rounds - i), points, n=some, noise=args.noise, repeats=args.repeats
            )
            left -= math.fsum(plan.cost)
            new = _noisy(Runs(plan.parameters, plan.tokens, loss(LAW, plan.parameters, plan.tokens)), args.noise, k)
            runs = Runs(*(np.concatenate(x) for x in zip(runs, new, strict=True)))
        return runs

    more = len(whole.loss) - len(first.loss)
    return {"first runs alone": first, "grid": whole, "planned": planned(k_plan, None),
            "planned, as many runs": planned(k_few, more)}  # fmt: skip


def _noisy(runs: Runs, noise: float, key: random.Key) -> Runs:
    z = random.normal(key, runs.loss.shape, torch.float64).numpy()
    return runs._replace(loss=runs.loss * np.exp(noise * z))


def _equal_cost(args: Args, grid: Runs, cost: float) -> float:
    """The share of the grid's further cost for which a plan, of one round and the law known, is as sure as it is."""
    g = planner.gradient(LAW, args.target)
    first = taken(grid, slice(0, args.first * args.sizes))
    goal = float(g @ planner.covariance(grid, LAW, args.noise) @ g)
    low, high = 1e-4, 1.0
    for _ in range(20):
        middle = math.sqrt(low * high)
        plan = planner.propose(
            first, LAW, args.target, middle * cost, _candidates(args, grid), noise=args.noise, repeats=args.repeats
        )
        low, high = (low, middle) if plan.variance_after <= goal else (middle, high)
    return high


def _row(name: str, errors: NDArray[np.float64], counts: list[int]) -> dict[str, Any]:
    fine = errors[np.isfinite(errors)]
    size = np.abs(fine)
    return {
        "way": name, "runs": int(np.median(counts)), "failed": int(len(errors) - len(fine)),
        "median_error": float(np.median(size)), "root_mean_square": float(np.sqrt(np.square(fine).mean())),
        "worst": float(size.max()), "bias": float(np.median(fine)),
    }  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """The page in Markdown."""
    s = result["settings"]
    lines = [
        "# Planned runs and an IsoFLOP grid of equal cost", "",
        f"Errors of ln N* at {s['target']:.3g} FLOPs, N* being {result['parameters']:.4g}; {s['seeds']} seeds of noise "
        f"of {s['noise']:.2%}; {result['flops_of_the_grid']:.3g} FLOPs in all, the first runs included.", "",
        "| way | runs | median size | root mean square | worst | median | failed |", "|---" * 7 + "|",
    ]  # fmt: skip
    lines += [
        f"| {r['way']} | {r['runs']} | {r['median_error']:.4f} | {r['root_mean_square']:.4f} | {r['worst']:.4f} "
        f"| {r['bias']:+.4f} | {r['failed']} |"
        for r in result["ways"]
    ]
    share = result["cost_for_the_grid's_deviation"]
    lines += ["", f"By the delta method a plan is as sure as the grid for {share:.1%} of its further cost.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Args))
