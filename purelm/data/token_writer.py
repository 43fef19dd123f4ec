"""Streaming, atomic writer of token files; the order of its renames is explained in token_format.py."""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from purelm.data.checks import check_int
from purelm.data.token_format import (
    DTYPES,
    identity_of,
    outside_message,
    sample_sha256,
    shard_files,
    uncommitted,
)
from purelm.files import hold, remove_leftovers, sync

__all__ = ["TokenWriter"]

BUFFER_BYTES = 1 << 20  # gathered before writing, since appends are often short documents


class TokenWriter:
    """Streaming writer of a token file, used as a context manager: the pair appears whole on leaving, or not at all.

    Args:
        path: `NAME.bin`. With shard_tokens the files are `NAME-00000.bin`, ...
        vocab_size: ids must be below it; uint16 is chosen where it fits (up to 65,536), else uint32.
        tokenizer_sha256: fingerprint of the tokenizer that made the ids.
        dtype: "uint16" or "uint32" to override the choice.
        n_bytes: bytes of the source text, if known beforehand; `append(ids, n_bytes)` adds to it.
        shard_tokens: tokens per shard; None writes one file.

    Example:
        >>> import tempfile
        >>> from purelm.data import open_tokens
        >>> folder = tempfile.mkdtemp()
        >>> with TokenWriter(f"{folder}/train.bin", vocab_size=300) as writer:
        ...     writer.append([1, 2, 299])
        >>> open_tokens(f"{folder}/train.bin").tokens.tolist()
        [1, 2, 299]
    """

    def __init__(
        self,
        path: str | os.PathLike,
        vocab_size: int,
        *,
        tokenizer_sha256: str | None = None,
        dtype: str | None = None,
        n_bytes: int | None = None,
        shard_tokens: int | None = None,
    ):
        self.path = Path(path)
        if self.path.suffix != ".bin":
            raise ValueError(f"path={str(path)!r}: a token file is named NAME.bin")
        vocab_size = check_int("vocab_size", vocab_size, 1, 2**32)
        if tokenizer_sha256 is not None and not isinstance(tokenizer_sha256, str):
            raise ValueError(f"tokenizer_sha256={tokenizer_sha256!r}: give a str or None")
        n_bytes = None if n_bytes is None else check_int("n_bytes", n_bytes, 0)
        dtype = dtype or ("uint16" if vocab_size <= 2**16 else "uint32")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
        if vocab_size > 2 ** (8 * DTYPES[dtype].itemsize):
            raise ValueError(f"dtype={dtype!r} cannot hold the ids of vocab_size={vocab_size}")
        shard_tokens = None if shard_tokens is None else check_int("shard_tokens", shard_tokens, 1)
        self.vocab_size, self.dtype, self.tokenizer_sha256 = vocab_size, dtype, tokenizer_sha256
        self.n_bytes, self.n_tokens, self.shard_tokens = n_bytes, 0, shard_tokens
        self._id = secrets.token_hex(8)
        self._file: IO[bytes] | None = None
        self._held: int | None = None  # descriptor of a lock, which tells other writers that this one is alive
        self._digest = hashlib.sha256()
        self._counts: list[int] = []  # tokens of each shard
        self._sums: list[str] = []  # sha256 of each shard that is whole

    def __enter__(self) -> "TokenWriter":
        if self._counts:
            raise ValueError(f"{self.path}: this writer was used; make a new one")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        self._next_shard()
        return self

    def __reduce__(self):
        raise TypeError("a TokenWriter cannot be copied or pickled: two would write one file")

    def _remove_leftovers(self) -> None:
        """Remove what killed writers of this path left, except files that a sidecar refers to."""
        stem = re.escape(self.path.stem)
        name = re.compile(rf"{stem}(-\d{{5,}})?\.(bin|json)\.(?P<id>[0-9a-f]{{16}})")
        remove_leftovers(self.path.parent, name, map(identity_of, [self.path, *shard_files(self.path)]))

    def append(self, ids: np.ndarray | Iterable[int], n_bytes: int | None = None) -> None:
        """Add ids (any integer array, or an iterable of int) and, if given, n_bytes of source text."""
        if self._file is None:
            raise ValueError(f"{self.path}: append outside of the writer's with-block")
        if isinstance(ids, str | bytes) or not (hasattr(ids, "__array__") or isinstance(ids, Iterable)):
            raise ValueError(f"ids for {self.path} are {type(ids).__name__}: allowed are integers")
        array = np.asarray(ids if hasattr(ids, "__array__") else list(ids)).reshape(-1)
        if array.size and array.dtype.kind not in "iu":
            raise ValueError(f"ids for {self.path} have dtype {array.dtype}: allowed are integers")
        if array.size and (int(array.max()) >= self.vocab_size or int(array.min()) < 0):
            bad = int(np.argmax((array >= self.vocab_size) | (array < 0)))
            raise ValueError(outside_message(str(self.path), self.n_tokens + bad, int(array[bad]), self.vocab_size))
        if n_bytes is not None:
            self.n_bytes = (self.n_bytes or 0) + check_int("n_bytes", n_bytes, 0)
        array = array.astype(DTYPES[self.dtype], copy=False)
        while array.size:
            room = array.size if self.shard_tokens is None else self.shard_tokens - self._counts[-1]
            if not room:
                self._next_shard()
                continue
            data = np.ascontiguousarray(array[:room]).data
            self._file.write(data)
            self._digest.update(data)
            self._counts[-1] += min(room, array.size)
            self.n_tokens += min(room, array.size)
            array = array[room:]

    def __exit__(self, kind, value, traceback) -> None:
        try:
            try:
                self._close()
            except OSError:  # a full disk shows here
                self._discard()
                raise
            if kind is None:
                self._publish()
            else:
                self._discard()
        finally:
            if self._held is not None:
                os.close(self._held)
                self._held = None

    def _discard(self) -> None:
        for shard in range(len(self._counts)):
            self._temporary(shard).unlink(missing_ok=True)

    def _target(self, shard: int) -> Path:
        if self.shard_tokens is None:
            return self.path
        return self.path.with_name(f"{self.path.stem}-{shard:05d}.bin")

    def _temporary(self, shard: int) -> Path:
        return uncommitted(self._target(shard), self._id)

    def _next_shard(self) -> None:
        self._close()
        self._counts.append(0)
        self._digest = hashlib.sha256()
        self._file = open(self._temporary(len(self._counts) - 1), "wb", buffering=BUFFER_BYTES)
        if self._held is None:  # the first shard's: the others have its id
            self._held = os.dup(self._file.fileno())
            hold(self._held)

    def _close(self) -> None:
        if self._file is not None:
            with self._file as file:
                self._file = None
                file.flush()
                os.fsync(file.fileno())
            self._sums.append(self._digest.hexdigest())

    def _publish(self) -> None:
        for shard, count in enumerate(self._counts):
            target = self._target(shard)
            sidecar: dict[str, Any] = {
                "dtype": self.dtype,
                "n_tokens": count,
                "vocab_size": self.vocab_size,
                "tokenizer_sha256": self.tokenizer_sha256,
                "n_bytes": self.n_bytes,
                "id": self._id,
                "sha256": self._sums[shard],
                "sample_sha256": sample_sha256(self._temporary(shard)),
            }
            if self.shard_tokens is not None:
                sidecar |= {"shard": shard, "n_shards": len(self._counts)}
            previous = identity_of(target)
            temporary = target.with_name(f"{target.stem}.json.{self._id}")
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(sidecar, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target.with_suffix(".json"))  # the commit
            sync(target.parent)  # the two renames must reach the disk in this order
            os.replace(self._temporary(shard), target)
            if previous:  # a writer killed between its two renames left this behind
                uncommitted(target, previous).unlink(missing_ok=True)
        # What was written under this path before in another cut would be opened instead, or mixed in.
        written = {self._target(shard) for shard in range(len(self._counts))}
        for old in [self.path, *shard_files(self.path)]:
            if old not in written and identity_of(old):
                old.unlink(missing_ok=True)
                old.with_suffix(".json").unlink()
        sync(self.path.parent)
