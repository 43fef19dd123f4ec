"""Word problems. Oracle: the numbers read back out of a prompt's text, and its template's expression in Fractions."""

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.align.data.word_problems import WordProblems, rows, split, value
from purelm.align.data.word_templates import HER, KINDS, NAMES, TEMPLATES

TASKS = st.builds(
    lambda steps, low, more, most: WordProblems(steps, (low, low + more), most),
    st.sampled_from([(1, 1), (1, 2), (2, 2)]), st.integers(2, 4), st.integers(40, 90), st.integers(400, 10_000),
)  # fmt: skip


def pattern(template):
    """What the texts of a template look like; a group for each number."""
    parts = re.split(r"\{(\w+)\}", template.text)
    words = [f"(?P<{x}>[0-9]+)" if re.fullmatch("[a-z]", x) else r"[A-Za-z ]+" for x in parts[1::2]]
    return re.compile("".join(re.escape(x) + y for x, y in zip(parts[::2], [*words, ""], strict=True)))


PATTERNS = [pattern(template) for template in TEMPLATES]


def read(row):
    """(template, numbers) of a prompt: the only template whose text it is."""
    found = [(t, m) for t, p in zip(TEMPLATES, PATTERNS, strict=True) if (m := p.fullmatch(row["prompt"]))]
    assert len(found) == 1, row["prompt"]
    return found[0][0], {x: int(y) for x, y in found[0][1].groupdict().items()}


@given(TASKS, st.integers(0, 2**40))
def test_answers_are_right_and_lengths_in_turn(task, seed):
    low, high = task.n_steps
    for k, row in enumerate(rows(task, seed, 0, 60)):
        template, numbers = read(row)
        assert row["length"] == low + k % (high - low + 1) == sum(x in "+-*/%" for x in template.expression)
        right = eval(template.expression, {}, {x: Fraction(y) for x, y in numbers.items()})
        assert row["response"] == str(right) and right.denominator == 1 and 1 <= right <= task.most
        made = dict(template.made)
        assert all(task.numbers[0] <= x <= task.numbers[1] for name, x in numbers.items() if name not in made)
        assert all(2 <= x <= task.most for x in numbers.values())


def test_answers_as_a_reader_finds_them():
    """Oracle: equations of the less direct sentences, with the numbers in the order of the text."""
    found = {read(row)[0].text: row for row in rows(WordProblems(numbers=(2, 9)), 0, 0, 94)}
    assert len(found) == len(TEMPLATES) == 47
    for text, row in found.items():
        n = [int(x) for x in re.findall("[0-9]+", row["prompt"])]
        answer = int(row["response"])
        if "fills as many" in text:
            assert any(n[0] == n[1] * full + answer for full in range(1, 9)) and answer < n[1]
        elif "more {things} than {A}. How many {things} do they have together" in text:
            assert answer == n[0] + (n[0] + n[1])
        elif "of the same price" in text:
            assert answer * n[1] == n[0] * n[2]
        elif "red {things}" in text:
            assert answer * n[2] == n[0] + n[1]
        elif "He} kept {b} and shared" in text:
            assert answer * n[2] + n[1] == n[0]
        elif "one of these friends" in text:
            assert (answer - n[2]) * n[1] == n[0]
        elif "which is {b} more than" in text:
            assert answer + n[1] == n[0]
        elif "How many more {things} does {B} have" in text:
            assert n[0] + answer == n[0] * n[1]
        elif "a bike" in text:
            assert n[1] + n[2] + answer == n[0]
        elif "{d} tables" in text:
            assert answer == n[0] * n[1] + n[2]
        elif "and {d} dogs" in text:
            assert answer == n[0] + n[2] - n[3]


def test_templates_are_well_formed():
    """Each number once in the text, each letter of an expression in it; a question at the end; several kinds."""
    fields = {"A", "B", *HER, *(x + y for kind in KINDS for x in kind for y in ("", "2"))}
    for template in TEMPLATES:
        named = re.findall(r"\{(\w+)\}", template.text)
        numbers = [x for x in named if re.fullmatch("[a-z]", x)]
        assert len(set(numbers)) == len(numbers) and set(named) - set(numbers) <= fields
        assert set(re.findall("[a-z]", template.expression)) <= set(numbers)
        assert template.text.endswith("?") and len(re.findall("[.?]", template.text)) >= 2
    steps = [sum(x in "+-*/%" for x in t.expression) for t in TEMPLATES]
    assert (steps.count(1), steps.count(2)) == (24, 23)
    irrelevant = [t for t in TEMPLATES if set(re.findall(r"\{([a-z])\}", t.text)) - set(t.expression)]
    assert len(irrelevant) == 7 and sum("ow many more" in t.text for t in TEMPLATES) == 4


def test_words_of_a_problem_differ_and_all_come():
    """No one gives something to himself; all names and words come; he and she go with the name."""
    found = rows(WordProblems(), 3, 0, 2000)
    text = " ".join(row["prompt"] for row in found)
    for words in KINDS.values():
        assert all(re.search(rf"\b({one}|{many})\b", text) for one, many in words)
    assert all(re.search(rf"\b{name}\b", text) for name, _ in NAMES)
    names = dict(NAMES)
    for row in found:
        present = [x for x in names if re.search(rf"\b{x}\b", row["prompt"])]
        template, _ = read(row)
        assert len(present) == len({x for x in ("{A}", "{B}") if x in template.text})
        if "{He}" in template.text:
            first = re.search("|".join(names), row["prompt"]).group()
            assert re.search(rf"\b{names[first]['He']}\b", row["prompt"])
        if "{things2}" in template.text:
            both = [w[1] for w in KINDS["thing", "things"] if re.search(rf"[0-9] {w[1]}\b", row["prompt"])]
            assert len(both) == 2


@given(TASKS, st.integers(0, 1000), st.integers(0, 80), st.integers(0, 80))
def test_sets_are_disjoint_and_exact(task, seed, n_train, n_heldout):
    """No template with the same numbers twice. Held-out rows do not depend on how many are trained on."""
    train, heldout = split(task, seed, n_train=n_train, n_heldout=n_heldout)
    assert (len(train), len(heldout)) == (n_train, n_heldout)
    problems = {(t.text, *n.items()) for t, n in map(read, train + heldout)}
    assert len(problems) == n_train + n_heldout
    assert split(task, seed, n_train=0, n_heldout=n_heldout)[1] == heldout
    assert rows(task, seed, n_heldout, n_heldout + n_train) == train


def test_every_problem_comes_once():
    """Oracle: all pairs of 2 .. 60, listed, of one template whose answer is a - b."""
    text = TEMPLATES[0].text
    found = [read(row) for row in rows(WordProblems((1, 1), (2, 60), 60), 5, 0, 24 * 100)]
    pairs = [(n["a"], n["b"]) for t, n in found if t.text == text]
    assert len(pairs) == len(set(pairs)) == 100 and {a > b for a, b in pairs} == {True}
    small = WordProblems((1, 1), (2, 12), 12)
    with pytest.raises(ValueError, match=r"numbers 2 to 12, most 12: no more problems like .*widen the ranges"):
        rows(small, 0, 0, 24 * 60)
    assert rows(small, 0, 0, 48) != rows(small, 1, 0, 48)


def test_small_numbers_to_the_last():
    """Of 2 .. 9, 35 triples have a > b + c: as many problems, and no more. All that is counted is in the plural."""
    small = WordProblems((2, 2), (2, 9), 90)
    found = [read(row) for row in rows(small, 0, 0, 23 * 35)]
    assert min(min(numbers.values()) for _, numbers in found) == 2
    triples = {(n["a"], n["b"], n["c"]) for t, n in found if t.expression == "a - b - c"}
    assert triples == {(a, b, c) for a in range(2, 10) for b in range(2, 10) for c in range(2, 10) if a > b + c}
    with pytest.raises(ValueError, match="no more problems like 'There were"):
        rows(small, 0, 0, 23 * 36)


def test_value_refuses_what_is_not_whole_or_positive():
    numbers = {"a": 20, "b": 5, "c": 3}
    for expression, right in (
        ("a + b", 25), ("a - b", 15), ("a * b", None), ("a * c", 60), ("a / b", 4), ("a / c", None), ("b - a", None),
        ("a - a", None), ("a % c", 2), ("a % b", None), ("c % b", None), ("b - a + a", None), ("a * b / b", None),
        ("a - (b + c)", 12), ("a - b - c", 12),
    ):  # fmt: skip
        assert value(expression, numbers, 60) == right, expression


def test_what_is_wrong_is_named():
    for task, message in (
        (WordProblems((0, 1)), "n_steps 0 to 1: needs 1 <= low <= high <= 2"),
        (WordProblems((2, 1)), "n_steps 2 to 1"),
        (WordProblems((1, 3)), "n_steps 1 to 3"),
        (WordProblems(numbers=(1, 9)), "numbers 1 to 9: needs 2 <= low < high <= 1,000"),
        (WordProblems(numbers=(9, 9)), "numbers 9 to 9"),
        (WordProblems(numbers=(2, 1001)), "numbers 2 to 1001"),
        (WordProblems(most=99), "most must be from 100 .* to 1,000,000, got 99"),
        (WordProblems(most=10**7), "got 10000000"),
    ):
        with pytest.raises(ValueError, match=message):
            rows(task, 0, 0, 1)
    with pytest.raises(ValueError, match="needs 0 <= first <= last"):
        rows(WordProblems(), 0, 3, 2)
    with pytest.raises(ValueError, match="n_train must be at least 0, got -1"):
        split(WordProblems(), 0, n_train=-1, n_heldout=3)
