"""Tokens as text: GPT-2's printable alphabet for bytes, in which vocab.json and tokenizer.json write them."""

from collections.abc import Iterable, Mapping
from typing import Any

from purelm.caches import memo
from purelm.tokenizer.bpe import BPE
from purelm.tokenizer.patterns import LONE_SURROGATE


@memo(1)
def byte_characters() -> tuple[str, ...]:
    """The character that stands for each byte: the byte's Latin-1 character if printable, else U+0100, U+0101, ...

    Source: Radford et al. 2019, bytes_to_unicode of the released encoder.
    """
    printable = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    others = iter(range(0x100, 0x200))
    return tuple(chr(value) if value in printable else chr(next(others)) for value in range(256))


# For str.translate, between the alphabet and Latin-1, whose characters are the bytes.
_FROM_LATIN1 = dict(enumerate(byte_characters()))
_TO_LATIN1 = {ord(character): chr(value) for value, character in _FROM_LATIN1.items()}


def to_unicode(token: bytes) -> str:
    """The token in the printable alphabet.

    >>> len(to_unicode(b" the"))
    4
    """
    return token.decode("latin-1").translate(_FROM_LATIN1)


def from_unicode(text: str, where: str) -> bytes:
    """The token that `text` stands for; ValueError, beginning with `where`, for a character outside the alphabet."""
    for character in text:
        if ord(character) not in _TO_LATIN1:
            raise ValueError(
                f"{where}: {text!r} holds {character!r}, which stands for no byte: not a byte-level vocabulary"
            )
    return text.translate(_TO_LATIN1).encode("latin-1")


def vocab_to_json(bpe: BPE) -> dict[str, int]:
    """Text -> id in the order of the ids: special tokens as they are, other tokens in the printable alphabet."""
    special = {name.encode(): name for name in bpe.special_tokens}
    merged = {left + right for left, right in bpe.merges}
    entries: dict[str, int] = {}
    for token_id, token in sorted(bpe.vocab.items()):
        text = special[token] if token in special else to_unicode(token)
        if token in special and text != to_unicode(token) and (token in merged or len(token) == 1):
            raise ValueError(f"the special token {text!r} is an ordinary token too; these files cannot hold both")
        if text in entries:
            raise ValueError(f"the special token {text!r} reads as the ordinary token {entries[text]} in such a file")
        entries[text] = token_id
    return entries


def vocab_from_json(entries: Mapping[str, Any], special_tokens: Iterable[str], name: str) -> dict[int, bytes]:
    """The vocab of what `vocab_to_json` writes; errors begin with `name`."""
    special = frozenset(special_tokens)
    vocab: dict[int, bytes] = {}
    for text, token_id in entries.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise ValueError(f"{name}: the id of {text!r} is {token_id!r}, not an int")
        if token_id in vocab:
            raise ValueError(f"{name}: {text!r} and {vocab[token_id]!r} both have id {token_id}")
        if text in special and LONE_SURROGATE.search(text):
            raise ValueError(f"{name}: the special token {text!r} holds a lone surrogate, which UTF-8 cannot hold")
        vocab[token_id] = text.encode() if text in special else from_unicode(text, name)
    return vocab
