r"""Where a text may be cut so that its pieces, and so its token ids, stay exactly what they are.

A cut is the position between two characters; it is *safe* when splitting (or encoding) the two sides apart gives the
pieces of the whole text. One rule serves chunked training, streams and parallel encoding:

1. Just before a space (U+0020) whose previous character is not white space, where the pattern is a known one (one of
   `patterns.NAMES`). Why: in these patterns a space that follows a non-space can only be the first character of a piece
   (the branches that hold a space later on are runs of white space), so every piece of the left side ends at the cut at
   the latest; their only look-ahead, (?!\S) and $, is behind a run of white space, and the left side does not end in
   one; nothing looks behind. "Before any white space" is wrong for cl100k and o200k, whose punctuation swallows
   newlines.
2. Just before a special token: specials are taken out before the pattern is applied.

Neither holds inside a special token: a cut that any occurrence of a special straddles is refused, which is stricter
than needed where specials overlap and so never wrong. For a regex of the user's own the first rule is not assumed:
such text is cut before special tokens only, and is one chunk when there are none.
"""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

import regex

from purelm.tokenizer.patterns import family

# White space as UTF-8: what \s of `regex` matches and U+001C..U+001F, which only str.isspace counts. Refusing a cut
# is always right. Other control characters are refused with them, to keep the class one range.
_SAFE_BYTES = (
    rb"(?<![\x00-\x20])(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])"
    rb"(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80) "
)
_SAFE_TEXT = r"(?<![\s\x00-\x20]) "

# The first rule alone, for text without special tokens under a known pattern: a match begins at a safe cut.
SAFE_SPACE, SAFE_SPACE_BYTES = re.compile(_SAFE_TEXT), re.compile(_SAFE_BYTES)


@lru_cache(maxsize=32)
def _rules(pattern: str, special_tokens: tuple[str, ...]):
    """(forward matcher of candidates in bytes, backward matcher in str, specials as bytes, specials as str).

    A candidate is right unless a special straddles it. Which specials can? Those that hold a space after their first
    character (at a space), and those that overlap another (at the start of a special): all are checked but the usual
    case, specials without a space that do not overlap, has nothing to check.
    """
    spaces = family(pattern) is not None
    encoded = tuple(name.encode("utf-8") for name in special_tokens)
    parts = [_SAFE_BYTES] if spaces else []
    parts += [b"(?=" + re.escape(token) + b")" for token in encoded]
    texts = [_SAFE_TEXT] if spaces else []
    texts += [f"(?={regex.escape(name)})" for name in special_tokens]
    straddlers = tuple(name for name in special_tokens if can_straddle(name, special_tokens, spaces))
    forward = re.compile(b"|".join(parts)) if parts else None
    backward = regex.compile("(?r)" + "|".join(texts)) if texts else None
    return forward, backward, tuple(name.encode("utf-8") for name in straddlers), straddlers


def _names(special_tokens: Iterable[str]) -> tuple[str, ...]:
    if isinstance(special_tokens, str):
        raise ValueError(f"special_tokens is the string {special_tokens!r}; give a sequence of strings")
    return tuple(special_tokens)


def can_straddle(name: str, special_tokens: tuple[str, ...], spaces: bool) -> bool:
    """Whether a cut (before a space, before a special) can fall inside `name`."""
    if spaces and " " in name[1:]:
        return True
    inside = range(1, len(name))
    return any(other.startswith(name[i : i + len(other)]) for other in special_tokens for i in inside)


def _straddled(data, cut: int, specials) -> bool:
    """Whether an occurrence of a special starts before `cut` and ends after it; data is bytes-like or str."""
    for name in specials:
        reach = len(name) - 1
        if data.find(name, max(0, cut - reach), cut + reach) >= 0:
            return True
    return False


def next_cut(data, start: int, pattern: str, special_tokens: tuple[str, ...] = ()) -> int:
    """The first safe cut at or after byte `start` of UTF-8 `data` (bytes or mmap); len(data) when there is none.

    >>> next_cut(b"one two three", 4, "gpt2")
    7
    """
    forward, _, straddlers, _ = _rules(pattern, _names(special_tokens))
    if start <= 0:
        return 0
    if forward is not None:
        for match in forward.finditer(data, start):
            if not _straddled(data, match.start(), straddlers):
                return match.start()
    return len(data)


def chunks(data, n_bytes: int, pattern: str, special_tokens: tuple[str, ...] = ()) -> Iterator[tuple[int, int]]:
    """(start, end) of consecutive chunks of UTF-8 `data` (bytes or mmap), each at least `n_bytes` but the last.

    Only the neighbourhood of each cut is read, so a mapped file is never loaded for it. A chunk is longer than
    `n_bytes` by the way to the next safe cut; text without one (see the top of this file) is one chunk.

    >>> list(chunks(b"one two three", 4, "gpt2"))
    [(0, 7), (7, 13)]
    """
    if n_bytes < 1:
        raise ValueError(f"n_bytes is {n_bytes}; a chunk has at least 1 byte")
    special_tokens = _names(special_tokens)
    start = 0
    while start < len(data):
        end = next_cut(data, start + n_bytes, pattern, special_tokens) if start + n_bytes < len(data) else len(data)
        yield start, end
        start = end


def last_cut(text: str, pattern: str, special_tokens: tuple[str, ...] = ()) -> int:
    """The last position of `text` that is a safe cut *whatever text may follow*; 0 when there is none.

    The end of `text` is none (a word may go on), and near it a cut is refused while a special token that straddles
    it could still be completed.

    >>> last_cut("one two three", "gpt2")
    7
    """
    _, backward, _, straddlers = _rules(pattern, _names(special_tokens))
    if backward is None:
        return 0
    longest = max(map(len, straddlers), default=1)
    for match in backward.finditer(text):
        cut = match.start()
        if cut > 0 and cut + longest - 1 <= len(text) and not _straddled(text, cut, straddlers):
            return cut
    return 0
