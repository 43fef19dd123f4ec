"""Grader and grade_all. Oracles: sympy itself, and the same pairs one by one in this process."""

import threading

import pytest

from purelm.align.graders import Grader, Policy, Verdict, equal, grade_all, grader, proof, prove
from purelm.align.graders.compare import NEEDS_PROOF
from purelm.align.graders.grammar import parse
from tests.align.pairs import FIRM_PAIRS, MORE_PAIRS

TRUE = [
    (r"\sin^2 x+\cos^2 x", "1"),
    (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"),
    (r"\tan x", r"\frac{\sin x}{\cos x}"),
    (r"\arctan 1", r"\pi/4"),
    (r"e^{i\pi}", "-1"),
    (r"\sqrt[3]{2+\sqrt5}+\sqrt[3]{2-\sqrt5}", "1"),
    (r"\cos\frac{\pi}{7}-\cos\frac{2\pi}{7}+\cos\frac{3\pi}{7}", r"\frac12"),
    (r"\frac{n!}{(n-1)!}", "n"),
]
FALSE = [
    (r"\sqrt{x^2}", "x"),  # where x > 0 alone
    (r"e^{\pi\sqrt{163}}", "262537412640768744"),  # to 30 digits
    (r"\sin(0.5)", "0.479425538604203"),
    (r"\sin 2x", r"2\sin x"),
]
# cos x cos 2x ... cos 2^11 x = sin(2^12 x) / (2^12 sin x), of which sympy has no proof within seconds.
LONG = ("".join(rf"\cos({2**k}x)" for k in range(12)), r"\frac{\sin(4096x)}{4096\sin x}")


@pytest.mark.parametrize(("pair", "right"), [*((p, True) for p in TRUE), *((p, False) for p in FALSE)])
def test_prove(pair, right):
    assert prove(*map(parse, pair)) is right
    if right:
        assert equal(*pair) == Verdict(False, NEEDS_PROOF)
    assert equal(*pair, prove=prove).equal is right


def test_prove_says_what_it_cannot():
    assert prove(parse("(1,2)"), parse("3")).startswith("undecided: sympy:")


def test_prove_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sympy", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs sympy: pip install 'purelm\[math\]'"):
        prove(parse("x"), parse("x"))


def test_a_pair_that_takes_long_is_undecided_and_the_next_ones_are_right():
    with Grader(seconds=1) as g:
        assert g.equal("0.5", "1/2").equal and g.workers[0].started == 0  # no process for what needs no sympy
        assert g.equal(*LONG) == Verdict(False, "undecided: time")
        assert g.equal(*TRUE[0]) == Verdict(True, "sympy") and g.workers[0].started == 2
        process = g.workers[0].process
        process.kill()  # from outside
        process.wait()
        assert g.equal(*TRUE[1]).equal and g.workers[0].started == 3
        process = g.workers[0].process
    assert process.poll() is not None and g.workers[0].process is None


def test_threads_share_a_grader():
    """Off the main thread, and more threads than processes."""
    pairs = (TRUE + FALSE) * 2
    found = {}
    with Grader(2) as g:
        threads = [
            threading.Thread(target=lambda k=k, pair=pair: found.update({k: g.equal(*pair).equal}))
            for k, pair in enumerate(pairs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert g.workers[0].started <= 1
    assert [found[k] for k in range(len(pairs))] == ([True] * len(TRUE) + [False] * len(FALSE)) * 2


def test_any_number_of_workers_gives_the_same_in_order():
    pairs = [(a, g) for a, _, g in FIRM_PAIRS + MORE_PAIRS] + TRUE + FALSE + [("9" * 10**6, "5"), ("(" * 4000, "5")]
    seen = []
    one = grade_all(pairs, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k + 1, len(pairs)) for k in range(len(pairs))]
    assert [v.equal for v in one] == [
        *(right for _, right, _ in FIRM_PAIRS + MORE_PAIRS), *[True] * len(TRUE), *[False] * (len(FALSE) + 2)
    ]  # fmt: skip
    assert grade_all(pairs, 3) == one
    assert grade_all([]) == [] == grade_all([], 2)


def test_the_policy_is_the_graders():
    strict = Policy(units="required")
    assert not grade_all([("10 cm", "10")], 2, policy=strict)[0].equal
    assert not Grader(policy=strict).equal("10 cm", "10").equal and Grader().equal("10 cm", "10").equal


def test_arguments_are_checked():
    for seconds in (0, 1.5, True, None, 3601):
        with pytest.raises(ValueError, match=f"seconds is {seconds}: allowed are whole numbers from 1 to 3600"):
            Grader(seconds=seconds)
    with pytest.raises(ValueError, match="n_workers is 0"):
        grade_all([], 0)


def test_mutants(monkeypatch):
    """A prover that trusts floating point, or few digits, or no check of variables fails a stated pair."""
    trusting = {pair: equal(*pair, prove=lambda a, b: True).equal for pair in FALSE}
    assert trusting[FALSE[0]] and trusting[FALSE[1]]
    monkeypatch.setattr(proof, "POINTS", ("0.5",) * 4)
    assert prove(*map(parse, FALSE[0])) is not False
    monkeypatch.setattr(grader, "NEEDS_PROOF", "another reason")
    with Grader() as g:
        assert not g.equal(*TRUE[0]).equal and g.workers[0].started == 0
