"""Equivalence of mathematical answers beside Math-Verify: pairs a second of CPU time, on one core.

python -m experiments.bench.graders [--n-pairs 2000] [--json FILE]

The pairs are answers as of school mathematics, all different: integers, decimals, fractions, percent, units, roots,
tuples, intervals, sets, polynomials, equations, matrices; half of them right, half wrong. Both libraries get answers in
\\boxed, without a limit of time of their own, and take turns. "by numbers" are integers and decimals alone, as in
GSM8K. "wrong" counts verdicts that differ from the right one.
"""

import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.bench.report import publish, row
from experiments.console import program, say
from purelm.align.graders import equal

PACKAGES = ("purelm", "math-verify", "sympy")
NUMBERS = [("{a}", "{a}"), ("{a}.00", "{a}"), ("{a},000", "{a}000"), ("{b}.5", "{b}.50")]
# {a} is an integer from 100, {b} the one after it: (answer, gold) is right; with the next integer in the answer, wrong.
FORMS = [
    *NUMBERS,
    (r"\frac{{{a}}}{{{b}}}", "{a}/{b}"),
    (r"{a}\%", r"{a}\%"),
    (r"{a}\text{{ cm}}", "{a}"),
    (r"{a}^\circ", "{a}"),
    (r"{a}\sqrt{{2}}", r"\frac{{2\cdot {a}}}{{\sqrt2}}"),
    ("({a}, {b})", r"\left({a},{b}\right)"),
    (r"(-\infty, {a})", "x<{a}"),
    (r"\{{{a},{b}\}}", r"\{{{b},{a}\}}"),
    ("(x+{a})(x-{a})", "x^2-{a}^2"),
    ("y={a}x+1", "y - {a}x = 1"),
    ("x={a}", "{a}"),
    (r"\begin{{pmatrix}}{a}\\{b}\end{{pmatrix}}", r"\begin{{bmatrix}}{a}\\{b}\end{{bmatrix}}"),
    (r"\frac{{{a}\pi}}{{3}}", r"{a}\cdot\frac{{\pi}}{{3}}"),
    (r"{a}\times 10^{{3}}", "{a}000"),
]


@dataclass(frozen=True)
class Args:
    """Graders beside Math-Verify."""

    n_pairs: int = 2000
    rounds: int = 3
    json: Path | None = None


def pairs(forms: Sequence[tuple[str, str]], n: int) -> list[tuple[str, str, bool]]:
    """(answer, gold, is it right) of n pairs."""
    out = []
    for k in range(n):
        answer, gold = forms[k // 2 % len(forms)]
        a, wrong = 100 + k // 2 // len(forms), k % 2
        out.append((answer.format(a=a + wrong, b=a + wrong + 1), gold.format(a=a, b=a + 1), not wrong))
    return out


def theirs() -> Callable[[str, str], bool]:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def grade(answer: str, gold: str) -> bool:
        read = [parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)]
        return verify(*read, timeout_seconds=None)

    return grade


def measure(
    graders: dict[str, Callable[[str, str], bool]], cases: list[tuple[str, str, bool]], rounds: int
) -> dict[str, tuple[float, int]]:
    """Name -> (pairs a second in the best round, wrong verdicts). The graders take turns, after a round for warm-up."""
    seconds = dict.fromkeys(graders, float("inf"))
    wrong = dict.fromkeys(graders, 0)
    for number in range(rounds + 1):
        for name, grade in graders.items():
            gc.collect()
            start = time.process_time()
            verdicts = [grade(answer, gold) for answer, gold, _ in cases]
            if number:
                seconds[name] = min(seconds[name], time.process_time() - start)
            wrong[name] = sum(v != right for v, (_, _, right) in zip(verdicts, cases, strict=True))
    return {name: (len(cases) / seconds[name], wrong[name]) for name in graders}


@program
def main(args: Args) -> None:
    graders: dict[str, Callable[[str, str], bool]] = {"purelm": lambda a, g: equal(rf"\boxed{{{a}}}", g).equal}
    try:
        graders["math-verify"] = theirs()
    except ModuleNotFoundError:
        say("math-verify is missing: pip install math-verify")
    rows = []
    for name, forms in (("ordinary answers", FORMS), ("by numbers", NUMBERS)):
        found = measure(graders, pairs(forms, args.n_pairs), args.rounds)
        say(f"{name}: wrong verdicts of {args.n_pairs}: " + ", ".join(f"{k} {w}" for k, (_, w) in found.items()))
        peer = found.get("math-verify", (None, 0))[0]
        rows.append(
            row(name, found["purelm"][0], "pairs/CPU s", peer="math-verify", peer_value=peer, packages=PACKAGES)
        )
    publish(rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
