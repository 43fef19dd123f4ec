"""How often each piece occurs, in machine code: an open-addressing table that compares pieces, never only hashes.

The key of a slot is the piece itself where that has at most 7 bytes (packed, the length in the top byte), so one
comparison of 64 bits decides. The key of a longer piece is a 63-bit hash (top bit set), and its bytes, which lie in
`arena`, are compared too. A free slot has key 0.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from purelm.tokenizer.blocks import Block, block_texts
from purelm.tokenizer.compiled.classes import class_table
from purelm.tokenizer.compiled.jit import loop
from purelm.tokenizer.compiled.splitting import split_some
from purelm.tokenizer.patterns import Pattern, known_family
from purelm.tokenizer.splitting import special_matcher


@loop(makes_arrays=True)
def _rehashed(size, slots, starts):
    """The same entries in tables of `size` slots (a power of 2)."""
    new_slots, new_starts = np.zeros((size, 2), np.uint64), np.empty(size, np.int64)
    mask = np.uint64(size - 1)
    for old in range(len(slots)):
        key = slots[old, 0]
        if key == 0:
            continue
        mixed = key * np.uint64(0x9E3779B97F4A7C15)
        slot = (mixed ^ (mixed >> np.uint64(32))) & mask
        while new_slots[slot, 0] != 0:
            slot = (slot + np.uint64(1)) & mask
        new_slots[slot, 0], new_slots[slot, 1], new_starts[slot] = key, slots[old, 1], starts[old]
    return new_slots, new_starts


@loop(makes_arrays=True)
def _add(slots, starts, arena, used, data, words, ends, start):
    """Count the pieces data[start:ends[0]], data[ends[0]:ends[1]], ...; returns the arrays, replaced where they grew.

    words: the uint64 (little-endian) that starts at each byte of data. used: int64 (2,) entries and arena bytes in
    use, updated in place. A long piece lies in the arena as 8 bytes of length and its bytes.
    """
    mask = np.uint64(len(slots) - 1)
    for i in range(ends.size):
        end = ends[i]
        length = end - start
        if length <= 7:
            low = (np.uint64(1) << np.uint64(8 * length)) - np.uint64(1)
            key = words[start] & low | np.uint64(length) << np.uint64(56)
        else:
            key = np.uint64(length)
            for j in range(start, end - 7, 8):
                key = (key ^ words[j]) * np.uint64(0xFF51AFD7ED558CCD)  # as MurmurHash3's finaliser
                key ^= key >> np.uint64(32)
            key = (key ^ words[end - 8]) * np.uint64(0xC4CEB9FE1A85EC53)
            key |= np.uint64(1) << np.uint64(63)
        mixed = key * np.uint64(0x9E3779B97F4A7C15)
        slot = (mixed ^ (mixed >> np.uint64(32))) & mask
        while True:
            found = slots[slot, 0]
            if found == key:
                if length <= 7:
                    slots[slot, 1] += np.uint64(1)
                    break
                at = starts[slot]
                stored = np.int64(0)
                for j in range(8):
                    stored |= np.int64(arena[at + j]) << np.int64(8 * j)
                same = stored == length
                j = 0
                while same and j < length:
                    same = arena[at + 8 + j] == data[start + j]
                    j += 1
                if same:
                    slots[slot, 1] += np.uint64(1)
                    break
            elif found == 0:
                slots[slot, 0], slots[slot, 1] = key, 1
                used[0] += 1
                if length > 7:
                    at = used[1]
                    if at + 8 + length > arena.size:
                        bigger = np.empty(2 * arena.size + 8 + length, np.uint8)
                        for j in range(at):  # a slice assignment would have numba compile its error message
                            bigger[j] = arena[j]
                        arena = bigger
                    starts[slot] = at
                    for j in range(8):
                        arena[at + j] = (length >> (8 * j)) & 255
                    for j in range(length):
                        arena[at + 8 + j] = data[start + j]
                    used[1] = at + 8 + length
                if 2 * used[0] > len(slots):
                    slots, starts = _rehashed(2 * len(slots), slots, starts)
                    mask = np.uint64(len(slots) - 1)
                break
            slot = (slot + np.uint64(1)) & mask
        start = end
    return slots, starts, arena


def empty_table() -> tuple:
    """A table without entries, for `add`."""
    size = 1 << 16
    return (
        np.zeros((size, 2), np.uint64),  # key, count: in one cache line
        np.empty(size, np.int64),  # where a long piece lies in the arena
        np.empty(1 << 16, np.uint8),
        np.zeros(2, np.int64),
    )


def padded(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(bytes of text as uint8, the uint64 that starts at each byte; at the end they contain zeros)."""
    buffer = text + bytes(8)
    return np.frombuffer(buffer, np.uint8)[: len(text)], np.ndarray((len(text) + 1,), np.uint64, buffer, strides=(1,))


def add(table: tuple, data: np.ndarray, words: np.ndarray, ends: np.ndarray, start: int = 0) -> tuple:
    """The table after counting the pieces of a text (see `padded`) that begin at `start` and end at `ends` (int64).

    The arrays of the given table are written to: use it no more.
    """
    *arrays, used = table
    return (*_add(*arrays, used, data, words, ends, start), used)


def counter(table: tuple) -> Counter[bytes]:
    """The entries of a table: piece -> how often it was added."""
    slots, starts, arena, _ = table
    keys, counts = slots[:, 0], slots[:, 1]
    out: Counter[bytes] = Counter()
    short = np.flatnonzero((keys != 0) & (keys >> np.uint64(63) == 0))
    raw = keys[short].tobytes()
    ends = (8 * np.arange(len(short)) + (keys[short] >> np.uint64(56)).astype(np.int64)).tolist()
    pieces = [raw[at:end] for at, end in zip(range(0, len(raw), 8), ends, strict=True)]
    out.update(dict(zip(pieces, counts[short].tolist(), strict=True)))
    long = np.flatnonzero(keys >> np.uint64(63))
    raw = arena.tobytes()
    for at, count in zip(starts[long].tolist(), counts[long].tolist(), strict=True):
        out[raw[at + 8 : at + 8 + int.from_bytes(raw[at : at + 8], "little")]] = count
    return out


def count_in_threads(
    blocks: Iterator[Block],
    pattern: Pattern,
    special_tokens: tuple[str, ...],
    workers: int,
    report: Callable[[int], None],
) -> Counter[bytes]:
    """Each thread has a table of its own and takes the next block when it is free; the tables are added at the end."""
    add_block = _block_adder(pattern, special_tokens)
    lock = threading.Lock()
    errors: list[tuple[int, BaseException]] = []
    done = 0

    def work() -> Counter[bytes]:
        nonlocal done
        table = empty_table()
        while True:
            with lock:
                block = None if errors else next(blocks, None)
            if block is None:
                return counter(table)
            try:
                table = add_block(table, block)
                with lock:
                    done += block.end - block.start
                    report(done)
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
        # Blocks are handed out in order, so the first error of the corpus is among these, however the threads ran.
        raise min(errors, key=lambda item: item[0])[1]
    out = tables[0]
    for table in tables[1:]:
        out.update(table)
    for name in special_tokens:  # see _block_adder
        out.pop(name.encode("utf-8"), None)
    return out


def _block_adder(pattern: Pattern, special_tokens: tuple[str, ...]):
    """add_block(table, block) -> table.

    Special tokens are counted as pieces of their own, and taken out of the sum in the end. No other piece is equal to
    one, because the text between special tokens contains none of them.
    """
    matcher = special_matcher(frozenset(special_tokens), True) if special_tokens else None
    known, classes = known_family(pattern), class_table()

    def add_block(table: tuple, block: Block) -> tuple:
        texts = block_texts(block)
        joined = b"".join(texts)
        data, words = padded(joined)
        ends = np.empty(len(joined), np.int64)  # as many as needed at most; pages that are not written cost nothing
        n_ends = start = stop = 0
        for text in texts:
            stop += len(text)
            for match in matcher.finditer(joined, start, stop) if matcher is not None else ():
                n_ends += split_some(data, start, match.start(), classes, *known, ends[n_ends:])
                start = ends[n_ends] = match.end()
                n_ends += 1
            n_ends += split_some(data, start, stop, classes, *known, ends[n_ends:])
            start = stop
        return add(table, data, words, ends[:n_ends])

    return add_block
