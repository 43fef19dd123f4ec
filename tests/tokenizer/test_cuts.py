"""The safe cutting rule. Oracle throughout: the reference pre-tokenizer `split` on the whole text."""

import mmap
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.testing import strategies as plm
from purelm.tokenizer import split
from purelm.tokenizer.blocks import chunk_spans, read_span
from purelm.tokenizer.cuts import chunks, last_cut, next_cut

PATTERNS = ["gpt2", "cl100k", "o200k", "cl100k_v1", "qwen", "smollm"]
# What the patterns tell apart: letters of both cases, digits, punctuation, contractions, all kinds of white space
# (ASCII, U+0085, no-break, ideographic, line separator, and U+001C which only str.isspace counts), marks, numbers.
ALPHABET = [
    *"aBz09 .,!'/_-", " ", " ", "  ", "\n", "\r\n", "\t", "'s", "'ll", "'RE", "don't", "\u0085", "\u00a0", "\u3000",
    "\u2028", "\u2003", "\u1680", "\u202f", "\u205f", "\x1c", "\x1f", "\x00", "\u00e9", "e\u0301", "\u0301", "\u4e2d",
    "\u00bd", "\u0663", "\u01c5", "\u02b0", "\U0001f600", "\u200d", "\u200b", "\ufeff", "\u017f",
]  # fmt: skip
MIXED = st.lists(st.sampled_from(ALPHABET) | st.characters(codec="utf-8")).map("".join)


def pieces(text: str, pattern: str, special_tokens=()) -> list[str]:
    """Pieces of text around the special tokens, plainly."""
    if not special_tokens:
        return split(text, pattern)
    longest_first = "|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True)))
    out = []
    for part in re.split(f"({longest_first})", text):
        out += [part] if part in special_tokens else split(part, pattern)
    return out


def check(text: str, pattern: str, special_tokens=(), n_bytes: int = 1) -> int:
    """Chunks join to the text, are at least n_bytes long, and cut no piece; their number."""
    data = text.encode()
    spans = list(chunks(data, n_bytes, pattern, special_tokens))
    assert b"".join(data[start:end] for start, end in spans) == data
    assert all(end - start >= n_bytes for start, end in spans[:-1])
    found = []
    for start, end in spans:
        found += pieces(data[start:end].decode(), pattern, special_tokens)
    assert found == pieces(text, pattern, special_tokens)
    return len(spans)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_cuts_keep_the_pieces_of_random_text(pattern):
    """3,000 random strings of the signs that the patterns tell apart, cut at every safe place; some must be cut."""
    rng = random.Random(pattern)
    n_chunks = 0
    for _ in range(3000):
        n_chunks += check("".join(rng.choices(ALPHABET, k=rng.randrange(40))), pattern)
    assert n_chunks > 5000


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=100)
@given(text=MIXED | plm.texts(), n_bytes=st.integers(1, 20))
def test_cuts_keep_the_pieces_of_any_text(pattern, text, n_bytes):
    check(text, pattern, n_bytes=n_bytes)


def test_whitespace_rule_is_not_too_wide():
    """The next simpler rule, "before any white space", is wrong: cl100k's punctuation keeps its newlines."""
    assert split("a.\nb", "cl100k") == ["a", ".\n", "b"]
    assert list(chunks(b"a.\nb", 1, "cl100k")) == [(0, 4)]
    assert split("a  b", "gpt2") == ["a", " ", " b"]
    assert list(chunks(b"a  b", 1, "gpt2")) == [(0, 1), (1, 4)]  # never between the two spaces


def test_a_cut_may_fall_at_every_plain_word():
    assert list(chunks(b"one two three", 1, "gpt2")) == [(0, 3), (3, 7), (7, 13)]
    assert next_cut(b"one two", 3, "gpt2") == 3
    assert next_cut(b"one two", 4, "gpt2") == 7
    assert next_cut(b"one", 0, "gpt2") == 0
    assert next_cut("\u00e9 x".encode(), 1, "gpt2") == 2  # a letter of two bytes before the space
    assert list(chunks(b"", 1, "gpt2")) == []


SPECIALS = [
    ("<|endoftext|>",),
    ("<a b>", "<|e|>"),  # a space inside
    (" x", "x y"),  # starts with a space; overlap, with a space in the overlap
    ("ab", "ba", "aba", "aa"),  # overlap each other and themselves
    ("a b c", "b", " "),  # a special within a special; the space itself
    ("e\u0301 \u4e2d", "\u4e2d "),
]


@pytest.mark.parametrize("special_tokens", SPECIALS)
@pytest.mark.parametrize("pattern", ["gpt2", "o200k", r"\w+|\W+"])
def test_cuts_never_fall_inside_special_tokens(pattern, special_tokens):
    """Random text thick with specials and parts of them."""
    rng = random.Random(repr((pattern, special_tokens)))
    parts = [*special_tokens, *special_tokens, *"".join(special_tokens), " ", " ", "a", "word", ".", "\n"]
    n_chunks = sum(check("".join(rng.choices(parts, k=20)), pattern, special_tokens) for _ in range(300))
    assert n_chunks > 300


def test_the_rule_is_not_assumed_for_an_unknown_pattern():
    """A regex whose pieces hold a space after a letter: cut only before special tokens."""
    pattern = r"[a-z]+(?: [a-z]+)?|\s|."
    assert split("one two three", pattern) == ["one two", " ", "three"]
    assert list(chunks(b"one two three", 1, pattern)) == [(0, 13)]
    assert list(chunks(b"one two<s>three four<s>", 1, pattern, ("<s>",))) == [(0, 7), (7, 20), (20, 23)]
    assert last_cut("one two ", pattern) == 0
    assert last_cut("one two<s>three", pattern, ("<s>",)) == 7


@given(
    text=st.lists(st.sampled_from([*ALPHABET, *["<a b>", "<a ", "b>", "<s>", "x"] * 8])).map("".join),
    pattern=st.sampled_from([*PATTERNS, r"\w+|\W+"]),
    special_tokens=st.sampled_from([(), ("<s>",), ("<a b>", "<s>"), ("a b", "b> <")]),
    cut_at=st.integers(0, 200),
)
def test_last_cut_is_safe_whatever_follows(text, pattern, special_tokens, cut_at):
    """Oracle: the pieces of the whole text; last_cut sees only a beginning of it."""
    cut = last_cut(text[:cut_at], pattern, special_tokens)
    left, right = pieces(text[:cut], pattern, special_tokens), pieces(text[cut:], pattern, special_tokens)
    assert left + right == pieces(text, pattern, special_tokens)


def test_last_cut_finds_the_last_place():
    assert last_cut("one two three", "gpt2") == 7
    assert last_cut("one two ", "gpt2") == 7
    assert last_cut("one two  ", "gpt2") == 7
    assert last_cut("one", "gpt2") == 0
    assert last_cut("", "gpt2") == 0
    # "<a" might become "<a b>": a cut that it could straddle waits.
    assert last_cut("x y <a b", "gpt2", ("<a b>",)) == 3
    assert last_cut("x y <a c ", "gpt2", ("<a b>",)) == 3
    assert last_cut("x y <a c ddd", "gpt2", ("<a b>",)) == 8
    # The space within a whole special is no cut; the special's start is one.
    assert last_cut("xx<a b>ddddd", "gpt2", ("<a b>",)) == 2


def test_file_chunks(tmp_path, shared_data):
    """On a real text: chunks of a mapped file are those of its bytes, and cut no piece of gpt2 or cl100k."""
    data = (shared_data / "text" / "tinystories-2MiB.txt").read_bytes()[:300_000]
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    for pattern in ("gpt2", "cl100k"):
        spans = list(chunk_spans(path, 1000, pattern, ("<|endoftext|>",)))
        assert spans == list(chunks(data, 1000, pattern, ("<|endoftext|>",)))
        assert max(end - start for start, end in spans) < 1100
        read = [read_span(path, start, end) for start, end in spans]
        assert b"".join(read) == data
        found = [piece for chunk in read for piece in pieces(chunk.decode(), pattern, ("<|endoftext|>",))]
        assert found == pieces(data.decode(), pattern, ("<|endoftext|>",))


def test_chunks_of_a_mapping_and_of_an_empty_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"one two three")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        assert list(chunks(data, 4, "gpt2")) == [(0, 7), (7, 13)]
    path.write_bytes(b"")
    assert list(chunk_spans(path, 4, "gpt2")) == []
    with pytest.raises(ValueError, match="n_bytes is 0"):
        list(chunks(b"x", 0, "gpt2"))


def test_text_without_a_safe_cut_is_one_chunk():
    for text in ("a" * 5000, "\n" * 5000, " " * 5000, "\u4e2d" * 5000):
        assert check(text, "gpt2", n_bytes=100) == 1
