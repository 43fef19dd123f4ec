r"""Ids to text: the bytes of the tokens, one after the other, read as UTF-8.

    decode(bpe, encode(bpe, text)) == text                    for every text without lone surrogates
    "".join(decode_iterable(bpe, ids)) == decode(bpe, ids)    also where a character spans several tokens
"""

import codecs
from collections.abc import Iterable, Iterator
from operator import index
from typing import SupportsIndex

import numpy as np

from purelm.tokenizer import tables
from purelm.tokenizer.bpe import BPE

_BLOCK = 4096  # ids at a time: what is gathered stays in the cache, which is 3 times as fast as all at once


def decode_bytes(bpe: BPE, ids: np.ndarray | Iterable[SupportsIndex]) -> bytes:
    """The bytes of `ids` (integers, one axis: array, list, tensor, ...), special tokens included.

    Raises ValueError that names the first id outside the vocabulary and its index.
    """
    return _join(bpe, _integers(ids))


def _join(bpe: BPE, ids: np.ndarray) -> bytes:
    tokens, _ = tables.tokens_by_id(bpe)
    # Ids outside the vocabulary show themselves: take raises IndexError where one is too large, join raises
    # TypeError at the None of a gap. Only wider types, which encode does not give, are looked through for negative ids.
    narrow = ids.dtype in (np.uint8, np.uint16, np.uint32) or len(ids) == 0
    try:
        if narrow or (ids.min() >= 0 and ids.max() < len(tokens)):
            blocks = (ids[start : start + _BLOCK] for start in range(0, len(ids), _BLOCK))
            return b"".join([b"".join(tokens.take(block).tolist()) for block in blocks])
    except (IndexError, TypeError):
        pass
    raise ValueError(_what_is_outside(bpe, ids))


def decode(bpe: BPE, ids: np.ndarray | Iterable[SupportsIndex], errors: str = "replace") -> str:
    """The text of `ids`. errors: what becomes of bytes that are not UTF-8, as in bytes.decode ("replace": U+FFFD).

    A token may hold a part of a character, so joining the texts of ids decoded one by one does not give the text of all
    of them; `decode_iterable` and `decode_next` do. Raises ValueError for an id outside the vocabulary, and with
    errors="strict" for bytes that are not UTF-8.

    >>> from purelm.tokenizer import make
    >>> bpe = make({i: bytes([i]) for i in range(256)} | {256: b"hi"}, [(b"h", b"i")])
    >>> decode(bpe, [256, 33])
    'hi!'
    """
    _check_errors(errors)
    return decode_bytes(bpe, ids).decode("utf-8", errors)


def decode_next(
    bpe: BPE,
    ids: np.ndarray | Iterable[SupportsIndex],
    held: bytes = b"",
    errors: str = "replace",
    *,
    final: bool = False,
) -> tuple[str, bytes]:
    """Decoding in steps: (the characters that are complete after `ids`, the bytes of one that is not).

    held: what the step before gave back, at first nothing. With final=True, for the last step, nothing is held back.
    The texts of all steps, joined, are `decode` of all ids.

    >>> from purelm.tokenizer import make
    >>> bpe = make({i: bytes([i]) for i in range(256)}, [])
    >>> decode_next(bpe, [104, 0xC3])  # 0xC3 0xA9 is one character
    ('h', b'\\xc3')
    >>> text, held = decode_next(bpe, [0xA9], held=b"\\xc3")
    >>> text == "\\u00e9", held
    (True, b'')
    """
    _check_errors(errors)
    data = held + decode_bytes(bpe, ids)
    text, n_bytes = codecs.utf_8_decode(data, errors, final)
    return text, data[n_bytes:]


def decode_iterable(bpe: BPE, ids: Iterable[SupportsIndex], errors: str = "replace") -> Iterator[str]:
    """The text of a stream of ids, piece by piece: what an id completes comes before the next id is asked for.

    Joined, the pieces are `decode` of all ids; none is empty. errors: as in `decode`.

    >>> from purelm.tokenizer import make
    >>> bpe = make({i: bytes([i]) for i in range(256)} | {256: b"hi"}, [(b"h", b"i")])
    >>> list(decode_iterable(bpe, iter([256, 33])))
    ['hi', '!']
    """
    _check_errors(errors)
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise ValueError(f"ids is {type(ids).__name__} {ids!r:.80}; give an iterable of integers")
    return _pieces(bpe, ids, errors)


def _pieces(bpe: BPE, ids: Iterable[SupportsIndex], errors: str) -> Iterator[str]:
    held = b""
    for number, token_id in enumerate(ids):
        token = bpe.vocab.get(index(token_id))
        if token is None:
            raise ValueError(_no_token(bpe, number, index(token_id)))
        data = held + token
        text, n_bytes = codecs.utf_8_decode(data, errors, False)
        held = data[n_bytes:]
        if text:
            yield text
    text = held.decode("utf-8", errors)
    if text:
        yield text


def _check_errors(errors: str) -> None:
    """ValueError for an unknown name also where no byte is bad, where the codec would not look at it."""
    try:
        codecs.lookup_error(errors)
    except (LookupError, TypeError):
        raise ValueError(f'errors is {errors!r}; allowed: "replace", "strict", "ignore", ...') from None


def decode_with_offsets(
    bpe: BPE, ids: np.ndarray | Iterable[SupportsIndex], errors: str = "strict"
) -> tuple[str, np.ndarray]:
    """(text, offsets): offsets[k], int64, is the index in `text` of the first character that has bytes of token k.

    Tokens that share a character all have its index, as in tiktoken's function of this name. Bytes that are not UTF-8
    raise ValueError; with errors="replace" they become U+FFFD, each of which counts as a character.

    >>> from purelm.tokenizer import make
    >>> bpe = make({i: bytes([i]) for i in range(256)} | {256: b"hi"}, [(b"h", b"i")])
    >>> text, offsets = decode_with_offsets(bpe, [256, 0xC3, 0xA9, 33])  # 0xC3 0xA9 is one character
    >>> len(text), offsets.tolist()
    (4, [0, 2, 2, 3])
    """
    if errors not in ("strict", "replace"):
        raise ValueError(f'errors is {errors!r}; allowed: "strict", "replace"')
    checked = _integers(ids)
    data = _join(bpe, checked)
    text = data.decode("utf-8", errors)
    _, lengths = tables.tokens_by_id(bpe)
    first_bytes = np.cumsum(lengths[checked]) - lengths[checked]
    starts = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80  # which bytes begin a character
    if errors == "replace" and "\ufffd" in text:
        _mark_replaced(data, starts)
    return text, np.maximum(np.cumsum(starts)[first_bytes] - 1, 0)


def _mark_replaced(data: bytes, starts: np.ndarray) -> None:
    """Set in `starts` which bytes begin a character of data.decode(errors="replace"), where that differs."""
    begin, view = 0, memoryview(data)
    while begin < len(data):
        end = min(begin + 4096, len(data))  # a window: without it, each of many errors would decode all of the rest
        try:
            str(view[begin:end], "utf-8")
            begin = end
        except UnicodeDecodeError as error:  # one U+FFFD for bytes [error.start, error.end)
            bad, after = begin + error.start, begin + error.end
            if after == end < len(data) and bad > begin:
                begin = bad  # the character may only be cut off by the window: look again from where it begins
                continue
            starts[bad] = True
            starts[bad + 1 : after] = False
            begin = after


def _integers(ids) -> np.ndarray:
    """`ids` as an array of integers with one axis."""
    if isinstance(ids, str | bytes) or not (hasattr(ids, "__array__") or isinstance(ids, Iterable)):
        raise ValueError(f"ids is {type(ids).__name__} {ids!r:.80}; give integers with one axis")
    array = np.asarray(ids if hasattr(ids, "__array__") or isinstance(ids, list | tuple) else list(ids))
    if array.shape == (0,):
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"ids is {array.dtype} of shape {array.shape}; give integers with one axis")
    return array


def _what_is_outside(bpe: BPE, ids: np.ndarray) -> str:
    _, lengths = tables.tokens_by_id(bpe)
    outside = (ids < 0) | (ids >= len(lengths))
    outside |= lengths[np.where(outside, 0, ids)] == 0
    number = int(np.argmax(outside))
    return _no_token(bpe, number, int(ids[number]))


def _no_token(bpe: BPE, number: int, token_id: int) -> str:
    return (
        f"ids[{number}] is {token_id}, which is no token: the vocabulary has {len(bpe.vocab)} ids, "
        f"the largest is {max(bpe.vocab)}"
    )
