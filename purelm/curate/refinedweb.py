r"""RefinedWeb's corrections line by line (Penedo et al. 2023, arXiv:2306.01116, appendix G.2), as DCLM applies them.

    clean(scan(text))  # the scan of what is kept, or Drop("words removed", 0.12)

Dropped are lines that are mainly upper case (over half of the characters: the paper gives no number, it is that of
DCLM, Li et al. 2024, arXiv:2406.11794), all digits, a counter ("3 likes"), or of one word; from lines of at most 10
words, "sign-in" in front, "read more..." at the end and "items in cart" are cut out. A text that loses over 5% of its
words by this is dropped. How this differs from DCLM's code: white space at the ends of a line does not count, and cuts
are repeated until there is none, so that a second pass changes nothing.
"""

import re
from dataclasses import dataclass

from purelm.curate.document import Drop
from purelm.curate.limits import check_counts, check_fractions
from purelm.curate.words import CHARACTERS, DIGITS, MOST_LINES, UPPERS, WORDS, Scan, changed, scan

__all__ = ["REFINEDWEB", "Corrections", "clean"]

_COUNTED = (
    "likes", "shares", "comments", "retweets", "reposts", "quotes", "bookmarks", "upvotes", "downvotes", "downloads",
    "views", "followers",
)  # fmt: skip
_COUNTER = re.compile(rf"\W*\d[\d,.]*[kmb]?\s+(?:{'|'.join(_COUNTED)})\W*")
_CUT = re.compile(r"^(?:sign-in\s?)+|\s?items in cart|\s?read more\.\.\.$", re.IGNORECASE)
_CUTS = ("sign-in", "items in cart", "read more...")


@dataclass(frozen=True)
class Corrections:
    """What is kept; None or False switches a rule off."""

    most_upper: float | None = 0.5  # characters of a line
    digits_alone: bool = True  # drop lines of digits alone
    counters: bool = True
    least_line_words: int | None = 2
    cut_up_to: int | None = 10  # words of a line that phrases are cut from
    most_removed: float | None = 0.05  # words

    def __post_init__(self) -> None:
        check_fractions(self, "most_upper", "most_removed")
        check_counts(self, "least_line_words", "cut_up_to")


REFINEDWEB = Corrections()


def clean(scanned: Scan, config: Corrections = REFINEDWEB) -> Scan | Drop:
    """The scan of the text with its corrections, or a Drop with the share of words that they take away.

    Blank lines stay. Texts of over MOST_LINES newlines are dropped as "too many lines".

    >>> from purelm.curate.words import scan
    >>> text = "HOME AND MORE\\n12 likes\\n" + "A line that is kept. " * 40
    >>> clean(scan(text, engine="python")).totals.lines
    1
    """
    t, c = scanned.totals, config
    if t.newlines > MOST_LINES:
        return Drop("too many lines", t.newlines)
    lower = scanned.text.lower()
    cuts = c.cut_up_to is not None and any(phrase in lower for phrase in _CUTS)
    counters = c.counters and any(word in lower for word in _COUNTED)
    rows = iter(scanned.rows.tolist())
    kept, n_words = [], 0
    for piece in scanned.text.split("\n"):
        if not (line := piece.strip()):
            kept.append(piece)
            continue
        row = next(rows)
        if cuts and row[WORDS] <= (c.cut_up_to or 0) and (shorter := _cut(line)) != line:
            if not shorter:
                continue
            piece = line = shorter
            row = scan(line, "python").rows[0].tolist()
        if c.most_upper is not None and row[UPPERS] / row[CHARACTERS] > c.most_upper:
            continue
        if c.digits_alone and row[DIGITS] == row[CHARACTERS]:
            continue
        if c.least_line_words is not None and row[WORDS] < c.least_line_words:
            continue
        if counters and _COUNTER.fullmatch(line.lower()):
            continue
        kept.append(piece)
        n_words += row[WORDS]
    if c.most_removed is not None and t.words and (t.words - n_words) / t.words > c.most_removed:
        return Drop("words removed", (t.words - n_words) / t.words)
    return changed(scanned, "\n".join(kept).strip())


def _cut(line: str) -> str:
    """Without the phrases; each round takes one off, and a line of few words has few of them."""
    while (shorter := _CUT.sub("", line).strip()) != line:
        line = shorter
    return line
