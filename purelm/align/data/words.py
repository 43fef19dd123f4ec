"""Words of a text, to find duplicates and contamination: what typing changes is gone, what maths says stays."""

import re
import unicodedata

__all__ = ["words"]

_WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+|[^\w\s]")
_HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])")
_MARKS = frozenset(".,;:?'\"`$\\_\u2018\u2019\u201c\u201d\u2026\u00ab\u00bb")
_BRACKETS = _MARKS | frozenset("!()[]{}")
_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u2014": "-", "\u00d7": "*", "\u00f7": "/"})


def words(text: str, brackets: bool = False) -> list[str]:
    """Numbers, runs of letters and digits in lower case, and each other sign that is no punctuation as its own word.

    Compatible forms of Unicode are one (NFKC), dashes and minuses too, and a hyphen between letters counts as space.
    brackets: brackets and ! are words too, without which (2 + 3) * 4 is 2 + 3 * 4.

    >>> words("Ann's twenty-five  dollars: $3.50 + \u22122?")
    ['ann', 's', 'twenty', 'five', 'dollars', '3.50', '+', '-', '2']
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    dropped = _MARKS if brackets else _BRACKETS
    return [word for word in _WORD.findall(_HYPHEN.sub(" ", text.casefold())) if word not in dropped]
