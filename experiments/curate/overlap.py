"""How much of reference texts stands in a token file, by runs of words that both hold."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from purelm.curate.normalise import folded
from purelm.curate.shingles import shingles
from purelm.data.tokens import TokenFile
from purelm.tokenizer import BPE, decode, token_to_id

__all__ = ["pieces", "shared"]

RUN = 13  # words: GPT-3's, Brown et al. 2020, appendix C
LEAST = 8  # words of a document that is looked for
BLOCK = 1 << 20  # tokens that are read at a time
REPEATED = 128  # tokens at the end of a block with which the next one begins, inside of a document: RUN words and more


def pieces(tokens: TokenFile | np.ndarray, bpe: BPE, delimiter: str, block: int = BLOCK) -> Iterator[tuple[str, int]]:
    """(text, tokens read so far) of each document; one of more than `block` tokens comes in parts.

    Parts overlap by `REPEATED` tokens, so that runs across a cut are seen.
    """
    end = token_to_id(bpe, delimiter) if delimiter in bpe.special_tokens else None
    held = np.zeros(0, np.int64)
    for start in range(0, len(tokens), block):
        ids = np.concatenate([held, np.asarray(tokens[start : start + block]).astype(np.int64)])
        cuts = np.flatnonzero(ids == end) if end is not None else np.zeros(0, np.int64)
        first = 0
        for cut in cuts.tolist():
            yield decode(bpe, ids[first:cut]), start
            first = cut + 1
        held = ids[first:]
        if len(held) > block:
            yield decode(bpe, held), start
            held = held[-REPEATED:]
    if len(held):
        yield decode(bpe, held), len(tokens)


def shared(
    references: Mapping[str, list[str]], tokens: TokenFile | np.ndarray, bpe: BPE, delimiter: str,
    tell: Callable[[int], Any] = lambda done: None,
) -> dict[str, float]:  # fmt: skip
    """Of each reference, by name, the share of its distinct runs of 13 words that the token file's text holds.

    A document of fewer words is looked for whole where it has 8. References are lists of documents; ValueError for one
    without any of 8 words. Memory: 9 bytes a word of the references, and a block of tokens.
    """
    wanted, held = {}, {}
    for name, texts in references.items():
        folds = [text for text in map(folded, texts) if text.count(" ") >= LEAST - 1]
        if not folds:
            raise ValueError(f"reference {name}: no document of it has {LEAST} words, so none can be looked for")
        wanted[name] = np.unique(np.concatenate([shingles(x, RUN) for x in folds]))
        held[name] = np.zeros(len(wanted[name]), bool)
    lengths = {RUN}
    for texts in references.values():
        lengths |= {n for x in map(folded, texts) if LEAST <= (n := x.count(" ") + 1) < RUN}
    for text, done in pieces(tokens, bpe, delimiter):
        words = folded(text)
        total = words.count(" ") + 1
        for n in sorted(lengths):
            if total < n or not words:
                continue
            runs = np.unique(shingles(words, n))
            for name, hashes in wanted.items():
                at = np.minimum(np.searchsorted(hashes, runs), len(hashes) - 1)
                held[name][at[hashes[at] == runs]] = True
        tell(done)
    return {name: float(x.mean()) for name, x in held.items()}
