"""Propose the next runs of a scaling study: those that make the best model's size surest for what is left to spend.

    python -m experiments.scaling.plan runs.json --budget 3e20 --target 1e22
    python -m experiments.scaling.plan runs.json --budget 3e20 --target 1e22 --n 6 --of loss --json plan.json

RUNS is a file of finished runs, as `experiments.scaling.fit` reads it. A law is fitted to them; candidates are a grid
of sizes and budgets, and those are taken that lower the standard deviation of ln N* at the target the most
(`purelm.scaling.planner`), for at most --budget FLOPs in all. With --json the plan is written to a file.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import tyro

import purelm
from experiments.console import program, say
from experiments.limits import Count, Place, Range
from experiments.scaling.count import Counting
from experiments.scaling.fit import Flops
from experiments.scaling.read import read_runs
from purelm import track
from purelm.files import refuse_overwrite
from purelm.scaling import planner, variable_projection
from purelm.scaling.laws import Law, optimum
from purelm.scaling.runs import Runs, lowest_of_each

Number = Annotated[float, Range(1e-6, 1e40)]


@dataclass(frozen=True)
class Args:
    """Propose the next runs of a scaling study."""

    runs: tyro.conf.Positional[Place]
    """.json, .jsonl or .csv of finished runs"""
    budget: Flops
    """FLOPs for all new runs together"""
    target: Flops
    """FLOPs of the run that is to be predicted"""
    of: Literal["parameters", "loss"] = "parameters"
    """what is to be sure: the best number of parameters there, or its loss"""
    n: Count | None = None
    """at most so many runs"""
    parameters: tuple[Number, Number] | None = None
    """least and most of the candidates; default: a third of the smallest run's to three times the largest's"""
    flops: tuple[Flops, Flops] | None = None
    """least and most of a candidate; default: of the smallest run to --budget"""
    tokens_each: tuple[Number, Number] = (1.0, 1000.0)
    """least and most tokens a parameter"""
    sizes: Annotated[int, Range(1, 200)] = 24
    budgets: Annotated[int, Range(1, 200)] = 12
    counting: Counting = "all"
    """of a service's configurations, as for `experiments.scaling.fit`"""
    lowest: bool = False
    """of runs with one N and D take that of the lowest loss alone"""
    repeats: Annotated[int, Range(1, 1000)] = 1
    """how often one candidate may be taken, with another seed each time"""
    noise: Annotated[float, Range(1e-6, 1.0)] | None = None
    """standard deviation of ln loss between seeds; default: from the runs' distances from the law"""
    json: Place | None = None
    """file for the plan"""


@program
def main(args: Args) -> None:
    if args.json is not None:
        refuse_overwrite([args.json], [args.runs])
    runs = read_runs(args.runs, args.counting)
    if args.lowest:
        runs = lowest_of_each(runs)
    law = variable_projection.fit(runs)
    n = args.parameters or (runs.parameters.min() / 3, 3 * runs.parameters.max())
    flops = args.flops or (min(runs.flops.min(), args.budget), args.budget)
    points = planner.grid(n, flops, args.sizes, args.budgets, tokens_each=args.tokens_each)
    plan = planner.propose(
        runs, law, args.target, args.budget, points, n=args.n, of=args.of, noise=args.noise, repeats=args.repeats
    )
    print(report(runs, law, plan, args.target, args.of))
    if args.json is not None:
        track.write_json(args.json, _result(runs, law, plan, args))
        say(f"{args.json}: the plan")


def _result(runs: Runs, law: Law, plan: planner.Plan, args: Args) -> dict[str, Any]:
    names = ("parameters", "tokens", "flops", "deviation")
    rows = zip(plan.parameters, plan.tokens, plan.cost, np.sqrt(plan.variance), strict=True)
    return {
        "purelm": purelm.__version__, "runs": len(runs.loss), "law": law._asdict(), "noise": plan.noise,
        "settings": {k: v for k, v in dataclasses.asdict(args).items() if k not in ("runs", "json")},
        "predicted": optimum(law, args.target)._asdict(),
        "deviation_before": math.sqrt(plan.variance_before), "deviation_after": math.sqrt(plan.variance_after),
        "cost": math.fsum(plan.cost),
        "plan": [dict(zip(names, map(float, row), strict=True)) for row in rows],
    }  # fmt: skip


def report(runs: Runs, law: Law, plan: planner.Plan, target: float, of: str) -> str:
    """The page in Markdown."""
    best, what = optimum(law, target), {"parameters": "ln N*", "loss": "ln loss"}[of]
    before, after = math.sqrt(plan.variance_before), math.sqrt(plan.variance_after)
    lines = [
        f"# Next runs, after {len(runs.loss)}", "",
        f"At {target:.4g} FLOPs the law predicts N* {best.parameters:.4g}, D* {best.tokens:.4g}, loss {best.loss:.4f}. "
        f"Runs are taken to differ by {plan.noise:.2%} between seeds: the standard deviation of {what} is {before:.4g} "
        f"now, and {after:.4g} after these {len(plan.cost)} runs of {math.fsum(plan.cost):.4g} FLOPs.", "",
        f"| run | parameters | tokens | tokens a parameter | FLOPs | then, deviation of {what} |", "|---" * 6 + "|",
    ]  # fmt: skip
    rows = zip(plan.parameters, plan.tokens, plan.cost, plan.variance, strict=True)
    for i, (n, d, cost, variance) in enumerate(rows, 1):
        lines.append(f"| {i} | {n:.4g} | {d:.4g} | {d / n:.4g} | {cost:.4g} | {math.sqrt(variance):.4g} |")
    if not len(plan.cost):
        lines.append("No candidate fits into the budget.")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Args))
