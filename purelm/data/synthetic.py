"""The synthetic source: short children's stories from a grammar, of known entropy. The default corpus.

The best possible predictor loses `entropy().nats_per_document` on an average document, its end included (no story is
the beginning of another, so the end is certain). So the lowest bits per byte that a model can reach are known:
`entropy().bits_per_byte` on average over the source, `floor_bits_per_byte(documents)` on given documents. The grammar
is in stories.py, the theory in grammar.py, and the checks of the grammar in grammar_build.py.
"""

import math
from collections.abc import Iterable, Iterator

from purelm import random
from purelm.caches import memo
from purelm.data import grammar as grammars
from purelm.data import stories
from purelm.data.checks import check_int
from purelm.data.grammar import Choice, Entropy, Grammar
from purelm.data.grammar_build import build
from purelm.random import Key

__all__ = ["entropy", "floor_bits_per_byte", "log_prob", "parse", "sample", "story_grammar"]

BLOCK = 256  # documents whose random bits are drawn together; part of the definition of document i


@memo(1)
def story_grammar() -> Grammar:
    """The checked grammar of stories.py; checking takes 0.2 s, once in a process."""
    return build(stories.VARIABLES, stories.PICKS, stories.START)


def sample(
    key: Key | int, n: int | None = None, *, start: int = 0, grammar: Grammar | None = None
) -> Iterator[str]:
    """Documents start, start + 1, ..., start + n - 1 of the endless corpus of `key`; without end where n is None.

    Document i is a function of (key, i) alone. An int as key means `random.key` of it.

    >>> next(sample(0)).count("\\n")
    2
    """
    check_int("start", start, 0)
    if n is not None:
        check_int("n", n, 0)
    return _sample(random.key(key) if isinstance(key, int) else key.cpu(), n, start, grammar or story_grammar())


def _sample(key: Key, n: int | None, start: int, grammar: Grammar) -> Iterator[str]:
    stop = math.inf if n is None else start + n
    block, skip = divmod(start, BLOCK)
    while block * BLOCK < stop:
        draws = random.bits(random.fold_in(key, block), (BLOCK, grammar.max_choices)).tolist()
        end = BLOCK if stop == math.inf else min(BLOCK, int(stop) - block * BLOCK)
        for row in draws[skip:end]:
            yield grammars.render(grammar, row)
        block, skip = block + 1, 0


def parse(text: str, grammar: Grammar | None = None) -> list[Choice]:
    """The choices that make `text`; ValueError names the place from which on it does not follow the grammar."""
    return grammars.parse(grammar or story_grammar(), text)


def log_prob(text: str, grammar: Grammar | None = None) -> float:
    """Exact log-probability of a document, in nats; ValueError where it is not of the grammar."""
    return math.fsum(choice.log_prob for choice in parse(text, grammar))


def entropy(grammar: Grammar | None = None) -> Entropy:
    """Expected nats and bytes of a document in closed form, and their ratio, the floor in bits per byte."""
    return grammars.entropy(grammar or story_grammar())


def floor_bits_per_byte(documents: Iterable[str], grammar: Grammar | None = None) -> float:
    """Bits per byte of the source itself on these documents: -sum of log2 p / sum of their bytes.

    The floor for a finite held-out set. (The source's expectation differs from it by sampling noise.)
    """
    bits, n_bytes = 0.0, 0
    for text in documents:
        bits -= log_prob(text, grammar) / math.log(2)
        n_bytes += len(text.encode())
    if not n_bytes:
        raise ValueError("documents: empty")
    return bits / n_bytes
