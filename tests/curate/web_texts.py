"""Strategies of texts for the quality rules: any characters that a rule looks at, and something like a page."""

from hypothesis import strategies as st

# Letters, digits and punctuation of one to four bytes; every kind of white space; NUL and lone surrogates.
CHARACTERS = "aB\xe9\u4e2d\U0001d400\U000200001\xb2\u0663.?!#-\u2026\u2022\u3002)\"'\u201d[]{}\U0001f600\xad\u0300"
CHARACTERS += " \n\n\t\r\x0b\x1c\x85\xa0\u2028\u3000\x00\ud800\udfff\ue000\U00100041\U0010ffff"
ENGINES = ("python", "numba")

# Of all characters, and of few, which meet in every way.
any_text = st.text(st.sampled_from(CHARACTERS), max_size=80) | st.text(st.sampled_from(".. a\u2026\n)#"), max_size=30)

WORDS = [
    "the",
    "of",
    "Cat",
    "ran",
    "3",
    "(home)",
    "end.",
    "why?",
    "wait...",
    "-",
    "\u2022",
    "##",
    "javascript",
    "[1]",
    "{",
    "X",
]
words = st.sampled_from(WORDS)
line = st.lists(words, max_size=9).map(" ".join)
page = st.lists(line, max_size=12).map("\n".join)


def few(n, most=14):
    """Lists of words over a vocabulary of n, so that much repeats."""
    return st.lists(st.sampled_from(["a", "bb", "ccc", "\xe9"][:n]), max_size=most)
