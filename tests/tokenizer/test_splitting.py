"""Splitting: the reference against `regex` itself, the compiled splitter against the reference."""

import random
import time

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.testing import strategies as plm
from purelm.tokenizer import resolve, split, splitting
from purelm.tokenizer.compiled.classes import LETTER, LOWER, NEWLINE, NUMBER, SPACE, UPPER, class_table
from purelm.tokenizer.patterns import CL100K, GPT2, NAMES, O200K, family

PATTERNS = ["gpt2", "cl100k", "o200k", "cl100k_v1", "qwen", "smollm"]
# Both cases, digits, contractions in any case (and the long s, which folds to s), every kind of white space, marks,
# numbers that are no digits, letters without case, title case, modifier letters, wide and invisible characters.
SIGNS = [
    *"aabAB'stTlLrReEvVdDmM0123 \t\n\r /!?.,-_", "\x00", "\x0b", "\x0c", "\x1c", "\x1f", "\x7f", "\u017f", "\u0300",
    "\u0301", "\u0903", "\u20dd", "\u00b2", "\u00bd", "\u0660", "\u2160", "\u4e2d", "\u3042", "\u01c5", "\u02b0",
    "\u0295", "\u00aa", "\ud55c", "\u00e9", "\u00c9", "\u0416", "\u0436", "\u0085", "\u00a0", "\u1680", "\u2028",
    "\u2029", "\u3000", "\u200b", "\u200d", "\u2019", "\ufeff", "\ufffd", "\U0001f600", "\U0001d7d8", "\U0001d400",
    "\U00020000", "\U000e0100", "\U0010ffff", "'s", "'ll", "'RE", "'\u017f", "  ", "\r\n", " \n ",
]  # fmt: skip
MIXED = st.lists(st.sampled_from(SIGNS) | st.characters(codec="utf-8"), max_size=40).map("".join)


def fast(text, pattern):
    """Pieces by the compiled splitter."""
    from purelm.tokenizer.compiled.splitting import split_ends

    data = text.encode()
    ends = split_ends(np.frombuffer(data, np.uint8), pattern).tolist()
    return [data[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]


def random_texts(seed, n):
    """Texts of few different signs each: runs and their boundaries come up often."""
    rng = random.Random(seed)
    for _ in range(n):
        some = rng.choices(SIGNS, k=rng.randint(2, 8))
        yield "".join(rng.choices(some, k=rng.randint(0, 12)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_reference_is_what_regex_finds(pattern):
    """Oracle: regex.findall; ASCII text, which takes `re`, and any text."""
    expression = regex.compile(resolve(pattern))
    n_ascii = 0
    for text in random_texts(pattern, 15000):
        for form in (text, text.encode("ascii", "ignore").decode()):
            assert split(form, pattern) == expression.findall(form), repr(form)
            n_ascii += form.isascii()
    assert n_ascii > 15000


@pytest.mark.parametrize("pattern", PATTERNS)
def test_compiled_is_the_reference_on_random_text(pattern):
    """Oracle: the reference splitter."""
    pytest.importorskip("numba")
    for text in random_texts(pattern + "fast", 15000):
        assert fast(text, pattern) == split(text, pattern), repr(text)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=100)
@given(text=MIXED | plm.texts())
def test_compiled_is_the_reference(pattern, text):
    """Oracle: the reference splitter, on any characters."""
    pytest.importorskip("numba")
    assert fast(text, pattern) == split(text, pattern)


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k"])
def test_every_character_between_others(pattern):
    """Oracle: the reference. All assigned characters outside the large blocks, and where those begin and end."""
    pytest.importorskip("numba")
    table = class_table()
    step = np.flatnonzero(np.diff(table)) + 1
    codes = set(range(0x3400)) | {int(code) + k for code in step for k in (-1, 0)} | {0x10FFFF}
    text = "".join(
        f"a{c}B {c}b'{c}1{c}\n{c}{c} " for c in map(chr, sorted(codes)) if not 0xD800 <= ord(c) < 0xE000
    )
    assert fast(text, pattern) == split(text, pattern)


def test_class_table_is_what_regex_says():
    """Oracle: one findall over all code points for each property."""
    every = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    table = class_table()
    for bit, expression in (
        (LETTER, r"\p{L}"),
        (NUMBER, r"\p{N}"),
        (SPACE, r"\s"),
        (NEWLINE, r"[\r\n]"),
        (UPPER, r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"),
        (LOWER, r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"),
    ):
        expected = [ord(c) for c in regex.findall(expression, every)]
        assert np.array_equal(np.flatnonzero(table & bit), expected), expression
    assert not table.flags.writeable


@settings(max_examples=100)
@given(data=st.binary(max_size=60) | plm.byte_strings(), pattern=st.sampled_from(PATTERNS))
def test_compiled_survives_bytes_that_are_no_text(data, pattern):
    """Law: ends rise strictly and the last is the length, whatever the bytes."""
    pytest.importorskip("numba")
    from purelm.tokenizer.compiled.splitting import split_ends

    ends = split_ends(np.frombuffer(data, np.uint8), pattern)
    assert ends.dtype == np.int64
    assert np.all(np.diff(ends, prepend=0) > 0) and (ends[-1:] == len(data)).all()


@settings(max_examples=100)
@given(
    text=MIXED | plm.texts(),
    pattern=st.sampled_from([*PATTERNS, r"\w+", r"(a|b)+|\s", r"x*", r"(?=a)", r"[\s\S]+", r"\d(\d)?"]),
)
def test_no_pattern_loses_text(text, pattern):
    """Law: the pieces join to the text and none is empty, also where the pattern leaves gaps or has groups."""
    pieces = split(text, pattern)
    assert "".join(pieces) == text and all(pieces)


def test_gaps_are_pieces():
    """By hand: what lies between matches is one piece each."""
    assert split("ab  cd!", r"\w+") == ["ab", "  ", "cd", "!"]
    assert split("a1b22", r"\d(\d)?") == ["a", "1", "b", "22"]


def test_names_and_spellings():
    """Names and the equivalent spellings of GPT-2's pattern become one string; all known patterns have a splitter."""
    handout = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    assert resolve("gpt2") == resolve("r50k_base") == resolve(handout) == resolve(GPT2) == GPT2
    assert resolve("cl100k_base") == CL100K and resolve("o200k") == O200K
    assert all(family(name) for name in NAMES)
    assert family(r"\w+|\W+") is None
    for text in random_texts("handout", 3000):
        assert split(text, "gpt2") == regex.findall(handout, text)


def test_split_ends_refuses_what_it_cannot_do():
    """A pattern without a compiled splitter, and arrays of another kind."""
    pytest.importorskip("numba")
    from purelm.tokenizer.compiled.splitting import split_ends

    with pytest.raises(ValueError, match="has no compiled splitter"):
        split_ends(np.zeros(3, np.uint8), r"\w+|\W+")
    with pytest.raises(ValueError, match="data is int64 of shape"):
        split_ends(np.zeros(3, np.int64), "gpt2")
    with pytest.raises(ValueError, match="data is uint8 of shape"):
        split_ends(np.zeros((3, 2), np.uint8), "gpt2")
    assert split_ends(np.frombuffer(b"ab xcdx", np.uint8)[::2], "gpt2").tolist() == [1, 4]  # "a cx", not contiguous


MEGABYTE = {
    "letter": "a" * 10**6,
    "capital": "A" * 10**6,
    "digit": "1" * 10**6,
    "space": " " * 10**6,
    "spaces and a word": " " * 10**6 + "a",
    "newline": "\n" * 10**6,
    "tab": "\t" * 10**6,
    "newline and spaces": "\n" + " " * 10**6 + "x",
    "emoji": "\U0001f600" * 250_000,
    "mark": "\u0301" * 500_000,
    "capital mark": "A\u0301" * 333_000,
    "exclamation": "!" * 10**6,
    "apostrophe": "'" * 10**6,
    "cjk": "\u4e2d\u6587" * 166_000,
    "replacement": "\ufffd" * 333_000,
    "pairs": "ab" * 500_000,
}


@pytest.mark.parametrize("name", MEGABYTE)
def test_a_megabyte_of_anything_is_linear(name):
    """Oracles: the reference for the compiled splitter; and CPU time far below what a quadratic step would take."""
    text = MEGABYTE[name]
    start = time.process_time()
    for pattern in ("gpt2", "cl100k", "o200k"):
        pieces = split(text, pattern)
        assert "".join(pieces) == text
        pytest.importorskip("numba")
        assert fast(text, pattern) == pieces
    assert time.process_time() - start < 10  # a quadratic split takes minutes; this takes 0.1 to 1.5 s


def test_patterns_that_never_end_are_stopped(monkeypatch):
    """Oracle: the count of ways, 2^40; stopped by the clock with one line; only such patterns look at it."""
    monkeypatch.setattr(splitting, "PATIENCE_SECONDS", 0.2)
    for pattern in (r"(?:a|aa)+$|.", r"((?:a|aa)*)*c(?<=d)|."):
        with pytest.raises(ValueError, match=r"no result after .* s on 6,001 characters"):
            split("a" * 6000 + "b", pattern)
    for pattern, wild in [
        (r"\w+|\W+", False), (r"(a+)+c|.", True), (r"[(a)+]+", False), (r"(?:ab){2,}", True), (r"a*b*c*", True),
        (r"a*|b*|c*", False), ("a?" * 9, True), (r"\(\)+ ?\p{L}+", False), (r"(?:a|b)?c+", False),
    ]:  # fmt: skip
        assert splitting._is_wild(pattern) == wild, pattern
    assert split("aab ab", r"(?:a+b)+|.") == ["aab", " ", "ab"]
