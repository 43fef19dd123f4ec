"""What is derived from a BPE, made once for each BPE object: look-up tables, and memos of pieces already seen.

The memo changes no result, only what the next call costs, and goes when the BPE goes.
"""

import hashlib
import json
import weakref
from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np

from purelm.caches import on_clear
from purelm.tokenizer.bpe import BPE, token_dtype

_MEMO: dict[int, dict[str, Any]] = {}  # by id(bpe): to look for an equal BPE would compare whole vocabularies
_LOCK = Lock()


@on_clear
def _forget() -> None:
    """The entries of a BPE, and not the BPE's place, which goes with it."""
    with _LOCK:
        for kept in _MEMO.values():
            kept.clear()


def once(bpe: BPE, name: str, build: Callable[[BPE], Any]) -> Any:
    """build(bpe), remembered under `name` as long as `bpe` lives."""
    try:
        return _MEMO[id(bpe)][name]
    except KeyError:
        value = build(bpe)
        with _LOCK:
            if id(bpe) not in _MEMO:
                _MEMO[id(bpe)] = {}
                weakref.finalize(bpe, _MEMO.pop, id(bpe)).atexit = False
            return _MEMO[id(bpe)].setdefault(name, value)


def token_to_id(bpe: BPE, token: str | bytes) -> int:
    """The id of a token, given as its bytes or as their text; ValueError where the vocabulary does not have it.

    >>> from purelm.tokenizer import make
    >>> bpe = make({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
    >>> token_to_id(bpe, "<|endoftext|>"), token_to_id(bpe, b"a")
    (256, 97)
    """
    if not isinstance(token, str | bytes):
        raise ValueError(f"token is {type(token).__name__} {token!r:.80}; give str or bytes")
    found = token_ids(bpe).get(token if isinstance(token, bytes) else token.encode("utf-8", "surrogatepass"))
    if found is None:
        raise ValueError(f"token is {token!r:.80}, which is none of the {len(bpe.vocab)} tokens of this vocabulary")
    return found


def token_ids(bpe: BPE) -> dict[bytes, int]:
    """bytes -> id of every token."""
    return once(bpe, "token_ids", lambda bpe: {token: token_id for token_id, token in bpe.vocab.items()})


def ranks(bpe: BPE) -> list[int]:
    """The rank of each merge: its place in the list. Under ignore_merges, neighbours with one result share a rank."""
    if not bpe.ignore_merges:
        return list(range(len(bpe.merges)))
    result, previous, rank = [], b"", -1
    for k, (left, right) in enumerate(bpe.merges):
        if left + right != previous:
            previous, rank = left + right, k
        result.append(rank)
    return result


def pair_merges(bpe: BPE) -> dict[tuple[int, int], int]:
    """(left id, right id) -> rank << 32 | id of the result: the smallest value is the merge to apply first."""
    return once(bpe, "pair_merges", _pair_merges)


def _pair_merges(bpe: BPE) -> dict[tuple[int, int], int]:
    ids = token_ids(bpe)
    return {
        (ids[left], ids[right]): rank << 32 | ids[left + right]
        for (left, right), rank in zip(bpe.merges, ranks(bpe), strict=True)
    }


def whole_tokens(bpe: BPE) -> dict[bytes, int]:
    """Bytes -> id of the tokens that a piece can become without merging: the ordinary ones under ignore_merges."""
    return once(bpe, "whole_tokens", _whole_tokens)


def _whole_tokens(bpe: BPE) -> dict[bytes, int]:
    if not bpe.ignore_merges:
        return {}
    special = {name.encode() for name in bpe.special_tokens} - {left + right for left, right in bpe.merges}
    return {token: token_id for token, token_id in token_ids(bpe).items() if len(token) == 1 or token not in special}


def byte_ids(bpe: BPE) -> list[int]:
    """The id of each of the 256 single bytes; -1 for one that has none and is dropped."""
    return once(bpe, "byte_ids", lambda bpe: [token_ids(bpe).get(bytes([value]), -1) for value in range(256)])


def special_ids(bpe: BPE) -> dict[str, int]:
    """name -> id of every special token."""
    return once(
        bpe, "special_ids", lambda bpe: {name: token_ids(bpe)[name.encode()] for name in bpe.special_tokens}
    )


def special_set(bpe: BPE) -> frozenset[str]:
    """The names of the special tokens."""
    return once(bpe, "special_set", lambda bpe: frozenset(bpe.special_tokens))


def tokens_by_id(bpe: BPE) -> tuple[np.ndarray, np.ndarray]:
    """(bytes of each id, object (vocab_size,); their lengths, int64); None and 0 where the vocabulary has a gap."""
    return once(bpe, "tokens_by_id", _tokens_by_id)


def _tokens_by_id(bpe: BPE) -> tuple[np.ndarray, np.ndarray]:
    size = max(bpe.vocab) + 1
    tokens = np.full(size, None, object)
    for token_id, token in bpe.vocab.items():
        tokens[token_id] = token
    return tokens, np.fromiter((len(token or b"") for token in tokens), np.int64, size)


def dtype(bpe: BPE) -> np.dtype:
    """`token_dtype(bpe)`, remembered."""
    return once(bpe, "dtype", token_dtype)


def fingerprint(bpe: BPE) -> str:
    """sha256, hex, of all that decides ids: equal for two BPEs exactly when all their fields are.

    The order of the special tokens and of the vocab's entries decides nothing and is left out.
    """
    return once(bpe, "fingerprint", _fingerprint)


def _fingerprint(bpe: BPE) -> str:
    digest = hashlib.sha256(b"purelm BPE 1\n")
    special = sorted(bpe.special_tokens)
    header: list[object] = [bpe.pattern, special, bool(bpe.ignore_merges), len(bpe.vocab), len(bpe.merges)]
    if bpe.normalizer is not None or bpe.normalized_tokens:
        header += [bpe.normalizer, sorted(bpe.normalized_tokens)]
    digest.update(json.dumps(header).encode() + b"\n")
    parts: list[bytes] = []
    for token_id, token in sorted(bpe.vocab.items()):
        parts.append(b"%d %d " % (token_id, len(token)) + token)
    for left, right in bpe.merges:
        parts.append(b"%d %d " % (len(left), len(right)) + left + right)
    digest.update(b"".join(parts))
    return digest.hexdigest()
