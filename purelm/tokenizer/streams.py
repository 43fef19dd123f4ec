"""Encoding of a stream of text in constant memory, with exactly the ids of the whole text."""

from collections.abc import Iterable, Iterator

from purelm.tokenizer import tables
from purelm.tokenizer.bpe import BPE
from purelm.tokenizer.cuts import last_cut, rules_for
from purelm.tokenizer.encoding import PieceMemo, check_surrogates, encode, encode_python
from purelm.tokenizer.engine import PAYS_FROM, choose

BLOCK_CHARS = 1 << 12  # encoded at a time: enough that a call's own cost is small, and little memory
MAX_HELD_CHARS = 1 << 26
_KEPT = 4096  # pieces in the memo of a stream, 0.4 MB


def encode_iterable(
    bpe: BPE, texts: Iterable[str], *, engine: str = "auto", max_held: int = MAX_HELD_CHARS
) -> Iterator[int]:
    """The ids of "".join(texts), one after the other, reading `texts` (a file's lines, say) only as far as needed.

    Equal to encode(bpe, "".join(texts)) for every way of cutting the text: what was read behind the last place where a
    cut is safe (see `cuts`) is held back, a few thousand characters in text with spaces. A text without any safe place
    must be held whole to be exact: one letter a million times, Chinese without spaces, or a pattern of the user's own
    without special tokens. More than `max_held` characters of that raise ValueError.

    engine: "python" takes less than 1 MB however long the stream is. "auto" is the same for the first 8 MB and then
    goes on as `encode` would with all of the text (see `purelm.tokenizer.engine.choose`): faster, with up to 100 MB of
    memory. To write a token file, `encode_file` and `encode_documents` are faster.

    >>> from purelm.tokenizer import make
    >>> bpe = make({i: bytes([i]) for i in range(256)} | {256: b"hi"}, [(b"h", b"i")])
    >>> list(encode_iterable(bpe, ["h", "i h", "i"]))
    [256, 32, 256]
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise ValueError(f"texts is one {type(texts).__name__}: give an iterable of str, as [text] or an open file")
    choose(engine, "encode", 0, bpe.pattern)  # raises here, and not at the first id
    if not isinstance(max_held, int) or max_held < 1:
        raise ValueError(f"max_held is {max_held!r}: allowed is an int of at least 1")
    return _ids(bpe, texts, engine, max_held)


def _ids(bpe: BPE, texts: Iterable[str], engine: str, max_held: int) -> Iterator[int]:
    memo, allowed = PieceMemo(bpe, _KEPT), tables.special_set(bpe)
    n_encoded = 0
    for block in _safe_blocks(bpe, texts, max_held):
        check_surrogates(block, n_encoded, " of the stream")
        if engine == "python" or (engine == "auto" and n_encoded < PAYS_FROM["encode"]):
            ids = encode_python(bpe, block, allowed, memo).tolist()
        else:  # as one text of what was read so far: also where that is Python, its memo is the large one
            ids = encode(bpe, block, engine=choose(engine, "encode", n_encoded, bpe.pattern)).tolist()
        n_encoded += len(block)
        del block
        yield from ids


def _safe_blocks(bpe: BPE, texts: Iterable[str], max_held: int) -> Iterator[str]:
    """The stream in blocks of about BLOCK_CHARS characters, cut where it is safe."""
    held: list[str] = []
    n_held = 0
    wanted = BLOCK_CHARS  # characters at which to look for a cut
    rules = rules_for(bpe)
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
            cut = last_cut(joined, *rules)
            held, n_held = [joined[cut:]], n_held - cut
            if n_held > max_held:
                raise ValueError(
                    f"texts: {n_held} characters without a place where a cut is safe, more than max_held={max_held}; "
                    "they hold no space, or the pattern is not a known one and no special token separates documents"
                )
            # The next look is after the text has doubled, so that a stream without a safe cut takes linear time.
            wanted = max(BLOCK_CHARS, 2 * n_held)
            if cut:
                joined = joined[:cut]
                yield joined
            del joined
    if n_held:
        yield "".join(held)
