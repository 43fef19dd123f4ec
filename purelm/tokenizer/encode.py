r"""Text to ids: encode(bpe, text) -> numpy, with special tokens cut out first.

    ids(text) = ids of each piece, one after the other        pieces: `pretokenize.split` between special tokens

Two engines give the same ids:
- "python": `re` / `regex` and a dict from piece to ids. The reference, always there.
- "numba": the loops of `fast_encode`, several times tiktoken's speed, for the known patterns.

"auto" takes numba where it is installed and knows the pattern, but never lets a small job wait for the machine code
(under a second to load, some seconds to compile once per machine): a BPE that has encoded less than 8 million
characters in this process is served by Python, unless the code is already there.
"""

import importlib.util
import re
import sys
from array import array
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache

import numpy as np

from purelm.tokenizer import tables
from purelm.tokenizer.bpe import BPE
from purelm.tokenizer.merge import merge
from purelm.tokenizer.patterns import family
from purelm.tokenizer.pretokenize import split

_ENOUGH = 8_000_000  # characters by which loading the compiled code has paid for itself
_BLOCK = 1 << 15  # characters that are split at a time: whole texts of ASCII are rare, such stretches are not
_LONGEST_KEPT = 64  # characters of a piece in the memo
_MOST_KEPT = 1 << 18  # pieces in the memo, about 50 MB; then it starts anew
_TINY = 128  # characters below which calling compiled code costs more than it saves


def encode(
    bpe: BPE,
    text: str,
    allowed_special: str | Collection[str] | None = "all",
    disallowed_special: str | Collection[str] = (),
    *,
    engine: str = "auto",
) -> np.ndarray:
    """The ids of `text`, (n,) uint16 where every id of the vocabulary fits, else uint32.

    allowed_special: the special tokens that become their ids: "all", some of `bpe.special_tokens`, or none of them
    (None, "none" or empty); the text of others is ordinary text. Of several at one position the longest wins.
    disallowed_special: those whose appearance in the text is an error, also inside of an allowed one or across its
    end; "all" is all that are not allowed.
    engine: "auto", "python" or "numba" (see the top of this file).
    Raises ValueError on a disallowed special token and on lone surrogates, naming the place, and on names that are no
    special tokens of `bpe`.

    >>> from purelm.tokenizer import make
    >>> bpe = make({i: bytes([i]) for i in range(256)} | {256: b"hi"}, [(b"h", b"i")], ["<|endoftext|>"])
    >>> encode(bpe, "hi!<|endoftext|>").tolist()
    [256, 33, 257]
    """
    if not isinstance(text, str):
        raise ValueError(f"text is {type(text).__name__}; give a str (bytes: decode them first)")
    allowed, disallowed = _special_names(bpe, allowed_special, disallowed_special)
    if disallowed:
        _refuse(text, disallowed)
    try:
        if _use_numba(bpe, text, engine):
            from purelm.tokenizer.fast_encode import encode_numba

            matcher = special_matcher(allowed, True) if allowed else None
            return encode_numba(bpe, text.encode(), _encoded_specials(bpe), matcher)
        return _encode_python(bpe, text, allowed)
    except UnicodeEncodeError:
        at = _SURROGATE.search(text)
        assert at is not None
        raise ValueError(
            f"text has a lone surrogate, U+{ord(at.group()):04X}, at character {at.start()}: it has no UTF-8 form"
        ) from None


_SURROGATE = re.compile("[\ud800-\udfff]")


@lru_cache(maxsize=64)
def special_matcher(names: frozenset[str], of_bytes: bool = False) -> re.Pattern:
    """Matches one of `names`, in str or UTF-8, the longest that starts at a position (the first alternative wins)."""
    ordered = sorted(names, key=lambda name: (-len(name), name))
    if of_bytes:
        return re.compile(b"|".join(re.escape(name.encode()) for name in ordered))
    return re.compile("|".join(map(re.escape, ordered)))


def _special_names(bpe: BPE, allowed, disallowed) -> tuple[frozenset[str], frozenset[str]]:
    every = tables.once(bpe, "special_names", lambda bpe: frozenset(bpe.special_tokens))
    if isinstance(allowed, str) and allowed == "all":
        chosen = every
    else:
        chosen = _known_names(every, allowed, "allowed_special")
    if isinstance(disallowed, str) and disallowed == "all":
        return chosen, every - chosen
    return chosen, _known_names(every, disallowed, "disallowed_special")


def _known_names(every: frozenset[str], names, argument: str) -> frozenset[str]:
    if names is None or (isinstance(names, str) and names == "none"):
        return frozenset()
    if isinstance(names, str):
        raise ValueError(f'{argument} is {names!r}; give "all", "none" or a collection of special tokens')
    if not isinstance(names, Iterable) or isinstance(names, bytes):
        raise ValueError(f'{argument} is {names!r}; give "all", "none" or a collection of special tokens')
    names = tuple(names)  # once: it may be a generator
    unknown = [name for name in names if name not in every]
    if unknown:
        raise ValueError(f"{argument}: {unknown[0]!r} is no special token of this BPE: {sorted(every)}")
    return frozenset(names)


def _refuse(text: str, disallowed: frozenset[str]) -> None:
    """As tiktoken does, whatever is allowed: also where one lies inside of an allowed token or overlaps it."""
    match = special_matcher(disallowed).search(text)
    if match is not None:
        raise ValueError(
            f"text holds the special token {match.group()!r} at character {match.start()}, which is in "
            "disallowed_special; allow it (allowed_special), or take it as ordinary text (disallowed_special=())"
        )


def _encoded_specials(bpe: BPE) -> dict[bytes, int]:
    return tables.once(
        bpe, "encoded_specials", lambda bpe: {name.encode(): i for name, i in tables.special_ids(bpe).items()}
    )


def _use_numba(bpe: BPE, text: str, engine: str) -> bool:
    if engine == "python":
        return False
    if engine == "numba":
        if not _has_numba():
            raise ImportError("engine='numba' needs numba, which is not installed: pip install 'purelm[fast]'")
        return True
    if engine != "auto":
        raise ValueError(f'engine is {engine!r}; allowed: "auto", "python", "numba"')
    if len(text) < _TINY or not tables.once(bpe, "can_compile", _can_compile):
        return False
    kernels = sys.modules.get("purelm.tokenizer.kernels")
    if kernels is not None and kernels.encode_some.signatures:
        return True
    seen = tables.once(bpe, "characters", lambda bpe: [0])
    seen[0] += len(text)
    return seen[0] >= _ENOUGH


def _can_compile(bpe: BPE) -> bool:
    # The compiled loops read words of 8 bytes, whose first byte must be the lowest.
    return family(bpe.pattern) is not None and sys.byteorder == "little" and _has_numba()


def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


# ---- The engine in plain Python ----


class _Memo(dict):
    """Piece -> its ids as bytes of the output dtype; a piece that it lacks is merged, and kept where it is short."""

    def __init__(self, bpe: BPE):
        self.merges = tables.pair_merges(bpe)
        self.byte_ids = tables.byte_ids(bpe)
        self.whole = tables.whole_tokens(bpe)
        self.typecode = "H" if tables.dtype(bpe) == np.uint16 else "I"

    def __missing__(self, piece: str) -> bytes:
        data = piece.encode()
        found = self.whole.get(data) if self.whole else None
        if found is not None:
            ids = [found]
        else:
            byte_ids = self.byte_ids
            ids = merge([byte_ids[value] for value in data], self.merges)
        packed = array(self.typecode, ids).tobytes()
        if len(piece) <= _LONGEST_KEPT:
            if len(self) >= _MOST_KEPT:
                self.clear()
            self[piece] = packed
        return packed


def _encode_python(bpe: BPE, text: str, allowed: frozenset[str]) -> np.ndarray:
    memo = tables.once(bpe, "memo", _Memo)
    ids_of = memo.__getitem__
    packed = bytearray()
    for span in _ordinary_spans(bpe, text, allowed, packed):
        for block in _blocks(span, bpe.pattern):
            packed += b"".join(map(ids_of, split(block, bpe.pattern)))
    return np.frombuffer(packed, tables.dtype(bpe))


def _ordinary_spans(bpe: BPE, text: str, allowed: frozenset[str], packed: bytearray) -> Iterator[str]:
    """The texts between special tokens; the id of each special token is appended to `packed` after the text before."""
    start = 0
    if allowed:
        ids, dtype = tables.special_ids(bpe), tables.dtype(bpe)
        for match in special_matcher(allowed).finditer(text):
            yield text[start : match.start()]
            packed += dtype.type(ids[match.group()]).tobytes()
            start = match.end()
    yield text[start:] if start else text


_SAFE = re.compile(r"(?<=[^\s\x00-\x20]) ")  # a cut before this space changes no piece: see chunks.py


def _blocks(text: str, pattern: str) -> Iterator[str]:
    """`text` in blocks of about _BLOCK characters, cut where a known pattern allows it."""
    if len(text) <= 2 * _BLOCK or family(pattern) is None:
        yield text
        return
    start = 0
    while len(text) - start > 2 * _BLOCK:
        cut = _SAFE.search(text, start + _BLOCK)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]
