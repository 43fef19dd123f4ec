"""Equivalence of answers. Oracles: the table of pairs (pairs.py); Fractions, for rendered numbers and expressions."""

import re
from fractions import Fraction
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.align.graders import Policy, Verdict, compare, equal, polynomials, relations, units
from tests.align.pairs import FIRM_PAIRS, MORE_PAIRS

PAIRS = FIRM_PAIRS + MORE_PAIRS


def wrong_rows(grade, pairs=PAIRS):
    return {f"{answer} | {gold}" for answer, right, gold in pairs if grade(answer, gold).equal != right}


def test_the_table():
    assert len(FIRM_PAIRS) == 54 and len(MORE_PAIRS) >= 70
    assert wrong_rows(equal) == set()
    undecided = {a for a, _, g in PAIRS if equal(a, g).reason.startswith("undecided")}
    assert undecided == {"9**9**9"}


@pytest.mark.parametrize(("answer", "right", "gold"), PAIRS)
def test_each_pair_either_way_and_in_other_clothes(answer, right, gold):
    """Symmetric, but for relations and intervals; the same with space, dollars and \\left \\right."""
    if not any(sign in answer + gold for sign in ("<", ">", r"\le")):
        assert equal(gold, answer).equal == right
    assert equal(f"  ${answer}$ ", f"\\({gold}\\)").equal == right
    loud = answer if r"\left" in answer else re.sub(r"(?<!\\)\(", r"\\left(", re.sub(r"\)", r"\\right)", answer))
    assert equal(loud, gold).equal == right
    assert equal(answer, answer).equal and equal(gold, gold).equal
    assert equal(f"\\boxed{{{answer}}}", f"\\fbox{{{gold}}}").equal == right


@pytest.mark.parametrize(
    ("answer", "gold", "option", "by_default", "with_option"),
    [
        ("50%", "50", {"percent": "number"}, True, False),
        ("50%", "0.5", {"percent": "number"}, True, True),
        ("0.333", r"\frac{1}{3}", {"float_tolerance": 1e-2}, False, True),
        (r"\pi", "3.14159", {"float_tolerance": 1e-5}, False, True),
        (r"\pi", "3.1", {"float_tolerance": 1e-5}, False, False),
        ("333/1000", r"\frac{1}{3}", {"float_tolerance": 1e-2}, False, False),  # no point: no rounding is meant
        ("3,2,1", "1,2,3", {"lists": "sequence"}, True, False),
        ("1,2", "(1,2)", {"lists": "sequence"}, False, True),
        ("1,2", r"\{2,1\}", {"lists": "sequence"}, True, False),
        ("x<2", r"(-\infty, 2)", {"interval_relation": "both"}, False, True),
        ("1<x<3", "(1,3)", {"interval_relation": "both"}, False, True),
        ("2x+3=5", "x=1", {"equation_solution": True}, False, True),
        ("2x+3=5", "1", {"equation_solution": True}, False, True),
        ("2x+3=7", "1", {"equation_solution": True}, False, False),
        ("2x<4", "x<2", {"equation_solution": True}, False, True),
        ("x=5", "5", {"assignment": False}, True, False),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)", {"column_vector": False}, True, False),
        (r"\begin{pmatrix}1&2\end{pmatrix}", "(1,2)", {"column_vector": True}, False, False),
        ("2:4", "1:2", {"colon": "clock"}, True, False),
        ("1:2", "0.5", {"colon": "clock"}, True, False),
        ("1:05", "2:10", {}, False, False),
        (r"10\text{ cm}", "10", {"units": "required"}, True, False),
        ("10", r"10\text{ cm}", {"units": "required"}, True, False),
        ("12 hours", "12 days", {"units": "ignored"}, False, True),
        ("24 hours", "1 day", {"units": "required"}, True, True),
    ],
)  # fmt: skip
def test_policies(answer, gold, option, by_default, with_option):
    assert equal(answer, gold).equal == by_default
    assert equal(answer, gold, Policy(**option)).equal == with_option


def test_policies_are_checked():
    for option in ({"percent": "no"}, {"lists": 1}, {"assignment": 1}, {"float_tolerance": -1.0}, {"colon": None}):
        (name,) = option
        with pytest.raises(ValueError, match=rf"Policy.{name} is .*: allowed are"):
            Policy(**option)
    with pytest.raises(ValueError, match="gold is a int: allowed is str"):
        equal("5", 5)


def test_what_is_empty_or_unreadable_is_not_equal():
    assert equal("", "5") == equal(" $ $ ", "") == Verdict(False, "empty answer")
    assert equal("She sold 5 clips.", "5").reason.startswith("answer not read")
    assert equal("5 + + )", "5 + + )") == Verdict(True, "same text")
    assert equal("1/0", "5").reason == "undefined: division by zero"


# Mutants of the grader: each breaks a rule, and the table must say so at rows of that rule.
def no_units(words):
    return "", Fraction(1)


def without_radicals(value, q):
    return polynomials.generator(f"froot({value})", q)


MUTANTS = {
    "units": (compare, "label", no_units, "12 hours | 12 days"),
    "assignment": (compare, "assigned", lambda node: None, "x=5 | 5"),
    "interval": (compare, "interval", lambda node: None, r"(-\infty, 2) | x<2"),
    "direction": (compare, "same_relation", lambda a, b, n: a.args[0] == b.args[0], r"x+2y=3 | x+2y=4"),
    "radicals": (polynomials, "primes_of", lambda n: {n: 1}, r"\sqrt8 | 2\sqrt{2}"),
    "brackets": (compare.Comparison, "structures", lambda self, a, b: (
        self.in_order(a.args[2], b.args[2]) if a.op == b.op == "seq" else None), "(1,2) | [1,2]"),
    "order": (compare.Comparison, "in_order", compare.Comparison.any_order, "(2,1) | (1,2)"),
    "subset": (compare.Comparison, "any_order", lambda self, a, b: all(any(self.same(x, y) for y in b) for x in a),
               r"\{1,2\} | \{1,2,3\}"),
    "sequence": (compare.Comparison, "any_order", compare.Comparison.in_order, r"\{2,1,1\} | \{1,2\}"),
    "measures": (compare.Comparison, "measured", lambda self, a, b: None, r"10\text{ cm} | 10"),
    "conversion": (units, "UNITS", {}, r"300\text{ cm} | 3\text{ m}"),
    "flip": (relations, "FLIP", {sign: sign for sign in relations.FLIP}, "2>x | x<2"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail_the_table(monkeypatch, name):
    where, attribute, value, row = MUTANTS[name]
    monkeypatch.setattr(where, attribute, value)
    assert row in wrong_rows(equal)


ROUND = str.maketrans("[]", "()")


@pytest.mark.parametrize(
    ("grade", "rows"),
    [
        (lambda a, g: Verdict(a.strip() == g.strip(), ""), {r"\frac{1}{2} | 0.5", "x=5 | 5"}),
        (partial(equal, policy=Policy(float_tolerance=1e-2)), {r"0.333 | \frac{1}{3}", r"\pi | 3.14159"}),
        (partial(equal, policy=Policy(units="ignored")), {"12 hours | 12 days", r"3\text{ m} | 3\text{ km}"}),
        (lambda a, g: equal(a.replace(" ", ""), g.replace(" ", "")), {"1 2 | 12"}),
        (lambda a, g: equal(a.replace(",", ""), g.replace(",", "")), {"3,4 | 34", "1,23 | 123"}),
        (lambda a, g: equal(a.translate(ROUND), g.translate(ROUND)), {"(1,2) | [1,2]", "(1,2) | (1,2]"}),
    ],
)  # fmt: skip
def test_wrong_graders_fail_the_table(grade, rows):
    assert rows <= wrong_rows(grade)


# Properties.
fractions = st.builds(Fraction, st.integers(-500, 500), st.integers(1, 60))


def renderings(x):
    """LaTeX forms of a Fraction."""
    n, d = x.numerator, x.denominator
    sign = "-" if n < 0 else ""
    yield from (
        rf"\frac{{{n}}}{{{d}}}",
        rf"{sign}\dfrac{{{abs(n)}}}{{{d}}}",
        f"{n}/{d}",
        rf"\frac{{{7 * n}}}{{{7 * d}}}",
    )
    yield from (rf"$\left({n}\right) \div {d}$", rf"{n} \cdot {d}^{{-1}}", rf"\boxed{{\tfrac{{{n}}}{{{d}}}}}.")
    yield from (f"x = {n}/{d}", rf"{100 * n}/{d}\%", rf"{n}/{d}\text{{ cm}}", rf"\frac{{{-n}}}{{-{d}}}")
    whole, rest = divmod(abs(n), d)
    if rest:
        yield rf"{sign}{whole}\frac{{{rest}}}{{{d}}}"
        yield f"{sign}{whole} {rest}/{d}"
    digits, remainders, r = [], [], rest
    while r and r not in remainders:  # long division, up to the cycle
        remainders.append(r)
        digits.append(str(10 * r // d))
        r = 10 * r % d
    start = remainders.index(r) if r else len(digits)
    fixed, cycle = "".join(digits[:start]), "".join(digits[start:])
    yield f"{sign}{whole}.{fixed}" + (rf"\overline{{{cycle}}}" if cycle else "0")
    if not cycle:
        yield rf"{sign}{whole}{fixed} \times 10^{{-{len(fixed)}}}"
        yield f"{sign}{whole}{fixed}e-{len(fixed)}"


@given(x=fractions, y=fractions)
def test_every_rendering_of_a_fraction_is_that_fraction_and_no_other(x, y):
    for text in renderings(x):
        assert equal(text, str(x)).equal, text
        if "%" not in text:  # 50% is 50, too
            assert equal(text, str(y)).equal == (x == y), (text, y)


@st.composite
def expressions(draw, depth=3):
    """(LaTeX, value) of an expression with rational value; the value is Python's, in Fractions."""
    if depth == 0 or draw(st.booleans()):
        x = draw(st.integers(0, 12))
        return str(x), Fraction(x)
    (a, x), (b, y) = draw(expressions(depth - 1)), draw(expressions(depth - 1))
    kind = draw(st.sampled_from("+-*/^sfl"))
    if kind == "+":
        return f"({a}) + ({b})", x + y
    if kind == "-":
        return rf"\left({a}\right)-({b})", x - y
    if kind == "*":
        return rf"({a}) \cdot ({b})", x * y
    if kind == "/" and y:
        return rf"\frac{{{a}}}{{{b}}}", x / y
    if kind == "^" and (x or y > 0):
        n = draw(st.integers(1, 3))
        return f"({a})^{{{n}}}", x**n
    if kind == "s":
        return rf"\sqrt{{({a})^2}}", abs(x)
    if kind == "f":
        n = draw(st.integers(0, 6))
        return rf"({a}) + {n}!", x + [1, 1, 2, 6, 24, 120, 720][n]
    return rf"\log_3 (3^{{{a}}})" if x.denominator == 1 and abs(x) < 20 else f"|{a}|", x if (
        x.denominator == 1 and abs(x) < 20
    ) else abs(x)


@given(case=expressions(), other=st.integers(-3, 3))
def test_expressions_have_the_value_of_fractions(case, other):
    text, value = case
    assert equal(text, str(value)).equal, (text, value)
    assert equal(text, str(value + other)).equal == (other == 0), (text, value, other)


variables = st.sampled_from("xyz")


@given(a=st.integers(-9, 9), b=st.integers(-9, 9), n=st.integers(0, 4), x=variables, c=st.integers(-2, 2))
def test_binomials_expand(a, b, n, x, c):
    """Oracle: the binomial theorem."""
    from math import comb

    terms = "+".join(f"({comb(n, k) * a**k * b ** (n - k) + (c if k == 0 else 0)}){x}^{{{k}}}" for k in range(n + 1))
    assert equal(f"({a}{x}+({b}))^{n}", terms).equal == (c == 0)


@given(
    roots=st.dictionaries(st.sampled_from([2, 3, 5, 6, 10, 15]), st.integers(-4, 4), min_size=1), k=st.integers(1, 5)
)
def test_sums_of_roots_are_equal_only_if_their_coefficients_are(roots, k):
    """Square roots of square-free numbers are independent; sqrt(k^2 n) is k sqrt n."""
    short = "+".join(rf"({c * k})\sqrt{{{n}}}" for n, c in roots.items())
    long = "+".join(rf"({c})\sqrt{{{n * k * k}}}" for n, c in roots.items())
    assert equal(long, short).equal
    assert not equal(long, short + r"+\sqrt{7}").equal
    assert equal(f"1/({short})", f"1/({long})").equal or not any(roots.values())


@given(words=st.lists(st.sampled_from("east no solution red blue never".split()), min_size=1, max_size=4))
def test_words_are_compared_without_case_and_space(words):
    text = " ".join(words)
    assert equal(text.upper(), f"\\text{{ {'  '.join(words)} }}").equal
    assert not equal(text, text + " not").equal
