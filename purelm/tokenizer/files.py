"""Text files, or any documents, to token files by several workers, with exactly the ids of the whole text.

The text is cut by the safe rule (see `chunks`), parts are encoded side by side and written in order. With the compiled
engine the workers are threads: it releases the interpreter's lock. Without it they are processes, which pay only for
long inputs. The token file appears under its name when it is whole, see `purelm.data.tokens`.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from purelm.files import refuse_overwrite
from purelm.tokenizer import tables
from purelm.tokenizer.bpe import BPE, vocab_size
from purelm.tokenizer.chunks import can_straddle
from purelm.tokenizer.counting import BYTES_PER_PROCESS, Block, has_fast_split, text_blocks
from purelm.tokenizer.encode import encode, special_matcher
from purelm.tokenizer.mapped import chunk_spans, decode_chunk, file_bytes, read_span
from purelm.tokenizer.workers import check_workers, in_processes, in_threads

if TYPE_CHECKING:
    from purelm.data.tokens import TokenFile

Progress = Callable[[int, int | None], None]

# Bytes from which loading the compiled engine (0.7 s) pays; as in `encode`.
FAST_BYTES = 8_000_000
CHUNK_BYTES = 1 << 20  # what one worker takes at a time


def encode_file(
    bpe: BPE,
    in_path: str | os.PathLike | Sequence[str | os.PathLike],
    out_path: str | os.PathLike,
    *,
    n_workers: int | None = None,
    between: str | None = None,
    engine: str = "auto",
    progress: Progress | None = None,
) -> "TokenFile":
    """Encode a UTF-8 text file, or several one after the other, to the token file `out_path` (NAME.bin, NAME.json).

    The ids are those of encode(bpe, whole text), special tokens included. Memory is a few MB a worker; only a text
    without any safe place for a cut (see `chunks`) is one part, and held whole.

    Args:
        n_workers: None for as many as there are processors and the input is worth; the result does not depend on it.
        between: a special token written between one file and the next (None: nothing, and the files are still encoded
            apart, so that no token spans two of them).
        engine: "auto", "python" or "numba", as in `encode`.
        progress: called as progress(bytes done, bytes in all).

    Returns the opened token file. Its n_bytes counts the text without special tokens, for bits per byte. Raises
    ValueError that names file, byte and line for text that is not UTF-8; then, as after a kill, what was there before
    under `out_path` is untouched.
    """
    paths = [in_path] if isinstance(in_path, str | os.PathLike) else list(in_path)
    refuse_overwrite([out_path, Path(out_path).with_suffix(".json")], paths)
    total = sum(file_bytes(path) for path in paths)
    _check_special(bpe, between, "between")

    def blocks() -> Iterator[Block | str]:
        for number, path in enumerate(paths):
            if number and between is not None:
                yield between
            for start, end in chunk_spans(path, CHUNK_BYTES, bpe.pattern, bpe.special_tokens):
                yield Block(os.fspath(path), start, end)

    fast, workers = _plan(bpe, engine, n_workers, total)
    return _write(bpe, blocks(), out_path, fast, workers, total, progress)


def encode_documents(
    bpe: BPE,
    documents: Iterable[str],
    out_path: str | os.PathLike,
    *,
    eot: str | None = "<|endoftext|>",
    n_workers: int | None = None,
    engine: str = "auto",
    progress: Progress | None = None,
) -> "TokenFile":
    """Encode documents, each followed by the special token `eot` (None: by nothing), to the token file `out_path`.

    The ids are those of encode(bpe, document) and the id of eot, one document after the other: no token spans two of
    them. Special tokens inside a document become their ids too. `documents` is read as it is encoded, a few MB ahead.
    Otherwise as `encode_file`; progress gets None for the bytes in all. An error names the document by its number.
    """
    if isinstance(documents, str | bytes) or not isinstance(documents, Iterable):
        raise ValueError(f"documents is one {type(documents).__name__}: give an iterable of str")
    _check_special(bpe, eot, "eot")
    head: list[Block] = []
    blocks = text_blocks(documents, "document")
    while (known := sum(block.end - block.start for block in head)) < FAST_BYTES:
        block = next(blocks, None)
        if block is None:
            break
        head.append(block)

    def all_blocks() -> Iterator[Block]:
        yield from head
        head.clear()
        yield from blocks

    fast, workers = _plan(bpe, engine, n_workers, known)
    return _write(bpe, all_blocks(), out_path, fast, workers, None, progress, eot)


def _check_special(bpe: BPE, name: str | None, argument: str) -> None:
    if name is not None and name not in bpe.special_tokens:
        raise ValueError(f"{argument} is {name!r}, no special token of this tokenizer: {list(bpe.special_tokens)}")


def _plan(bpe: BPE, engine: str, n_workers: int | None, n_bytes: int) -> tuple[bool, int]:
    """(whether the compiled engine, number of workers)."""
    if engine not in ("auto", "python", "numba"):
        raise ValueError(f'engine is {engine!r}; allowed: "auto", "python", "numba"')
    workers = check_workers(n_workers)
    if engine == "auto":
        # Where the compiled code is in the process already, it is for every input.
        loaded = "purelm.tokenizer.kernels" in sys.modules
        fast = has_fast_split(bpe.pattern) and (loaded or n_bytes >= FAST_BYTES)
    else:
        fast = engine == "numba"
    if n_workers is None and not fast:
        workers = min(workers, 1 + n_bytes // BYTES_PER_PROCESS)
    return fast, workers


def _write(
    bpe: BPE,
    blocks: Iterable[Block | str],
    out_path: str | os.PathLike,
    fast: bool,
    workers: int,
    total: int | None,
    progress: Progress | None,
    after: str | None = None,
) -> "TokenFile":
    # Here and not above: purelm.data imports torch, which a worker process does not need.
    from purelm.data.tokens import TokenWriter, open_tokens
    from purelm.tokenizer.formats import fingerprint

    shared = _Task(bpe, fast, after, after is not None and _may_join(bpe.special_tokens, after))
    if fast:
        results = in_threads(lambda block: encode_block(shared, block), blocks, workers)
    else:
        results = in_processes(encode_block, shared, blocks, workers)
    done = 0
    with TokenWriter(out_path, vocab_size(bpe), tokenizer_sha256=fingerprint(bpe), n_bytes=0) as writer:
        for block, (ids, n_text_bytes) in results:
            writer.append(ids, n_text_bytes)
            done += 0 if isinstance(block, str) else block.end - block.start
            if progress is not None:
                progress(done, total)
    return open_tokens(out_path)


class _Task(NamedTuple):
    bpe: BPE
    fast: bool
    after: str | None  # special token after each document
    join: bool  # documents may be joined by it and encoded as one text


def _may_join(special_tokens: Sequence[str], eot: str) -> bool:
    """Whether eot is always found between joined documents: no special overlaps it, itself included, or goes beyond."""
    return not any(
        can_straddle(name, (eot,), spaces=False) or (name != eot and name.startswith(eot)) for name in special_tokens
    )


def encode_block(task: _Task, block: Block | str) -> tuple[np.ndarray, int]:
    """(ids, bytes of text) of a part of a file, of documents with `after` behind each, or of one special token."""
    if isinstance(block, str):
        texts = [block.encode("utf-8")]
    elif block.texts is None:
        texts = [read_span(block.name, block.start, block.end)]
        if not texts[0].isascii():
            decode_chunk(texts[0], block.name, block.start)  # is it UTF-8?
    elif task.after is None:
        texts = block.texts
    else:
        eot = task.after.encode("utf-8")
        texts = [text for document in block.texts for text in (document, eot)]
        if task.join:
            texts = [b"".join(texts)]
    parts = [_encode_utf8(task, text) for text in texts]
    ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return ids, sum(map(len, texts)) - _special_bytes(task.bpe, ids)


def _encode_utf8(task: _Task, text: bytes) -> np.ndarray:
    """encode(bpe, text.decode()) for valid UTF-8."""
    if not task.fast:
        return encode(task.bpe, text.decode("utf-8"), engine="python")
    from purelm.tokenizer.fast_encode import encode_numba

    names = {name.encode("utf-8"): token_id for name, token_id in tables.special_ids(task.bpe).items()}
    matcher = special_matcher(frozenset(task.bpe.special_tokens), True) if names else None
    return encode_numba(task.bpe, text, names, matcher)


def _special_bytes(bpe: BPE, ids: np.ndarray) -> int:
    """UTF-8 bytes of the special tokens among ids."""
    sizes, low, high = tables.once(bpe, "special_bytes", _special_sizes)
    if not len(sizes):
        return 0
    if low > 0:  # specials are mostly at one end of the vocabulary: one comparison leaves few ids to look at
        ids = ids[ids >= low]
    if high < len(sizes) - 1:
        ids = ids[ids <= high]
    return int(sizes[ids].sum())


def _special_sizes(bpe: BPE) -> tuple[np.ndarray, int, int]:
    """(int64 (vocab_size,) bytes of each special token's id, 0 for others; lowest, highest of these ids)."""
    special = sorted(tables.special_ids(bpe).values())
    if not special:
        return np.zeros(0, np.int64), 0, 0
    sizes = np.zeros(vocab_size(bpe), np.int64)
    sizes[special] = [len(bpe.vocab[token_id]) for token_id in special]
    return sizes, special[0], special[-1]
