"""Rows of OpenR1-Math-220k. Oracles: rows of its schema made by hand; sums over their lists."""

from functools import partial

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from purelm.align.data import clean, difficulty
from purelm.align.data.openr1 import chosen, correct, each_generation, openr1, pass_rate

ROW = {
    "problem": "What is 2 + 2?", "solution": "It is 4.", "answer": "4", "problem_type": "Algebra",
    "question_type": "math-word-problem", "source": "olympiads", "uuid": "u1",
    "is_reasoning_complete": [True, False, True, True], "generations": ["a" * 9, "bb", "ccc", "dd"],
    "correctness_math_verify": [True, True, False, True], "correctness_llama": None,
    "finish_reasons": ["stop", "length", "stop", "stop"], "correctness_count": 3,
    "messages": [{"role": "user", "content": "What is 2 + 2?"}],
}  # fmt: skip


def test_from_a_row_to_a_pair():
    (row,) = openr1(ROW)
    assert (row["prompt"], row["collection"]) == ("What is 2 + 2?", "olympiads") and "messages" not in row
    assert pass_rate(row) == 0.75
    (good,), (counts,) = clean([row], [correct()])
    assert good["generations"] == ["a" * 9, "dd"] and good["finish_reasons"] == ["stop", "stop"]
    assert good["correctness_math_verify"] == [True, True] and counts.n_out == 1
    (first,), _ = clean([row], [correct(), chosen()])
    assert first == {"prompt": "What is 2 + 2?", "response": "a" * 9, "answer": "4", "uuid": "u1",
                     "collection": "olympiads", "pass_rate": 0.75}  # fmt: skip
    (short,), _ = clean([row], [correct(), chosen(partial(min, key=len))])
    assert short["response"] == "dd"
    (any_end,), _ = clean([row], [correct(complete=False)])
    assert any_end["generations"] == ["a" * 9, "bb", "dd"]


FLAG = st.sampled_from([True, False, None])


@given(st.lists(st.tuples(FLAG, FLAG, FLAG), max_size=4), st.sampled_from([(0, 0), (0, 1), (1, 0), (1, 1), (1, 1)]))
@example([(True, True, False), (True, False, None)], (1, 1))
def test_verdicts(flags, asked):
    """Oracle: a verdict at a time. One judge's yes is enough; what no judge was asked about is unknown."""
    n, complete = len(flags), [x[0] for x in flags]
    first, second = ([x[k] for x in flags] if asked[k - 1] else None for k in (1, 2))
    given_ = {"problem": "p", "generations": [f"g{i}" for i in range(n)], "is_reasoning_complete": complete}
    given_ |= {"correctness_math_verify": first, "correctness_llama": second}
    (row,) = openr1(given_)
    said = [[v for v in (first and first[i], second and second[i]) if v is not None] for i in range(n)]
    known = [any(x) for x in said if x]
    assert pass_rate(row) == (sum(known) / len(known) if known else None)
    wanted = [f"g{i}" for i in range(n) if complete[i] and any(said[i])]
    kept, (counts,) = clean([row], [correct()])
    assert [x["generations"] for x in kept] == ([wanted] if wanted else [])
    if not wanted:
        reason = "no generation" if not n else "none correct" if any(complete) else "none complete"
        assert counts.removed == {reason: 1}
    rows = list(each_generation([row]))
    assert [x["generations"] for x in rows] == [[f"g{i}"] for i in range(n)]
    assert {x["pass_rate"] for x in rows} <= {pass_rate(row)}
    pairs = clean(rows, [correct(), chosen()])[0]
    assert [x["response"] for x in pairs] == wanted and {x["pass_rate"] for x in pairs} <= {pass_rate(row)}


def test_difficulty_by_pass_rate():
    rows = [{"problem": "p", "generations": ["g"] * 4, "correctness_math_verify": [i < k for i in range(4)]}
            for k in range(5)]  # fmt: skip
    kept, (counts,) = clean([x for row in rows for x in openr1(row)], [difficulty(0.25, 0.75, pass_rate)])
    assert [pass_rate(row) for row in kept] == [0.25, 0.5, 0.75] and counts.removed == {"too hard": 1, "too easy": 1}


def test_chosen_of_none():
    _, (counts,) = clean([{"prompt": "p", "generations": []}], [chosen()])
    assert counts.removed == {"no generation": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem": None}, "its 'problem' is a NoneType, not a text"),
        ({"generations": None}, "its 'generations' is not a list of texts"),
        ({"generations": [1]}, "its 'generations' is not a list of texts"),
        ({"correctness_llama": [True]}, "its 'correctness_llama' is not a list of 4 verdicts, one a generation"),
        ({"is_reasoning_complete": True}, "its 'is_reasoning_complete' is not a list of 4 verdicts"),
    ],
)
def test_what_a_row_lacks_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        openr1(ROW | change)
