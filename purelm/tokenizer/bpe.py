"""The tokenizer as a value: BPE(vocab, merges, special_tokens, pattern, ...), and `make`, which checks one.

Byte-level byte-pair encoding: `pattern` cuts a text into pieces, and a piece starts as its UTF-8 bytes. As long as some
neighbours are a pair in `merges`, the pair that is listed first is merged (where it occurs twice, at its leftmost
place). The order of the merges says nothing about ids: ids may be in any order and have gaps.

A byte without a token in the vocab is dropped by `encode`, as Hugging Face's library drops it: its neighbours in the
piece become neighbours and may merge. `decode(encode(text))` then lacks it. `make` takes such a vocab only where the
caller says `drop_missing_bytes=True`.

Sennrich et al. 2016 (BPE for translation); Radford et al. 2019, section 2.2 (on bytes).
"""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from purelm.tokenizer.patterns import LONE_SURROGATE, Pattern, resolve

MOST_IDS = 2**24
FORMS = ("NFC", "NFD", "NFKC", "NFKD")
Specials = Sequence[str] | Mapping[str, int]  # names of special tokens, or their ids where these are fixed


@dataclass(frozen=True, eq=False)
class BPE:
    """A trained tokenizer. Build it by `make`, `train` or `load`, which check it; never change its vocab in place.

    Two are equal when all is equal that decides ids, and so exactly when their `fingerprint`s are: the order of the
    special tokens and of the vocab's entries does not count.
    """

    vocab: dict[int, bytes]  # id -> bytes, special tokens included; bytes are unique, ids may have gaps
    merges: tuple[tuple[bytes, bytes], ...]  # by rank: the earlier is applied first
    special_tokens: tuple[str, ...]  # cut out of the text before `pattern` applies; each is in the vocab as UTF-8
    pattern: Pattern  # the pre-tokenizer: a regular expression (`regex` syntax), or a tuple of steps
    # True: a piece that is itself a token becomes that token whatever the merges say, and consecutive merges with the
    # same result share a rank. This is what tiktoken does, and the flag of this name in Hugging Face's files. It makes
    # no difference in a trained vocabulary, where the merges turn the bytes of each token into that token.
    ignore_merges: bool = False
    normalizer: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = None  # of the text between special tokens, `normalize`
    # The special tokens that are looked for after all others are cut out and the rest is normalized. Empty where that
    # cannot make a difference.
    normalized_tokens: frozenset[str] = frozenset()

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, BPE):
            return NotImplemented
        return (
            (self.pattern, self.ignore_merges) == (other.pattern, other.ignore_merges)
            and (self.normalizer, self.normalized_tokens) == (other.normalizer, other.normalized_tokens)
            and set(self.special_tokens) == set(other.special_tokens)
            and self.merges == other.merges
            and self.vocab == other.vocab
        )

    def __hash__(self) -> int:
        """Equal BPEs have equal hashes. Not all is read, which would be slow, so unequal ones may have equal hashes."""
        return hash((self.pattern, frozenset(self.special_tokens), len(self.vocab), len(self.merges), self.merges[-1:]))


def make(
    vocab: Mapping[int, bytes],
    merges: Iterable[tuple[bytes, bytes]],
    special_tokens: Specials = (),
    pattern: Pattern = "gpt2",
    *,
    ignore_merges: bool = False,
    normalizer: str | None = None,
    normalized_tokens: Iterable[str] = (),
    drop_missing_bytes: bool = False,
) -> BPE:
    """A checked BPE; special tokens that the vocab lacks are appended with the next ids.

    special_tokens: names, or a mapping from name to id where the ids are fixed from outside. pattern: a name of
    `purelm.tokenizer.patterns`, a regex, or a tuple of them. normalizer: None or a Unicode normal form.
    normalized_tokens: the special tokens that are looked for in normalized text. drop_missing_bytes: whether bytes may
    lack a token, see the top of this file. Raises ValueError that names the first thing that is wrong: an id that is
    not an int in range, two ids with the same bytes, one of the 256 single bytes missing, a merge that is listed twice,
    or a merge whose parts or result are not in the vocab.

    >>> bpe = make({i: bytes([i]) for i in range(256)} | {256: b"hi"}, [(b"h", b"i")], ["<|endoftext|>"])
    >>> bpe.vocab[257], vocab_size(bpe)
    (b'<|endoftext|>', 258)
    """
    if not isinstance(vocab, Mapping):
        raise ValueError(f"vocab is {type(vocab).__name__}; give a mapping from id to bytes")
    given, vocab = vocab, {}
    ids: dict[bytes, int] = {}
    for token_id, token in given.items():
        _check_entry(token_id, token)
        vocab[int(token_id)] = token  # numpy's integers, which json does not write
        if token in ids:
            raise ValueError(f"vocab: ids {ids[token]} and {token_id} are both {token!r}; a token has one id")
        ids[token] = token_id
    special_tokens = _add_specials(vocab, ids, special_tokens)
    missing = [value for value in range(256) if bytes([value]) not in ids]
    if missing and not drop_missing_bytes:
        raise ValueError(
            f"vocab: {len(missing)} of the 256 single bytes are missing, the first is {bytes(missing[:1])!r}; "
            "without them some texts have no encoding (drop_missing_bytes=True: such bytes are dropped)"
        )
    merges = tuple(_pair(merge, rank) for rank, merge in enumerate(listed(merges, "merges", "pairs of bytes")))
    seen: dict[tuple[bytes, bytes], int] = {}
    for rank, pair in enumerate(merges):
        if pair in seen:
            raise ValueError(f"merges: {pair} is listed twice, as merge {seen[pair]} and merge {rank}")
        seen[pair] = rank
        for part, name in ((pair[0], "left part"), (pair[1], "right part"), (pair[0] + pair[1], "result")):
            if part not in ids:
                raise ValueError(f"merges: the {name} of merge {rank}, {pair}, is not in the vocab: {part!r}")
    if normalizer not in (None, *FORMS):
        raise ValueError(f"normalizer is {normalizer!r}; allowed are None, {', '.join(FORMS)}")
    second = _second_pass(special_tokens, normalizer, listed(normalized_tokens, "normalized_tokens", "strings"))
    pattern = resolve(pattern)
    return BPE(vocab, merges, special_tokens, pattern, bool(ignore_merges), normalizer, second)  # type: ignore[arg-type]


def _second_pass(special_tokens: tuple[str, ...], normalizer: str | None, names: list[str]) -> frozenset[str]:
    """The value of BPE.normalized_tokens; ValueError for names that cannot be there."""
    unknown = [name for name in names if name not in special_tokens]
    if unknown:
        raise ValueError(f"normalized_tokens: {unknown[0]!r} is not in special_tokens, {list(special_tokens)}")
    if normalizer is None:
        others = [name for name in special_tokens if name not in names]
        return frozenset(names) if overlap(others, names) is not None else frozenset()
    forms: dict[str, str] = {}
    for name in names:
        form = unicodedata.normalize(normalizer, name)  # type: ignore[arg-type]
        if forms.setdefault(form, name) != name:
            raise ValueError(f"normalized_tokens: {forms[form]!r} and {name!r} are equal in {normalizer}")
    return frozenset(names)


def overlap(first: Sequence[str], second: Sequence[str]) -> tuple[str, str] | None:
    """A string of `first` and one of `second` that can share characters in some text, or None."""
    for one, other, swap in ((first, second, False), (second, first, True)):
        begins = {text[:k]: text for text in other for k in range(1, len(text) + 1)}
        whole = set(other)
        for text in one:
            for k in range(len(text)):
                found = begins.get(text[k:])  # a string that begins with the end of `text`
                if found is None:
                    inside = (text[k:end] for end in range(k + 1, len(text)) if text[k:end] in begins)
                    found = next((part for part in inside if part in whole), None)
                if found is not None:
                    return (found, text) if swap else (text, found)
    return None


def listed(values, argument: str, what: str) -> list:
    """The elements of an iterable; ValueError for a str or bytes, whose elements are not meant."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"{argument} is {type(values).__name__} {values!r:.80}; give a sequence of {what}")
    return list(values)


def listed_specials(special_tokens: Specials) -> Specials:
    """The same, so that it can be read twice: a mapping stays, an iterator becomes a tuple."""
    if isinstance(special_tokens, Mapping):
        return special_tokens
    return tuple(listed(special_tokens, "special_tokens", "strings"))


def _pair(merge, rank: int) -> tuple[bytes, bytes]:
    if isinstance(merge, tuple | list) and len(merge) == 2 and all(isinstance(part, bytes) for part in merge):
        return merge[0], merge[1]
    raise ValueError(f"merges: merge {rank} is {merge!r:.80}, not two bytes objects")


def _check_entry(token_id, token) -> None:
    if not isinstance(token_id, int | np.integer) or isinstance(token_id, bool) or not 0 <= token_id < MOST_IDS:
        raise ValueError(f"vocab: the id {token_id!r} is not an int in [0, 2**24); embeddings have a row for each id")
    if not isinstance(token, bytes) or not token:
        raise ValueError(f"vocab: id {token_id} is {token!r}; a token is bytes and not empty")


def _add_specials(vocab: dict[int, bytes], ids: dict[bytes, int], special_tokens) -> tuple[str, ...]:
    """Add what is missing to `vocab` and `ids` (dicts that the caller made); the names in order."""
    fixed = special_tokens if isinstance(special_tokens, Mapping) else {}
    names = tuple(listed(special_tokens, "special_tokens", "strings"))
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(f"special_tokens: {name!r} is not a string of at least one character")
        if name in seen:
            raise ValueError(f"special_tokens: {name!r} is listed twice")
        seen.add(name)
        if LONE_SURROGATE.search(name):
            raise ValueError(f"special_tokens: {name!r} holds a lone surrogate, which UTF-8 cannot hold")
        token = name.encode("utf-8")
        token_id = fixed.get(name)
        if token_id is None:
            token_id = ids.get(token, max(vocab, default=-1) + 1)
        _check_entry(token_id, token)
        if ids.get(token, token_id) != token_id:
            raise ValueError(f"special_tokens: {name!r} is to have id {token_id}, but the vocab has it as {ids[token]}")
        if vocab.get(token_id, token) != token:
            raise ValueError(f"special_tokens: {name!r} is to have id {token_id}, which is {vocab[token_id]!r}")
        vocab[token_id] = token
        ids[token] = token_id
    return names


def with_special_tokens(bpe: BPE, special_tokens: Specials) -> BPE:
    """`bpe` with more special tokens; those that the vocab lacks are appended with the next ids."""
    more = listed_specials(special_tokens)
    ids: dict[str, int | None] = dict.fromkeys((*bpe.special_tokens, *more))
    if isinstance(more, Mapping):
        ids.update(more)
    vocab = dict(bpe.vocab)
    names = _add_specials(vocab, {token: token_id for token_id, token in vocab.items()}, ids)
    return replace(bpe, vocab=vocab, special_tokens=names)


def vocab_size(bpe: BPE) -> int:
    """The number of rows that an embedding table needs: largest id + 1 (ids may have gaps)."""
    return max(bpe.vocab) + 1


def token_dtype(bpe: BPE) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size(bpe) <= 2**16 else np.uint32)
