"""Contamination. Oracle: sets of tuples of words, compared one example after the other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.align.data import clean, decontaminated, index, match
from purelm.align.data.words import words

WORDS = st.lists(st.sampled_from("a b c d".split()), max_size=9).map(" ".join)


def runs(text, n):
    found = words(text)
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


def slowly(examples, text, n, ratio):
    """(id, share) of the best example, the first of those that tie."""
    if len(words(text)) < n:
        return next(((name, 1.0) for name, x in examples if words(x) and words(x) == words(text)), None)
    best = None
    for name, example in examples:
        theirs = {*runs(example, n)}
        if shared := theirs & {*runs(text, n)}:
            share = len(shared) / len(theirs)
            if best is None or share > best[1]:
                best = name, share
    return best if best is not None and best[1] >= ratio else None


@given(st.lists(WORDS, max_size=5), st.lists(WORDS, max_size=3), st.integers(1, 4), st.sampled_from([0, 0.5, 1]))
def test_as_sets_of_tuples(examples, texts, n, ratio):
    named = [(f"q{i}", text) for i, text in enumerate(examples)]
    tests = index(named, n)
    for text in [*texts, *examples, " x ".join(examples)]:
        found = match(tests, text, ratio)
        assert (found and (found.id, found.share)) == slowly(named, text, n, ratio)
        if found and len(words(text)) >= n:
            example = dict(named)[found.id]
            assert tuple(found.words.split()) == next(run for run in runs(text, n) if run in runs(example, n))


OWN = st.lists(st.sampled_from([f"own{i}" for i in range(20)]), min_size=1, max_size=30)
THEIRS = st.lists(st.sampled_from([f"test{i}" for i in range(20)]), min_size=1, max_size=30)


@given(st.lists(OWN, min_size=1, max_size=6), st.lists(THEIRS, min_size=1, max_size=6), st.data())
def test_all_that_is_planted_is_found_and_nothing_else(rows, examples, data):
    """Examples of 13 words and more anywhere in a row, shorter ones as the whole row; other vocabularies stay."""
    tests = index([(str(i), " ".join(x)) for i, x in enumerate(examples)])
    clean_rows = [{"prompt": " ".join(x), "response": ""} for x in rows]
    assert clean(clean_rows, [decontaminated(tests)])[0] == clean_rows
    planted = data.draw(st.lists(st.tuples(st.integers(0, len(rows) - 1), st.sampled_from(examples)), max_size=4))
    mixed = [list(x) for x in rows]
    for i, example in planted:
        at = data.draw(st.integers(0, len(rows[i])))
        mixed[i] = [*rows[i][:at], *example, *rows[i][at:]] if len(example) >= 13 else example
    text = [", ".join(x).title() for x in mixed]
    seen = []
    kept, _ = clean(
        [{"prompt": x, "response": str(i)} for i, x in enumerate(text)],
        [decontaminated(tests)],
        watch=lambda name, found: seen.append(found),
    )
    touched = {i for i, _ in planted}
    assert {int(row["response"]) for row in kept} == {*range(len(rows))} - touched
    assert all(found.reason == "contaminated" and "(" in found.detail for found in seen)


def test_which_texts_are_looked_at():
    """The question, not the template around it; responses where asked."""
    tests = index([("q1", "What is two and two?")])
    row = {"prompt": "Below is a task.\nWhat is two and two?", "question": "what is two and two", "response": "x"}
    assert clean([row], [decontaminated(tests)])[0] == []
    row = {"prompt": "a", "response": "What is two and two?"}
    assert clean([row], [decontaminated(tests)])[0] == [row]
    _, (counts,) = clean([row], [decontaminated(tests, texts=lambda row: (row["prompt"], row["response"]))])
    assert counts.removed == {"contaminated": 1}


def test_what_is_refused():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        index([], 0)
    with pytest.raises(ValueError, match="ratio must be 0 to 1, got 2"):
        decontaminated(index([]), 2)
    assert match(index([("empty", " ?! ")]), "?") is None


def test_the_real_sets(shared_data):
    """GSM8K: every test question is found in itself, whole; of 7,473 training questions few share a run of 13 words."""
    from purelm.align.data import gsm8k, read

    folder = shared_data / "math"
    test = [(row["source"], row["prompt"]) for row in read(folder / "gsm8k-test.jsonl", gsm8k)]
    tests = index(test)
    assert all((found := match(tests, f"So: {text} Well?")) and found.share == 1 for _, text in test)
    _, (counts,) = clean(read(folder / "gsm8k-train.jsonl", gsm8k), [decontaminated(tests)])
    assert counts.n_in == 7473 and 1 <= counts.n_in - counts.n_out <= 20
