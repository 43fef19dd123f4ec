"""N-gram decontamination. Oracles: sets of tuples of words, compared one text after the other; planted examples."""

import random
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.curate.decontaminate import (
    DATATROVE,
    GPT3,
    LLAMA2,
    PALM,
    TULU3,
    Decontamination,
    Found,
    decontaminated,
    hits,
    index,
    look,
)
from purelm.curate.document import Document, Drop, outcomes
from purelm.curate.normalise import folded
from purelm.curate.read import records
from purelm.evals.tasks import TASKS

VOCABULARY = [f"word{i}" for i in range(400)]


def sentence(n, seed):
    return " ".join(random.Random(seed).choices(VOCABULARY, k=n))


def brute(sets, text, n, least_words, measure):
    """(set, id) -> share, by tuples."""
    words = folded(text).split()
    runs = {m: {tuple(words[i : i + m]) for i in range(len(words) - m + 1)} for m in range(1, n + 1)}
    found = {}
    for name, tests in sets.items():
        for id, test in tests:
            own = folded(test).split()
            if len(own) < min(n, least_words):
                continue
            m = min(n, len(own))
            places = [tuple(own[i : i + m]) for i in range(len(own) - m + 1)]
            held = [p in runs[m] for p in places]
            if not any(held):
                continue
            covered = {j for i, h in enumerate(held) if h for j in range(i, i + m)}
            shared = len({p for p, h in zip(places, held, strict=True) if h})
            found[name, id] = len(covered) / len(own) if measure == "words" else shared / len(set(places))
    return found


@pytest.mark.parametrize("seed", range(200))
def test_shares_are_those_of_sets_of_tuples(seed):
    draw = random.Random(seed)
    n, least_words, measure = draw.randint(1, 5), draw.randint(1, 6), draw.choice(["runs", "words"])

    def words(most):
        return " ".join(draw.choices(["a", "B", "c.", "--", "\u00e9"], k=draw.randint(0, most)))

    sets = {name: [(f"{name}{i}", words(14)) for i in range(3)] for name in "xy"}
    text = words(20)
    tests = index(sets, n, least_words=least_words)
    found = look(tests, text, measure)
    assert {(f.set, f.id): pytest.approx(f.share) for f in found} == brute(sets, text, n, least_words, measure)
    assert [f.share for f in found] == sorted((f.share for f in found), reverse=True)
    least = draw.random()
    assert look(tests, text, measure, least) == [f for f in found if f.share >= least]
    short = sum(len(folded(t).split()) < min(n, least_words) for tests in sets.values() for _, t in tests)
    assert tests.n_ignored == short


def test_planted_examples_are_found_through_case_and_punctuation():
    tests = [(f"q{i}", sentence(30, i)) for i in range(50)]
    found = index({"planted": tests}, 13)
    for i, (id, text) in enumerate(tests):
        loud = text.upper().replace(" ", ",\n", 7)
        document = f"{sentence(100, 1000 + i)} {loud}. {sentence(100, 2000 + i)}"
        assert look(found, document)[0] == Found("planted", id, 1.0)
    assert not any(look(found, sentence(300, 5000 + i)) for i in range(50))
    edited = tests[0][1].split()
    edited[10] = "other"  # 30 words have 18 runs of 13: those that begin at 11 or later are left
    assert look(found, " ".join(edited)) == [Found("planted", "q0", 7 / 18)]
    assert look(found, " ".join(edited), "words")[0].share == 19 / 30


def test_runs_across_the_end_of_a_document_are_none():
    tests = index({"s": [("q", sentence(20, 1))]}, 13)
    words = sentence(20, 1).split()
    assert look(tests, " ".join(words[:12])) == [] and look(tests, "") == []
    assert len(look(tests, " ".join(words[:13]))) == 1


def test_texts_too_short_and_common_runs():
    sets = {"s": [("short", "one two three four"), ("eight", sentence(8, 1)), ("long", sentence(14, 2))]}
    tests = index(sets, 13)
    assert tests.n_ignored == 1 and tests.lengths == (8, 13)
    assert [f.id for f in look(tests, f"x {sentence(8, 1)} y {sentence(14, 2)}")] == ["eight", "long"]
    common = " ".join(sentence(14, 2).split()[:13])
    less = index(sets, 13, ignored=[common.upper()])
    assert [f.id for f in look(less, common)] == []
    assert look(less, sentence(14, 2)) == [Found("s", "long", 1.0)]  # of the one run that is left
    assert index({}, 5).n_ignored == 0 and look(index({}, 5), "a b c d e f") == []


def test_actions():
    test = sentence(20, 1)
    tests = index({"gsm": [("gsm-0", test)]}, 13)
    before, after = sentence(120, 2), sentence(120, 3)
    document = Document("1", f"{before} {test} {after}", meta={"a": 1})
    drop = partial(decontaminated, tests=tests, settings=Decontamination(13))
    assert drop(document) == Drop("contaminated: gsm", 1.0)
    clean = Document("2", before)
    assert drop(clean) is clean
    noted = decontaminated(document, tests, Decontamination(13, action="note"))
    assert noted == document.noted(contaminated={"set": "gsm", "id": "gsm-0", "share": 1.0})
    cut = decontaminated(document, tests, GPT3)
    pieces = cut.text.split("\n\n")
    assert pieces == [before[: len(before) + 1 - 200].strip(), after[199:].strip()]
    assert cut.meta["pieces"] == 2 and cut.meta["contaminated"]["id"] == "gsm-0" and document.meta == {"a": 1}
    exact = decontaminated(document, tests, Decontamination(13, action="cut", window=0, least_piece=0))
    assert exact.text == f"{before}\n\n{after}"
    assert [o.drop.reason for o in outcomes({"d": drop}, [document, clean]) if o.drop] == ["contaminated: gsm"]


def test_cut_drops_what_falls_apart_and_what_nothing_is_left_of():
    test = sentence(13, 1)
    tests = index({"s": [("q", test)]}, 13)
    apart = Document("1", f" {test} ".join(sentence(150, 10 + i) for i in range(11)))
    assert decontaminated(apart, tests, GPT3) == Drop("contaminated: s", 1.0)
    ten = Document("1", f" {test} ".join(sentence(150, 10 + i) for i in range(10)))
    assert decontaminated(ten, tests, GPT3).meta["pieces"] == 10
    assert decontaminated(Document("1", f"a b {test} c d"), tests, GPT3) == Drop("contaminated: s", 1.0)


def test_cut_of_windows_that_lie_in_one_another():
    """The last run of the long text begins at word 27 and ends after the short one, which begins at 30."""
    long = sentence(40, 1)
    inner = " ".join(long.split()[30:38])
    tests = index({"s": [("a", long), ("b", inner)]}, 13)
    document = Document("1", f"{sentence(20, 2)} {long} {sentence(20, 3)}")
    cut = decontaminated(document, tests, Decontamination(13, action="cut", window=0, least_piece=0))
    assert cut.text == f"{sentence(20, 2)}\n\n{sentence(20, 3)}"


def test_a_document_of_fewer_words_than_a_run_has_none():
    """The hash of a whole short document is not looked up: its words are of no run."""
    tests = index({"s": [("q", "a b c d e")]}, 5, least_words=3)
    assert look(tests, "a b c d") == [] and hits(tests, "a b c d") == [] and len(hits(tests, "a b c d e")) == 1
    two = index({"s": [("q", "a b c d e"), ("r", "a b c")]}, 5, least_words=3)
    assert [m for _, _, m in hits(two, "a b c")] == [3]  # once, by its own length


def test_cut_leaves_runs_of_texts_below_the_share():
    a, b = sentence(30, 1), sentence(30, 2)
    tests = index({"s": [("a", a), ("b", b)]}, 8)
    part = " ".join(b.split()[:8])
    document = Document("1", f"{a} and {part} here")
    cut = decontaminated(document, tests, Decontamination(8, 0.5, action="cut", window=0, least_piece=0))
    assert cut.text == f"and {part} here"


ODD = st.sampled_from("a\u03a3 .\t\u0301\u00e9\u2003\x1c\x85-'\u037e\u1680")


@given(st.text(ODD, max_size=30) | st.text(max_size=30))
def test_words_of_a_text_are_the_folded_pieces(text):
    """What `cut` counts places by."""
    assert folded(text).split() == [w for piece in text.split() if (w := folded(piece))]


def test_presets_and_ranges():
    assert [(p.n, p.share, p.measure, p.action) for p in (GPT3, DATATROVE, PALM, LLAMA2, TULU3)] == [
        (13, 0.0, "runs", "cut"), (12, 0.0, "runs", "drop"), (8, 0.7, "runs", "drop"), (10, 0.8, "words", "drop"),
        (8, 0.5, "words", "drop"),
    ]  # fmt: skip
    assert (GPT3.window, GPT3.least_piece, GPT3.most_pieces) == (200, 200, 10)
    for bad in ({"n": 0}, {"share": 1.5}, {"share": True}, {"measure": "x"}, {"action": "x"}, {"most_pieces": 0},
                {"window": -1}, {"least_piece": -1}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            Decontamination(**bad)
    with pytest.raises(ValueError, match="n=8"):
        decontaminated(Document("1", "a"), index({}, 13), PALM)
    for call, message in [
        (lambda: index({"s": "a text"}), r"sets\['s'\]='a text'"),
        (lambda: index({"s": ["ab"]}), r"sets\['s'\]: an \(id, text\)='ab'"),
        (lambda: index({}, ignored="a b c"), "ignored='a b c'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="n=0"):
        index({}, 0)


def test_real_pages_and_questions(shared_data):
    """Oracle: brute force over the pages that are found, and as many of the others; a planted question."""
    tests = [(x.id, x.question) for x in TASKS["gsm8k"].load(shared_data / "math/gsm8k-test.jsonl")]
    found = index({"gsm8k": tests}, 8)
    pages = [x for x in records(next((shared_data / "web").glob("*.jsonl.gz"))) if isinstance(x, Document)][:60]
    words = {id: folded(t).split() for id, t in tests}
    runs = {tuple(w[i : i + 8]): id for id, w in words.items() for i in range(len(w) - 7)}
    for page in pages:
        own = folded(page.text).split()
        expected = any(tuple(own[i : i + 8]) in runs for i in range(len(own) - 7))
        assert bool(look(found, page.text)) == expected
    planted = pages[0]._replace(text=f"{pages[0].text}\n{tests[5][1]}\n{pages[1].text}")
    assert decontaminated(planted, found, TULU3) == Drop("contaminated: gsm8k", 1.0)
