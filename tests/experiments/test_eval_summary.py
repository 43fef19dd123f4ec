"""Figures of answers. Oracles: subsets, votes and subjects counted by hand."""

import itertools

import pytest

from experiments.eval_summary import summary_of, summary_of_open
from purelm.evals.tasks import Example


def rows_of(*answers, gold="4"):
    """A row of each tuple of answers; an answer is right if it is the gold one by value."""
    right = [[x is not None and float(x) == float(gold) for x in some] for some in answers]
    return [{"answers": [*some], "right": hits} for some, hits in zip(answers, right, strict=True)]


def test_several_samples():
    rows = rows_of(("5", "4", "4.0", "5", "4.00"), ("4", "5", "5", None, "5"), (None,) * 5, ("4",) * 5)
    examples = [Example(str(i), "", "4") for i in range(4)]
    found = summary_of(examples, rows)
    assert (found["n"], found["right"], found["accuracy"], found["unparsed"]) == (4, 2, 0.5, 1)
    for j in (1, 2, 4, 5):
        subsets = [[any(s) for s in itertools.combinations(row["right"], j)] for row in rows]
        assert found[f"pass@{j}"] == pytest.approx(sum(sum(s) / len(s) for s in subsets) / 4)
    assert "pass@3" not in found
    assert found["maj@5"] == 0.5  # 4, 4.0 and 4.00 are three votes against two; then 5; none; 4
    assert "subjects" not in found and "macro accuracy" not in found


def test_subjects():
    rows = rows_of(("4",), ("5",), (None,), ("4",), ("5",))
    examples = [Example(str(i), "", "4", subject) for i, subject in enumerate("bbbab")]
    found = summary_of(examples, rows)
    assert found["subjects"] == {
        "a": {"n": 1, "right": 1, "accuracy": 1.0}, "b": {"n": 4, "right": 1, "accuracy": 0.25}
    }  # fmt: skip
    assert [*found["subjects"]] == ["a", "b"] and found["macro accuracy"] == 0.625 and found["accuracy"] == 0.4
    assert "maj@1" not in found and "pass@1" not in found


def test_open():
    found = summary_of_open([{"responses": [text, "other"]} for text in ("abcd", " \n", "", "xy")])
    assert found == {"n": 4, "mean length": 2.0, "empty": 0.5}
