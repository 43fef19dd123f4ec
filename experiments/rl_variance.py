"""Variance of the policy-gradient estimator with and without baselines: exact by enumeration, and measured by sampling.

    python -m experiments.rl_variance                       # a minute on one CPU core
    python -m experiments.rl_variance --groups 2000 --results runs/variance

The policy writes `--length` tokens of a vocabulary of `--vocab`; its parameters are the logits after every prefix. A
sequence has reward 1 if the sum of its tokens is divisible by the vocabulary's size, else 0, and logits that lead there
are raised by a tilt, so that rewards go from rare to usual. With s_i = grad log pi(y_i) of G independent sequences,

    g = grad E[r],    estimate = 1/G sum_i A_i s_i,    variance = E |estimate - g|^2, summed over all parameters

    no baseline        A_i = r_i                  (E r^2 |s|^2 - |g|^2) / G
    expected reward    A_i = r_i - E r            (E (r - E r)^2 |s|^2 - |g|^2) / G
    optimal            A_i = r_i - b              the same with b = E r |s|^2 / E |s|^2, the best constant
    leave one out      A_i = r_i - mean_{j != i} r_j      a U-statistic: (4 (G - 2) z1 + 2 z2) / (G (G - 1))
    group mean         A_i = r_i - mean_j r_j     (1 - 1/G) times leave one out: (1 - 1/G)^2 its variance; its mean is
                                                  (1 - 1/G) g, and not g

with h(x, y) = (r_x - r_y) (s_x - s_y) / 2, z1 = E |E_y h|^2 - |g|^2 where E_y h = ((r - E r) s + g) / 2, and
z2 = E |h|^2 - |g|^2 (Hoeffding 1948). Optimal baseline: Greensmith, Bartlett, Baxter 2004, JMLR 5. All in float64.

It leaves rl_variance.json, rl_variance.png and rl_variance.md in RESULTS.
"""

import math
import shlex
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from torch import Tensor

from experiments.bench.report import cpu_name, versions
from experiments.console import program, progress_bar
from experiments.limits import Place, Range, Seed
from purelm import random, track
from purelm.align import advantages

ESTIMATORS = ("no baseline", "expected reward", "optimal", "leave one out", "group mean")
AT_ONCE = 4096  # groups


@dataclass(frozen=True)
class Args:
    """Measure the variance of the policy gradient."""

    vocab: Annotated[int, Range(2, 8)] = 4
    length: Annotated[int, Range(1, 4)] = 3
    tilts: tuple[Annotated[float, Range(-20, 20)], ...] = (-2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
    """of the logits that lead to a reward"""
    group_sizes: tuple[Annotated[int, Range(2, 256)], ...] = (2, 4, 8, 16)
    groups: Annotated[int, Range(2, 10**7)] = 20_000
    """sampled for each row of the table"""
    seed: Seed = 0
    results: Place = Path("experiments/results")


class Policy(NamedTuple):
    """Everything there is to know of a policy over N sequences and D parameters."""

    probs_N: Tensor
    rewards_N: Tensor
    scores_ND: Tensor  # gradients of the log-probabilities


class Row(NamedTuple):
    """One estimator of one policy: variance by formula and as measured, with the measurement's standard error."""

    reward: float
    group_size: int
    estimator: str
    exact: float
    measured: float
    error: float
    bias: float  # |E estimate - g| / |g|, by formula
    measured_bias: float


def enumerated(vocab: int, length: int, tilt: float, seed: int) -> Policy:
    """The policy of normal logits, tilted; scores by autograd, one sequence at a time."""
    sequences = torch.tensor(list(product(range(vocab), repeat=length)))
    n_prefixes = [vocab**t for t in range(length)]
    key = random.key(seed)
    logits = [random.normal(random.fold_in(key, t), (n, vocab), torch.float64) for t, n in enumerate(n_prefixes)]
    before = torch.tensor([sum(x) for x in product(range(vocab), repeat=length - 1)])
    logits[-1][torch.arange(len(before)), -before % vocab] += tilt
    logits = [x.requires_grad_() for x in logits]
    rows = torch.zeros(len(sequences), dtype=torch.int64)
    log_p_N = torch.zeros(len(sequences), dtype=torch.float64)
    for t, x in enumerate(logits):
        log_p_N = log_p_N + x.log_softmax(1)[rows, sequences[:, t]]
        rows = rows * vocab + sequences[:, t]
    scores = [torch.cat([g.flatten() for g in torch.autograd.grad(x, logits, retain_graph=True)]) for x in log_p_N]
    rewards_N = (sequences.sum(1) % vocab == 0).to(torch.float64)
    return Policy(log_p_N.detach().exp(), rewards_N, torch.stack(scores))


def gradient(policy: Policy) -> Tensor:
    """(D,): g = E[r s]."""
    return (policy.probs_N * policy.rewards_N) @ policy.scores_ND


def optimal_baseline(policy: Policy) -> float:
    """E[r |s|^2] / E[|s|^2]."""
    weights_N = policy.probs_N * policy.scores_ND.square().sum(1)
    return float(weights_N @ policy.rewards_N / weights_N.sum())


def exact_variance(policy: Policy, estimator: str, group_size: int) -> float:
    """By the formulas of the module, over all sequences and all pairs of them."""
    p, r, s, G = *policy, group_size
    g2 = float(gradient(policy).square().sum())
    mean = float(p @ r)
    if estimator in ("leave one out", "group mean"):
        projected = ((r - mean)[:, None] * s + gradient(policy)) / 2
        z1 = float(p @ projected.square().sum(1)) - g2
        squares = s.square().sum(1)
        distance = squares[:, None] + squares - 2 * s @ s.T
        z2 = float(p @ ((r[:, None] - r).square() * distance / 4) @ p) - g2
        whole = (4 * (G - 2) * z1 + 2 * z2) / (G * (G - 1))
        return whole * (1 - 1 / G) ** 2 if estimator == "group mean" else whole
    b = {"no baseline": 0.0, "expected reward": mean, "optimal": optimal_baseline(policy)}[estimator]
    return (float(p @ ((r - b).square() * s.square().sum(1))) - g2) / G


def estimates(policy: Policy, estimator: str, chosen_MG: Tensor) -> Tensor:
    """(M, D): an estimate of each group of sampled sequences, with the advantages of `purelm.align`."""
    r_MG = policy.rewards_N[chosen_MG]
    if estimator == "expected reward":
        a_MG = r_MG - float(policy.probs_N @ policy.rewards_N)
    elif estimator == "optimal":
        a_MG = r_MG - optimal_baseline(policy)
    else:
        of = {"no baseline": advantages.raw, "leave one out": advantages.leave_one_out}
        a_MG = of.get(estimator, advantages.centered)(r_MG)[0]
    return torch.einsum("mg,mgd->md", a_MG, policy.scores_ND[chosen_MG]) / chosen_MG.shape[1]


def measured(policy: Policy, group_size: int, groups: int, key: Tensor) -> dict[str, tuple[float, float, float]]:
    """{estimator: (variance, its standard error, |mean - g| / |g|)} of sampled groups, the same for all of them.

    Variance about the estimates' own mean; the standard error is that of a mean of squared distances.
    """
    cumulative_N = policy.probs_N.cumsum(0)
    sums = {name: torch.zeros(policy.scores_ND.shape[1], dtype=torch.float64) for name in ESTIMATORS}
    g = gradient(policy)
    mean_of = {name: g * (1 - 1 / group_size) if name == "group mean" else g for name in ESTIMATORS}
    second, fourth = dict.fromkeys(ESTIMATORS, 0.0), dict.fromkeys(ESTIMATORS, 0.0)
    for i, at in enumerate(range(0, groups, AT_ONCE)):
        shape = (min(AT_ONCE, groups - at), group_size)
        u_MG = random.uniform(random.fold_in(key, i), shape, dtype=torch.float64)
        chosen_MG = torch.searchsorted(cumulative_N, u_MG).clamp(max=len(cumulative_N) - 1)
        for name in ESTIMATORS:
            off_MD = estimates(policy, name, chosen_MG) - mean_of[name]
            squares_M = off_MD.square().sum(1)
            sums[name] += off_MD.sum(0)
            second[name] += float(squares_M.sum())
            fourth[name] += float(squares_M.square().sum())
    out = {}
    for name in ESTIMATORS:
        off = sums[name] / groups
        about = second[name] / groups
        error = math.sqrt(max(fourth[name] / groups - about**2, 0.0) / groups)
        variance = (about - float(off.square().sum())) * groups / (groups - 1)
        out[name] = (variance, error, float((mean_of[name] + off - g).norm() / g.norm()))
    return out


def rows_of(args: Args) -> list[Row]:
    """All policies, group sizes and estimators."""
    found = []
    with progress_bar("variance", len(args.tilts) * len(args.group_sizes), "settings") as bar:
        for i, tilt in enumerate(args.tilts):
            policy = enumerated(args.vocab, args.length, tilt, args.seed)
            reward = float(policy.probs_N @ policy.rewards_N)
            for j, size in enumerate(args.group_sizes):
                key = random.fold_in(random.fold_in(random.key(args.seed), 1 + i), j)
                for name, (variance, error, bias) in measured(policy, size, args.groups, key).items():
                    by_formula = 1 / size if name == "group mean" else 0.0
                    exact = exact_variance(policy, name, size)
                    found.append(Row(reward, size, name, exact, variance, error, by_formula, bias))
                bar(i * len(args.group_sizes) + j + 1)
    return found


def table(rows: list[Row]) -> str:
    """A row for each policy and group size: exact / measured variance of each estimator."""
    lines = [f"| mean reward | G | {' | '.join(ESTIMATORS)} |", "|---" * (2 + len(ESTIMATORS)) + "|"]
    for at in range(0, len(rows), len(ESTIMATORS)):
        some = rows[at : at + len(ESTIMATORS)]
        cells = " | ".join(f"{x.exact:.4g} / {x.measured:.4g}" for x in some)
        lines.append(f"| {some[0].reward:.3f} | {some[0].group_size} | {cells} |")
    return "\n".join(lines)


def concluded(rows: list[Row]) -> str:
    """What the numbers say, in sentences."""
    off = [abs(x.measured - x.exact) / x.error for x in rows if x.error > 0]
    within = sum(x < 2 for x in off)
    by = {(x.reward, x.group_size, x.estimator): x.exact for x in rows}
    rewards, sizes = sorted({x.reward for x in rows}), sorted({x.group_size for x in rows})
    ratio = {(r, G, name): by[r, G, name] / by[r, G, ESTIMATORS[0]] for r, G, name in by}
    big, small = sizes[-1], sizes[0]
    gain = ", ".join(f"{ratio[r, big, 'leave one out']:.2f} at {r:.3f}" for r in rewards)
    worse = [r for r in rewards if ratio[r, big, "expected reward"] > 1]
    return " ".join([
        f"Formula and measurement differ by at most {max(off):.1f} standard errors, {within} of {len(off)} by less "
        "than 2.",
        f"Leave-one-out with G = {big} has this part of the variance without a baseline, by mean reward: {gain}.",
        f"The optimal constant has {min(ratio[r, big, 'optimal'] for r in rewards):.2f} to "
        f"{max(ratio[r, big, 'optimal'] for r in rewards):.2f} of it.",
        f"With G = {small}, leave-one-out has {min(ratio[r, small, 'leave one out'] for r in rewards):.2f} to "
        f"{max(ratio[r, small, 'leave one out'] for r in rewards):.2f} of it: its baseline is an estimate of "
        f"{small - 1} reward{'s' * (small > 2)}.",
        "The expected reward as a baseline is worse than none at mean reward "
        f"{', '.join(f'{r:.3f}' for r in worse)}." if worse else "The expected reward is never worse than none here.",
        "The group's mean has less variance than leave-one-out by (1 - 1/G)^2 exactly, and shrinks the gradient by "
        "1 - 1/G: the same estimator at another scale.",
    ])  # fmt: skip


def page(args: Args, rows: list[Row], command: str) -> str:
    """One page, in Markdown."""
    of, n = versions(), args.vocab**args.length
    return "\n\n".join([
        "# Variance of the policy gradient",
        "How much of REINFORCE's variance does each baseline take away, and does sampling agree with the formulas?",
        "## Setup",
        f"A policy of {args.length} tokens from a vocabulary of {args.vocab}: {n} sequences, whose probabilities, "
        "rewards and scores are enumerated. Reward 1 if the sum of the tokens is divisible by "
        f"{args.vocab}, else 0; the logits that lead there are raised by {', '.join(f'{x:g}' for x in args.tilts)}, "
        "which sets the mean reward. Variance: E |estimate - mean|^2, summed over parameters. Each cell is exact / "
        f"measured from {args.groups:,} groups of G sequences. The formulas are in `experiments/rl_variance.py`.",
        "## Results", table(rows), "![variance by mean reward](rl_variance.png)",
        f"Variance relative to no baseline, G = {max(args.group_sizes)}; lines are exact, points measured.",
        "## Conclusion", concluded(rows), "## Command", f"    {command}",
        f"{cpu_name()}; Python {of['python']}, torch {of['torch']}, purelm {of['purelm']}.",
    ]) + "\n"  # fmt: skip


def draw(path: Path, rows: list[Row], size: int) -> None:
    """Variance relative to that without a baseline, by mean reward."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    some = sorted((x for x in rows if x.group_size == size), key=lambda x: x.reward)
    none = {x.reward: x.exact for x in some if x.estimator == ESTIMATORS[0]}
    for name in ESTIMATORS:
        found = [x for x in some if x.estimator == name]
        at = [x.reward for x in found]
        (line,) = axis.plot(at, [x.exact / none[x.reward] for x in found], label=name)
        relative = [x.measured / none[x.reward] for x in found]
        axis.errorbar(at, relative, [2 * x.error / none[x.reward] for x in found], fmt="o", color=line.get_color())
    axis.set(xlabel="mean reward", ylabel="variance, of that without a baseline", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)


@program
def main(args: Args) -> None:
    """Compute, measure, write."""
    for name in ("tilts", "group_sizes"):
        given: tuple[Any, ...] = getattr(args, name)
        if not given or len(set(given)) < len(given):
            raise ValueError(f"{name}: give at least one, and none twice; got {given}")
    rows = rows_of(args)
    command = shlex.join(["python", "-m", "experiments.rl_variance", *sys.argv[1:]])
    args.results.mkdir(parents=True, exist_ok=True)
    draw(args.results / "rl_variance.png", rows, max(args.group_sizes))
    out = {"command": command, "rows": [x._asdict() for x in rows], "versions": versions(), "device": cpu_name()}
    track.write_json(args.results / "rl_variance.json", out)
    track.write_text(args.results / "rl_variance.md", page(args, rows, command))
    print(table(rows))
    print(concluded(rows))
    print(f"{args.results}: rl_variance.md, .png, .json")


if __name__ == "__main__":
    main(tyro.cli(Args))
