"""One pass over a text that all quality rules share: its words and lines, counted once.

    scanned = scan(text)
    gopher.quality(scanned, gopher.GOPHER)  # the scan, or a Drop
    repetition.repetition(scanned, repetition.GOPHER)

Definitions:
- A word is what lies between white space (str.split). It counts if it has any character that is not punctuation, a
  symbol or a control character (Unicode's P, S, C): `counted` and `counted_characters` are of such words alone.
- A line is what lies between newlines, without white space at both ends, if anything is left: blank lines are no lines.
- A sentence ends in a word that ends in . ! or ?, also with closing quotation marks or brackets after it, and at the
  end of each line. Abbreviations end sentences too.
- Lengths are in code points.

Published code has several definitions at once: datatrove 0.10.1 takes spaCy's tokens for words and, from rule to rule,
str.splitlines, runs of newlines, or lines that are not blank, none of them stripped.
"""

import re
from typing import Literal, NamedTuple

import numpy as np

from purelm.curate.characters import CLOSER, LETTER, SENTENCE, SYMBOL, TERMINAL, character_table
from purelm.tokenizer.engine import has_numba

__all__ = ["MOST_LINES", "Scan", "Totals", "changed", "lines", "scan"]

MOST_LINES = 1_000_000  # newlines in a text whose lines are looked at one by one; memory stays bounded
CHARACTERS, WORDS, LONGEST, UPPERS, DIGITS, SENTENCES = range(6)  # columns of Scan.rows
_WORD = re.compile(r"\S+")


class Totals(NamedTuple):
    """Counts over a text; the definitions are the module's."""

    characters: int
    words: int
    counted: int  # words with more than symbols
    counted_characters: int  # of those words
    lettered: int  # words with a letter
    hashes: int  # characters "#"
    ellipses: int  # "..." (as str.count: not overlapping) and U+2026
    newlines: int
    lines: int
    bullets: int  # lines that start with "-" or U+2022
    ellipsis_lines: int  # lines that end with "..." or U+2026
    punctuated: int  # lines that end with terminal punctuation of any script


class Scan(NamedTuple):
    """A text and what the pass found."""

    text: str
    totals: Totals
    rows: np.ndarray  # int64 (lines, 6), columns as named above; of the first lines where there are over MOST_LINES
    data: bytes  # UTF-8 of the text (lone surrogates as three bytes) for the machine code; empty without it


def scan(text: str, engine: Literal["auto", "python", "numba"] = "auto") -> Scan:
    """The pass. engine: "numba" (the extra `fast`) is some 20 times as fast; "auto" takes it where it is installed.

    Equal totals and rows by either engine, for any str: lone surrogates and NULs too. The first call of a process loads
    the machine code (a second; some seconds more where it has to be compiled).

    Raises ValueError for another engine, ImportError for "numba" where that is not installed.

    >>> scan("One, two. Three!", engine="python").totals.words
    3
    """
    if engine not in ("auto", "python", "numba"):
        raise ValueError(f'engine={engine!r}; allowed: "auto", "python", "numba"')
    if engine == "numba" and not has_numba():
        raise ImportError("engine='numba' needs numba, which is not installed: pip install 'purelm[fast]'")
    if engine == "python" or not has_numba():
        return Scan(text, *_plain(text), b"")
    from purelm.curate.compiled.scanning import scan_bytes

    data = text.encode("utf-8", "surrogatepass")
    totals = np.zeros(len(Totals._fields), np.int64)
    rows = np.empty((min(data.count(b"\n") + 1, MOST_LINES), 6), np.int64)
    scan_bytes(np.frombuffer(data, np.uint8), character_table(), totals, rows)
    found = Totals._make(totals.tolist())
    return Scan(text, found, rows[: found.lines], data)


def changed(scanned: Scan, text: str) -> Scan:
    """The scan of another text by the same engine; the same scan where the text is.

    >>> one = scan("a", engine="python")
    >>> changed(one, "a") is one, changed(one, "a b").totals.words
    (True, 2)
    """
    return scanned if text == scanned.text else scan(text, "numba" if scanned.data else "python")


def lines(scanned: Scan) -> list[str]:
    """The lines, in the order of `rows`; ValueError where there are more than MOST_LINES newlines.

    >>> lines(scan(" a \\n\\n b", engine="python"))
    ['a', 'b']
    """
    if scanned.totals.newlines > MOST_LINES:
        raise ValueError(f"text of {scanned.totals.newlines:,} lines; allowed: {MOST_LINES:,}")
    return [line for piece in scanned.text.split("\n") if (line := piece.strip())]


def _plain(text: str) -> tuple[Totals, np.ndarray]:
    """The definitions, in plain Python: the fallback, and what the machine code is tested against."""
    table = character_table().data  # Python's ints, much faster than numpy's
    rows = []
    words = counted = counted_characters = lettered = n_lines = bullets = ellipsis_lines = punctuated = 0
    for line in _stripped_lines(text):
        n = longest = sentences = 0
        ends = True
        for match in _WORD.finditer(line):
            word = match.group()
            bits = bytes(map(table.__getitem__, map(ord, word)))  # a long word takes a byte a character
            n += 1
            longest = max(longest, len(word))
            lettered += any(b & LETTER for b in bits)
            if any(not b & SYMBOL for b in bits):
                counted += 1
                counted_characters += len(word)
            before = next((b for b in reversed(bits) if not b & CLOSER), 0)
            ends = bool(before & SENTENCE)
            sentences += ends
        sentences += not ends
        words += n
        n_lines += 1
        bullets += line.startswith(("-", "\u2022"))
        ellipsis_lines += line.endswith(("...", "\u2026"))
        punctuated += bool(table[ord(line[-1])] & TERMINAL)
        if n_lines <= MOST_LINES:
            uppers, digits = sum(map(str.isupper, line)), sum(map(str.isdigit, line))
            rows.append((len(line), n, longest, uppers, digits, sentences))
    totals = Totals(
        len(text), words, counted, counted_characters, lettered, text.count("#"),
        text.count("...") + text.count("\u2026"), text.count("\n"), n_lines, bullets, ellipsis_lines, punctuated,
    )  # fmt: skip
    return totals, np.array(rows, np.int64).reshape(-1, 6)


def _stripped_lines(text: str):
    """Lines one at a time, so that many short ones take no memory."""
    start = 0
    while start <= len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        if line := text[start:end].strip():
            yield line
        start = end + 1
