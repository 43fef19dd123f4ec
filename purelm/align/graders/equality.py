"""Equivalence of mathematical answers."""

import re

from purelm.align.graders.compare import Comparison, Prover
from purelm.align.graders.grammar import parse
from purelm.align.graders.nodes import Node
from purelm.align.graders.policy import MAX_LENGTH, NO_POLICY, Policy, TooBig, Verdict
from purelm.align.graders.stream import Unread
from purelm.align.graders.tokens import TEXT, tidy

__all__ = ["equal"]

_SIZES = re.compile(r"\\(?:left|right|[bB]ig+[lr]?|displaystyle|,|;|:|!|quad)(?![A-Za-z])|[\s$~]+")
_WRAPPED = re.compile(rf"\\(?:{'|'.join(sorted(TEXT))})\s*\{{([^{{}}]*)\}}")
_WORDS = re.compile(r"[A-Za-z]{3,}(?: [A-Za-z]+)*")


def equal(answer: str, gold: str, policy: Policy = NO_POLICY, prove: Prover | None = None) -> Verdict:
    """Whether `answer` says the same as `gold`, by exact arithmetic on what both say in LaTeX or in something like it.

    Pure and thread-safe; bounded in steps, so that no text takes more than about a second; nothing is evaluated by
    Python or sympy. Two sides that agree in floating point but not in normal form (trigonometric identities, nested
    roots) are left to `prove`; a `Grader` has one. Without it such a pair is "undecided", which is not equal.

    Not equal are: decimals that round the gold (0.333 and 1/3; see Policy.float_tolerance), different units, (1,2) and
    [1,2], an empty answer, and what differs as text where one side cannot be read.

    >>> equal("\\\\frac{10}{2}", "5")
    Verdict(equal=True, reason='exact arithmetic')
    >>> equal("12 hours", "12 days")
    Verdict(equal=False, reason='different')
    """
    for name, text in (("answer", answer), ("gold", gold)):
        if not isinstance(text, str):
            raise ValueError(f"{name} is a {type(text).__name__}: allowed is str")
    if len(answer) > MAX_LENGTH or len(gold) > MAX_LENGTH:
        same = answer.strip() == gold.strip()
        return Verdict(same, "same text" if same else f"undecided: more than {MAX_LENGTH} characters")
    try:
        answer, gold = tidy(answer), tidy(gold)
    except TooBig as error:
        return Verdict(False, f"undecided: {error}")
    if not answer:
        return Verdict(False, "empty answer")
    if _plain(answer) == _plain(gold):
        return Verdict(True, "same text")
    trees: list[Node] = []
    for name, text in (("answer", answer), ("gold", gold)):
        try:
            trees.append(parse(text))
        except Unread as error:
            return Verdict(False, f"{name} not read: {error}")
        except TooBig as error:
            return Verdict(False, f"undecided: {name}: {error}")
    if {trees[0].op, trees[1].op} & {"list", "set"} and trees[0].op != trees[1].op:  # 100,200 read as one number
        trees = [
            tree if tree.op in ("list", "set") else _separated(text, tree)
            for tree, text in zip(trees, (answer, gold), strict=True)
        ]
    comparison = Comparison(policy, prove)
    try:
        if comparison.same(*trees):
            return Verdict(True, min(comparison.means, key=MEANS.index, default="same form"))
    except TooBig as error:
        comparison.doubts.append(f"undecided: {error}")
    return Verdict(False, comparison.doubts[0] if comparison.doubts else "different")


MEANS = ["float tolerance", "sympy", "exact arithmetic", "same form"]  # the weakest is the reason


def _separated(text: str, tree: Node) -> Node:
    try:
        return parse(text, thousands=False) if "," in text else tree
    except (Unread, TooBig):
        return tree


def _plain(text: str) -> str:
    """Without commands of looks; words in lower case. Space between digits or letters stays."""
    text = _SIZES.sub(" ", _WRAPPED.sub(r" \1 ", text)).strip()
    text = re.sub(r"\s*([^\sA-Za-z0-9])\s*", r"\1", " ".join(text.split()))
    return text.lower() if _WORDS.fullmatch(text) or text.lower() == "no" else text
