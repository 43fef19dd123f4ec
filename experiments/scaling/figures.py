"""Figures of a fit: IsoFLOP curves, the best sizes with their band, residuals."""

from pathlib import Path

import numpy as np

from purelm.scaling.bootstrap import interval
from purelm.scaling.laws import FLOPS, Law, loss, optimum
from purelm.scaling.runs import Runs, budgets

__all__ = ["draw"]

MOST_CURVES = 12


def draw(
    runs: Runs, law: Law, laws: Law | None, targets: tuple[float, ...], path: Path, *, tolerance: float, coverage: float
) -> None:
    """A picture of three panels. Needs matplotlib (extra `report`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
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
    figure.savefig(path, dpi=110)
    plt.close(figure)
