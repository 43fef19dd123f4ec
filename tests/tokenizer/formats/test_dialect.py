"""Which patterns mean the same to `regex` and Oniguruma. Oracle: Hugging Face's Split, which runs the latter."""

import random
import unicodedata

import pytest

from purelm.tokenizer.formats.dialect import _PROPERTIES, check_dialect
from purelm.tokenizer.patterns import CL100K_V1, GPT2, O200K, QWEN, compile_pattern
from purelm.tokenizer.splitting import split

tokenizers = pytest.importorskip("tokenizers")

# What DeepSeek's file has between its two other splits.
WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHARACTERS = [*"abcsSfFtTiIkKeE123 \t\n\r\v'-_<.[]{}()^$|&~#/\\", "\u00df", "\ufb00", "\ufb06", "\u0130", "\u00b2"]
CHARACTERS += ["\u0663", "\u00a0", "\u00e9", "\u00c9", "\u017f", "\u212a", "\u4e2d", "\u200d", "\u0301"]
CHARACTERS += ["\x85", "\u2028"]


def theirs(pattern, text):
    return [piece for piece, _ in peer(pattern).pre_tokenize_str(text)]


def peer(pattern):
    return tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


def texts(rng, n, length=14):
    return ["".join(rng.choices(CHARACTERS, k=rng.randint(1, length))) for _ in range(n)]


@pytest.mark.parametrize(
    "pattern",
    [
        GPT2, CL100K_V1, QWEN, O200K, WORDS, r"\p{N}{1,3}", r"\P{L}+", r"[^\n]*\n|[^\n]+", r"\s++$|\S+|\s",
        r"(?>\d{1,3})|.", r"(?<=[a-z])\d|(?<!a)b", "[\u4e00-\u9fa5]+", r"\x41\u00df|\.|\-", r"a{2,}?|b*?c|d??e|f{,2}g",
        r"\A\s+|\S", "[a^$.|-]+",
    ],
)  # fmt: skip
def test_patterns_that_are_taken(pattern):
    """The signs of real files: equal pieces on texts of all that is hard."""
    check_dialect(pattern)
    rng, matcher = random.Random(0), peer(pattern)
    for text in texts(rng, 60):
        assert split(text, pattern) == [piece for piece, _ in matcher.pre_tokenize_str(text)], text


@pytest.mark.parametrize(
    "pattern, text",
    [
        (r"(?=(\d{3})+(?!\d))", "ab 1223331"),
        (r"(?<=[a-z])(?=[0-9])", "a1"),
        (r"a*", "bb"),
        (r"\s+$|\s|\S+", "  ab  \n  ab "),
        (r"[^\n]+$|\S+", "a b\na b"),
        (r"^a", "b\na"),
        (r"\w+", "a\u00b2"),
        (r"\W+", "a\u200d-"),
        (r"\d{1,2}+\d|x", "1234"),
        (r"a{2}?", "bb"),
        (r"(?i:ss)", "a\u00dfa"),
        (r"(?i:st)", "a\ufb06a"),
        (r"(?i:i)x", "\u0130x1"),
        (r"(?i:e)(?i:s)|\P{Lu}+?", "Sf"),
        (r"[ab&&b]+", "a&b"),
        (r"a\Z|b", "ba\n"),
        (r"\h+", "fg"),
    ],
)
def test_patterns_that_differ_are_refused(pattern, text):
    """Each is cut otherwise there, or is no pattern here: so the refusal is needed, and it names the pattern."""
    try:
        differ = split(text, pattern) != theirs(pattern, text)
    except ValueError:
        differ = True
    assert differ
    with pytest.raises(ValueError, match="pattern"):
        check_dialect(pattern)


def test_random_patterns_are_cut_alike_or_refused():
    """Patterns of random signs, valid or not: what is taken, both compile and cut alike."""
    rng = random.Random(0)
    taken = 0
    for _ in range(2500):
        pattern = "".join(rng.choices(SIGNS, k=rng.randint(1, 7))) if rng.random() < 0.5 else random_pattern(rng)
        try:
            check_dialect(pattern)
            compile_pattern(pattern)
        except ValueError:
            continue
        taken += 1
        matcher = peer(pattern)
        for text in texts(rng, 4):
            ours = split(text, f"(?:{pattern})")  # a group, so that no pattern is taken for a name
            assert ours == [piece for piece, _ in matcher.pre_tokenize_str(text)], (pattern, text)
    assert taken > 500


SIGNS = (
    r"a b s S f i 1 \s \S \d \D \p{L} \p{N} \P{L} \p{Lu} . \n \r | | ( (?: (?i: (?= (?! (?<= (?<! (?> ) ) ) ) [ [^ ] ]"
    r" - + * ? ++ *+ ?+ +? {2} {1,2} {1,} {,2} {2,1} $ ^ \A \w \b \x41 \u00df \. \- \' \< ' && { } \v \\ \z \G \K \R \h"
).split()
ATOMS = [*"abs1 .'", r"\s", r"\S", r"\d", r"\p{L}", r"\P{Lu}", r"\n", r"\r", "\u00e9", "(?<=a)", r"(?<!\s)", r"\s++$"]
ATOMS += ["(?i:'s|'t|ll)", "(?i:[sdm])", "(?i:s)", "(?i:k|ve)", "(?i:e)", "[a-f1]", "[^a-f]", r"[^\s\p{L}]"]
ATOMS += [r"[\p{Nd}'|]"]
QUANTIFIERS = ["", "", "", "+", "*", "?", "++", "*+", "+?", "{1,3}", "{2}", "{2,}", "{,2}", "{1,2}?"]


def random_pattern(rng, depth=0):
    parts = []
    for _ in range(rng.randint(1, 3)):
        group = rng.choice(["(", "(?:", "(?>", "(?=", "(?!"])
        atom = rng.choice(ATOMS) if depth > 1 or rng.random() < 0.8 else f"{group}{random_pattern(rng, depth + 1)})"
        parts.append(atom + rng.choice(QUANTIFIERS))
    rest = f"|{random_pattern(rng, depth + 1)}" if depth < 3 and rng.random() < 0.3 else ""
    return "".join(parts) + rest


def test_properties_have_equal_members():
    """Each category and script that is taken, on a sample of the characters below U+3000 and beyond."""
    sample = map(chr, [*range(0, 0x3000, 5), *range(0x3000, 0xD800, 97), *range(0x1F000, 0x1FA00, 11)])
    # Python's Unicode is older than both: what it knows, both know.
    text = "".join(character for character in sample if unicodedata.category(character) != "Cn")
    for name in sorted(_PROPERTIES):
        assert split(text, rf"\p{{{name}}}") == theirs(rf"\p{{{name}}}", text), name


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("a" * 3 + "(", "a group without [)] at character 3"),
        ("(?:" * 60 + "a" + ")" * 60, "nested deeper than 50"),
        ("(?:a{1000}){1000}", "1,000,000 times in all; allowed is 1,000"),
        ("[a", "a class without ]"),
        (r"\p{Emoji}", r"\\p of another property"),
        ("(?<=a+)b", "one fixed length"),
        ("(?<n>a)", r"groups that agree are"),
        ("a)", "closes no group"),
        ("(?:a*)*b", "what is repeated can match no characters"),
        ("a**", r"\* behind a quantifier"),
        ("a{1", "no {n}"),
        (r"a|\xe9", r"allowed are"),
    ],
)
def test_refusals_say_what_and_where(pattern, message):
    """One line that names the sign and its place."""
    with pytest.raises(ValueError, match=message) as caught:
        check_dialect(pattern)
    assert "\n" not in str(caught.value)
