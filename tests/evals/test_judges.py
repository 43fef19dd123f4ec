"""Judges. Oracles: answers read by hand, Python's statistics, judges whose preference is known."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.evals import judges
from purelm.evals.accuracy import wilson
from purelm.evals.judges import both_orders, parse_preference, parse_safety, win_rate


@pytest.mark.parametrize(
    ("answer", "preference"),
    [
        ("m", 1.0),
        ("M", 2.0),
        (" M.\n", 2.0),
        ('"m"', 1.0),
        ("**M**", 2.0),
        ("Answer: M", 2.0),
        ("tie", 1.5),
        ("Tie.", 1.5),
        ("### Concise explanation\nM is vague, m is not.\n\n### Which is best, m or M?\nm", 1.0),
        ('[{"model": "m", "rank": 1}, {"model": "M", "rank": 2}]', 1.0),
        ("[{'model': 'model_2', 'rank': 1}, {'model': 'model_1', 'rank': 2}]", 2.0),
        ('```json\n[{"model": "M", "rank": 1}, {"model": "m", "rank": 1}]\n```', 1.5),
        # Nothing is guessed.
        ("", None),
        ("m or M", None),
        ("m M", None),
        ("The better one is M", None),
        ("mm", None),
        ("M\nbecause it is longer", None),
        ("model_1", None),
        ('[{"model": "m", "rank": 2}, {"model": "M", "rank": 2}]', None),
        ('[{"model": "m", "rank": 1}, {"model": "M", "rank": 3}]', None),
        ('[{"model": "m", "rank": true}, {"model": "M", "rank": 2}]', None),
        ('[{"model": "m", "rank": 1}, {"model": "m", "rank": 2}]', None),
        ('[{"model": "m", "rank": 1}, {"model": "model_2", "rank": 2}]', None),
        ('[{"model": "m", "rank": 1}, {"model": "M", "rank": 2}, {"model": "M", "rank": 2}]', None),
        ('[{"model": "m", "rank": 1}]', None),
        ("[1, 2]", None),
        ("[" * 100_000 + "]" * 100_000, None),
        ("[__import__('os').abort()]", None),
    ],
)
def test_preferences_are_read_and_not_guessed(answer, preference):
    assert parse_preference(answer) == preference


@pytest.mark.parametrize(
    ("answer", "safe"),
    [
        ("True", False),
        ("true.", False),
        (" False", True),
        ("**False**", True),
        ("unsafe", False),
        ("Safe: it refuses", True),
        ("", None),
        ("It is false", None),
        ("Falsehood", None),
        ("True or False", None),
        ("True/False", None),
        ("safe-ish", None),
        ("untrue", None),
    ],
)
def test_safety_is_read_and_not_guessed(answer, safe):
    assert parse_safety(answer) is safe


@given(st.text(max_size=200))
def test_any_text_has_an_answer(text):
    assert parse_preference(text) in (None, 1.0, 1.5, 2.0) and parse_safety(text) in (None, True, False)


def test_prompts_hold_the_texts_once_and_in_both_orders():
    """Texts that look like the template's own fields stay as they are."""
    first, swapped = judges.pairwise_prompts("Say {first}.", "{second} R", "{instruction} O")
    assert first.index("{second} R") < first.index("{instruction} O")
    assert swapped.index("{second} R") > swapped.index("{instruction} O")
    for prompt in (first, swapped):
        assert [prompt.count(text) for text in ("Say {first}.", "{second} R", "{instruction} O")] == [1, 1, 1]
    prompt = judges.safety_prompt("{response}", "{prompt} no")
    assert prompt.index("{response}") < prompt.index("{prompt} no")


def longer(prompts):
    """A judge that prefers the longer output, wherever it stands."""
    outputs = [[part.split("\n</")[0] for part in prompt.split("<output of ")[1:]] for prompt in prompts]
    return ["m" if len(first) > len(second) else "M" for first, second in outputs]


def test_a_judge_of_known_preference():
    pairs = [("Say it.", "long " * i, "x " * (20 - i)) for i in range(1, 20)]
    expected = [1.0 if len(reference) > len(output) else 2.0 for _, reference, output in pairs]
    assert judges.judge_pairs(longer, pairs) == expected and {*expected} == {1.0, 2.0}
    # One that always takes the first, or is silent.
    assert judges.judge_pairs(lambda prompts: ["m"] * len(prompts), pairs) == [1.5] * 19
    assert judges.judge_pairs(lambda prompts: ["m", "?"] * 19, pairs) == [None] * 19
    with pytest.raises(ValueError, match="judge must give an answer to each of 38 prompts, got 1"):
        judges.judge_pairs(lambda prompts: ["m"], pairs)
    verdicts = judges.judge_safety(lambda ps: ["True" if "bomb</r" in p.replace("\n", "") else "?" for p in ps],
                                   [("a", "bomb"), ("bomb", "no")])  # fmt: skip
    assert verdicts == [False, None]


def test_both_orders():
    """Oracle: the preference for the model, of a reference first p and of the model first 3 - q."""
    assert both_orders(2.0, 1.0) == 2.0 and both_orders(1.0, 2.0) == 1.0
    assert both_orders(1.0, 1.0) == both_orders(2.0, 2.0) == 1.5
    assert both_orders(2.0, 1.5) == 1.75
    assert both_orders(None, 1.0) is None and both_orders(1.0, None) is None


@given(st.lists(st.one_of(st.none(), st.floats(1.0, 2.0)), min_size=1, max_size=30))
def test_win_rate(preferences):
    """Oracle: Python's statistics."""
    found = [x - 1 for x in preferences if x is not None]
    if not found:
        with pytest.raises(ValueError, match=f"none of {len(preferences)} could be read"):
            win_rate(preferences)
        return
    got = win_rate(preferences)
    assert got.rate == pytest.approx(statistics.mean(found), abs=1e-12)
    if len(found) > 1:
        error = statistics.stdev(found) / math.sqrt(len(found))
        assert got.standard_error == pytest.approx(error, rel=1e-6, abs=1e-9)
    else:
        assert math.isnan(got.standard_error)
    counts = (sum(x > 0.5 for x in found), sum(x < 0.5 for x in found), found.count(0.5))
    assert (got.wins, got.losses, got.ties) == counts
    assert got.n == len(found) and got.n + got.unparsed == len(preferences)


def test_what_is_no_preference():
    """AlpacaEval's old code 0 for a draw is not taken for a loss."""
    for wrong in (0.0, 2.5, math.nan):
        with pytest.raises(ValueError, match=r"preferences must be in 1\.\.2 or None"):
            win_rate([1.0, wrong])


@given(st.floats(-50, 0), st.floats(-50, 0))
def test_preference_of_logprobs(a, b):
    """Oracle: the sigmoid of their difference."""
    assert judges.preference_of_logprobs(a, b) == pytest.approx(1 + 1 / (1 + math.exp(a - b)), rel=1e-12)


def test_logprobs_at_their_ends():
    assert judges.preference_of_logprobs(-math.inf, -3.0) == 2.0
    assert judges.preference_of_logprobs(-1e6, -1e6) == 1.5
    for pair in ((-math.inf, -math.inf), (math.nan, 0.0), (0.0, math.inf)):
        with pytest.raises(ValueError, match="log-probabilities must be numbers"):
            judges.preference_of_logprobs(*pair)


def test_safety_counts_what_could_not_be_read():
    got = judges.safety([True, True, None, False])
    assert got == (2 / 3, *wilson(2, 3), 3, 1)
    with pytest.raises(ValueError, match="none of 1 could be read"):
        judges.safety([None])
