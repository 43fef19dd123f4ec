"""Generated tasks. Oracles: Python's own evaluation of a prompt's text; all problems, listed; sets."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.align.data.tasks import Addition, Modular, Sort, n_problems, problem_row, rows, shuffled, split

SPANS = st.tuples(st.integers(2, 4), st.integers(0, 3)).map(lambda x: (x[0], x[0] + x[1]))
NUMBERS = st.tuples(st.integers(0, 20), st.integers(1, 90)).map(lambda x: (x[0], x[0] + x[1]))
TASKS = st.one_of(
    st.builds(Sort, SPANS, NUMBERS),
    st.builds(Addition, SPANS, NUMBERS),
    st.builds(Modular, st.integers(2, 99), SPANS, st.sampled_from(["+", "+-", "*-+"])),
)


def answer(row):
    """What Python says of the text of a prompt."""
    text = row["prompt"]
    if row["task"] == "sort":
        numbers = text.removeprefix("Sort these numbers: ").split(".")[0].removesuffix("->").replace(",", " ").split()
        return " ".join(map(str, sorted(map(int, numbers))))
    expression = text.removeprefix("What is ").split("?")[0].removesuffix("=")
    return str(eval(expression.replace("modulo", "%").replace("mod", "%")))


@given(TASKS, st.integers(0, 2**40), st.sampled_from(["spaced", "worded"]))
def test_answers_are_right_and_lengths_in_turn(task, seed, style):
    low, high = task.n_operations if isinstance(task, Modular) else task.n_numbers
    n = min(min(n_problems(task).values()) * (high - low + 1), 12)
    found = rows(task, seed, 0, n, style)
    for k, row in enumerate(found):
        assert row["response"] == answer(row)
        assert row["length"] == low + k % (high - low + 1)
        signs = sum(x in "+-*" for x in row["prompt"].split())
        assert row["task"] == "sort" or signs == row["length"] - isinstance(task, Addition)


def test_compact_is_the_spaced_text_without_space():
    for task in (Modular(13, (1, 3)), Addition((2, 3), (5, 70)), Sort((2, 4))):
        for a, b in zip(rows(task, 3, 0, 20), rows(task, 3, 0, 20, "compact"), strict=True):
            assert a["prompt"].replace(" ", "").replace("mod", "%").replace("->", ">") == b["prompt"]
            assert a["response"].replace(" ", "") == b["response"]


def test_every_problem_comes_once():
    """Oracle: all of them, listed."""
    found = [row["prompt"] for row in rows(Addition((2, 2), (3, 9)), 5, 0, 49)]
    assert sorted(found) == sorted(f"{a} + {b} =" for a, b in product(range(3, 10), repeat=2))
    assert found != sorted(found) and found != [row["prompt"] for row in rows(Addition((2, 2), (3, 9)), 6, 0, 49)]
    chains = [row["prompt"] for row in rows(Modular(3, (2, 2), "+*"), 0, 0, 108)]
    listed = (f"(({a} {o} {b}) {p} {c}) mod 3 =" for a, o, b, p, c in product("012", "+*", "012", "+*", "012"))
    assert sorted(chains) == sorted(listed)


@given(st.integers(1, 300), st.integers(0, 2**60), st.sampled_from(["", "5"]))
def test_shuffled_is_a_bijection(n, seed, name):
    assert sorted(shuffled(k, n, seed, name) for k in range(n)) == list(range(n))


def test_shuffled_is_spread():
    """Means of 2,000 of 10^12 values lie within 4 standard errors of the middle, for consecutive k; both halves too."""
    n = 10**12
    values = [shuffled(k, n, 0) / n for k in range(2000)]
    assert abs(sum(values) / 2000 - 0.5) < 4 * (1 / 12 / 2000) ** 0.5
    pairs = sum((a > 0.5) == (b > 0.5) for a, b in pairwise(values))
    assert abs(pairs / 1999 - 0.5) < 4 * (0.25 / 1999) ** 0.5


@given(TASKS, st.integers(0, 1000), st.integers(0, 4), st.integers(0, 4))
def test_sets_are_disjoint_and_exact(task, seed, n_train, n_heldout):
    """Held-out rows do not depend on how many are trained on."""
    n_train = min(n_train, min(n_problems(task).values()) - n_heldout)
    if n_train < 0:
        return
    train, heldout = split(task, seed, n_train=n_train, n_heldout=n_heldout)
    assert (len(train), len(heldout)) == (n_train, n_heldout)
    assert len({row["prompt"] for row in train + heldout}) == n_train + n_heldout
    assert split(task, seed, n_train=0, n_heldout=n_heldout)[1] == heldout


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="301 problems are wanted, 101 of length 2, of which there are only 100"):
        rows(Sort((2, 4)), 0, 0, 301)
    assert len(rows(Sort((2, 4)), 0, 0, 300)) == 300
    for task, message in (
        (Sort((1, 3)), "n_numbers 1 to 3: needs 2 <= low"),
        (Sort((4, 3)), "n_numbers 4 to 3"),
        (Addition((2, 99)), "high <= 32"),
        (Addition((2, 2), (5, 5)), "numbers 5 to 5: needs 0 <= low < high"),
        (Modular(1), "modulus must be from 2"),
        (Modular(5, (0, 1)), "n_operations 0 to 1: needs 1 <= low"),
        (Modular(5, (1, 1), "+/"), "allowed are some of"),
        (Modular(5, (1, 1), "++"), "each once"),
    ):
        with pytest.raises(ValueError, match=message):
            n_problems(task)
    for options, message in (
        ({"style": "loud"}, "style: 'loud': allowed is spaced, compact, worded"),
        ({"first": 3, "last": 2}, "needs 0 <= first <= last"),
    ):
        with pytest.raises(ValueError, match=message):
            rows(Sort(), **{"seed": 0, "first": 0, "last": 5, **options})
    with pytest.raises(ValueError, match="compact has no space between numbers"):
        rows(Sort(numbers=(0, 12)), 0, 0, 5, "compact")
    with pytest.raises(ValueError, match="n_heldout must be at least 0, got -1"):
        split(Sort(), 0, n_train=3, n_heldout=-1)
    with pytest.raises(ValueError, match=r"k must be in 0 \.\. 4, got 5"):
        shuffled(5, 5, 0)
    with pytest.raises(ValueError, match="is the length of fewer problems"):
        problem_row(Sort(), 5, 100_000)
