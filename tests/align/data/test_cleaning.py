"""Steps of cleaning. Oracles: plain lists and sets; the laws of a filter; answers read by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.align.data import (
    Counts,
    Removed,
    Step,
    asked,
    clean,
    difficulty,
    filtered,
    length_window,
    normalised,
    prompt_of,
    table,
    unique,
    verifiable,
)

TEXT = st.text("aB .", max_size=3)
ROWS = st.lists(st.fixed_dictionaries({"prompt": TEXT, "response": TEXT, "rate": st.sampled_from([None, 0, 0.5, 1])}))
STEPS = [
    unique(),
    unique(prompt_of, normalised),
    length_window(len, 2, 4),
    difficulty(0.5, 0.75, lambda row: row["rate"]),
    filtered("upper", lambda row: row | {"response": row["response"].upper()}),
]


@given(ROWS)
def test_unique_keeps_first_ones(rows):
    """Oracle: a dict of what was seen, which keeps its order. Twice is as once."""
    first = {}
    for row in rows:
        first.setdefault((row["prompt"], row["response"]), row)
    kept, counts = clean(rows, [unique()])
    assert kept == list(first.values()) and counts[0].removed.get("duplicate", 0) == len(rows) - len(kept)
    assert clean(kept, [unique()])[0] == kept
    words = {}
    for row in rows:
        words.setdefault(" ".join(row["prompt"].lower().replace(".", " ").split()), row)
    assert clean(rows, [unique(prompt_of, normalised)])[0] == list(words.values())


def test_unique_tells_where_a_text_ends():
    rows = [{"prompt": "ab", "response": "c"}, {"prompt": "a", "response": "bc"}]
    assert clean(rows, [unique()])[0] == rows


@given(ROWS, st.lists(st.sampled_from(STEPS), max_size=4))
def test_laws_of_clean(rows, steps):
    """Counts add up and follow on one another; the order is kept; together is one after the other; all is seen."""
    seen = []
    before = [dict(row) for row in rows]
    kept, counts = clean(rows, steps, watch=lambda name, found: seen.append((name, found)))
    assert rows == before
    assert [x.step for x in counts] == [step.name for step in steps]
    for x in counts:
        assert x.n_in == x.n_out + sum(x.removed.values()) and all(x.removed.values())
    assert [x.n_in for x in counts] + [len(kept)] == [len(rows)] + [x.n_out for x in counts]
    assert len(seen) == len(rows) - len(kept)
    single = rows
    for step, x in zip(steps, counts, strict=True):
        single, (alone,) = clean(single, [step])
        assert alone == x
    assert single == kept
    places = iter([(row["prompt"], row["rate"]) for row in rows])
    assert all((row["prompt"], row["rate"]) in places for row in kept)


def test_rows_stream():
    """One row is in memory at a time: the last is not made before the first is written."""
    alive = []

    def rows():
        for i in range(5):
            alive.append(i)
            yield {"prompt": str(i), "response": ""}

    total, _ = clean(rows(), [unique(), length_window(len, 0, 9)], into=lambda stream: [len(alive) for _ in stream])
    assert total == [1, 2, 3, 4, 5]


def test_a_step_that_loses_rows_is_named():
    for run, n in ((lambda rows: iter([*rows][1:]), 1), (lambda rows: iter([*rows] * 2), 4)):
        with pytest.raises(ValueError, match=f"step 'odd': was given 2 rows and gave back {n}"):
            clean([{}, {}], [Step("odd", run)])


def test_length_window():
    """Both ends are included; the tokens of the two texts add up."""
    rows = [{"prompt": "x" * n, "response": "yy"} for n in range(6)]
    kept, (counts,) = clean(rows, [length_window(len, 3, 5)])
    assert [len(row["prompt"]) for row in kept] == [1, 2, 3]
    assert counts == Counts("length", 6, 3, {"too short": 1, "too long": 2})
    assert clean(rows, [length_window(len, 3, None)])[1][0].n_out == 5
    for low, high in ((-1, 2), (3, 2)):
        with pytest.raises(ValueError, match=f"needs 0 <= low <= high, got low {low} and high 2"):
            length_window(len, low, high)


def test_difficulty():
    rows = [{"rate": x} for x in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, None)]
    kept, (counts,) = clean(rows, [difficulty(0.25, 0.75, lambda row: row["rate"])])
    assert [row["rate"] for row in kept] == [0.25, 0.5, 0.75]
    assert counts.removed == {"too hard": 2, "too easy": 1, "no pass rate": 1}
    with pytest.raises(ValueError, match=r"needs 0 <= low <= high <= 1, got low 0.5 and high 2"):
        difficulty(0.5, 2, lambda row: 1.0)


VERDICTS = {
    "no answer": ["", " ", None, "proof", "notfound", ["5"]],
    "not read": ["{", r"\frac{1}{", "5 +"],
    "sentence": ["all of the primes above seven", r"\text{there is no such triangle at all}"],
    None: [5, "0.5", r"\frac{1}{2}", "(1,2]", r"x=5", "east", "C", r"3\sqrt{2}\mathrm{cm}", r"\text{no solution}"],
}


@pytest.mark.parametrize(("answer", "reason"), [(a, reason) for reason, answers in VERDICTS.items() for a in answers])
def test_verifiable(answer, reason):
    (found,) = verifiable().run([{"answer": answer}])
    assert (found.reason if isinstance(found, Removed) else None) == reason


def test_verifiable_by_another_grader():
    """The grader is asked about the answer in its box; a row without the field has no answer."""
    from purelm.align.graders import Verdict

    pairs = []

    def never(answer, gold):
        pairs.append((answer, gold))
        return Verdict(False, "never")

    step = verifiable("gold", grade=never)
    _, (counts,) = clean([{"gold": "{5}"}, {"answer": "5"}], [step])
    assert pairs == [("{5}", "{5}")] and counts.removed == {"not equal to itself": 1, "no answer": 1}


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("What is 3 + 4?", "what is  3+4", True),
        ("What is 3 + 4?", "What is 3 - 4?", False),
        ("(2 + 3) * 4", "2 + 3 * 4", False),
        ("5!", "5", False),
        ("3.5", "3 5", False),
        ("x \u2212 1 \u00d7 2", "x - 1 * 2", True),
        ("twenty-five", "Twenty five", True),
        ("\ufb01ve \u201cdogs\u201d", 'five "dogs"', True),
    ],
)
def test_normalised(a, b, same):
    assert (normalised(a) == normalised(b)) is same


def test_asked():
    """Each message of a user, else the question, else the prompt."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert asked({"messages": [*messages, *messages], "question": "q", "prompt": "p"}) == ("a", "a")
    assert asked({"question": "q", "prompt": "p"}) == ("q",) and asked({"prompt": "p"}) == ("p",)


def test_table():
    text = table([Counts("read", 10, 8, {"refused": 2}), Counts("a long name", 8, 8, {})])
    assert text.splitlines()[1:] == [
        "read                10       8        2  refused 2",
        "a long name          8       8        0",
    ]
