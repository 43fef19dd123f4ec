"""Any text is answered, within its bound. Oracle: the bound itself (steps, levels, bits), not a clock.

CPU time is checked against many times what is needed: 20 s, where the slowest takes 0.3 s.
"""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.align.graders import (
    Policy,
    answer_tag,
    boxed,
    countdown,
    equal,
    gsm8k,
    gsm8k_gold,
    last_number,
    mmlu_letter,
    normal,
    polynomials,
    question_only,
    r1_zero,
)
from purelm.align.graders.policy import MAX_BITS, MAX_STEPS, TooBig

SECONDS = 20.0
HOSTILE = {
    "tower": "9**9**9",
    "tower in LaTeX": "9^{9^{9^9}}",
    "exponent": "2^{1000000000}",
    "negative exponent": "2^{-1000000000}",
    "fraction of an exponent": "2^{1000000000/3}",
    "scientific": "1e999999999",
    "fractions": r"\frac{1}{1+" * 10_000 + "1" + "}" * 10_000,
    "some fractions": r"\frac{1}{1+" * 300 + "1" + "}" * 300,
    "few fractions": r"\frac{1}{1+" * 12 + "x" + "}" * 12,
    "1 MB of digits": "9" * 10**6,
    "4000 digits": "9" * 4000,
    "1 MB of letters": "a" * 10**6,
    "1 MB of boxes": r"\boxed{" * 150_000,
    "brackets": "(" * 4000,
    "closed brackets": "(" * 2000 + "1" + ")" * 2000,
    "braces": "{" * 4000,
    "mixed brackets": "([{" * 1300,
    "signs": "-" * 4000 + "1",
    "signs of an exponent": "x^{" + "-" * 4000 + "1}",
    "factorials": "5" + "!" * 4000,
    "a factorial": "1000000!",
    "a binomial": r"\binom{1000000}{500000}",
    "a sum to a power": "(a+b+c+d+e+f)^{60}",
    "powers of powers": "((((x+y)^9)^9)^9)^9",
    "products of sums": "".join(f"(a_{{{i}}}+b_{{{i}}})" for i in range(100)),
    "a sum of fractions": "+".join(rf"\frac{{1}}{{x+{i}}}" for i in range(200)),
    "a sum of roots": "+".join(rf"\sqrt{{{i}}}" for i in range(2, 300)),
    "a root of many digits": r"\sqrt{" + "7" * 2000 + "}",
    "a root of two primes": r"\sqrt{1000000016000000063}",
    "a root of high degree": r"\sqrt[1000000007]{2}",
    "plus and minus": "1" + r"\pm 1" * 800,
    "only plus and minus": r"\pm" * 1000 + "1",
    "a list": ",".join(map(str, range(900))),
    "a set of roots": r"\{" + ",".join(rf"\sqrt{{{i}}}" for i in range(200)) + r"\}",
    "functions": r"\sin" * 800 + "x",
    "bars": "|" * 4000,
    "a row": r"\begin{pmatrix}" + "&".join("1" * 700) + r"\end{pmatrix}",
    "matrices": r"\begin{pmatrix}" * 250,
    "indices": "x" + "_x" * 2000,
    "powers": "x^" * 1500 + "x",
    "logarithms": r"\log_" * 800 + "2",
    "a cycle": r"0.\overline{" + "3" * 4000 + "}",
    "spaces": " " * 10**6 + "5",
    "texts": r"\text{" * 800,
    "a chain": "<".join("x" * 2000),
    "numbers": "1," * 2000,
    "zero bytes": "\0" * 100,
    "other digits": "\u0660\u0661\uffff",
    "a pole": r"\tan\frac{\pi}{2}",
    "by zero": "1/0",
    "zero to a power": "0^{-1}",
    "a root of degree 0": r"\sqrt[0]{5}",
    "base 1": r"\log_1 5",
    "infinity": r"\infty-\infty",
    "exponentials": "(e^x+2^x+3^x+5^x)^{20}",
    "large sine": r"\sin(10^{300})+1",
    "nested exponentials": "e^{e^{e^{e^{e}}}}",
    "surrogate": "\ud800",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers(name):
    text = HOSTILE[name]
    start = time.process_time()
    assert not equal(text, "77").equal and not equal("77", text).equal
    assert not equal(text, text + " + x").equal
    assert equal(text, text).equal
    assert r1_zero(f"</think> <answer>{text}</answer>", "77")["reward"] == 0
    assert question_only(rf"\boxed{{{text}}}", "77")["reward"] == 0
    assert countdown(f"<answer>{text}</answer>", [1, 2], 77)["reward"] == 0
    assert not gsm8k(text, "#### 77").equal
    long = text * (10**6 // len(text))
    for function in (boxed, answer_tag, last_number, gsm8k_gold, mmlu_letter):
        function(text)
        function(long)
    mmlu_letter(long, ["one", "two"])
    assert time.process_time() - start < SECONDS


# Texts of the grammar, with no regard to sense, and texts of its signs alone.
LEAVES = [
    *"0 1 2 10 0.5 x y e i C cm abc 1,000 101_2 no 2^{10} 9999999999 -1 100 and".split(),
    *(r"\pi \infty \theta 0.\overline{3} \emptyset \mathbb{R} \ldots \text{cm}").split(),
]
FORMS = [
    *r"{}+{} {}-{} {}{} {}/{} \frac{{{}}}{{{}}} \sqrt[{}]{{{}}} ({})^{{{}}} ({},{}) [{},{}) |{}|{} {}:{} {},{}".split(),
    *r"\sin({})+{} \log_{{{}}}({}) \binom{{{}}}{{{}}} ({})!{} {}\%{} \max({},{}) {}={} {}<{} \{{{},{}\}}".split(),
    *r"({})\cup({}) \begin{{pmatrix}}{}\\{}\end{{pmatrix}} x\in({},{}] {}\le{{}}x<{} x={}{}".split(),
    r"{}\cdot {}", r"{}^\circ {}", r"{}\pm {}", r"{}\text{{ cm}}^{}", "{} hours {}", r"{}\text{{ or }}{}",
    r"\lfloor {}\rfloor {}",
]  # fmt: skip
SIGNS = [
    *"0123456789xyzeiab+-*/^_(){}[]|!%,.;:<>=$ \\'\"&~",
    r"\frac", r"\sqrt", r"\left", r"\{", r"\}", r"\text{", r"\pi", r"\log", r"\pm", r"\le", r"\begin{pmatrix}", r"\\",
    r"\end{pmatrix}", r"\overline{", "\u00b2", "\u2212", "\u221a",
]  # fmt: skip
answers = st.recursive(
    st.sampled_from(LEAVES),
    lambda x: st.builds(lambda form, a, b: form.format(a, b), st.sampled_from(FORMS), x, x),
    max_leaves=8,
)
texts = st.lists(st.sampled_from(SIGNS), max_size=40).map("".join) | st.text(max_size=40)
POLICIES = st.sampled_from(
    [Policy(), Policy("number", 0.01, "sequence", "both", False, True, False, "clock", "ignored")]
)


@given(a=answers | texts, b=answers | texts, policy=POLICIES)
@settings(max_examples=400)
def test_any_two_texts_have_a_verdict(a, b, policy):
    """And it does not depend on space around, on dollars, and on the order, but for relations."""
    verdict = equal(a, b, policy)
    assert equal(f" ${a}$ ", f"  {b}", policy).equal == verdict.equal
    if not any(sign in a + b for sign in ("<", ">", "=", r"\le")) and a.strip("$ .,;:\n") and b.strip("$ .,;:\n"):
        assert equal(b, a, policy).equal == verdict.equal


@given(a=answers, policy=POLICIES)
@settings(max_examples=200)
def test_reflexive(a, policy):
    assert equal(a, a, policy).equal
    assert equal(rf"\left({a}\right)", rf"( {a} )", policy).equal


@given(a=answers, b=answers)
@settings(max_examples=200)
def test_steps_are_counted(a, b):
    """No more than MAX_STEPS, whatever is compared."""
    spent = []

    class Counting(polynomials.Steps):
        def spend(self, n):
            spent.append(min(n, self.left))
            super().spend(n)

    original, normal.Steps = normal.Steps, Counting
    try:
        equal(f"({a})^{{9}}+({b})^{{9}}", f"({b})^{{9}}+({a})^{{9}}")
    finally:
        normal.Steps = original
    assert sum(spent) <= MAX_STEPS


def test_bounds_are_those_stated():
    """Each bound by itself: just below it there is a value, just above it TooBig."""
    from fractions import Fraction

    two = Fraction(2)
    assert polynomials.integer_power(two, MAX_BITS) == 2**MAX_BITS
    with pytest.raises(TooBig, match=f"more than {MAX_BITS} bits"):
        polynomials.integer_power(two, MAX_BITS + 1)
    steps = polynomials.Steps(10)
    steps.spend(10)
    with pytest.raises(TooBig, match="too many steps"):
        steps.spend(1)
    assert equal("2^{8000}", "4^{4000}").equal
    assert equal("2^{8000000}", "4^{4000000}").reason == f"undecided: a number of more than {MAX_BITS} bits"
    assert equal("x" * 5000, "x" * 4999 + "y").reason == "undecided: more than 4096 characters"
    assert equal("(" * 100 + "1" + ")" * 100, "1").reason == "undecided: answer: more than 60 levels"


def test_a_grader_without_bounds_would_not_end(monkeypatch):
    """The mutant: without a bound, the hostile product takes more than ten times the steps."""
    spent = 0

    class Loose(polynomials.Steps):
        def spend(self, n):
            nonlocal spent
            spent += n
            if spent > 10 * MAX_STEPS:
                raise TooBig("ten times the bound")

    monkeypatch.setattr(normal, "Steps", Loose)
    assert equal(HOSTILE["products of sums"], "77").reason == "undecided: ten times the bound"
