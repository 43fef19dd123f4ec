"""C4's rules (Raffel et al. 2020, arXiv:1910.10683, section 2.2), as its code applies them, and mC4's of long lines.

    clean(scan(text))  # the scan of the lines that are kept, or Drop("too few sentences", 2)

Lines are dropped that have a word over 1,000 characters, no terminal punctuation (or an ellipsis), fewer than 3 words
(the first version of the paper says 5, the code 3), "javascript", or a phrase of policies. Documents are dropped with
"lorem ipsum", "{" or a bad word, or under 5 sentences in what is kept. Marks of citations ([1], [edit], [citation
needed]) are taken out.

Where paper and code (TensorFlow Datasets, c4_utils.py) differ, this is the code: the paper drops pages on "lorem ipsum"
and "{" anywhere, the code only in lines that the other rules leave up to there; long words and policies are in the code
alone. How this differs from the code: citations are taken out before words are counted, and sentences are those of
`words`, which take no trained model (there, NLTK's Punkt). The list of bad words is the caller's: none comes with this.
"""

import re
from dataclasses import dataclass

from purelm.caches import memo
from purelm.curate.document import Drop
from purelm.curate.limits import check_counts, check_words
from purelm.curate.words import CHARACTERS, LONGEST, MOST_LINES, SENTENCES, WORDS, Scan, changed, lines

__all__ = ["C4", "FINEWEB", "MC4", "Lines", "LongLines", "clean", "long_lines"]

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_ENDS = (".", "?", "!", '"', "'")


@dataclass(frozen=True)
class Lines:
    """What is kept; None, False or an empty tuple switches a rule off."""

    most_word_length: int | None = 1000  # characters
    terminal_punctuation: bool = True
    least_line_words: int | None = 3
    javascript: bool = True
    policies: tuple[str, ...] = _POLICIES  # in lower case
    lorem_ipsum: bool = True
    curly_brackets: bool = True
    least_sentences: int | None = 5
    citations: bool = True
    bad_words: tuple[str, ...] = ()  # in lower case; between characters that are no word characters

    def __post_init__(self) -> None:
        check_counts(self, "most_word_length", "least_line_words", "least_sentences")
        check_words(self, "policies", "bad_words")
        for name in ("policies", "bad_words"):
            if wrong := [word for word in getattr(self, name) if word != word.lower()]:
                raise ValueError(f"Lines: {name} has {wrong[0]!r}; give it in lower case")


C4 = Lines()
FINEWEB = Lines(terminal_punctuation=False)  # as FineWeb has it (Penedo et al. 2024, arXiv:2406.17557, section 3.5)


def clean(scanned: Scan, config: Lines = C4) -> Scan | Drop:
    """The scan of what is kept of the text, one line under another; or a Drop, with what was found.

    Texts of over MOST_LINES newlines are dropped as "too many lines".

    >>> from purelm.curate.words import scan
    >>> text = "Menu\\nA first line is kept. So is this one!\\nWe use cookies on this page."
    >>> clean(scan(text, engine="python"), Lines(least_sentences=1)).text
    'A first line is kept. So is this one!'
    """
    c = config
    if scanned.totals.newlines > MOST_LINES:
        return Drop("too many lines", scanned.totals.newlines)
    if c.citations and "[" in scanned.text:
        scanned = changed(scanned, _CITATION.sub("", scanned.text))
    columns = scanned.rows[:, [WORDS, LONGEST, SENTENCES]].tolist()
    least, most = c.least_line_words or 0, c.most_word_length or scanned.totals.characters
    kept = []
    for line, (n_words, longest, sentences) in zip(lines(scanned), columns, strict=True):
        if n_words < least or longest > most:
            continue
        if c.terminal_punctuation and (not line.endswith(_ENDS) or line.endswith("...")):
            continue
        kept.append((line, sentences))
    lower = scanned.text.lower()
    needles = (*(["lorem ipsum"] * c.lorem_ipsum), *(["{"] * c.curly_brackets), *(["javascript"] * c.javascript))
    if any(needle in lower for needle in (*needles, *c.policies)):
        found = _without_phrases(kept, c)
        if isinstance(found, Drop):
            return found
        kept = found
    n = sum(sentences for _, sentences in kept)
    if c.least_sentences is not None and n < c.least_sentences:
        return Drop("too few sentences", n)
    text = "\n".join([line for line, _ in kept])
    if c.bad_words and (bad := _bad(c.bad_words).search(text.lower())):
        return Drop("bad word", bad.group(1))
    return changed(scanned, text)


def _without_phrases(kept: list[tuple[str, int]], c: Lines) -> list[tuple[str, int]] | Drop:
    """The rules that look into lines, in the code's order: a line is gone before the next rule sees it."""
    out = []
    for line, sentences in kept:
        lower = line.lower()
        if c.lorem_ipsum and "lorem ipsum" in lower:
            return Drop("lorem ipsum")
        if c.javascript and "javascript" in lower:
            continue
        if c.curly_brackets and "{" in line:
            return Drop("curly bracket")
        if any(phrase in lower for phrase in c.policies):
            continue
        out.append((line, sentences))
    return out


@memo(16)
def _bad(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(?:\W|^)({'|'.join(map(re.escape, words))})(?:\W|$)")


@dataclass(frozen=True)
class LongLines:
    """How many lines of which length a text needs (mC4: Xue et al. 2021, arXiv:2010.11934, section 3.1)."""

    least_lines: int = 3
    least_characters: int = 200

    def __post_init__(self) -> None:
        check_counts(self, "least_lines", "least_characters")


MC4 = LongLines()


def long_lines(scanned: Scan, config: LongLines = MC4) -> Scan | Drop:
    """The scan, or a Drop with the number of long lines.

    >>> from purelm.curate.words import scan
    >>> long_lines(scan("short", engine="python"))
    Drop(reason='too few long lines', value=0)
    """
    n = int((scanned.rows[:, CHARACTERS] >= config.least_characters).sum())
    return Drop("too few long lines", n) if n < config.least_lines else scanned
