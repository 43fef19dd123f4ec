"""The added tokens of a tokenizer.json, as special tokens with ids; those that would mean something else are refused.

Hugging Face's library cuts added tokens out of the text in two passes: first those with normalized=false, then, in what
is left, the others. Within a pass the leftmost wins, and of several there the longest. `encode` has one pass. The
results agree where no token of one pass can overlap one of the other.

The ids come from the vocab, not from the list of added tokens: the library gives an added token the id that the model's
vocab has for it. Those that the vocab does not have get, in the order of the list, the size of the vocab and up. Where
the file says otherwise the library only warns (tokenizers 0.23). Here that is an error: a model was trained with one of
the two ids, and the file does not tell with which.
"""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["added_tokens"]


def added_tokens(added: Any, vocab: Mapping[str, Any], name: str) -> dict[str, int]:
    """Content -> id of the added tokens of a file whose model has `vocab` (text -> id); errors begin with `name`."""
    if not isinstance(added, list):
        raise ValueError(f"{name}: added_tokens is {type(added).__name__}; a list is expected")
    special: dict[str, int] = {}
    passes: tuple[list[str], list[str]] = ([], [])
    following = len(vocab)
    for token in added:
        content, token_id = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        if not isinstance(content, str) or not content or type(token_id) is not int:
            raise ValueError(f"{name}: the added token {token!r} has no content or no id")
        for key in ("single_word", "lstrip", "rstrip"):
            if token.get(key):
                raise ValueError(f"{name}: the added token {content!r} has {key}; not supported")
        if content in special:
            raise ValueError(f"{name}: the added token {content!r} is there twice")
        expected = vocab.get(content, following)
        if expected == following and content not in vocab:
            following += 1
        if token_id != expected:
            raise ValueError(
                f"{name}: the added token {content!r} is to have id {token_id}, but Hugging Face's library gives it "
                f"{expected}, " + ("as the vocab has it" if content in vocab else "the next behind the vocab")
            )
        special[content] = token_id
        passes[bool(token.get("normalized"))].append(content)
    pair = _overlap(*passes)
    if pair is not None:
        raise ValueError(
            f"{name}: the added token {pair[0]!r} has normalized=false and {pair[1]!r}, which can overlap it, has not; "
            "not supported"
        )
    return special


def _overlap(first: Sequence[str], second: Sequence[str]) -> tuple[str, str] | None:
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
