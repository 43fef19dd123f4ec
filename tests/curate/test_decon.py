"""Decon. Oracles: the formula over tuples of words, question by question; planted examples with edits, clean text."""

import random
from functools import partial
from math import log

import pytest

from purelm.curate.decon import Decon, Example, cleared, contamination, index
from purelm.curate.document import Document, Drop, outcomes
from purelm.curate.normalise import folded
from purelm.curate.read import records
from purelm.evals.tasks import TASKS

WIDE = Decon(n=2, every=1, misses=10**6, least=0.3, perfect=3, long=6, least_words=3, answer_window=10**6)
VOCABULARY = [f"word{i}" for i in range(2000)]


def sentence(n, seed):
    return " ".join(random.Random(seed).choices(VOCABULARY, k=n))


def tuples(text, n):
    words = folded(text).split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def brute(tests, text, s):
    """Scores of all examples where clusters and windows are the whole document."""
    tests = [t for t in tests if len(folded(t.question).split()) >= s.least_words]
    runs, words = tuples(text, s.n), folded(text).split()
    found = {}

    def weight(kind, x):
        own = [tuples(t[kind], s.n) for t in tests]
        return log((1 + sum(bool(o) for o in own)) / sum(x in o for o in own))

    def share(kind, t):
        own = tuples(t[kind], s.n)
        return sum(weight(kind, x) for x in own & runs) / sum(weight(kind, x) for x in own)

    def near(kind, t):
        part = folded(t[kind]).split()
        if not part:
            return None
        if len(part) < s.n:
            return float(any(words[i : i + len(part)] == part for i in range(len(words))))
        return share(kind, t)

    for t in tests:
        q, a, p = share(1, t), near(2, t), near(3, t)
        if not tuples(t.question, s.n) & runs:
            continue
        sure = min(1, 0.5 + len(tuples(t.question, s.n)) / 40)
        if a is None and p is None:
            score = q
        elif p is None:
            score = 0.75 * sure * q + (1 - 0.75 * sure) * a
        elif a is None:
            score = 0.85 * sure * q + (1 - 0.85 * sure) * p
        else:
            score = 0.7 * sure * q + (1 - 0.7 * sure) * (2 / 3 * a + 1 / 3 * p)
        total = sum(len(folded(x).split()) for x in t[1:])
        at = min(1, max(0, (total - s.perfect) / (s.long - s.perfect)))
        needed = 1 - at * (1 - s.least)
        whole = q > 1 - 1e-9 and len(folded(t.question).split()) >= s.long
        if score >= needed - 1e-9 or whole:
            found[t.id] = (score, q, a, p)
    return found


@pytest.mark.parametrize("seed", range(200))
def test_scores_are_the_formula(seed):
    draw = random.Random(seed)

    def words(most):
        return " ".join(draw.choices("abcdef", k=draw.randint(0, most)))

    tests = [Example(str(i), words(9), words(draw.choice([0, 1, 9])), words(draw.choice([0, 1, 9]))) for i in range(4)]
    text = words(20)
    found = contamination(index({"s": tests}, WIDE), text)
    expected = brute(tests, text, WIDE)
    assert {h.id: (h.score, h.question, h.answer, h.passage) for h in found} == {
        id: tuple(pytest.approx(x) if x is not None else None for x in values) for id, values in expected.items()
    }
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


def changed(text, every, seed):
    """Each `every`-th word replaced, left out, or doubled by another, as it comes."""
    draw = random.Random(seed)
    words = []
    for i, word in enumerate(text.split()):
        if i % every == every // 2:
            words += draw.choice([["otherwise"], [], [word, "otherwise"]])
        else:
            words.append(word)
    return " ".join(words)


def test_planted_examples_are_found_through_edits_and_clean_text_is_not():
    tests = [Example(f"q{i}", sentence(60, i), sentence(3, 100 + i)) for i in range(60)]
    found = index({"planted": tests}, Decon())
    edited = Decon(least=0.55)  # an edit costs five of 56 runs; at one word in 25 that is a fifth of a question
    for settings, every, least in ((Decon(), 60, 60), (edited, 25, 58)):
        found = index({"planted": tests}, settings)
        recalled = 0
        for i, t in enumerate(tests):
            page = f"{sentence(150, 1000 + i)} {changed(t.question, every, i)} so {t.answer}. {sentence(90, 3000 + i)}"
            hits = contamination(found, page)
            recalled += [h.id for h in hits] == [t.id]
            assert len(hits) <= 1
        assert recalled >= least
        assert not any(contamination(found, sentence(400, 9000 + i)) for i in range(60))


def test_an_answer_tells_a_short_question_from_its_source():
    """30 words of question, one of them edited: with its answer near by it is one, without it is not."""
    question, answer = sentence(30, 1), "seventeen apples"
    tests = index({"s": [Example("q", question, answer)]}, Decon(least=0.7, perfect=10, long=40))
    words = question.split()
    words[2] = "other"
    page = f"{sentence(60, 2)} {' '.join(words)}"
    (hit,) = contamination(tests, f"{page} {answer} {sentence(60, 3)}")
    assert hit.answer == 1.0 and hit.question == pytest.approx(23 / 26) and hit.passage is None
    assert folded(f"{page} {answer}").split()[hit.begin : hit.end] == words[3:]  # where the runs of it are
    assert contamination(tests, f"{page} {sentence(60, 3)}") == []
    far = f"{page} {sentence(21, 3)} {answer}"  # the window is of 20 words
    assert contamination(tests, far) == []
    near = f"{page} {sentence(18, 3)} {answer}"
    assert len(contamination(tests, near)) == 1


def test_a_long_question_suffices_alone():
    fifty, less = sentence(50, 1), sentence(49, 2)
    tests = index({"s": [Example("a", fifty, "an answer"), Example("b", less, "an answer")]})
    assert [h.id for h in contamination(tests, f"{fifty} {sentence(30, 3)} {less}")] == ["a"]


def test_misses_end_a_cluster():
    question = sentence(60, 1)
    words = question.split()
    first, second = " ".join(words[:30]), " ".join(words[30:])
    tests = partial(index, {"s": [Example("q", question)]})
    for gap, settings, n in ((3, Decon(), 1), (7, Decon(), 0), (7, Decon(misses=12), 1)):  # gap + 4 runs are missed
        page = f"{first} {sentence(gap, 5)} {second}"
        assert len(contamination(tests(settings), page)) == n


def test_misses_are_counted_in_a_row():
    """Three edits make five misses each, 15 in all, and never eleven in a row."""
    words = sentence(90, 1).split()
    for at in (20, 45, 70):
        words[at] = "other"
    tests = index({"s": [Example("q", sentence(90, 1))]})
    (hit,) = contamination(tests, " ".join(words))
    assert (hit.begin, hit.end) == (0, 90) and hit.question == pytest.approx(71 / 86)


def test_a_part_of_a_question_is_not_enough_and_hot_runs_begin_nothing():
    question = sentence(60, 1)
    tests = index({"s": [Example("q", question)]})
    assert contamination(tests, " ".join(question.split()[:45])) == []
    twice = index({"s": [Example("q", question), Example("r", question)]}, Decon(hot=1))
    assert contamination(twice, question) == []
    warm = index({"s": [Example("q", question), Example("r", question)]}, Decon(hot=2))
    assert [h.id for h in contamination(warm, question)] == ["q", "r"]


def test_sampling_looks_at_each_tenth_run():
    question = sentence(12, 1)  # 8 runs
    tests = index({"s": [Example("q", question)]}, Decon(every=10))
    found = [len(contamination(tests, f"{sentence(k, 2)} {question} {sentence(30, 3)}")) for k in range(1, 21)]
    # Runs k .. k + 7 are of the question; 10 or 20 is among them but for k = 1, 2 and 11, 12.
    assert found == [int(any(k <= at < k + 8 for at in (10, 20))) for k in range(1, 21)]
    every = index({"s": [Example("q", question)]}, Decon(every=1))
    assert all(contamination(every, f"{sentence(k, 2)} {question}") for k in range(1, 21))


def test_the_step():
    question = sentence(60, 1)
    tests = index({"gsm": [Example("q", question), Example("short", "one two three")]})
    assert tests.n_ignored == 1
    step = partial(cleared, tests=tests)
    clean, dirty = Document("1", sentence(200, 7)), Document("2", f"{sentence(50, 8)} {question}")
    assert step(clean) is clean and step(dirty) == Drop("contaminated: gsm", pytest.approx(1.0))
    assert [o.step for o in outcomes({"d": step}, [clean, dirty])] == [None, "d"]
    assert contamination(tests, "") == [] and contamination(index({}), sentence(20, 1)) == []


@pytest.mark.parametrize(
    "bad",
    [{"n": 0}, {"every": 0}, {"misses": 0}, {"hot": 0}, {"least": 0.0}, {"least": 1.1}, {"least": True}, {"long": 25},
     {"least_words": 4}, {"answer_window": -1}, {"passage_window": -1}, {"perfect": -1}],
)  # fmt: skip
def test_ranges(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
        Decon(**bad)


def test_real_questions_in_real_pages(shared_data):
    """Recall: questions with their worked answers in a page, as they are; precision: pages as they were crawled."""
    tests = [Example(x.id, x.question, x.solution) for x in TASKS["gsm8k"].load(shared_data / "math/gsm8k-test.jsonl")]
    found = index({"gsm8k": tests})
    pages = [x for x in records(next((shared_data / "web").glob("*.jsonl.gz"))) if isinstance(x, Document)][:100]
    assert not any(contamination(found, page.text) for page in pages)
    for i, (test, page) in enumerate(zip(tests[:100], pages, strict=True)):
        text = f"{page.text}\n{test.question}\nAnswer: {test.answer}\n{pages[i - 1].text}"
        assert contamination(found, text)[0].id == test.id
