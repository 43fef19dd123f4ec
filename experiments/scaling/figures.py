"""Figures of a fit: IsoFLOP curves, the best sizes with their band, residuals, the largest budget held out."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purelm.scaling.bootstrap import interval
from purelm.scaling.laws import FLOPS, Law, loss, optimum
from purelm.scaling.runs import Runs, budgets, taken

__all__ = ["draw"]

MOST_CURVES = 12


def draw(
    runs: Runs, law: Law, laws: Law | None, targets: tuple[float, ...], path: Path, *, tolerance: float,
    coverage: float, held: tuple[Law, NDArray[np.int64]] | None = None,
) -> None:  # fmt: skip
    """A picture of four panels. Needs matplotlib (extra `report`).

    held: a law, and the places of the runs that it was not fitted to.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    left, middle, right, last = axes.ravel()
    groups = [(c, g) for c, g in budgets(runs, tolerance) if len(g) > 2]
    every = max(1, -(-len(groups) // MOST_CURVES))
    for i, (c, group) in enumerate(groups[::every]):
        n = np.sort(runs.parameters[group])
        fine = np.geomspace(n[0], n[-1], 100)
        left.plot(fine, loss(law, fine, c / (FLOPS * fine)), color=f"C{i}", lw=1)
        left.plot(runs.parameters[group], runs.loss[group], "o", color=f"C{i}", ms=4, label=f"{c:.2g}")
        best = optimum(law, c)
        left.plot(best.parameters, best.loss, "k*", ms=6)
    if not groups:
        left.plot(runs.parameters, runs.loss, "o", ms=3)
    else:
        left.legend(title="FLOPs", fontsize=7)
    left.set(xscale="log", xlabel="parameters", ylabel="loss, nats a token", title="runs, and the law of each budget")

    every_c = np.geomspace(runs.flops.min(), max(*targets, runs.flops.max()), 60)
    best = optimum(law, every_c)
    for x, name, color in ((best.parameters, "N*", "C0"), (best.tokens, "D*", "C1")):
        middle.plot(every_c, x, color=color, label=name)
    if laws is not None:
        many = [optimum(laws, x) for x in every_c]
        for field, color in (("parameters", "C0"), ("tokens", "C1")):
            low, high = zip(*(interval(getattr(m, field), coverage) for m in many), strict=True)
            middle.fill_between(every_c, low, high, color=color, alpha=0.2, lw=0)
    middle.axvline(runs.flops.max(), color="grey", ls=":", lw=1)
    middle.set(xscale="log", yscale="log", xlabel="FLOPs", title="best parameters and tokens; dotted: largest run")
    middle.legend()

    residual = np.log(loss(law, runs.parameters, runs.tokens) / runs.loss)
    right.axhline(0, color="grey", lw=1)
    right.scatter(runs.flops, residual, c=np.log10(runs.parameters), s=12)
    right.set(xscale="log", xlabel="FLOPs", title="log of predicted over measured; darker: smaller models")

    _held_out(last, runs, held)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _held_out(axis: Any, runs: Runs, held: tuple[Law, NDArray[np.int64]] | None) -> None:
    """Measured losses of the runs that were held out, and the curve that the law of the others predicts."""
    axis.set(xscale="log", xlabel="parameters", ylabel="loss, nats a token")
    if held is None:
        axis.set_title("too few runs to hold any out")
        return
    law, places = held
    some = taken(runs, places[np.argsort(runs.parameters[places])])
    style = "x-" if len(budgets(some, 0.05)) == 1 else "x"  # runs of several budgets lie on no one curve
    axis.plot(some.parameters, loss(law, some.parameters, some.tokens), style, color="C1", label="predicted")
    axis.plot(some.parameters, some.loss, "o", color="C0", label="measured")
    axis.set_title(f"held out: {len(places)} runs from {some.flops.min():.2g} FLOPs on")
    axis.legend()
