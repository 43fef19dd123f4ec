"""Exact duplicates, of documents and of lines, by 128-bit hashes.

    first = first_of(texts)                                   # for each document the number of its first equal
    counts = count_lines(texts)                               # pass one, over all of the corpus
    kept = [unique_lines(text, counts) for text in texts]     # pass two: without lines that stand in it more than once
"""

from collections.abc import Iterable
from hashlib import blake2b

from purelm.curate.limits import check_several

__all__ = ["LineCounts", "count_lines", "digest", "first_of", "merged_counts", "unique_lines"]

LineCounts = dict[bytes, int]


def digest(text: str) -> bytes:
    """16 bytes (BLAKE2b); texts of one digest are taken for equal, which errs once in 2^64 texts."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def first_of(texts: Iterable[str]) -> list[int]:
    """For each text the number of the first that equals it: its own if there is none before it.

    >>> first_of(["a", "b", "a"])
    [0, 1, 0]
    """
    check_several("texts", texts)
    seen: dict[bytes, int] = {}
    return [seen.setdefault(digest(text), i) for i, text in enumerate(texts)]


def count_lines(texts: Iterable[str], counts: LineCounts | None = None) -> LineCounts:
    """How often each line stands in these texts, added to `counts`, which is changed, or to none.

    Lines end with a line feed alone, as in CS336's assignment 4. Memory: about 150 bytes for each different line.
    """
    check_several("texts", texts)
    counts = {} if counts is None else counts
    for text in texts:
        for line in text.split("\n"):
            key = digest(line)
            counts[key] = counts.get(key, 0) + 1
    return counts


def merged_counts(parts: Iterable[LineCounts]) -> LineCounts:
    """The counts of all parts."""
    total: LineCounts = {}
    for part in parts:
        for key, n in part.items():
            total[key] = total.get(key, 0) + n
    return total


def unique_lines(text: str, counts: LineCounts) -> str:
    """The text without the lines that were counted more than once in the corpus.

    A text whose lines all go is empty. Every line of the text must have been counted: KeyError if one was not.

    >>> counts = count_lines(["a\\nb", "b\\nc"])
    >>> unique_lines("a\\nb", counts)
    'a'
    """
    return "\n".join(line for line in text.split("\n") if counts[digest(line)] == 1)
