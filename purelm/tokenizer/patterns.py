r"""Pre-tokenizer patterns: the regular expressions that cut text into pieces before merging.

A piece never crosses a match, so the pattern decides which merges can exist at all. The three constants are the
published patterns of OpenAI's encodings in the form that tiktoken runs (possessive where that changes only speed).
All are `regex` syntax (Unicode classes, possessive quantifiers).

- GPT2 (also r50k, p50k): contractions, " ?letters", " ?numbers", " ?other", white space; the last white-space
  character before a word stays with the word's piece.
- CL100K (GPT-4): contractions in any case, one leading non-letter of any kind before letters, numbers in threes,
  punctuation keeps the newlines after it, white space up to its last newline. White space at the very end of the text
  is one piece (`\s++$`); the first published form of this pattern, CL100K_V1, cuts it after its last newline.
- O200K (GPT-4o): as CL100K with words split where a capital follows a small letter, marks counted as letters, the
  contraction kept on its word.
- SMOLLM (StarCoder, SmolLM): each digit a piece of its own, and GPT2 between digits; both steps in one expression.
- DEEPSEEK3: three steps, each of which splits the pieces of the one before.

A pattern is one regular expression, or a tuple of steps: expressions, each applied to every piece of the step before,
and `Removed`, which drops text.

Source: tiktoken 0.14, openai_public.py; Llama 3 and Qwen 2 tokenizer.json for the variants of CL100K_V1, SmolLM and
DeepSeek V3 tokenizer.json.
"""

import re
from typing import NamedTuple

import regex

from purelm.caches import memo

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The first published form of cl100k, with white space at the end of the text cut after its last newline. Llama 3 and
# many others use it as it is, Qwen 2 and 3 with one digit a piece.
CL100K_V1 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = CL100K_V1.replace(r"\p{N}{1,3}", r"\p{N}")

# GPT2 with each number a piece of its own: white space before a number is one piece, as at the end of a text.
SMOLLM = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N})|\s++$|\s+(?!\S)|\s"
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_WORDS = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
DEEPSEEK3 = (r"\p{N}{1,3}", _DEEPSEEK_CJK, _DEEPSEEK_WORDS)


class Removed(NamedTuple):
    """A step that drops text: what `pattern` matches, or with `invert` what it leaves between its matches."""

    pattern: str
    invert: bool = False


Step = str | Removed
Pattern = str | tuple[Step, ...]

NAMES = {
    "gpt2": GPT2,
    "r50k": GPT2,
    "r50k_base": GPT2,
    "cl100k": CL100K,
    "cl100k_base": CL100K,
    "o200k": O200K,
    "o200k_base": O200K,
    "cl100k_v1": CL100K_V1,
    "llama3": CL100K_V1,
    "qwen": QWEN,
    "smollm": SMOLLM,
    "starcoder": SMOLLM,
}

# The patterns that the compiled splitter knows: (family, most digits a piece; 0 is any number).
_FAMILIES = {GPT2: (0, 0), CL100K: (1, 3), CL100K_V1: (2, 3), QWEN: (2, 1), O200K: (3, 3), SMOLLM: (4, 1)}

# Steps for which a cut before a space that follows no white space is safe (see `cuts`). Under one of _CUTTERS such a
# place is always the end of a piece. No match of one of _CLEAR holds a space or depends on what follows a match.
_CUTTERS = frozenset((*_FAMILIES, _DEEPSEEK_WORDS))
_CLEAR = frozenset((r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r"[0-9]", r"[0-9]+", r"[\r\n]", "[\r\n]", _DEEPSEEK_CJK))

# Steps that are one known pattern together.
_COMPOSED = {(r"\p{N}", GPT2): SMOLLM}

# Other spellings of GPT2 that match the same pieces on every text: the 2019 release, the course handout, and the one
# with its branches in the order that Hugging Face's ByteLevel has.
_SAME_AS_GPT2 = frozenset(
    (
        r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    )
)


def resolve(pattern: Pattern) -> Pattern:
    r"""The regular expression that `pattern` names, or `pattern` itself when it is one; known spellings become one.

    A string that has no regex syntax and is not a known name, such as the typing error "gtp2", is refused. Of a tuple
    each step is resolved; one step alone is that step, and steps that are a known pattern together become that.

    >>> resolve("gpt2") == GPT2
    True
    >>> resolve(r"\w+|\W+")
    '\\w+|\\W+'
    """
    if isinstance(pattern, tuple) and not isinstance(pattern, Removed):
        return _resolve_steps(pattern)
    if not isinstance(pattern, str):
        raise ValueError(f"pattern is {pattern!r}: give a regular expression or one of {', '.join(NAMES)}")
    if pattern in NAMES:
        return NAMES[pattern]
    if pattern in _SAME_AS_GPT2:
        return GPT2
    if not pattern or (pattern.replace("_", "").replace("-", "").isalnum() and pattern.isascii()):
        raise ValueError(f"pattern is {pattern!r}: give a regular expression or one of {', '.join(NAMES)}")
    compile_pattern(pattern)
    return pattern


def _resolve_steps(steps: tuple) -> Pattern:
    resolved: list[Step] = []
    for step in steps:
        if isinstance(step, Removed):
            one = resolve(step.pattern)
            if not isinstance(one, str) or not isinstance(step.invert, bool):
                raise ValueError(f"pattern: {step!r} is no Removed(regular expression, bool)")
            # Nothing lies between the matches of a known pattern.
            resolved.append(one if step.invert and one in _FAMILIES else Removed(one, step.invert))
        elif isinstance(step, str):
            one = resolve(step)
            resolved += one if isinstance(one, tuple) else (one,)
        else:
            raise ValueError(f"pattern: the step {step!r:.80} is neither a regular expression nor Removed(...)")
    if not resolved:
        raise ValueError("pattern is an empty tuple: give at least one step")
    found = tuple(resolved)
    if len(found) == 1 and isinstance(found[0], str):
        return found[0]
    return _COMPOSED.get(found, found)  # type: ignore[arg-type]


def family(pattern: Pattern) -> tuple[int, int] | None:
    """(number of the matcher in `compiled.splitting.piece_end`, most digits a piece) of a known pattern, else None."""
    return _FAMILIES.get(resolve(pattern))  # type: ignore[arg-type]


def safe_at_spaces(pattern: Pattern) -> bool:
    """Whether a text may be cut before a space that follows no white space (see `cuts`)."""
    pattern = resolve(pattern)
    if isinstance(pattern, str):
        return pattern in _CUTTERS
    return all(step in _CUTTERS or step in _CLEAR for step in pattern) and any(step in _CUTTERS for step in pattern)


def known_family(pattern: Pattern) -> tuple[int, int]:
    """`family` of a pattern that must be a known one; ValueError for any other."""
    known = family(pattern)
    if known is None:
        raise ValueError(f"pattern {pattern!r} has no compiled splitter: use engine='python'")
    return known


MOST_REPEATS = 10_000
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_COUNTS = re.compile(r"\{(\d*),?(\d*)\}")


@memo(64)
def compile_pattern(pattern: str) -> regex.Pattern:
    """`pattern` compiled by `regex`; a ValueError says where its syntax is wrong."""
    if LONE_SURROGATE.search(pattern):
        raise ValueError(f"pattern {pattern!r} holds a lone surrogate, which UTF-8 cannot hold")
    # `regex` unrolls a counted repetition: a billion times is gigabytes, before anything is matched.
    for counts in _COUNTS.findall(pattern):
        if any(len(count) > 9 or int(count or 0) > MOST_REPEATS for count in counts):
            raise ValueError(f"pattern {pattern!r} repeats more than {MOST_REPEATS:,} times")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"pattern {pattern!r:.200} is not a regular expression: {error}") from None
