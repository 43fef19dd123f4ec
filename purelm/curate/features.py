"""Hashed n-grams of words and characters: the features of `purelm.curate.classifier`.

    features("The cat. The dog.", Features(buckets=1 << 20, word_ngrams=2))     # int64 ids, repeated as they occur

The text is lower-cased. A word is a run of characters that are neither white space nor of Unicode's P, S and C; each
of these is a word of its own. A word's hash is 64-bit FNV-1a over its code points; a run of words g_1 .. g_k hashes to
g = mix(g B + h_k), a bucket is g mod buckets. Nothing depends on Python's hash, the machine or the run.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from purelm.curate.characters import SPACE, SYMBOL, character_table
from purelm.data.checks import check_int
from purelm.tokenizer.engine import has_numba

__all__ = ["Features", "features"]

MASK = (1 << 64) - 1
START, START_OF_CHARACTERS, PRIME, B = 0xCBF29CE484222325, 0x84222325CBF29CE4, 0x100000001B3, 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Features:
    """Which n-grams are looked at, and how many different ones are told apart."""

    buckets: int = 1 << 20  # n-grams of one bucket are one feature
    word_ngrams: int = 2  # runs of 1 to so many words
    least_characters: int = 0  # character n-grams of each word, between < and >, from so many
    most_characters: int = 0  # to so many; 0: none
    most_text: int = 20_000  # characters of a text that are looked at, the first ones

    def __post_init__(self):
        check_int("buckets", self.buckets, 1, 1 << 28)
        check_int("word_ngrams", self.word_ngrams, 1, 5)
        check_int("most_characters", self.most_characters, 0, 8)
        low, high = (1, self.most_characters) if self.most_characters else (0, 0)
        check_int("least_characters", self.least_characters, low, high)
        check_int("most_text", self.most_text, 1, 1 << 24)


def features(text: str, cfg: Features, engine: Literal["auto", "python", "numba"] = "auto") -> np.ndarray:
    """The ids of a text's n-grams, int64 (N,), each within 0 .. buckets - 1; none of a text of white space.

    engine: "numba" (the extra `fast`) is some 50 times as fast, with equal results; "auto" takes it where installed.
    Raises ValueError for another engine, ImportError for "numba" where that is not installed.

    >>> len(features("The cat sat", Features(word_ngrams=2), engine="python"))  # 3 words and 2 pairs
    5
    """
    if engine not in ("auto", "python", "numba"):
        raise ValueError(f'engine={engine!r}; allowed: "auto", "python", "numba"')
    if engine == "numba" and not has_numba():
        raise ImportError("engine='numba' needs numba, which is not installed: pip install 'purelm[fast]'")
    text = text[: cfg.most_text].lower()
    if engine == "python" or not has_numba():
        return np.array(_plain(text, cfg), np.int64)
    from purelm.curate.compiled.features import hash_ngrams

    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    room = cfg.word_ngrams * len(text)  # every character a word; with < and > it then has 3 characters
    room += (cfg.most_characters - cfg.least_characters + 1) * 3 * len(text) if cfg.most_characters else 0
    ids = np.empty(room, np.int64)
    words, codes = np.empty(len(text), np.uint64), np.empty(len(text) + 2, np.int64)
    n = hash_ngrams(
        data, character_table(), words, codes, ids, cfg.buckets, cfg.word_ngrams, cfg.least_characters,
        cfg.most_characters,
    )  # fmt: skip
    return ids[:n].copy()


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def _fnv(codes: list[int], start: int) -> int:
    for code in codes:
        start = ((start ^ code) * PRIME) & MASK
    return start


def _words(text: str) -> list[list[int]]:
    """The words as lists of code points."""
    table = character_table().data
    words: list[list[int]] = []
    inside = False
    for code in map(ord, text):
        bits = table[code]
        if bits & SPACE:
            inside = False
        elif bits & SYMBOL:
            words.append([code])
            inside = False
        elif inside:
            words[-1].append(code)
        else:
            words.append([code])
            inside = True
    return words


def _plain(text: str, cfg: Features) -> list[int]:
    """The definition in plain Python: the fallback, and what the machine code is tested against."""
    words = _words(text)
    ids = []
    if cfg.most_characters:
        for word in words:
            marked = [ord("<"), *word, ord(">")]
            for i in range(len(marked)):
                for width in range(cfg.least_characters, min(cfg.most_characters, len(marked) - i) + 1):
                    h = _fnv(marked[i : i + width], START_OF_CHARACTERS)
                    ids.append(_mix(h ^ width) % cfg.buckets)
    hashes = [_mix(_fnv(word, START)) for word in words]
    for i, g in enumerate(hashes):
        ids.append(g % cfg.buckets)
        for h in hashes[i + 1 : i + cfg.word_ngrams]:
            g = _mix((g * B + h) & MASK)
            ids.append(g % cfg.buckets)
    return ids
