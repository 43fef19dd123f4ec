"""Gopher's quality rules. Oracles: the paper's rules over str.split and lines; the cases of the course."""

from dataclasses import replace

import pytest
from hypothesis import given

from purelm.curate.document import Drop
from purelm.curate.gopher import COURSE, GOPHER, Quality, quality
from purelm.curate.words import scan
from tests.curate.test_words import slow_totals
from tests.curate.web_texts import any_text, page

THRESHOLDS = {name: getattr(GOPHER, name) for name in GOPHER.__dataclass_fields__ if name != "stop_words"}
OFF = Quality(**dict.fromkeys(THRESHOLDS))


def verdict(text, config=GOPHER):
    found = quality(scan(text, "python"), config)
    return found if isinstance(found, Drop) else None


def ellipses(n, of):
    return "\n".join(["Many of the lines here trail off like this..."] * n + ["The others end."] * (of - n))


# In pairs, dropped and kept: words (at least, at most), their mean length, lines with ellipses, letters.
CASES = [
    ("A text of a few words is too short to keep.", False),
    ("The reading of a long text takes longer." * 100, True),  # "The" is one of two stop words
    ("A text of so many words is far too long. " * 50_000, False),
    ("A text of so many words is still within the limit. " * 5_000, True),
    ("the be " * 100, False),
    ("the with " * 100, True),
    ("of the " + "internationalisation characteristically uncontrollable biggest " * 100, False),
    ("of the kind that is fine " * 100, True),
    (ellipses(70, 100), False),
    (ellipses(30, 260), True),
    ("the and " + "123 " * 40 + "word " * 10, False),
    ("This text should pass, and it reads well, as to the rules of Gopher. " * 100, True),
]


@pytest.mark.parametrize(("text", "kept"), CASES)
@pytest.mark.parametrize("config", [COURSE, GOPHER])
def test_cases_of_the_course(text, kept, config):
    assert (quality(scan(text, "numba"), config).__class__ is not Drop) == kept


def slow(text, name, threshold):
    """Whether one rule drops a text, from the paper's sentence."""
    t = slow_totals(text)
    if name.startswith("least_stop"):
        letters = "".join(c if c.isalnum() or c == "_" else " " for c in text).lower().split()
        return len({*letters} & {*GOPHER.stop_words}) < threshold
    shares = {
        "words": (t.counted, 1),
        "mean_length": (t.counted_characters, t.counted),
        "hashes": (t.hashes, t.words),
        "ellipses": (t.ellipses, t.words),
        "bullet_lines": (t.bullets, t.lines),
        "ellipsis_lines": (t.ellipsis_lines, t.lines),
        "lettered": (t.lettered, t.words),
    }
    end, key = name.split("_", 1)
    part, whole = shares[key]
    return whole > 0 and (part / whole < threshold if end == "least" else part / whole > threshold)


@given(any_text | page | page.map(lambda text: text + " word, of" * 30))
def test_each_rule_and_all_together(text):
    """All drop a text if one alone does, so their order makes no difference."""
    alone = {name: verdict(text, replace(OFF, **{name: threshold})) for name, threshold in THRESHOLDS.items()}
    for name, threshold in THRESHOLDS.items():
        assert (alone[name] is not None) == slow(text, name, threshold), name
        if alone[name] is not None:
            below = alone[name].value < threshold
            assert below if name.startswith("least") else alone[name].value > threshold
    found = verdict(text)
    assert found in alone.values() if found else not any(alone.values())
    four = (
        "least_words",
        "most_words",
        "least_mean_length",
        "most_mean_length",
        "most_ellipsis_lines",
        "least_lettered",
    )
    assert (verdict(text, COURSE) is None) == all(alone[name] is None for name in four)


@given(any_text | page)
def test_at_the_threshold_is_kept(text):
    for name in THRESHOLDS:
        whole = name.endswith("words") or name == "least_mean_length"
        extreme = 0 if name.startswith("most") else 10**9 if whole else 1.0
        found = verdict(text, replace(OFF, **{name: extreme}))
        assert found is None or verdict(text, replace(OFF, **{name: found.value})) is None


def test_stop_words():
    only = replace(OFF, least_stop_words=2)
    assert verdict("The end, (of) it", only) is None
    assert verdict("THE the breathe offer", only) == Drop("too few stop words", 1)
    assert verdict("", replace(only, stop_words=())) == Drop("too few stop words", 0)
    assert verdict("c++ a.b", replace(only, stop_words=("a.b",), least_stop_words=1)) is None
    assert verdict("axb", replace(only, stop_words=("a.b",), least_stop_words=1)) == Drop("too few stop words", 0)


def test_thresholds_are_the_papers():
    assert (*THRESHOLDS.values(),) == (50, 100_000, 3.0, 10.0, 0.1, 0.1, 0.9, 0.3, 0.8, 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"least_words": -1}, "least_words=-1"),
        ({"least_words": 2.5}, "least_words=2.5"),
        ({"most_hashes": float("inf")}, "most_hashes=inf"),
        ({"least_lettered": 80}, "least_lettered=80; allowed: a number from 0 to 1, or None"),
        ({"stop_words": "the"}, "stop_words='the'"),
        ({"stop_words": ("",)}, "none empty"),
        ({"least_words": 10, "most_words": 9}, "least_words=10 is above most_words=9"),
    ],
)
def test_ranges(wrong, message):
    with pytest.raises(ValueError, match=message):
        Quality(**wrong)
