"""Encoding of a stream of text in constant memory, with exactly the ids of the whole text."""

import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from purelm.tokenizer import tables
from purelm.tokenizer.bpe import BPE
from purelm.tokenizer.chunks import last_cut
from purelm.tokenizer.encode import _Memo, _ordinary_spans, encode
from purelm.tokenizer.pretokenize import split

BLOCK_CHARS = 1 << 12  # encoded at a time: enough that the call does not count, little beside a process
LONG_STREAM_CHARS = 8_000_000  # from where "auto" takes the engine of `encode`
MAX_HELD_CHARS = 1 << 26
SURROGATE = re.compile("[\ud800-\udfff]")
_KEPT = 2048  # pieces in each half of the memo; 0.4 MB in all


def encode_iterable(
    bpe: BPE, texts: Iterable[str], *, engine: str = "auto", max_held: int = MAX_HELD_CHARS
) -> Iterator[int]:
    """The ids of "".join(texts), one after the other, reading `texts` (a file's lines, say) only as far as needed.

    Equal to encode(bpe, "".join(texts)) for every way of cutting the text: the end of what was read is held back to
    the last place where a cut is safe (see `chunks`), a few thousand characters in text with spaces. A text without
    any safe place, such as one letter a million times, Chinese without spaces or a pattern of the user's own without
    special tokens, must be held whole to be exact; beyond `max_held` characters that is refused with a ValueError
    instead of giving other ids.

    engine: "python" takes less than 1 MB however long the stream is. "auto" is the same for 8 million characters and
    then goes on as `encode` does, faster, with the compiled code and a bounded memo (under 100 MB). "numba" and others
    as in `encode`. To write a token file, `encode_file` and `encode_documents` are faster.

    >>> from purelm.tokenizer.bpe import make
    >>> bpe = make({i: bytes([i]) for i in range(256)} | {256: b"hi"}, [(b"h", b"i")])
    >>> list(encode_iterable(bpe, ["h", "i h", "i"]))
    [256, 32, 256]
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise ValueError(f"texts is one {type(texts).__name__}: give an iterable of str, as [text] or an open file")
    if engine not in ("auto", "python", "numba"):
        raise ValueError(f'engine is {engine!r}; allowed: "auto", "python", "numba"')
    if not isinstance(max_held, int) or max_held < 1:
        raise ValueError(f"max_held is {max_held!r}: allowed is an int of at least 1")
    return _ids(bpe, texts, engine, max_held)


def _ids(bpe: BPE, texts: Iterable[str], engine: str, max_held: int) -> Iterator[int]:
    encode_small = _small_encoder(bpe)
    n_encoded = 0
    for block in _safe_blocks(bpe, texts, max_held):
        surrogate = None if block.isascii() else SURROGATE.search(block)
        if surrogate:
            raise ValueError(
                f"text has a lone surrogate, U+{ord(surrogate.group()):04X}, at character "
                f"{n_encoded + surrogate.start()} of the stream: it has no UTF-8 form"
            )
        if engine == "python" or (engine == "auto" and n_encoded < LONG_STREAM_CHARS):
            ids = encode_small(block)
        else:
            ids = encode(bpe, block, engine=engine).tolist()
        n_encoded += len(block)
        del block
        yield from ids


def _safe_blocks(bpe: BPE, texts: Iterable[str], max_held: int) -> Iterator[str]:
    """The stream in blocks of about BLOCK_CHARS characters, cut where it is safe."""
    held: list[str] = []
    n_held = 0
    wanted = BLOCK_CHARS  # characters at which to look for a cut
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {number} is {type(text).__name__}: an iterable of str is expected")
        # A long text goes in parts, so that neither it nor its ids are held a second time.
        for start in range(0, len(text), BLOCK_CHARS):
            part = text[start : start + BLOCK_CHARS]
            held.append(part)
            n_held += len(part)
            if n_held < wanted:
                continue
            joined = "".join(held)
            cut = last_cut(joined, bpe.pattern, bpe.special_tokens)
            held, n_held = [joined[cut:]], n_held - cut
            if n_held > max_held:
                raise ValueError(
                    f"texts: {n_held} characters without a place where a cut is safe, more than max_held={max_held}; "
                    "they hold no space, or the pattern is not a known one and no special token separates documents"
                )
            # Looking again only when the text has doubled keeps a stream without a safe cut linear.
            wanted = max(BLOCK_CHARS, 2 * n_held)
            if cut:
                joined = joined[:cut]
                yield joined
            del joined
    if n_held:
        yield "".join(held)


class _SmallMemo(_Memo):
    """A memo of few pieces: when it is full it becomes the old half, from which pieces met again come back."""

    def __init__(self, bpe: BPE):
        super().__init__(bpe)
        self.old: dict[str, bytes] = {}

    def __missing__(self, piece: str) -> bytes:
        if len(self) >= _KEPT:
            self.old = dict(self)
            self.clear()
        packed = self.old.get(piece)
        if packed is None:
            return super().__missing__(piece)
        self[piece] = packed
        return packed


def _small_encoder(bpe: BPE) -> Callable[[str], list[int]]:
    """Like `encode` by the Python engine, with a memo of its own."""
    ids_of = _SmallMemo(bpe).__getitem__
    allowed, dtype = frozenset(bpe.special_tokens), tables.dtype(bpe)

    def encode_small(text: str) -> list[int]:
        packed = bytearray()
        for span in _ordinary_spans(bpe, text, allowed, packed):
            packed += b"".join(map(ids_of, split(span, bpe.pattern)))
        return np.frombuffer(packed, dtype).tolist()

    return encode_small
