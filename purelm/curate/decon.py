"""Contamination by clusters of n-grams weighted by rarity, question, answer and passage apart: found through edits too.

    tests = index({"gsm8k": [Example("gsm8k-0", question, answer="18"), ...]})
    partial(cleared, tests=tests)                           # Drop("contaminated: gsm8k", 0.93), or the document

After AI2's Decon (github.com/allenai/decon, used for OLMo 3), whose defaults these are:
1. Every `every`-th run of n words of a document is looked up among those of the questions. From a hit the document is
   read on, run by run, both ways; a question is followed until `misses` runs in a row are none of its own. Runs of more
   than `hot` questions begin no such cluster.
2. O_q = sum of idf(x) over the question's distinct runs x that the cluster holds, over that sum for all of them, with
   idf(x) = ln((1 + questions) / df(x)).
3. O_a of the answer, within max(answer_window, twice its words) words around the cluster: 1 or 0 for fewer than n
   words, which must stand there as they are; else as O_q over the answers' runs. O_p of the passage likewise, within
   max(passage_window, twice its words).
4. Score S = w_q O_q + w_a O_a + w_p O_p, w = (.75, .25) with an answer, (.85, .15) with a passage, (.7, .2, .1) with
   both. w_q is taken times 1/2 + N_q / 40 where the question has N_q < 20 distinct runs, and the rest given to the
   others by their weights.
5. Contaminated is S >= r, r = 1 where the question, answer and passage have at most `perfect` words together, `least`
   where they have `long` or more, on a line between. A question of `long` words or more that is there whole suffices.

Differs from Decon: words are `normalise.folded`'s and not a tokenizer's, there is no limit of words by which short
questions are left out but `least_words`, idf is never 0 (Decon's ln(N / df) is for one question), and 4 redistributes
without its table.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import log
from typing import NamedTuple

from purelm.curate.document import Document, Drop
from purelm.curate.normalise import folded
from purelm.curate.shingles import shingles
from purelm.data.checks import check_int

__all__ = ["Decon", "Example", "Hit", "Index", "cleared", "contamination", "index"]


@dataclass(frozen=True)
class Decon:
    """Decon's numbers."""

    n: int = 5  # words of a run
    every: int = 10  # words from one look-up to the next
    misses: int = 11  # runs in a row
    hot: int = 1000  # questions with a run, above which it begins no cluster
    least: float = 0.8  # score of long ones
    perfect: int = 25  # words, up to which the score must be 1
    long: int = 50  # words
    least_words: int = 8  # of a question; shorter ones are not looked for
    answer_window: int = 20  # words
    passage_window: int = 100  # words

    def __post_init__(self):
        for name, low in (("n", 1), ("every", 1), ("misses", 1), ("hot", 1), ("perfect", 0), ("long", 1),
                          ("least_words", 1), ("answer_window", 0), ("passage_window", 0)):  # fmt: skip
            check_int(name, getattr(self, name), low)
        if self.long <= self.perfect:
            raise ValueError(f"long={self.long}: must be more than perfect={self.perfect}")
        if self.least_words < self.n:
            raise ValueError(f"least_words={self.least_words}: must be at least n={self.n}")
        if isinstance(self.least, bool) or not isinstance(self.least, int | float) or not 0 < self.least <= 1:
            raise ValueError(f"least={self.least!r}: allowed is above 0, to 1")


class Example(NamedTuple):
    """An example of an evaluation set."""

    id: str
    question: str
    answer: str = ""
    passage: str = ""


class Part(NamedTuple):
    """A question, an answer or a passage."""

    words: tuple[str, ...]
    runs: frozenset[int]  # distinct ones
    total: float  # of their idf


class Index(NamedTuple):
    """Evaluation sets, as they are looked up."""

    settings: Decon
    names: tuple[tuple[str, str], ...]  # of each question its set and its id
    parts: tuple[tuple[Part, Part, Part], ...]  # question, answer, passage
    where: Mapping[int, tuple[int, ...]]  # run -> questions with it
    idf: tuple[Mapping[int, float], Mapping[int, float], Mapping[int, float]]  # of runs of each kind of part
    n_ignored: int  # questions that are not looked for: of fewer than least_words words


class Hit(NamedTuple):
    """An evaluation example that a document holds."""

    set: str
    id: str
    score: float
    question: float  # O_q
    answer: float | None  # O_a; None: it has none
    passage: float | None  # O_p
    begin: int  # words of the document (those of `folded`), first
    end: int  # and after the last


def index(sets: Mapping[str, Iterable[Example]], settings: Decon | None = None) -> Index:
    """The Index of evaluation sets. Memory: about 200 bytes for each distinct run."""
    settings = settings or Decon()
    names: list[tuple[str, str]] = []
    texts: list[tuple[str, str, str]] = []
    n_ignored = 0
    for name, tests in sets.items():
        for test in tests:
            found = (folded(test.question), folded(test.answer), folded(test.passage))
            if len(found[0].split()) < settings.least_words:
                n_ignored += 1
                continue
            names.append((name, test.id))
            texts.append(found)
    runs = [tuple(_runs(text, settings.n) for text in found) for found in texts]
    tables: list[dict[int, float]] = []
    for kind in range(3):
        counts = Counter(run for found in runs for run in found[kind])
        total = sum(1 for found in runs if found[kind])
        tables.append({run: log((1 + total) / df) for run, df in counts.items()})
    parts = tuple(
        (
            Part(tuple(found[0].split()), own[0], sum(tables[0][x] for x in own[0])),
            Part(tuple(found[1].split()), own[1], sum(tables[1][x] for x in own[1])),
            Part(tuple(found[2].split()), own[2], sum(tables[2][x] for x in own[2])),
        )
        for found, own in zip(texts, runs, strict=True)
    )
    where: dict[int, list[int]] = {}
    for number, own in enumerate(runs):
        for run in own[0]:
            where.setdefault(run, []).append(number)
    frozen = {run: tuple(numbers) for run, numbers in where.items()}
    return Index(settings, tuple(names), parts, frozen, (tables[0], tables[1], tables[2]), n_ignored)


def _runs(text: str, n: int) -> frozenset[int]:
    """Distinct runs of n words; none of a text of fewer."""
    return frozenset(shingles(text, n).tolist()) if text.count(" ") >= n - 1 and text else frozenset()


def contamination(tests: Index, text: str) -> list[Hit]:
    """The examples that a text holds, the highest score first, each with the cluster that has it."""
    s = tests.settings
    words_text = folded(text)
    if not words_text or words_text.count(" ") < s.n - 1:
        return []
    runs = shingles(words_text, s.n).tolist()
    words: list[str] | None = None
    best: dict[int, Hit] = {}
    done: dict[int, int] = {}  # question -> the end of the cluster that it was followed in last
    for at in range(0, len(runs), s.every):
        there = tests.where.get(runs[at], ())
        if not there or len(there) > s.hot:
            continue
        active = {number for number in there if done.get(number, -1) < at}
        if not active:
            continue
        words = words if words is not None else words_text.split(" ")
        for number, (found, begin, end) in _cluster(tests, runs, at, active).items():
            done[number] = end
            hit = _scored(tests, number, found, words, runs, begin, end + s.n)
            if hit is not None and (number not in best or hit.score > best[number].score):
                best[number] = hit
    return [hit for _, hit in sorted(best.items(), key=lambda item: (-item[1].score, item[0]))]


def _cluster(tests: Index, runs: list[int], at: int, active: set[int]) -> dict[int, tuple[set[int], int, int]]:
    """Of each question its runs in the cluster, and the places of the first and the last of them."""
    found = {number: ({runs[at]}, at, at) for number in active}
    for step in (1, -1):
        missed = dict.fromkeys(active, 0)
        place = at + step
        while missed and 0 <= place < len(runs):
            there = tests.where.get(runs[place], ())
            for number in list(missed):
                if number in there:
                    held, begin, end = found[number]
                    held.add(runs[place])
                    found[number] = (held, min(begin, place), max(end, place))
                    missed[number] = 0
                else:
                    missed[number] += 1
                    if missed[number] >= tests.settings.misses:
                        del missed[number]
            place += step
    return found


def _scored(
    tests: Index, number: int, found: set[int], words: list[str], runs: list[int], begin: int, end: int
) -> Hit | None:
    s = tests.settings
    question, answer, passage = tests.parts[number]
    overlap = sum(tests.idf[0][x] for x in found) / question.total
    most = _score(overlap, 1.0 if answer.words else None, 1.0 if passage.words else None, len(question.runs))
    if most < s.least - 1e-9 and len(found) < len(question.runs):
        return None  # whatever answer and passage are, it is too little
    o_a = _near(tests, 1, answer, words, runs, begin, end, s.answer_window)
    o_p = _near(tests, 2, passage, words, runs, begin, end, s.passage_window)
    score = _score(overlap, o_a, o_p, len(question.runs))
    total = len(question.words) + len(answer.words) + len(passage.words)
    needed = s.least + (1 - s.least) * min(1.0, max(0.0, (s.long - total) / (s.long - s.perfect)))
    is_whole = len(found) == len(question.runs) and len(question.words) >= s.long
    if score < needed - 1e-9 and not is_whole:  # sums of floats that should be 1
        return None
    return Hit(*tests.names[number], min(1.0, score), min(1.0, overlap), o_a, o_p, begin, end)


def _score(o_q: float, o_a: float | None, o_p: float | None, n_runs: int) -> float:
    """Step 4 of the formula."""
    w_q = 0.7 if o_a is not None and o_p is not None else 0.75 if o_a is not None else 0.85 if o_p is not None else 1.0
    others = [(o, w) for o, w in ((o_a, 0.2 if o_p is not None else 0.25), (o_p, 0.1 if o_a is not None else 0.15))
              if o is not None]  # fmt: skip
    if not others:
        return o_q
    sure = w_q * min(1.0, 0.5 + n_runs / 40)
    return o_q * sure + sum(o * w for o, w in others) * (1 - sure) / sum(w for _, w in others)


def _near(
    tests: Index, kind: int, part: Part, words: list[str], runs: list[int], begin: int, end: int, window: int
) -> float | None:
    """O_a or O_p: how much of a part lies around words begin .. end; None where there is no such part."""
    n = tests.settings.n
    if not part.words:
        return None
    reach = max(window, 2 * len(part.words))
    first, last = max(0, begin - reach), min(len(words), end + reach)
    if not part.runs:
        m = len(part.words)
        return float(any(tuple(words[i : i + m]) == part.words for i in range(first, last - m + 1)))
    here = part.runs.intersection(runs[first : max(first, last - n + 1)])
    return min(1.0, sum(tests.idf[kind][x] for x in here) / part.total)


def cleared(document: Document, tests: Index) -> Document | Drop:
    """The document, or Drop `contaminated: SET` with the score of the example that it holds most surely."""
    found = contamination(tests, document.text)
    return Drop(f"contaminated: {found[0].set}", found[0].score) if found else document
