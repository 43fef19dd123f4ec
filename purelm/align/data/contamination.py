"""Rows that contain examples of a test set: shared runs of n words, as GPT-3's authors looked for them.

    tests = index([(x.id, x.question) for x in examples], n=13)
    match(tests, text)                                   # Match(id, share, words), or None
    kept, counts = clean(rows, [decontaminated(tests)])

Brown et al. 2020 (arXiv:2005.14165), appendix C: runs of 13 words, in lower case and without punctuation.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from purelm.align.data.cleaning import Removed, Row, Step, asked, filtered
from purelm.align.data.words import words

__all__ = ["Index", "Match", "decontaminated", "index", "match"]

UNKNOWN = 0  # the number of every word that is in no example


class Index(NamedTuple):
    """Examples of test sets, as they are looked up."""

    n: int
    ids: tuple[str, ...]
    numbers: dict[str, int]  # word -> its number, from 1
    runs: dict[bytes, tuple[int, ...]]  # n numbers, 4 bytes each -> examples that hold this run
    n_runs: tuple[int, ...]  # of each example, distinct ones
    short: dict[tuple[str, ...], int]  # all words of an example that has fewer than n


class Match(NamedTuple):
    """The example of which a text holds the largest share."""

    id: str
    share: float  # of the example's distinct runs; 1 for a short one
    words: str  # the first run that both hold


def index(examples: Iterable[tuple[str, str]], n: int = 13) -> Index:
    """The Index of (id, text)s; texts without a word match nothing.

    Memory: some 150 bytes for each distinct run of n words.
    """
    if n < 1:
        raise ValueError(f"index: n must be at least 1, got {n}")
    ids: list[str] = []
    numbers: dict[str, int] = {}
    runs: dict[bytes, tuple[int, ...]] = {}
    n_runs: list[int] = []
    short: dict[tuple[str, ...], int] = {}
    for number, (name, text) in enumerate(examples):
        ids.append(name)
        found = words(text)
        if len(found) < n:
            n_runs.append(0)
            if found:
                short.setdefault(tuple(found), number)
            continue
        known = array("I", [numbers.setdefault(word, len(numbers) + 1) for word in found])
        distinct = dict.fromkeys(run for _, run in _runs(known, n))
        n_runs.append(len(distinct))
        for run in distinct:
            runs[run] = (*runs.get(run, ()), number)
    return Index(n, tuple(ids), numbers, runs, tuple(n_runs), short)


def match(tests: Index, text: str, ratio: float = 0.0) -> Match | None:
    """The example with which the text shares the largest part of its runs, and at least `ratio` and one run of them.

    An example of fewer than n words is matched by a text of the same words and no more.

    >>> tests = index([("q1", "How many eggs do four hens lay in a week?")], n=4)
    >>> match(tests, "Say how many eggs do FOUR hens lay.")
    Match(id='q1', share=0.5714285714285714, words='how many eggs do')
    """
    found = words(text)
    if len(found) < tests.n:
        number = tests.short.get(tuple(found))
        return None if number is None else Match(tests.ids[number], 1.0, " ".join(found))
    known = array("I", [tests.numbers.get(word, UNKNOWN) for word in found])
    shared: dict[int, dict[bytes, int]] = {}  # example -> its runs, and where the text holds them first
    for at, run in _runs(known, tests.n):
        for number in tests.runs.get(run, ()):
            shared.setdefault(number, {}).setdefault(run, at)
    if not shared:
        return None
    share, first = max((len(held) / tests.n_runs[number], -number) for number, held in shared.items())
    if share < ratio:
        return None
    at = next(iter(shared[-first].values()))
    return Match(tests.ids[-first], share, " ".join(found[at : at + tests.n]))


def decontaminated(tests: Index, ratio: float = 0.0, texts: Callable[[Row], tuple[str, ...]] = asked) -> Step:
    """Removes rows one of whose texts has a `match`; reason "contaminated", detail the example's id and the words."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"decontaminated: ratio must be 0 to 1, got {ratio}")

    def look(row: Row) -> Row | Removed:
        for text in texts(row):
            if (found := match(tests, text, ratio)) is not None:
                return Removed(row, "contaminated", f"{found.id} ({found.share:.0%}): {found.words}")
        return row

    return filtered("decontaminated", look)


def _runs(numbers: array, n: int) -> Iterator[tuple[int, bytes]]:
    """(place, bytes) of each run of n numbers without UNKNOWN in it."""
    data, size = numbers.tobytes(), numbers.itemsize
    begin = 0  # of the words since the last unknown one
    for end, number in enumerate(numbers, 1):
        if number == UNKNOWN:
            begin = end
        elif end - begin >= n:
            yield end - n, data[size * (end - n) : size * end]
