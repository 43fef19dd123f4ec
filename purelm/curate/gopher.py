"""Gopher's rules of document quality (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1, "Quality Filtering").

    quality(scan(text))  # the scan, or Drop("too few words", 12)

Thresholds are the paper's. How it differs from datatrove 0.10.1: words lie between white space (there, they are spaCy's
tokens: a full stop is a word without letters, so that rule drops more there); lines that are blank do not count; stop
words are found in any case of letters and beside punctuation (there, equal tokens alone, which misses "The"). As there,
the number of words and their mean length are of words with more than symbols, and the ratios are to all words. The
paper lists no bullets: "-" and U+2022, as there.
"""

import re
from dataclasses import dataclass
from math import inf

from purelm.caches import memo
from purelm.curate.document import Drop
from purelm.curate.limits import check_counts, check_fractions, check_words
from purelm.curate.words import Scan

__all__ = ["COURSE", "GOPHER", "Quality", "quality"]


@dataclass(frozen=True)
class Quality:
    """What is kept; None switches a rule off."""

    least_words: int | None = 50
    most_words: int | None = 100_000
    least_mean_length: float | None = 3.0  # characters of a word
    most_mean_length: float | None = 10.0
    most_hashes: float | None = 0.1  # to a word
    most_ellipses: float | None = 0.1  # to a word
    most_bullet_lines: float | None = 0.9
    most_ellipsis_lines: float | None = 0.3
    least_lettered: float | None = 0.8  # words with a letter
    least_stop_words: int | None = 2  # different ones
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")

    def __post_init__(self) -> None:
        check_counts(self, "least_words", "most_words", "least_stop_words")
        check_fractions(self, "least_mean_length", "most_mean_length", "most_hashes", "most_ellipses", high=inf)
        check_fractions(self, "most_bullet_lines", "most_ellipsis_lines", "least_lettered")
        check_words(self, "stop_words")
        for least, most in (("least_words", "most_words"), ("least_mean_length", "most_mean_length")):
            low, high = getattr(self, least), getattr(self, most)
            if low is not None and high is not None and low > high:
                raise ValueError(f"Quality: {least}={low!r} is above {most}={high!r}")


GOPHER = Quality()
# Stanford CS336, assignment 4: words, mean length, ellipsis lines and letters.
COURSE = Quality(most_hashes=None, most_ellipses=None, most_bullet_lines=None, least_stop_words=None)


def quality(scanned: Scan, config: Quality = GOPHER) -> Scan | Drop:
    """The scan, or a Drop with what was measured. A ratio to no words, or to no lines, is not judged.

    >>> from purelm.curate.words import scan
    >>> quality(scan("The string is short.", engine="python"))
    Drop(reason='too few words', value=4)
    """
    t, c = scanned.totals, config
    if c.least_words is not None and t.counted < c.least_words:
        return Drop("too few words", t.counted)
    if c.most_words is not None and t.counted > c.most_words:
        return Drop("too many words", t.counted)
    if t.counted:
        mean = t.counted_characters / t.counted
        if c.least_mean_length is not None and mean < c.least_mean_length:
            return Drop("short words", mean)
        if c.most_mean_length is not None and mean > c.most_mean_length:
            return Drop("long words", mean)
    if t.words:
        if c.most_hashes is not None and t.hashes / t.words > c.most_hashes:
            return Drop("hashes", t.hashes / t.words)
        if c.most_ellipses is not None and t.ellipses / t.words > c.most_ellipses:
            return Drop("ellipses", t.ellipses / t.words)
    if t.lines:
        if c.most_bullet_lines is not None and t.bullets / t.lines > c.most_bullet_lines:
            return Drop("bullet lines", t.bullets / t.lines)
        if c.most_ellipsis_lines is not None and t.ellipsis_lines / t.lines > c.most_ellipsis_lines:
            return Drop("ellipsis lines", t.ellipsis_lines / t.lines)
    if t.words and c.least_lettered is not None and t.lettered / t.words < c.least_lettered:
        return Drop("words without letters", t.lettered / t.words)
    if c.least_stop_words and (n := _stop_words(scanned.text, c.stop_words, c.least_stop_words)) < c.least_stop_words:
        return Drop("too few stop words", n)
    return scanned


def _stop_words(text: str, words: tuple[str, ...], enough: int) -> int:
    """How many different ones occur, up to `enough`: English text has them in its first sentence."""
    found = set()
    for match in _pattern(words).finditer(text):
        found.add(match.group().casefold())
        if len(found) >= enough:
            break
    return len(found)


@memo(64)
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    if not words:
        return re.compile(r"(?!)")
    first = "".join(
        sorted({re.escape(word[0]) for word in words})
    )  # a look at one letter first takes a third less time
    return re.compile(rf"\b(?=[{first}])(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)
