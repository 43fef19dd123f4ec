r"""The reference pre-tokenizer: text into pieces by `regex`, or by the standard library where the text is ASCII.

    "".join(split(text, pattern)) == text        for every text and every pattern

A raw `regex.findall` costs about as much as the whole of tiktoken's encode, while `re` with ASCII classes is 2-3 times
faster and cuts the same pieces of ASCII text; so text that is ASCII takes `re` where the pattern is a known one.
"""

import re
from functools import lru_cache

from purelm.tokenizer.patterns import CL100K, CL100K_V1, GPT2, O200K, QWEN, compiled, resolve

# The known patterns on ASCII text. re.ASCII makes \s the six white-space characters that \s of `regex` has there
# (without it `re` adds U+001C..U+001F). Letters first where that cannot change the match: most pieces are words.
_ASCII = {
    GPT2: r" ?[A-Za-z]++|'(?:[sdmt]|ll|ve|re)| ?[0-9]++| ?[^\sA-Za-z0-9]++|\s++$|\s+(?!\S)|\s",
    CL100K: (
        r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\nA-Za-z0-9]?+[A-Za-z]++|[0-9]{1,3}+"
        r"| ?[^\sA-Za-z0-9]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    CL100K_V1: (
        r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\nA-Za-z0-9]?+[A-Za-z]++|[0-9]{1,3}+"
        r"| ?[^\sA-Za-z0-9]++[\r\n]*+|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    QWEN: (
        r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\nA-Za-z0-9]?+[A-Za-z]++|[0-9]"
        r"| ?[^\sA-Za-z0-9]++[\r\n]*+|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    O200K: (
        r"[^\r\nA-Za-z0-9]?(?:[A-Z]*+[a-z]++|[A-Z]++)(?:'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE]))?"
        r"|[0-9]{1,3}+| ?[^\sA-Za-z0-9]++[\r\n/]*+|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
}


@lru_cache(maxsize=64)
def _matchers(pattern: str) -> tuple[re.Pattern | None, object]:
    """(matcher for ASCII text or None, matcher for any text)."""
    ascii_pattern = _ASCII.get(pattern)
    return (None if ascii_pattern is None else re.compile(ascii_pattern, re.ASCII)), compiled(pattern)


def split(text: str, pattern: str) -> list[str]:
    r"""The pieces of `text`: the successive matches of `pattern` (a name or a regex), nothing lost between them.

    Text that a pattern of the user's own leaves unmatched comes back as pieces of its own (as Hugging Face's Split
    with "isolated" does), so joining the pieces always gives the text back. No special tokens here: see
    `purelm.tokenizer.encode`.

    >>> split("Hello, world's end", "gpt2")
    ['Hello', ',', ' world', "'s", ' end']
    """
    pattern = resolve(pattern)
    ascii_matcher, matcher = _matchers(pattern)
    if ascii_matcher is not None and text.isascii():
        return ascii_matcher.findall(text)
    if pattern in _ASCII:
        return matcher.findall(text)  # type: ignore[attr-defined]
    if matcher.groups == 0:  # type: ignore[attr-defined]
        pieces = matcher.findall(text)  # type: ignore[attr-defined]
        if sum(map(len, pieces)) == len(text):
            return pieces if all(pieces) else [piece for piece in pieces if piece]
    return _split_with_gaps(text, matcher)


def _split_with_gaps(text: str, matcher) -> list[str]:
    """Matches and what lies between them, empty ones dropped; also for patterns with groups, where findall differs."""
    pieces, end = [], 0
    for match in matcher.finditer(text):
        start, stop = match.span()
        if start == stop:
            continue
        if start > end:
            pieces.append(text[end:start])
        pieces.append(text[start:stop])
        end = stop
    if end < len(text):
        pieces.append(text[end:])
    return pieces
