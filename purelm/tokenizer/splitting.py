r"""The reference pre-tokenizer: text into pieces by `regex`, or by the standard library's `re` where the text is ASCII.

    "".join(split(text, pattern)) == text        for every text and every pattern without a `Removed` step

`re` with ASCII classes cuts ASCII text into the same pieces, 2-3 times as fast as `regex`, which for its part takes as
long as the whole of tiktoken's encode. Each known pattern is written out for `re` below.
"""

import re

from purelm.caches import memo
from purelm.tokenizer.patterns import (
    CL100K,
    CL100K_V1,
    GPT2,
    O200K,
    QWEN,
    SMOLLM,
    Pattern,
    Removed,
    compile_pattern,
    resolve,
)

# CPU time that a pattern which repeats groups may take: a hundred times what one without nested repetitions needs.
PATIENCE_SECONDS, SECONDS_PER_CHARACTER = 10.0, 2e-5

# The known patterns on ASCII text. re.ASCII makes \s the six white-space characters that \s of `regex` has there
# (without it `re` adds U+001C..U+001F). Letters first where that cannot change the match: most pieces are words.
_CONTRACTION = r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])"
_CL100K = _CONTRACTION + r"|[^\r\nA-Za-z0-9]?+[A-Za-z]++|[0-9]{1,3}+| ?[^\sA-Za-z0-9]++[\r\n]*+"
_WHITE_SPACE = r"|\s*[\r\n]|\s+(?!\S)|\s+"
_ASCII = {
    GPT2: r" ?[A-Za-z]++|'(?:[sdmt]|ll|ve|re)| ?[0-9]++| ?[^\sA-Za-z0-9]++|\s++$|\s+(?!\S)|\s",
    CL100K: _CL100K + r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    CL100K_V1: _CL100K + _WHITE_SPACE,
    QWEN: _CL100K.replace("{1,3}+", "") + _WHITE_SPACE,
    SMOLLM: r" ?[A-Za-z]++|'(?:[sdmt]|ll|ve|re)|[0-9]| ?[^\sA-Za-z0-9]++|\s++(?=[0-9])|\s++$|\s+(?!\S)|\s",
    O200K: rf"[^\r\nA-Za-z0-9]?(?:[A-Z]*+[a-z]++|[A-Z]++)(?:{_CONTRACTION})?"
    + r"|[0-9]{1,3}+| ?[^\sA-Za-z0-9]++[\r\n/]*+"
    + _WHITE_SPACE,
}


@memo(64)
def _matchers(pattern: str) -> tuple[re.Pattern | None, object, bool]:
    """(matcher for ASCII text or None, matcher for any text, whether the second may take exponential time)."""
    ascii_pattern = _ASCII.get(pattern)
    matcher = compile_pattern(pattern)
    return (None if ascii_pattern is None else re.compile(ascii_pattern, re.ASCII)), matcher, _is_wild(pattern)


_ATOM = re.compile(r"\\[pP]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_REPETITION = re.compile(r"\)?(?:[*+]|\{\d*,?\d*\})[+?]?|\||(?<!\()\?")
_MOST_OPTIONS = 8  # 2^8 ways


def _is_wild(pattern: str) -> bool:
    """Whether a text can match in very many ways: a group is repeated, or many repetitions follow one another.

    Otherwise a piece of n characters is matched in n^2 steps at most.
    """
    repetitions = options = 0  # in a row
    for found in _REPETITION.findall(_ATOM.sub("x", pattern)):
        if found == "|":
            repetitions = options = 0
        elif found == "?":
            options += 1
        else:
            repetitions += 1
        if found.startswith(")") or repetitions > 2 or options > _MOST_OPTIONS:
            return True
    return False


def split(text: str, pattern: Pattern) -> list[str]:
    r"""The pieces of `text`: the successive matches of `pattern` (a name or a regex), nothing lost between them.

    Text that a pattern of the user's own leaves unmatched comes back as pieces of its own (as Hugging Face's Split
    with "isolated" does), so joining the pieces always gives the text back. Of a tuple of steps each splits the pieces
    of the one before; only a `Removed` step loses text. Special tokens are ordinary text here.

    >>> split("Hello, world's end", "gpt2")
    ['Hello', ',', ' world', "'s", ' end']
    """
    pattern = resolve(pattern)
    if not isinstance(pattern, str):
        pieces = [text] if text else []
        for step in pattern:
            pieces = [part for piece in pieces for part in _split_step(piece, step)]
        return pieces
    return _split_by(text, pattern)


def _split_step(text: str, step: str | Removed) -> list[str]:
    if isinstance(step, str):
        return _split_by(text, step)
    parts = _spans(text, step.pattern)
    return [text[start:end] for start, end, matched in parts if matched == step.invert]


def _split_by(text: str, pattern: str) -> list[str]:
    ascii_matcher, matcher, wild = _matchers(pattern)
    if ascii_matcher is not None and text.isascii():
        return ascii_matcher.findall(text)
    if pattern in _ASCII:
        return matcher.findall(text)  # type: ignore[attr-defined]
    seconds = _seconds(text, wild)
    try:
        if matcher.groups == 0:  # type: ignore[attr-defined]
            pieces = matcher.findall(text, timeout=seconds)  # type: ignore[attr-defined]
            if sum(map(len, pieces)) == len(text):
                return pieces if all(pieces) else [piece for piece in pieces if piece]
    except TimeoutError:
        raise _out_of_time(text, pattern, seconds) from None
    return [text[start:end] for start, end, _ in _spans(text, pattern)]


def _seconds(text: str, wild: bool) -> float | None:
    """The time limit of matching, or None: `regex` is some 4 times slower with one, so only wild patterns have it."""
    return PATIENCE_SECONDS + len(text) * SECONDS_PER_CHARACTER if wild else None


def _out_of_time(text: str, pattern: str, seconds: float | None) -> ValueError:
    return ValueError(
        f"pattern {pattern!r}: no result after {seconds:.0f} s on {len(text):,} characters; it tries exponentially "
        "many ways to match (as (a+)+b does): write it without a repetition inside of a repetition"
    )


def _spans(text: str, pattern: str) -> list[tuple[int, int, bool]]:
    """(start, end, whether matched) of the matches and of what lies between them, empty ones dropped.

    Also for patterns with groups, where findall differs.
    """
    _, matcher, wild = _matchers(pattern)
    seconds = _seconds(text, wild)
    parts, end = [], 0
    try:
        for match in matcher.finditer(text, timeout=seconds):  # type: ignore[attr-defined]
            start, stop = match.span()
            if start == stop:
                continue
            if start > end:
                parts.append((end, start, False))
            parts.append((start, stop, True))
            end = stop
    except TimeoutError:
        raise _out_of_time(text, pattern, seconds) from None
    if end < len(text):
        parts.append((end, len(text), False))
    return parts


@memo(64)
def special_matcher(names: frozenset[str], of_bytes: bool = False) -> re.Pattern:
    """Matches one of `names`, in str or UTF-8, the longest that starts at a position (the first alternative wins)."""
    ordered = sorted(names, key=lambda name: (-len(name), name))
    pattern = "|".join(map(re.escape, ordered))
    return re.compile(pattern.encode() if of_bytes else pattern)
