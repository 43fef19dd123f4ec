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

Source: tiktoken 0.14, openai_public.py; Llama 3 and Qwen 2 tokenizer.json for the variants of CL100K_V1.
"""

import re

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
}

# The patterns that the compiled splitter knows: (family, most digits a piece; 0 is any number).
_FAMILIES = {GPT2: (0, 0), CL100K: (1, 3), CL100K_V1: (2, 3), QWEN: (2, 1), O200K: (3, 3)}

# Other spellings of GPT2 that match the same pieces on every text: the 2019 release, the course handout, and the one
# with its branches in the order that Hugging Face's ByteLevel has.
_SAME_AS_GPT2 = frozenset(
    (
        r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    )
)


def resolve(pattern: str) -> str:
    r"""The regular expression that `pattern` names, or `pattern` itself when it is one; known spellings become one.

    A string that has no regex syntax and is not a known name, such as the typing error "gtp2", is refused.

    >>> resolve("gpt2") == GPT2
    True
    >>> resolve(r"\w+|\W+")
    '\\w+|\\W+'
    """
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


def family(pattern: str) -> tuple[int, int] | None:
    """(number of the matcher in `compiled.splitting.piece_end`, most digits a piece) of a known pattern, else None."""
    return _FAMILIES.get(resolve(pattern))


def known_family(pattern: str) -> tuple[int, int]:
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
