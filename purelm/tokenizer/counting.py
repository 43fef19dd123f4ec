"""How often each pre-token occurs in a corpus: the first half of BPE training, and nearly all of its time.

Special tokens are cut out first (they separate pieces and are not counted), then the pattern cuts what lies between.
A file is mapped and cut by the safe rule into chunks that are counted apart; the result is the same for any number of
workers, because addition does not care about order.

Two ways, with equal results: `regex`, in processes where there is much to do, and numba's splitter and hash table, in
threads (the compiled loops release the interpreter's lock). Compiling or loading the latter takes longer than counting
a small corpus, so inputs under FAST_BYTES never do; nor do patterns without a compiled splitter.
"""

import importlib.util
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from purelm.tokenizer.encode import special_matcher
from purelm.tokenizer.mapped import chunk_spans, decode_chunk, file_bytes, read_span
from purelm.tokenizer.patterns import family, resolve
from purelm.tokenizer.pretokenize import split
from purelm.tokenizer.workers import check_workers, in_processes

# Below this many bytes `regex` (0.07 s a MB) is done before compiled code is loaded (0.7 s; the first time made: 8 s).
FAST_BYTES = 8 << 20
# A process costs its start (0.3 s and more): with n_workers=None, one for every so many bytes.
BYTES_PER_PROCESS = 32 << 20
BLOCK_BYTES = 1 << 20  # what one worker takes at a time; the arrays of a block stay in the second-level cache


class Block(NamedTuple):
    """Some text to count: `texts`, or where None bytes start..end of the file `name`."""

    name: str
    start: int
    end: int
    texts: list[bytes] | None = None


def count_pieces(
    source: str | os.PathLike | Iterable[str],
    pattern: str = "gpt2",
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
    total: int | None
    if isinstance(source, str | os.PathLike):
        total = known = file_bytes(source)
        blocks: Iterator[Block] = file_blocks(source, pattern, special_tokens)
    else:
        total = None
        blocks = text_blocks(source)
        head = list(islice(blocks, FAST_BYTES // BLOCK_BYTES + 1))
        known = sum(block.end - block.start for block in head)
        blocks = chain(head, blocks)
    if known >= FAST_BYTES and has_fast_split(pattern):
        return _count_in_threads(blocks, pattern, special_tokens, workers, total, progress)
    if n_workers is None and total is not None:
        workers = min(workers, 1 + total // BYTES_PER_PROCESS)
    elif n_workers is None:
        workers = 1  # texts of unknown number: processes only when asked for
    return _count_in_processes(blocks, pattern, special_tokens, workers, total, progress)


def has_fast_split(pattern: str) -> bool:
    """Whether numba is installed and has a splitter for this pattern (numba itself is not imported)."""
    return family(pattern) is not None and sys.byteorder == "little" and importlib.util.find_spec("numba") is not None


def file_blocks(path: str | os.PathLike, pattern: str, special_tokens: tuple[str, ...]) -> Iterator[Block]:
    for start, end in chunk_spans(path, BLOCK_BYTES, pattern, special_tokens):
        yield Block(os.fspath(path), start, end)


def text_blocks(texts: Iterable[str], what: str = "text") -> Iterator[Block]:
    """Texts gathered to blocks of about BLOCK_BYTES; what: their name in errors."""
    held: list[bytes] = []
    n_bytes = done = 0
    for number, text in enumerate(texts):
        try:
            held.append(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{what} {number} holds a lone surrogate at character {error.start}, which UTF-8 cannot hold"
            ) from None
        except AttributeError:
            raise ValueError(f"{what} {number} is {type(text).__name__}: an iterable of str is expected") from None
        n_bytes += len(held[-1])
        if n_bytes >= BLOCK_BYTES:
            yield Block("texts", done, done + n_bytes, held)
            done += n_bytes
            held, n_bytes = [], 0
    if held:
        yield Block("texts", done, done + n_bytes, held)


def block_texts(block: Block) -> list[bytes]:
    return [read_span(block.name, block.start, block.end)] if block.texts is None else block.texts


def count_block(rules: tuple[str, tuple[str, ...]], block: Block) -> Counter[bytes]:
    """The pre-tokens of one block by `regex`; rules: pattern and special tokens."""
    pattern, special_tokens = rules
    specials = special_matcher(frozenset(special_tokens)) if special_tokens else None
    found: Counter[str] = Counter()
    for data in block_texts(block):
        text = decode_chunk(data, block.name, block.start)
        for part in [text] if specials is None else specials.split(text):
            found.update(split(part, pattern))
    return Counter({piece.encode("utf-8"): count for piece, count in found.items()})


def _count_in_processes(blocks, pattern, special_tokens, workers, total, progress) -> Counter[bytes]:
    out: Counter[bytes] = Counter()
    done = 0
    for block, found in in_processes(count_block, (pattern, special_tokens), blocks, workers):
        out.update(found)
        done += block.end - block.start
        if progress is not None:
            progress(done, total)
    return out


def _count_in_threads(blocks, pattern, special_tokens, workers, total, progress) -> Counter[bytes]:
    """Each thread has a table of its own and takes the next block when it is free; the tables are added at the end."""
    from purelm.tokenizer import fast_count

    add_block = _block_adder(pattern, special_tokens)
    lock = threading.Lock()
    errors: list[tuple[int, BaseException]] = []
    done = 0

    def work() -> Counter[bytes]:
        nonlocal done
        table = fast_count.empty_table()
        while True:
            with lock:
                block = None if errors else next(blocks, None)
            if block is None:
                return fast_count.counter(table)
            try:
                table = add_block(table, block)
                with lock:
                    done += block.end - block.start
                    if progress is not None:
                        progress(done, total)
            except BaseException as error:
                with lock:
                    errors.append((block.start, error))

    if workers == 1:
        tables = [work()]
    else:
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(work) for _ in range(workers)]
            try:
                tables = [future.result() for future in futures]
            except BaseException as error:  # Ctrl-C: let the threads end after the block in hand
                errors.append((-1, error))
                raise
    if errors:
        # Blocks are handed out in order, so the first error of the corpus is among these whatever the timing was.
        raise min(errors, key=lambda item: item[0])[1]
    out = tables[0]
    for table in tables[1:]:
        out.update(table)
    for name in special_tokens:  # see _block_adder
        out.pop(name.encode("utf-8"), None)
    return out


def _block_adder(pattern: str, special_tokens: tuple[str, ...]):
    """add_block(table, block) -> table, by compiled code.

    A special token is counted as a piece of its own, which is taken out of the sum: what lies between special tokens
    holds none of them whole, so no other piece is equal to one.
    """
    from purelm.tokenizer import fast_count, kernels
    from purelm.tokenizer.classes import class_table

    matcher = special_matcher(frozenset(special_tokens), True) if special_tokens else None
    known, classes = family(pattern), class_table()
    assert known is not None

    def add_block(table: tuple, block: Block) -> tuple:
        texts = block_texts(block)
        if block.texts is None and not texts[0].isascii():
            decode_chunk(texts[0], block.name, block.start)  # is it UTF-8?
        joined = b"".join(texts)
        data, words = fast_count.padded(joined)
        ends = np.empty(len(joined), np.int64)  # no piece is empty; pages that are not written cost nothing
        n_ends = start = stop = 0
        for text in texts:
            stop += len(text)
            for match in matcher.finditer(joined, start, stop) if matcher is not None else ():
                n_ends += kernels.split_some(data, start, match.start(), classes, *known, ends[n_ends:])
                start = ends[n_ends] = match.end()
                n_ends += 1
            n_ends += kernels.split_some(data, start, stop, classes, *known, ends[n_ends:])
            start = stop
        return fast_count.add(table, data, words, ends[:n_ends])

    return add_block
