"""Text files, or any documents, to token files by several workers, with exactly the ids of the whole text.

The text is cut by the safe rule (see `cuts`), parts are encoded side by side and written in order. With the compiled
engine the workers are threads: it releases the interpreter's lock. Without it they are processes, which are
worth their start only for long inputs. The token file appears under its name when it is whole, see
`purelm.data.tokens`.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from purelm.files import refuse_overwrite
from purelm.tokenizer import tables
from purelm.tokenizer.blocks import Block, block_texts, file_blocks, file_bytes, look_ahead, text_blocks
from purelm.tokenizer.bpe import BPE, vocab_size
from purelm.tokenizer.cuts import can_straddle, rules_for
from purelm.tokenizer.encoding import encode
from purelm.tokenizer.engine import PAYS_FROM, choose
from purelm.workers import check_workers, in_processes, in_threads

if TYPE_CHECKING:
    from purelm.data.tokens import TokenFile

Progress = Callable[[int, int | None], None]


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
    without any safe place for a cut (see `cuts`) is one part, and held whole.

    Args:
        n_workers: None for as many as there are processors and the input is worth; the result does not depend on it.
        between: a special token written between one file and the next (None: nothing, and the files are still encoded
            apart, so that no token spans two of them).
        engine: "auto" (by the size of the input), "python" or "numba", see `purelm.tokenizer.engine.choose`.
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
            yield from file_blocks(path, *rules_for(bpe))

    return _write(bpe, blocks(), out_path, engine, n_workers, total, total, progress)


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
    known, blocks = look_ahead(text_blocks(documents, "document"), PAYS_FROM["encode"])
    return _write(bpe, blocks, out_path, engine, n_workers, known, None, progress, eot)


def _check_special(bpe: BPE, name: str | None, argument: str) -> None:
    if name is not None and name not in bpe.special_tokens:
        raise ValueError(f"{argument} is {name!r}, no special token of this tokenizer: {list(bpe.special_tokens)}")


def _write(
    bpe: BPE, blocks: Iterable[Block | str], out_path: str | os.PathLike, engine: str, n_workers: int | None,
    known: int, total: int | None, progress: Progress | None, after: str | None = None,
) -> "TokenFile":  # fmt: skip
    """Encode the blocks to a token file. known: bytes that decide engine and workers; total: for `progress`."""
    chosen = choose(engine, "encode", known, bpe.pattern)
    workers = check_workers(n_workers, None if chosen == "numba" else known)
    # Here and not above: purelm.data imports torch, which a worker process does not need.
    from purelm.data.tokens import TokenWriter, open_tokens

    task = Task(bpe, chosen, after, after is not None and _may_join(bpe, after))
    if chosen == "numba":
        results = in_threads(lambda block: encode_block(task, block), blocks, workers)
    else:
        results = in_processes(encode_block, task, blocks, workers)
    done = 0
    with TokenWriter(out_path, vocab_size(bpe), tokenizer_sha256=tables.fingerprint(bpe), n_bytes=0) as writer:
        for block, (ids, n_text_bytes) in results:
            writer.append(ids, n_text_bytes)
            done += 0 if isinstance(block, str) else block.end - block.start
            if progress is not None:
                progress(done, total)
    return open_tokens(out_path)


class Task(NamedTuple):
    """What each block is encoded with."""

    bpe: BPE
    engine: str  # "python" or "numba"
    after: str | None  # special token after each document
    join: bool  # whether documents may be joined by it and encoded as one text


def _may_join(bpe: BPE, eot: str) -> bool:
    """Whether `eot` between joined documents is always found: no special token, itself included, can overlap it."""
    if eot in bpe.normalized_tokens:
        return False
    return not any(
        can_straddle(name, (eot,), spaces=False) or (name != eot and name.startswith(eot))
        for name in bpe.special_tokens
    )


def encode_block(task: Task, block: Block | str) -> tuple[np.ndarray, int]:
    """(ids, bytes of text) of a part of a file, of documents with `after` behind each, or of one special token."""
    if isinstance(block, str):
        texts = [block.encode("utf-8")]
    else:
        texts = block_texts(block)
        if block.texts is not None and task.after is not None:
            eot = task.after.encode("utf-8")
            texts = [text for document in texts for text in (document, eot)]
            if task.join:
                texts = [b"".join(texts)]
    parts = [_encode_utf8(task, text) for text in texts]
    ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return ids, sum(map(len, texts)) - _special_bytes(task.bpe, ids)


def _encode_utf8(task: Task, text: bytes) -> np.ndarray:
    """encode(bpe, text.decode()) for valid UTF-8."""
    if task.engine == "python":
        return encode(task.bpe, text.decode("utf-8"), engine="python")
    from purelm.tokenizer.compiled.encoding import encode_numba

    return encode_numba(task.bpe, text, tables.special_set(task.bpe))


def _special_bytes(bpe: BPE, ids: np.ndarray) -> int:
    """UTF-8 bytes of the special tokens among ids."""
    sizes, low, high = tables.once(bpe, "special_bytes", _special_sizes)
    if not len(sizes):
        return 0
    if low > 0:  # special ids mostly lie at one end of the vocabulary: one comparison leaves few ids to look up
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
