"""Repetition within a document: the rules of Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1 and Table A1).

    repetition(scan(text))  # the scan, or Drop("duplicate 5-gram characters", 0.27)

What the paper leaves open is decided as in datatrove 0.10.1, whose counts these are for equal words and lines:
- duplicate lines, paragraphs: occurrences after the first; their share of all, or of the text's characters.
- top n-gram: the most frequent one (of several the first to occur), its length with spaces times how often it occurs.
- duplicate n-grams: from left to right, an n-gram that occurred before counts with its characters, spaces left out, and
  the search goes on behind it; so no character counts twice, and first occurrences do not count. (RedPajama's code
  counts those too.)
Words and lines are those of `words`; a paragraph ends at a blank line. datatrove joins the words of a duplicate n-gram
without a space to compare them, so "a bc" repeats "ab c" there, and not here.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from purelm.curate.characters import character_table
from purelm.curate.document import Drop
from purelm.curate.limits import check_fractions
from purelm.curate.words import MOST_LINES, Scan, lines
from purelm.data.checks import check_int

__all__ = ["GOPHER", "MOST_WORDS", "Repeats", "Repetition", "duplicates", "repeats", "repetition"]

MOST_WORDS = 2_000_000  # of a text whose n-grams are counted: some 130 MB of tables
_PARAGRAPH_END = re.compile(r"\n\s*\n")

NGrams = tuple[tuple[int, float], ...]  # (n, most allowed)


@dataclass(frozen=True)
class Repetition:
    """Largest shares that are kept; None or an empty tuple switches a rule off."""

    lines: float | None = 0.30  # duplicates among lines
    paragraphs: float | None = 0.30
    line_characters: float | None = 0.20  # characters in duplicate lines, of the text's
    paragraph_characters: float | None = 0.20
    top_ngrams: NGrams = ((2, 0.20), (3, 0.18), (4, 0.16))
    duplicate_ngrams: NGrams = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))

    def __post_init__(self) -> None:
        check_fractions(self, "lines", "paragraphs", "line_characters", "paragraph_characters")
        for name in ("top_ngrams", "duplicate_ngrams"):
            for n, most in getattr(self, name):
                check_int(f"Repetition: n of {name}", n, 1, 64)
                if isinstance(most, bool) or not isinstance(most, int | float) or not 0 <= most <= 1:
                    raise ValueError(f"Repetition: {name} has {most!r} for n = {n}; allowed: a number from 0 to 1")


GOPHER = Repetition()


class Repeats(NamedTuple):
    """Characters in repeated n-grams; index n, with 0 for n = 0 and where the text has fewer than n words."""

    top: tuple[int, ...]  # of the most frequent n-gram, spaces included, times its occurrences
    duplicate: tuple[int, ...]  # of n-grams that occurred before, spaces left out, none twice


def repetition(scanned: Scan, config: Repetition = GOPHER) -> Scan | Drop:
    """The scan, or a Drop with the share that is too large.

    Texts of over MOST_LINES newlines or MOST_WORDS words are dropped as "too many lines" or "too many words", where a
    rule would look at those.

    >>> from purelm.curate.words import scan
    >>> repetition(scan("Again and again. " * 9, engine="python"))
    Drop(reason='top 2-gram characters', value=0.5294117647058824)
    """
    text, totals = scanned.text, scanned.totals
    of = max(totals.characters, 1)
    by_line = config.lines is not None or config.line_characters is not None
    by_paragraph = config.paragraphs is not None or config.paragraph_characters is not None
    if (by_line or by_paragraph) and totals.newlines > MOST_LINES:
        return Drop("too many lines", totals.newlines)
    if by_paragraph and _PARAGRAPH_END.search(text):
        pieces = [piece.strip() for piece in _PARAGRAPH_END.split(text.strip())]
        count, characters = duplicates(pieces)
        if config.paragraphs is not None and count / len(pieces) > config.paragraphs:
            return Drop("duplicate paragraphs", count / len(pieces))
        if config.paragraph_characters is not None and characters / of > config.paragraph_characters:
            return Drop("duplicate paragraph characters", characters / of)
    if by_line and totals.lines > 1:
        count, characters = duplicates(lines(scanned))
        if config.lines is not None and count / totals.lines > config.lines:
            return Drop("duplicate lines", count / totals.lines)
        if config.line_characters is not None and characters / of > config.line_characters:
            return Drop("duplicate line characters", characters / of)
    most_n = max((n for n, _ in (*config.top_ngrams, *config.duplicate_ngrams)), default=0)
    if most_n == 0:
        return scanned
    if totals.words > MOST_WORDS:
        return Drop("too many words", totals.words)
    found = repeats(scanned, most_n)
    for n, most in config.top_ngrams:
        if found.top[n] / of > most:
            return Drop(f"top {n}-gram characters", found.top[n] / of)
    for n, most in config.duplicate_ngrams:
        if found.duplicate[n] / of > most:
            return Drop(f"duplicate {n}-gram characters", found.duplicate[n] / of)
    return scanned


def duplicates(pieces: Sequence[str]) -> tuple[int, int]:
    """(pieces that occurred before, their characters).

    >>> duplicates(["ab", "c", "ab", "ab"])
    (2, 4)
    """
    if len(first := set(pieces)) == len(pieces):
        return 0, 0
    return len(pieces) - len(first), sum(map(len, pieces)) - sum(map(len, first))


def repeats(scanned: Scan, most: int = 10) -> Repeats:
    """The characters in repeated n-grams of 1 to `most` words; the engine is the scan's.

    >>> from purelm.curate.words import scan
    >>> repeats(scan("to be or not to be", engine="python"), 2)
    Repeats(top=(0, 4, 10), duplicate=(0, 4, 4))
    """
    check_int("most", most, 1, 64)
    m = scanned.totals.words
    check_int("words of the text", m, 0, MOST_WORDS)
    if not scanned.data:
        return _plain(scanned.text.split(), most)
    from purelm.curate.compiled.ngrams import number_words, repeated

    size = 1 << (2 * m + 16).bit_length()
    keys, values = np.zeros(size, np.uint64), np.empty(size, np.int32)
    work = np.empty((5, m + 1), np.int64)
    grams, starts, ends, sums, counts = work[0, :m], work[1], work[2], work[3], work[4]
    data = np.frombuffer(scanned.data, np.uint8)
    n_ids = number_words(data, character_table(), keys, values, grams, starts, ends, sums, counts)
    found = np.zeros((2, most + 1), np.int64)
    repeated(keys, values, grams, sums, counts, starts, n_ids, found[0], found[1])
    return Repeats(*map(tuple, found.tolist()))


def _plain(words: list[str], most: int) -> Repeats:
    """The definitions, in plain Python."""
    sums = [0]
    for word in words:
        sums.append(sums[-1] + len(word))
    top, duplicate = [0] * (most + 1), [0] * (most + 1)
    keys: Sequence[str | tuple[int, int]] = words
    for n in range(1, min(most, len(words)) + 1):
        number: dict[str | tuple[int, int], int] = {}
        grams = [number.setdefault(key, len(number)) for key in keys]
        counts = Counter(grams)
        best = max(counts, key=counts.__getitem__)  # the first of several: a Counter keeps the order of appearance
        at = grams.index(best)
        top[n] = counts[best] * (sums[at + n] - sums[at] + n - 1)
        seen: set[int] = set()
        i = 0
        while i < len(grams):
            if grams[i] in seen:
                duplicate[n] += sums[i + n] - sums[i]
                i += n
            else:
                seen.add(grams[i])
                i += 1
        keys = list(pairwise(grams))
    return Repeats(tuple(top), tuple(duplicate))
