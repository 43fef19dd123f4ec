"""Beside Math-Verify, and on real questions. Oracle: Math-Verify 0.9.0, on pairs where both are to be right."""

import json
import logging
from fractions import Fraction
from itertools import pairwise

import pytest

from purelm.align.graders import equal, gsm8k_gold
from tests.align.pairs import FIRM_PAIRS, MORE_PAIRS

# What Math-Verify 0.9.0 says otherwise, both sides in \boxed.
KNOWN = {
    r"0.\overline{3}", "18.", "C.", "12 hours", r"3\text{ m}", r"\emptyset", r"1\,000", "18 dollars", "1,000 people",
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    math_verify = pytest.importorskip("math_verify")
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def grade(answer, gold):
        parsed = [math_verify.parse(rf"\boxed{{{x}}}", parsing_timeout=None) for x in (gold, answer)]
        return math_verify.verify(*parsed, timeout_seconds=None)

    return grade


def gsm8k_golds(shared_data):
    path = shared_data / "math" / "gsm8k-test.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}")
    return [gsm8k_gold(json.loads(line)["answer"]) for line in path.read_text().splitlines()]


def test_gsm8k_golds_in_other_forms(theirs, shared_data):
    """Each gold answer against itself in other forms and against its neighbours: the verdicts of both are the same."""
    golds = gsm8k_golds(shared_data)
    for k, gold in enumerate(golds):
        n = int(gold)
        forms = (
            f"{n:,}",
            f"{n}.0",
            rf"\frac{{{3 * n}}}{{3}}",
            rf"\${n}",
            rf"{n}\text{{ cm}}",
            str(n + 1),
            f"{2 * n + 1}/2",
        )
        form = forms[k % len(forms)]
        right = k % len(forms) < 5
        assert equal(form, gold).equal == right, (form, gold)
        if k % 10 == 0:
            assert theirs(form, gold) == right, (form, gold)
    assert not any(equal(a, b).equal != (Fraction(a) == Fraction(b)) for a, b in pairwise(golds))


def test_firm_pairs_beside_math_verify(theirs):
    """It differs only where a wrong verdict of its is known."""
    differ = {answer for answer, right, gold in FIRM_PAIRS if theirs(answer, gold) != right}
    assert differ <= KNOWN, differ - KNOWN
    assert all(equal(answer, gold).equal == right for answer, right, gold in FIRM_PAIRS)
    assert len(MORE_PAIRS) > 70
