"""The added tokens of a tokenizer.json, as special tokens with ids; those that would mean something else are refused.

Hugging Face's library cuts added tokens out of the text in two passes: first those with normalized=false, then, in what
is left and normalized, the others. Within a pass the leftmost wins, and of several there the longest. The second pass
is `BPE.normalized_tokens`; `make` leaves it empty where it cannot make a difference.

The ids come from the vocab, not from the list of added tokens: the library gives an added token the id that the model's
vocab has for it. Those that the vocab does not have get, in the order of the list, the size of the vocab and up. Where
the file says otherwise the library only warns (tokenizers 0.23). Here that is an error: a model was trained with one of
the two ids, and the file does not tell with which.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["added_tokens"]


_KEYS = {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}


def added_tokens(added: Any, vocab: Mapping[str, Any], problems: list[str]) -> tuple[dict[str, int], list[str]]:
    """(content -> id, contents with normalized=true) of added tokens; vocab: text -> id, of the model.

    What is not supported is added to `problems`, and the result then means nothing.
    """
    if not isinstance(added, list):
        problems.append(f"added_tokens is {type(added).__name__}; a list is expected")
        return {}, []
    special: dict[str, int] = {}
    second: list[str] = []
    following = len(vocab)
    for token in added:
        content, token_id = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        if not isinstance(content, str) or not content or type(token_id) is not int:
            problems.append(f"the added token {token!r} has no content or no id")
            continue
        for key in ("single_word", "lstrip", "rstrip"):
            if token.get(key):
                problems.append(f"the added token {content!r} has {key}; not supported")
        for key in sorted(set(token) - _KEYS):
            problems.append(f"the added token {content!r} has {key}, which is not known")
        if content in special:
            problems.append(f"the added token {content!r} is there twice")
            continue
        expected = vocab.get(content, following)
        if expected == following and content not in vocab:
            following += 1
        if token_id != expected:
            problems.append(
                f"the added token {content!r} is to have id {token_id}, but Hugging Face's library gives it "
                f"{expected}, " + ("as the vocab has it" if content in vocab else "the next behind the vocab")
            )
        special[content] = token_id
        if token.get("normalized"):
            second.append(content)
    return special, second
