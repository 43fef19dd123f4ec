"""Fit scaling laws to finished runs, and say what is best for larger budgets.

    python -m experiments.scaling.fit runs.json --out results/scaling
    python -m experiments.scaling.fit runs.csv --budgets 1e22 1e23 --bootstrap 4000 --drop-highest 5

RUNS is JSON (a list), JSON lines or CSV with parameters, loss, and tokens or FLOPs. The default is variable projection
on the robust objective of Chinchilla's third approach; beside it stand that approach from 4,500 starts (--grid),
parabolas and lowest losses of each budget, where there are such. Intervals are from bootstrap samples. The law is also
fitted without the largest budget, whose losses are then predicted. It leaves in OUT: fits.json, report.md, fits.png.

The training service's answer to GET /experiments is read too, with N as --counting says:

    curl -s -H "X-API-Key: $KEY" localhost:8000/experiments > runs.json
    python -m experiments.scaling.fit runs.json --counting blocks --lowest
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

import purelm
from experiments import limits
from experiments.console import program, say
from experiments.limits import Place, Range, Seed, Share, Whole
from experiments.scaling.count import Counting
from experiments.scaling.figures import draw
from experiments.scaling.read import read
from purelm import random
from purelm.files import staging, sync
from purelm.scaling import isoflop, parametric, variable_projection
from purelm.scaling.bootstrap import interval, resampled
from purelm.scaling.laws import Law, exponents, loss, optimum, power
from purelm.scaling.runs import Runs, budgets, lowest_of_each, taken, without_highest

Flops = Annotated[float, Range(1.0, 1e40)]


@dataclass(frozen=True)
class Args:
    """Fit scaling laws to finished runs."""

    runs: tyro.conf.Positional[Place]
    """.json, .jsonl or .csv"""
    out: Place | None = None
    """folder for fits.json, report.md and fits.png; none: print alone"""
    budgets: tuple[Flops, ...] = ()
    """FLOPs to predict for; default 10 and 100 times the largest"""
    bootstrap: Whole = 1000
    """samples for the intervals; 0: none"""
    coverage: Share = 0.95
    """of the intervals"""
    counting: Counting = "all"
    """what N is of a service's configurations: all parameters; head: without token embeddings; blocks: without the head
    either; kaplan: 12 n d^2"""
    lowest: bool = False
    """of runs with one N and D (several learning rates, say) take that of the lowest loss alone"""
    drop_highest: Whole = 0
    """runs of the highest losses that are left out: Besiroglu et al. leave out 5"""
    grid: bool = False
    """also approach 3 from 4,500 starts, in half a minute"""
    tolerance: Share = 0.01
    """budgets that differ by less are one"""
    seed: Seed = 0


@program
def main(args: Args) -> None:
    limits.check(args)
    if not 0 < args.coverage < 1:
        raise ValueError(f"coverage must be between 0 and 1, got {args.coverage}")
    runs, left_out, counting = read(args.runs, args.counting)
    if args.lowest:
        runs = lowest_of_each(runs)
    runs = without_highest(runs, args.drop_highest)
    targets = args.budgets or tuple(float(f"{m * runs.flops.max():.3g}") for m in (10, 100))
    law = variable_projection.fit(runs)
    _check_falls(runs, law)
    laws = resampled(random.key(args.seed), runs, law, args.bootstrap) if args.bootstrap else None
    result: dict[str, Any] = {
        "runs": len(runs.loss), "left_out": left_out, "counting": counting, "purelm": purelm.__version__,
        "settings": {k: v for k, v in dataclasses.asdict(args).items() if k not in ("runs", "out")},
        "law": law._asdict(), "objective": float(parametric.objective(runs, law)), "exponents": exponents(law),
        "intervals": _intervals(law, laws, args.coverage), "predicted": _predicted(law, laws, targets, args.coverage),
    }  # fmt: skip
    if args.grid:
        other, found = parametric.fit(runs)
        at_best = float((found.value < found.value.min() + 1e-6).mean())
        result["grid"] = {
            "law": other._asdict(), "objective": float(parametric.objective(runs, other)), "starts_at_the_best": at_best
        }  # fmt: skip
    result["isoflop"] = _isoflop(runs, targets, args.tolerance)
    held = _held_out(runs, args.tolerance)
    result["held_out"] = None if held is None else _compared(runs, *held, args.tolerance)
    text = report(result, targets)
    print(text)
    if args.out is not None:
        with staging(args.out) as staged:
            (staged / "fits.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
            (staged / "report.md").write_text(text + "\n![runs, laws and residuals](fits.png)\n")
            draw(
                runs,
                law,
                laws,
                targets,
                staged / "fits.png",
                tolerance=args.tolerance,
                coverage=args.coverage,
                held=held,
            )
            for name in ("fits.png", "report.md", "fits.json"):
                sync(staged / name)
                (staged / name).replace(args.out / name)
        say(f"{args.out}: fits.json, report.md, fits.png")


def _check_falls(runs: Runs, law: Law) -> None:
    """ValueError where the law's loss does not fall with N, or with D: then no size is best for a budget."""
    for name, x, size, exponent in (("parameters", runs.parameters, law.A, law.alpha),
                                    ("tokens", runs.tokens, law.B, law.beta)):  # fmt: skip
        falls = size * (x.min() ** -exponent - x.max() ** -exponent)
        if not falls > 1e-6 * runs.loss.min():
            raise ValueError(f"runs: by the law that fits best, losses do not fall with {name}; no best size follows")


def _intervals(law: Law, laws: Law | None, coverage: float) -> dict[str, tuple[float, float]]:
    if laws is None:
        return {}
    fields = {**laws._asdict(), "a": exponents(laws)[0]}
    return {name: interval(x, coverage) for name, x in fields.items()}


def _predicted(law: Law, laws: Law | None, targets: tuple[float, ...], coverage: float) -> list[dict[str, Any]]:
    """N*, D* and loss of each budget, with intervals."""
    found = []
    for c in targets:
        best = optimum(law, c)
        row: dict[str, Any] = {"flops": c, **best._asdict()}
        if laws is not None:
            for name, x in optimum(laws, c)._asdict().items():
                row[f"{name}_interval"] = interval(x, coverage)
        found.append(row)
    return found


def _isoflop(runs: Runs, targets: tuple[float, ...], tolerance: float) -> dict[str, Any]:
    """Approach 2 by its ways, where it can be taken; else why not."""
    found: dict[str, Any] = {}
    ways: dict[str, tuple[Any, int | None]] = {
        "lowest": ("lowest", None), "parabola": ("parabola", None), "parabola of 5": ("parabola", 5)
    }  # fmt: skip
    for name, (how, nearest) in ways.items():
        try:
            minima = isoflop.minima(runs, how, nearest=nearest, tolerance=tolerance)
            n, d = isoflop.laws_of(minima)
        except ValueError as error:
            found[name] = {"left_out": str(error)}
            continue
        found[name] = {
            "N": n._asdict(), "D": d._asdict(), "budgets": len(minima.flops), "inside": int(minima.inside.sum()),
            "predicted": [{"flops": c, "parameters": power(n, c), "tokens": power(d, c)} for c in targets],
        }  # fmt: skip
    return found


def _held_out(runs: Runs, tolerance: float) -> tuple[Law, NDArray[np.int64]] | None:
    """The law of all runs but those of the largest budget, and the places of these; None: too few runs.

    Where the largest budget has fewer than 3 runs, the tenth of the runs with the most compute is left out.
    """
    _, last = budgets(runs, tolerance)[-1]
    if len(last) < 3:
        last = np.argsort(runs.flops, kind="stable")[-max(3, len(runs.loss) // 10) :]
    mask = np.ones(len(runs.loss), np.bool_)
    mask[last] = False
    try:
        return variable_projection.fit(taken(runs, mask)), last
    except ValueError:
        return None


def _compared(runs: Runs, law: Law, last: NDArray[np.int64], tolerance: float) -> dict[str, Any]:
    """How far the law is from the runs that it was not fitted to; and from their parabola, where they have one."""
    some, c = taken(runs, last), float(runs.flops[last].min())
    errors = loss(law, some.parameters, some.tokens) - some.loss
    best = optimum(law, c)
    found: dict[str, Any] = {
        "flops": c, "runs": len(last), "law": law._asdict(), "mean_error": float(errors.mean()),
        "largest_error": float(errors[np.abs(errors).argmax()]), "parameters": best.parameters, "loss": best.loss,
    }  # fmt: skip
    try:
        (n,), (y,) = isoflop.minima(some, tolerance=tolerance)[1:3]
    except ValueError:  # of several budgets, too few sizes, or without a minimum
        return found
    return {**found, "measured_parameters": float(n), "measured_loss": float(y)}


def report(result: dict[str, Any], targets: tuple[float, ...]) -> str:
    """The page in Markdown."""
    law, spans = result["law"], result["intervals"]

    def span(name: str) -> str:
        return f" ({spans[name][0]:.4g} to {spans[name][1]:.4g})" if name in spans else ""

    lines = [
        f"# Scaling law of {result['runs']} runs", "",
        "L(N, D) = E + A / N^alpha + B / D^beta, by variable projection", "", "| | value |", "|---|---|",
        *(f"| {name} | {law[name]:.6g}{span(name)} |" for name in law),
        f"| exponent of N* of C | {result['exponents'][0]:.4f}{span('a')} |",
        f"| sum of Huber losses (1e-3) of log L | {result['objective']:.7g} |", "",
        "| method | " + " | ".join(f"N*({c:.3g}) | D*({c:.3g})" for c in targets) + " |",
        "|---" * (1 + 2 * len(targets)) + "|",
        _method("variable projection", result["predicted"]),
    ]  # fmt: skip
    if "grid" in result:
        best = [optimum(Law(**result["grid"]["law"]), c) for c in targets]
        rows = [{"parameters": x.parameters, "tokens": x.tokens} for x in best]
        lines.append(_method(f"4,500 starts ({result['grid']['starts_at_the_best']:.0%} at the best)", rows))
    left_out = []
    for name, found in result["isoflop"].items():
        if "left_out" in found:
            left_out.append(f"IsoFLOP, {name}, is left out: {found['left_out']}")
        else:
            lines.append(_method(f"IsoFLOP, {name}", found["predicted"]))
    lines += ["", "| FLOPs | N* | D* | loss |", "|---|---|---|---|"]
    for row in result["predicted"]:
        cells = [_with_interval(row, name) for name in ("parameters", "tokens", "loss")]
        lines.append(f"| {row['flops']:.3g} | {' | '.join(cells)} |")
    lines.append("")
    if result["held_out"] is not None:
        h = result["held_out"]
        lines += [
            f"Fitted without the {h['runs']} runs from {h['flops']:.3g} FLOPs on, the law is off by "
            f"{h['mean_error']:+.4f} nats there in the mean, and by {h['largest_error']:+.4f} at most.", "",
        ]  # fmt: skip
        if "measured_loss" in h:
            lines += [
                "| of that budget | best parameters | their loss |", "|---|---|---|",
                f"| predicted by the law of the others | {h['parameters']:.4g} | {h['loss']:.4f} |",
                f"| by a parabola through its runs | {h['measured_parameters']:.4g} | {h['measured_loss']:.4f} |", "",
            ]  # fmt: skip
    if result["counting"]:
        lines += [f"N is counted as `{result['counting']}` (--counting).", ""]
    if result["left_out"]:
        lines += [f"Left out: {', '.join(f'{n} {why}' for why, n in result['left_out'].items())}.", ""]
    return "\n".join([*lines, *left_out])


def _method(name: str, rows: list[dict[str, Any]]) -> str:
    return f"| {name} | " + " | ".join(f"{r['parameters']:.4g} | {r['tokens']:.4g}" for r in rows) + " |"


def _with_interval(row: dict[str, Any], name: str) -> str:
    text = f"{row[name]:.4g}" if name != "loss" else f"{row[name]:.4f}"
    ends = row.get(f"{name}_interval")
    return text if ends is None or not all(map(math.isfinite, ends)) else f"{text} ({ends[0]:.4g} to {ends[1]:.4g})"


if __name__ == "__main__":
    main(tyro.cli(Args))
