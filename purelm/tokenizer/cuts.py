r"""Where a text may be cut so that its pieces, and so its token ids, stay exactly what they are.

A cut is the position between two characters; it is *safe* when splitting (or encoding) the two sides apart gives the
pieces of the whole text. One rule serves chunked training, streams and parallel encoding:

1. Just before a space (U+0020) whose previous character is not white space, where the pattern is a known one (one of
   `patterns.NAMES`). In these patterns a space that follows a non-space can only be the first character of a piece: the
   branches with a space further on are runs of white space. So no piece of the left side reaches over the cut. Nor does
   what comes after the cut change a piece of the left side: the only look-aheads, (?!\S) and $, stand behind a run of
   white space, and the left side does not end in one. No pattern looks behind. The simpler rule "before any white
   space" is wrong for cl100k and o200k, whose punctuation takes the newlines after it.
   The same holds for a tuple of patterns of which each is known to leave such a place alone, and one to end a piece
   there (`patterns.safe_at_spaces`): by induction over the steps, the pieces of the two sides are those of the whole,
   but for a piece that reaches over the cut until the step that ends it there.
2. Just before a special token, because special tokens are taken out before the pattern is applied.

Under a normalizer the first rule stays true, because a space combines with no character before it, and no character
that is not white space has a normal form that ends in white space: the normal form of the whole is that of the left
side and that of the right side, and the cut lies again before a space that follows no white space. The second rule
holds for the special tokens that are cut out before normalization; `rules_for` leaves out the others.

A cut that lies inside an occurrence of a special token is refused, even where encoding would take another special token
that overlaps it: that is stricter than needed and never wrong. For a regex of the user's own the first rule is not
assumed: such text is cut before special tokens only, and is one chunk when there are none.
"""

import re
from collections.abc import Iterable, Iterator

import regex

from purelm.caches import memo
from purelm.tokenizer.bpe import BPE
from purelm.tokenizer.normalize import normalize
from purelm.tokenizer.patterns import Pattern, safe_at_spaces

# A space that does not follow white space. White space is what \s of `regex` matches, and all of U+0000..U+0020: to
# refuse a cut is never wrong, and `re` counts U+001C..U+001F too. The space comes first because `re` then searches for
# it alone, which is many times faster.
_SAFE_BYTES = (
    rb" (?<![\x00-\x20] )(?<!\xc2[\x85\xa0] )(?<!\xe1\x9a\x80 )(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf] )"
    rb"(?<!\xe2\x81\x9f )(?<!\xe3\x80\x80 )"
)
_SAFE_TEXT = r" (?<![\s\x00-\x20] )"

# The first rule alone, for text without special tokens under a known pattern: a match begins at a safe cut.
SAFE_SPACE, SAFE_SPACE_BYTES = re.compile(_SAFE_TEXT), re.compile(_SAFE_BYTES)


_NO_SPACES = r"[\s\S]+"  # a pattern under which only cuts before special tokens are safe


def rules_for(bpe: BPE) -> tuple[Pattern, tuple[str, ...]]:
    """(pattern, special tokens) to hand to the functions here, so that their cuts are safe for encoding with `bpe`."""
    if not bpe.normalized_tokens:
        return bpe.pattern, bpe.special_tokens
    # One that holds a space behind other text may reach over a cut before a space.
    forms = (normalize(name, bpe.normalizer) for name in bpe.normalized_tokens)
    spaces = any(SAFE_SPACE.search(form, 1) for form in forms)
    before = tuple(name for name in bpe.special_tokens if name not in bpe.normalized_tokens)
    return (_NO_SPACES if spaces else bpe.pattern), before


@memo(32)
def _rules(pattern: Pattern, special_tokens: tuple[str, ...]):
    """(forward matcher of candidates in bytes, backward matcher in str, straddlers as bytes, straddlers as str).

    A candidate is a safe cut unless it lies inside a special token. Straddlers are the special tokens in which one can
    lie. Usually there are none, and nothing is left to check.
    """
    spaces = safe_at_spaces(pattern)
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
    """Whether a cut before a space (if `spaces`) or before a special token can fall inside `name`."""
    if spaces and " " in name[1:]:
        return True
    inside = range(1, len(name))
    return any(other.startswith(name[i : i + len(other)]) for other in special_tokens for i in inside)


def _straddled(data, cut: int, specials) -> bool:
    """Whether one of `specials` starts before `cut` and ends after it; data is bytes-like or str."""
    return any(data.find(name, max(0, cut + 1 - len(name)), cut + len(name) - 1) >= 0 for name in specials)


def next_cut(data, start: int, pattern: Pattern, special_tokens: tuple[str, ...] = ()) -> int:
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


def chunks(data, n_bytes: int, pattern: Pattern, special_tokens: tuple[str, ...] = ()) -> Iterator[tuple[int, int]]:
    """(start, end) of consecutive chunks of UTF-8 `data` (bytes or mmap), each at least `n_bytes` but the last.

    Only the neighbourhood of each cut is read, so a mapped file is never loaded for it. A chunk is longer than
    `n_bytes` because it ends at the next safe cut; text without one (see the top of this file) is one chunk.

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


def last_cut(text: str, pattern: Pattern, special_tokens: tuple[str, ...] = ()) -> int:
    """The last position of `text` that is a safe cut *whatever text may follow*; 0 when there is none.

    The end of `text` is not a safe cut, because a word may go on there. Near the end a cut is refused as long as it may
    turn out to lie inside a special token.

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
