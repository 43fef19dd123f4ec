"""How often each pre-token occurs in a corpus: the first half of BPE training, and nearly all of its time.

Special tokens are cut out first (they separate pieces and are not counted), then the pattern cuts what lies between.
A file is cut by the safe rule (see `cuts`) into blocks that are counted apart. The result is the same for any number of
workers, because addition does not care about order.

Two ways with equal results, see `engine`: `regex` in Python, in several processes where there is much to do; or the
compiled splitter and hash table, in threads (the compiled loops release the interpreter's lock).
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from purelm.tokenizer.blocks import Block, block_texts, file_blocks, file_bytes, look_ahead, text_blocks
from purelm.tokenizer.engine import PAYS_FROM, choose
from purelm.tokenizer.patterns import Pattern, resolve
from purelm.tokenizer.splitting import special_matcher, split
from purelm.workers import check_workers, in_processes


def count_pieces(
    source: str | os.PathLike | Iterable[str],
    pattern: Pattern = "gpt2",
    special_tokens: tuple[str, ...] = (),
    *,
    n_workers: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Counter[bytes]:
    """Pre-token (UTF-8) -> number of occurrences in a text file, or in texts, none of which runs on into the next.

    n_workers: None for as many as there are processors and the input is worth. progress(bytes done, bytes in all or
    None for an iterable). Raises ValueError naming file, byte and line for text that is not UTF-8.

    >>> count_pieces(["low low<|endoftext|>low"], special_tokens=("<|endoftext|>",)) == {b"low": 2, b" low": 1}
    True
    """
    pattern = resolve(pattern)
    if isinstance(special_tokens, str):
        raise ValueError(f"special_tokens is the string {special_tokens!r}; give a sequence of strings")
    special_tokens = tuple(special_tokens)
    workers = check_workers(n_workers)
    if isinstance(source, bytes) or not isinstance(source, str | os.PathLike | Iterable):
        raise ValueError(f"source is {type(source).__name__}; give a path or an iterable of str")
    total: int | None = None
    blocks: Iterator[Block]
    if isinstance(source, str | os.PathLike):
        total = known = file_bytes(source)
        blocks = file_blocks(source, pattern, special_tokens)
    else:
        known, blocks = look_ahead(text_blocks(source), PAYS_FROM["count"])

    def report(done: int) -> None:
        if progress is not None:
            progress(done, total)

    if choose("auto", "count", known, pattern) == "numba":
        from purelm.tokenizer.compiled.counting import count_in_threads

        return count_in_threads(blocks, pattern, special_tokens, workers, report)
    # Of an iterable the size is not known: one process, unless the caller asks for more.
    workers = check_workers(n_workers, total or 0)
    counts: Counter[bytes] = Counter()
    done = 0
    for block, found in in_processes(count_block, (pattern, special_tokens), blocks, workers):
        counts.update(found)
        done += block.end - block.start
        report(done)
    return counts


def count_block(rules: tuple[Pattern, tuple[str, ...]], block: Block) -> Counter[bytes]:
    """The pre-tokens of one block by `regex`; rules: pattern and special tokens."""
    pattern, special_tokens = rules
    specials = special_matcher(frozenset(special_tokens)) if special_tokens else None
    found: Counter[str] = Counter()
    for data in block_texts(block):
        text = data.decode("utf-8")
        for part in [text] if specials is None else specials.split(text):
            found.update(split(part, pattern))
    return Counter({piece.encode("utf-8"): count for piece, count in found.items()})
