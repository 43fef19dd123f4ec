"""FineWeb's own rules (Penedo et al. 2024, arXiv:2406.17557, section 3.6).

    quality(scan(text))  # the scan, or Drop("short lines", 0.81)

Thresholds are those of the published code (datatrove 0.10.1), which drops a text with over .01 of its characters in
duplicate lines; the paper's text says .1 (PAPER). Lines that end in punctuation: at least .12, lines of at most 30
characters: at most .67, newlines to a word: at most .3. How this differs from the code: lines are without white space
at both ends and words lie between white space (see `words`); there, words are spaCy's tokens.
"""

from dataclasses import dataclass, replace
from math import inf

from purelm.curate.document import Drop
from purelm.curate.limits import check_counts, check_fractions
from purelm.curate.repetition import duplicates
from purelm.curate.words import CHARACTERS, MOST_LINES, Scan, lines

__all__ = ["FINEWEB", "PAPER", "Quality", "quality"]


@dataclass(frozen=True)
class Quality:
    """What is kept; None switches a rule off."""

    least_punctuated: float | None = 0.12  # lines that end in terminal punctuation, of all
    most_short_lines: float | None = 0.67
    short_line: int = 30  # characters
    most_duplicate_characters: float | None = 0.01  # in lines that occurred before, of all but newlines
    most_newlines: float | None = 0.3  # to a word

    def __post_init__(self) -> None:
        check_fractions(self, "least_punctuated", "most_short_lines", "most_duplicate_characters")
        check_fractions(self, "most_newlines", high=inf)
        if self.short_line is None:
            raise ValueError(
                "Quality: short_line=None; allowed: 0 or more (most_short_lines=None switches the rule off)"
            )
        check_counts(self, "short_line")


FINEWEB = Quality()
PAPER = replace(FINEWEB, most_duplicate_characters=0.1)


def quality(scanned: Scan, config: Quality = FINEWEB) -> Scan | Drop:
    """The scan, or a Drop with the share that was measured; a text without a word is dropped as "empty".

    Texts of over MOST_LINES newlines are dropped as "too many lines".

    >>> from purelm.curate.words import scan
    >>> quality(scan("Home\\nAbout", engine="python"))
    Drop(reason='lines without punctuation', value=0.0)
    """
    t, c = scanned.totals, config
    if t.lines == 0:
        return Drop("empty", 0)
    if t.newlines > MOST_LINES:
        return Drop("too many lines", t.newlines)
    if c.least_punctuated is not None and t.punctuated / t.lines < c.least_punctuated:
        return Drop("lines without punctuation", t.punctuated / t.lines)
    if c.most_short_lines is not None:
        share = int((scanned.rows[:, CHARACTERS] <= c.short_line).sum()) / t.lines
        if share > c.most_short_lines:
            return Drop("short lines", share)
    if c.most_duplicate_characters is not None and t.lines > 1:
        share = duplicates(lines(scanned))[1] / (t.characters - t.newlines)
        if share > c.most_duplicate_characters:
            return Drop("duplicate line characters", share)
    if c.most_newlines is not None and t.newlines / t.words > c.most_newlines:
        return Drop("newlines", t.newlines / t.words)
    return scanned
