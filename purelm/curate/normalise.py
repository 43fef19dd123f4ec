"""The text that duplicates are looked for in."""

import re
import unicodedata

__all__ = ["comparable", "folded"]

_OTHER = re.compile(r"[^\w\s]")


def folded(text: str) -> str:
    """The text in lower case, without accents and punctuation, words with one space between them.

    NFD, then everything goes that is no letter, digit, underscore or white space: combining marks among them. This is
    the normalisation of CS336's assignment 4 (fuzzy deduplication).

    >>> folded("  Café,\\tdéjà-vu! \\n")
    'cafe dejavu'
    """
    if not text.isascii():
        text = unicodedata.normalize("NFD", text)
    return " ".join(_OTHER.sub("", text.lower()).split())


def comparable(text: str) -> str:
    """The text folded; one of which nothing is left, of signs alone, as it is, with one space between its words.

    So what has no letter is only like what has the same signs. Texts of white space are empty, and all alike.

    >>> comparable("Well, well!"), comparable(" :-)  :-( ")
    ('well well', ':-) :-(')
    """
    return folded(text) or " ".join(text.split())
