"""Decoding. Oracles: the round trip, bytes.decode, tiktoken, and offsets counted character by character."""

import codecs
import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.testing import strategies as plm
from purelm.tokenizer import (
    decode,
    decode_bytes,
    decode_iterable,
    decode_next,
    decode_with_offsets,
    encode,
    make,
)

BYTES = {value: bytes([value]) for value in range(256)}
TEXT = st.text(st.sampled_from("ab c\n\u00e9\u4e2d\U0001f600\u0301\ufffd\x00") | st.characters(codec="utf-8"))


@settings(max_examples=100)
@given(text=TEXT | plm.texts(["<|endoftext|>", "b c"]), seed=st.integers(0, 5))
def test_round_trip(random_bpe, text, seed):
    """Law: decode(encode(text)) == text, both engines, special tokens or not."""
    bpe = random_bpe(seed, special_tokens=["<|endoftext|>", "b c"], pattern=["gpt2", "cl100k", "o200k"][seed % 3])
    text = text + "<|endoftext|>" + text
    for allowed in ("all", None):
        ids = encode(bpe, text, allowed, engine="python")
        assert decode(bpe, ids) == text and decode_bytes(bpe, ids.tolist()) == text.encode()
        pytest.importorskip("numba")
        assert decode(bpe, encode(bpe, text, allowed, engine="numba")) == text


@given(ids=st.lists(st.integers(0, 255)), errors=st.sampled_from(["replace", "ignore", "backslashreplace"]))
def test_bytes_that_are_no_text(ids, errors):
    """Oracle: bytes.decode."""
    bpe = make(BYTES, [])
    assert decode(bpe, ids, errors) == bytes(ids).decode("utf-8", errors)
    assert decode_bytes(bpe, ids) == bytes(ids)


def test_long_arrays_go_by_blocks(random_bpe):
    """Oracle: joining the tokens of the vocab; lengths around the block of 4,096."""
    bpe = random_bpe(2)
    rng = random.Random(2)
    known = sorted(bpe.vocab)
    for n in (0, 1, 4095, 4096, 4097, 20_000):
        ids = rng.choices(known, k=n)
        assert decode_bytes(bpe, ids) == b"".join(map(bpe.vocab.__getitem__, ids))


@pytest.mark.parametrize("name", ["gpt2", "o200k_base"])
def test_tiktoken_decodes_the_same(published, tiktoken_of, name):
    """Oracle: tiktoken, on random ids (mostly no valid text) and on text with its offsets."""
    bpe = published(name)
    encoding = tiktoken_of(bpe)
    rng = random.Random(3)
    ids = rng.choices([i for i in bpe.vocab if i < 50_000], k=30_000)
    assert decode(bpe, ids) == encoding.decode(ids)
    for _ in range(300):
        text = "".join(rng.choices(["ab", " ", "\u00e9", "\u4e2d\u6587", "\U0001f600", "\u0301", "\ufffd"], k=12))
        ids = encode(bpe, text)
        expected = encoding.decode_with_offsets(ids.tolist())
        for errors in ("strict", "replace"):
            ours = decode_with_offsets(bpe, ids, errors)
            assert (ours[0], ours[1].tolist()) == expected


def slow_offsets(tokens):
    """Text and offsets with replacement, plainly: which character of the text each byte went into."""
    data = b"".join(tokens)
    owner, text = [], ""
    k = 0
    while k < len(data):
        for n in (1, 2, 3, 4):
            try:
                text += data[k : k + n].decode()
                break
            except UnicodeDecodeError as error:
                if k + n >= len(data) or n == 4 or error.reason != "unexpected end of data":
                    n = error.end if error.reason != "unexpected end of data" else len(data) - k
                    text += "\ufffd"
                    break
        owner += [len(text) - 1] * n
        k += n
    starts = np.cumsum([0, *map(len, tokens)])
    return text, [owner[start] for start in starts[:-1]]


@given(
    tokens=st.lists(
        st.sampled_from([b"a", b"\xc3", b"\xa9", b"\xe4\xb8", b"\xad", b"\xf0\x9f", b"\x98\x80", b"\xff", b"\x80b"]),
        max_size=12,
    )
)
def test_offsets_count_replacements_as_characters(tokens):
    """Oracle: the character that the token's first byte went into, found byte by byte."""
    extra = {256: b"\xe4\xb8", 257: b"\xf0\x9f", 258: b"\x98\x80", 259: b"\x80b"}
    bpe = make(BYTES | extra, [(token[:1], token[1:]) for token in extra.values()])
    ids = {token: i for i, token in bpe.vocab.items()}
    text, offsets = decode_with_offsets(bpe, [ids[token] for token in tokens], "replace")
    assert (text, offsets.tolist()) == slow_offsets(tokens)
    assert text == b"".join(tokens).decode("utf-8", "replace")


def test_offsets_of_a_long_broken_text():
    """Oracle: Python's decoder on prefixes: windows of 4,096 bytes that cut characters leave no trace."""
    bpe = make(BYTES, [])
    for data in ("\u4e2d" * 3000, "\U0001f600a" * 2000):
        broken = bytearray(data.encode())
        broken[9] = broken[8000] = 0xFF  # far apart: the windows between them end inside characters
        text, offsets = decode_with_offsets(bpe, list(broken), "replace")
        assert text == broken.decode("utf-8", "replace")
        for k in range(0, len(broken), 97):
            while k > 0 and broken[k] & 0xC0 == 0x80:
                k -= 1
            assert offsets[k] == len(broken[:k].decode("utf-8", "replace"))


def test_ids_come_in_many_kinds():
    """Lists, arrays of each integer type, tensors, ranges, generators; nothing at all is the empty text."""
    bpe = make(BYTES, [])
    ids = [104, 105]
    kinds = [ids, tuple(ids), iter(ids), torch.tensor(ids), np.array(ids, np.uint8), np.array(ids, np.uint64)]
    assert [decode(bpe, kind) for kind in kinds] == ["hi"] * len(kinds)
    assert decode(bpe, range(97, 100)) == "abc"
    assert decode(bpe, []) == decode(bpe, np.empty(0, np.uint16)) == "" == decode(bpe, torch.empty(0))
    text, offsets = decode_with_offsets(bpe, [])
    assert text == "" and offsets.shape == (0,) and offsets.dtype == np.int64


@pytest.mark.parametrize(
    "ids, message",
    [
        ([65, 300, 400], r"ids\[1\] is 300, which is no token: the vocabulary has 257 ids, the largest is 310"),
        ([65, 65, 311], r"ids\[2\] is 311"),
        ([-1], r"ids\[0\] is -1"),
        ([2**40], r"ids\[0\] is 1099511627776"),
        (np.array([65, 2**64 - 1], np.uint64), r"ids\[1\] is 18446744073709551615"),
        (np.array([65, 300], np.uint16), r"ids\[1\] is 300"),
        (np.array([65, 311], np.uint32), r"ids\[1\] is 311"),
        ([1.0], "ids is float64"),
        ([[1, 2]], r"ids is int64 of shape \(1, 2\)"),
        ([True], "ids is bool"),
    ],
)
def test_bad_ids_are_named(ids, message):
    """The first id outside the vocabulary and its index, gaps included; what are no integers."""
    bpe = make(BYTES | {310: b"ab"}, [(b"a", b"b")])
    for function in (decode, decode_bytes, decode_with_offsets):
        with pytest.raises(ValueError, match=message):
            function(bpe, ids)


def test_strict_errors():
    """bytes that are no UTF-8 raise a ValueError where that is asked for; offsets know two ways only."""
    bpe = make(BYTES, [])
    with pytest.raises(ValueError, match="invalid start byte"):
        decode(bpe, [255], "strict")
    with pytest.raises(ValueError, match="invalid start byte"):
        decode_with_offsets(bpe, [255])
    with pytest.raises(ValueError, match='errors is \'ignore\'; allowed: "strict", "replace"'):
        decode_with_offsets(bpe, [65], "ignore")


def test_wrong_kinds_of_ids_and_errors():
    """A string, a number, an unknown error handler: one line each, also where no byte is bad."""
    bpe = make({value: bytes([value]) for value in range(256)}, [])
    for ids in ("123", b"123", 5, None):
        with pytest.raises(ValueError, match=r"ids is .*; give integers with one axis"):
            decode(bpe, ids)
    with pytest.raises(ValueError, match="errors is 'replce'"):
        decode(bpe, [97], errors="replce")
    assert decode(bpe, (i for i in [97, 98])) == "ab"


# ---- In steps ----

# Whole characters, parts of them, and bytes that are none, as ids of single bytes.
PARTS = [*(c.encode() for c in "a\u00e9\u4e2d\U0001f600"), b"\xe4\xb8", b"\xf0\x9f", b"\xa9", b"\xed\xa0", b"\xff"]
BAD_OR_GOOD = st.lists(st.sampled_from(PARTS)).map(lambda parts: list(b"".join(parts))) | st.lists(st.integers(0, 255))
ERRORS = ["replace", "ignore", "backslashreplace", "strict"]


@settings(max_examples=75)
@given(
    ids=BAD_OR_GOOD | plm.byte_strings().map(list),
    errors=st.sampled_from(ERRORS),
    cuts=st.lists(st.integers(0, 60)),
)
def test_pieces_join_to_the_whole(ids, errors, cuts):
    """Law: joined, what the steps give is decode of all ids, for every way of cutting them; errors are raised alike."""
    bpe = make(BYTES, [])
    try:
        expected = decode(bpe, ids, errors)
    except UnicodeDecodeError:
        with pytest.raises(UnicodeDecodeError):
            list(decode_iterable(bpe, ids, errors))
        return
    pieces = list(decode_iterable(bpe, iter(ids), errors))
    assert "".join(pieces) == expected and all(pieces)
    text, held = "", b""
    for start, end in itertools.pairwise([0, *sorted(cuts), len(ids)]):
        more, held = decode_next(bpe, ids[start:end], held, errors)
        text += more
        assert len(held) <= 3
    last, held = decode_next(bpe, [], held, errors, final=True)
    assert text + last == expected and held == b""


@given(text=st.text("a\u00e9b\u4e2d\U0001f600 ") | TEXT)
def test_steps_of_tokens_of_several_bytes(text):
    """Oracle: Python's incremental decoder, id by id: a character comes with the token that completes it."""
    merges = [
        (b"a", b"\xc3"), (b"\xa9", b"b"), (b"\xe4", b"\xb8"), (b" ", b"\xe4\xb8"), (b"\xad", b"\xf0"),
        (b"\xf0", b"\x9f"),
    ]  # fmt: skip
    vocab = BYTES | {256 + i: left + right for i, (left, right) in enumerate(merges)}
    bpe = make(vocab, merges, ["<|endoftext|>"], r"[\s\S]+")
    ids = encode(bpe, text + "<|endoftext|>")
    decoder, held = codecs.getincrementaldecoder("utf-8")(), b""
    for token_id in ids.tolist():
        step, held = decode_next(bpe, [token_id], held)
        assert step == decoder.decode(bpe.vocab[token_id])
    assert "".join(decode_iterable(bpe, ids)) == text + "<|endoftext|>" and held == b""


def test_a_stream_is_decoded_as_it_comes():
    """By hand: nothing is asked for before its turn, and a held part comes out as U+FFFD at the end."""
    bpe, asked = make(BYTES, []), []

    def ids():
        for token_id in b"a\xc3\xa9\xf0\x9f":
            asked.append(token_id)
            yield np.uint16(token_id)

    pieces = decode_iterable(bpe, ids())
    assert asked == [] and next(pieces) == "a" and asked == [0x61]
    assert next(pieces) == "\u00e9" and asked == [0x61, 0xC3, 0xA9]
    assert list(pieces) == ["\ufffd"]
    assert list(decode_iterable(bpe, torch.tensor([104, 105]))) == ["h", "i"]


def test_wrong_steps():
    """An id that is none is named with its place, errors and ids of the wrong kind at the call."""
    bpe = make(BYTES, [])
    with pytest.raises(ValueError, match=r"ids\[2\] is 256, which is no token: .* the largest is 255"):
        list(decode_iterable(bpe, [1, 2, 256]))
    with pytest.raises(ValueError, match=r"ids\[0\] is -1"):
        decode_next(bpe, [-1])
    for function in (decode_iterable, lambda bpe, ids, errors: decode_next(bpe, ids, b"", errors)):
        with pytest.raises(ValueError, match="errors is 'some'"):
            function(bpe, [1], "some")
    with pytest.raises(ValueError, match="ids is str 'ab'; give an iterable of integers"):
        decode_iterable(bpe, "ab")
