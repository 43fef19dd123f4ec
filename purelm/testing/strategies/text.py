"""Strategies of texts and bytes that tokenizers get wrong.

    @given(texts(special_tokens=bpe.special_tokens))
    def test_round_trip(text): ...

PIECES and BYTE_PIECES are what they are joined from.
"""

from collections.abc import Sequence

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from purelm.data.checks import check_int
from purelm.testing.strategies.choices import chosen

__all__ = ["BYTE_PIECES", "PIECES", "byte_strings", "texts"]

# What texts are joined from, by kind. In each kind the simplest come first, and what holds them stands behind them.
PIECES: dict[str, tuple[str, ...]] = {
    "letters": (
        *"abABzZ", "\u00e9", "\u00c9", "\u00df", "\u0130", "\u0131", "\u0416", "\u0436", "\u03c3", "\u03c2",  # case
        "\u01c5", "\u02b0", "\u00aa", "\u0295",  # title case, modifiers, a small letter that has no capital
        "\u4e2d", "\u3042", "\ud55c", "\u1112", "\u0627", "\u0915", "\ufb00", "\u2126",  # no case, jamo, ligature, ohm
        "\u017f",  # long s, which folds to s
        "the", " the", "ab", "Ab", "camelCase", "\u4e2d\u6587", "\u1112\u1161\u11ab",
    ),
    "digits": (
        *"0129", "\u00b2", "\u00bd", "\u0660", "\u0966", "\u2160", "\u3007", "\U0001d7d8",
        "12", "123", "1234", "1,234.5", " 12",
    ),
    "whitespace": (
        " ", "  ", "   ", " \t", "\t", "\t\t", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u1680", "\u2003",
        "\u2028", "\u2029", "\u202f", "\u205f", "\u3000",
    ),
    "newlines": ("\n", "\n\n", " \n", "\n ", " \n \n ", "\n\r", "\r", "\r\n", "\r\n\r\n"),
    "punctuation": (*".,!?'\"-_/\\<>|#@$%", "\u2019", "\u2026", "\u3002", "...", "!?", "//", "--", "<|", "|>"),
    "contractions": (
        "'s", "'t", "'d", "'m", "'ll", "'re", "'ve", "'S", "'LL", "'Re", "'\u017f", "\u2019s", "''s", "' s",
        "don't", "we'll", "DON'T", "I'm",
    ),
    "marks": (
        "\u0300", "\u0301", "e\u0301", "E\u0301", " \u0301", "1\u0301", "a\u0301\u0323", "\u0323", "\u0903", "\u093f",
        "\u0915\u093f", "\u20dd", "\u3099", "\ufe0f",
    ),
    "invisible": (
        "\ufeff", "\u200b", "\u200c", "\u200d", "\u200e", "\u202e", "\u2060", "\u00ad", "\u180e", "\U000e0100",
    ),
    "controls": ("\x00", "\x01", "\x07", "\x08", "\x1b", "\x1b[0m", "\x7f", "\x80", "\x9f"),
    "emoji": (
        "\U0001f600", "\u2764", "\u2764\ufe0f", "\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea", "1\ufe0f\u20e3",
        "\U0001f469\u200d\U0001f680", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    ),
    # Ends of the ranges that UTF-8 writes in one, two, three and four bytes, private use and what is no character.
    "edges": (
        "\u07ff", "\u0800", "\ud7ff", "\ue000", "\ufffd", "\ufffe", "\uffff", "\U00010000", "\U0001d400", "\U00020000",
        "\U0010fffd", "\U0010ffff",
    ),
}  # fmt: skip
ONES = tuple(dict.fromkeys(c for pieces in PIECES.values() for piece in pieces for c in piece))  # all their characters
KINDS = (*PIECES, "special", "runs", "any")

# What bytes are joined from: whole characters, parts of them, and what no UTF-8 holds.
BYTE_PIECES: tuple[bytes, ...] = (
    b"a", b" ", b"\n", b"\r\n", b"\x00", "\u00e9".encode(), "\u4e2d".encode(), "\U0001f600".encode(),
    b"\xef\xbb\xbf",  # byte order mark
    b"\x80", b"\xa9", b"\xbf",  # continuations of nothing
    b"\xc3", b"\xe4", b"\xe4\xb8", b"\xf0", b"\xf0\x9f", b"\xf0\x9f\x98",  # beginnings without an end
    b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\x80", b"\xf0\x80\x80\x80",  # longer than needed
    b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xed\xa0\xbd\xed\xb8\x80",  # surrogates, alone and as a pair
    b"\xf4\x90\x80\x80", b"\xf5", b"\xf8", b"\xfe", b"\xff", b"\xff\xfe", b"\xfe\xff",  # beyond U+10FFFF; UTF-16
)  # fmt: skip


def texts(
    special_tokens: Sequence[str] = ("<|endoftext|>",),
    *,
    kinds: str | Sequence[str] | None = None,
    max_pieces: int = 40,
    max_run: int = 40,
) -> SearchStrategy[str]:
    r"""Texts that UTF-8 can hold, joined from up to max_pieces pieces of these kinds, each kind as often as the others.

    Args:
        special_tokens: for the kind "special": one of them, or its beginning or its end, whole ones as often as parts.
        kinds: keys of PIECES (letters, digits, whitespace, newlines, punctuation, contractions, marks, invisible,
            controls, emoji, edges), "special", "runs" (a character of PIECES 2 to max_run times) and "any" (any
            character but surrogates); None: all, without "special" if there are no special tokens.

    Shrinks to few pieces, and each towards the first of its kind.

    >>> from hypothesis import find
    >>> find(texts(kinds=("letters", "newlines")), lambda text: len(text) > 2 and "\n" in text)
    'aa\n'
    """
    if isinstance(special_tokens, str) or not all(isinstance(t, str) and t for t in special_tokens):
        raise ValueError(f"special_tokens must be a sequence of strings that are not empty, got {special_tokens!r}")
    check_int("max_pieces", max_pieces, 1)
    check_int("max_run", max_run, 2)
    every = tuple(kind for kind in KINDS if kind != "special" or special_tokens)
    some = chosen("kinds", every if kinds is None else kinds, KINDS)
    if "special" in some and not special_tokens:
        raise ValueError("kinds: 'special' needs special_tokens, got none")
    more: dict[str, SearchStrategy[str]] = {
        "runs": st.builds(lambda one, n: one * n, st.sampled_from(ONES), st.integers(2, max_run)),
        "any": st.characters(codec="utf-8"),
    }
    if special_tokens:
        parts = [part for t in special_tokens for i in range(1, len(t)) for part in (t[:i], t[i:])]
        more["special"] = st.sampled_from(special_tokens) | st.sampled_from(parts or special_tokens)
    pieces = [more[kind] if kind in more else st.sampled_from(PIECES[kind]) for kind in some]
    return st.lists(st.one_of(pieces), max_size=max_pieces).map("".join)


def byte_strings(max_pieces: int = 40) -> SearchStrategy[bytes]:
    r"""Bytes, most of which are no UTF-8: whole characters, parts of them and impossible bytes (BYTE_PIECES), and any.

    Shrinks to few pieces, and each towards b"a".

    >>> from hypothesis import find
    >>> find(byte_strings(), lambda data: len(data) > 1)
    b'aa'
    """
    check_int("max_pieces", max_pieces, 1)
    any_byte = st.integers(0, 255).map(lambda value: bytes([value]))
    return st.lists(st.sampled_from(BYTE_PIECES) | any_byte, max_size=max_pieces).map(b"".join)
