"""Opening and checking token files (their format: token_format.py, writing: token_writer.py)."""

import glob
import operator
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from purelm.data.checks import check_int
from purelm.data.token_format import (
    DTYPES,
    check_sidecar,
    check_sums,
    missing_sidecar,
    outside_message,
    read_sidecar,
    shard_files,
    uncommitted,
)
from purelm.data.token_writer import TokenWriter

__all__ = ["ShardedTokens", "TokenFile", "TokenWriter", "check_ids", "check_tokenizer", "open_tokens"]

SCAN_TOKENS = 1 << 22  # read at a time by check_ids: 8-16 MiB
_SHARD = re.compile(r"(.*?)[-_]?\d+$")


class ShardedTokens:
    """Several arrays seen as one sequence: `len`, an int index or a slice (copied only where it spans shards)."""

    def __init__(self, shards: Iterable[np.ndarray]):
        self.shards = tuple(shards)
        if not self.shards or len({shard.dtype for shard in self.shards}) > 1:
            raise ValueError(f"shards have dtypes {[str(shard.dtype) for shard in self.shards]}; they must have one")
        self.dtype = self.shards[0].dtype
        self._ends = np.cumsum([len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index):
        if not isinstance(index, slice):
            i = operator.index(index) + (len(self) if index < 0 else 0)
            if not 0 <= i < len(self):
                raise IndexError(f"index {index} is outside a sequence of {len(self)} tokens")
            shard = int(np.searchsorted(self._ends, i, side="right"))
            return self.shards[shard][i - (int(self._ends[shard]) - len(self.shards[shard]))]
        start, stop, stride = index.indices(len(self))
        if stride != 1:
            raise ValueError(f"tokens[{index}]: only slices of stride 1 are supported")
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = int(self._ends[shard]) - len(self.shards[shard])
            parts.append(self.shards[shard][start - begin : stop - begin])
            start, shard = int(self._ends[shard]), shard + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros(0, self.dtype)


@dataclass(frozen=True, eq=False)
class TokenFile:
    """An opened token file. It has a length and slices, so it can be used in place of its `tokens`."""

    path: str  # as given to open_tokens, for messages
    tokens: np.ndarray | ShardedTokens  # np.memmap of one file, or the view over shards
    dtype: str  # "uint16" | "uint32"
    n_tokens: int
    vocab_size: int | None  # None: a bare .bin
    tokenizer_sha256: str | None
    n_bytes: int | None  # of the source text in UTF-8, document delimiters as the writer counted them
    identity: tuple[str | None, ...] | None = None  # each file's id (token_format.py); None: not from open_tokens

    def __len__(self) -> int:
        return self.n_tokens

    def __getitem__(self, index):
        return self.tokens[index]

    def __copy__(self) -> "TokenFile":
        return self

    def __deepcopy__(self, memo) -> "TokenFile":
        return self  # nothing in it changes

    def __reduce__(self):
        # Pickled by name: a worker process maps the file itself, and is not sent gigabytes.
        if self.identity is None:
            return TokenFile, tuple(getattr(self, field.name) for field in fields(self))
        return _reopen, (os.path.abspath(self.path), self.path, self.dtype, self.identity)


def _reopen(path: str, name: str, dtype: str, identity: tuple[str | None, ...]) -> TokenFile:
    opened = open_tokens(path, dtype=dtype)
    if opened.identity != identity:
        raise ValueError(f"{path}: was written anew since this TokenFile was pickled")
    return replace(opened, path=name)


def open_tokens(
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    tokenizer_sha256: str | None = None,
    verify: bool = False,
) -> TokenFile:
    """Open a token file, a folder of shards or a glob of them, without reading the ids into memory.

    Args:
        path: `NAME.bin`; or, where only `NAME-00000.bin`, ... exist, that shard set; or a folder that holds one
            shard set; or a glob pattern, its matches taken in sorted order.
        dtype: what the file must have, "uint16" or "uint32"; needed for a `.bin` without sidecar.
        tokenizer_sha256: if given, the file must have been made by this tokenizer.
        verify: read every file whole and compare it with the checksum in its sidecar. Otherwise 16 blocks of 4 KiB are
            compared, if the sidecar has their checksum.

    Raises ValueError naming the file when it is truncated, changed, has another dtype, another tokenizer, no sidecar
    (and no dtype is given), a damaged one, or one without the checksum that verify asks for; when shards are missing
    or of different sets. FileNotFoundError when there is nothing.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
    files = _resolve(path)
    opened = [_open_one(file, dtype, verify) for file in files]
    first_tokens, first = opened[0]
    for file, (_, sidecar) in zip(files, opened, strict=True):
        for field in ("dtype", "vocab_size", "tokenizer_sha256"):
            if sidecar.get(field) != first.get(field):
                raise ValueError(
                    f"{file}: {field} is {sidecar.get(field)}, but {files[0]} has {first.get(field)}; "
                    "shards of one set must agree"
                )
    _check_set(path, files, [sidecar for _, sidecar in opened])
    tokens: np.ndarray | ShardedTokens = first_tokens
    if len(opened) > 1:
        tokens = ShardedTokens(shard for shard, _ in opened)
    if "n_shards" in first:  # every sidecar of a set states the whole, since a shard may end inside a character
        n_bytes = first.get("n_bytes") if len(files) == first["n_shards"] else None
    else:
        known = [sidecar["n_bytes"] for _, sidecar in opened if sidecar.get("n_bytes") is not None]
        n_bytes = sum(known) if len(known) == len(opened) else None
    result = TokenFile(
        str(path),
        tokens,
        str(first["dtype"]),
        len(tokens),
        first.get("vocab_size"),
        first.get("tokenizer_sha256"),
        n_bytes,
        tuple(sidecar.get("id") for _, sidecar in opened),
    )
    if tokenizer_sha256 is not None:
        check_tokenizer(result, tokenizer_sha256)
    return result


def check_ids(tokens: TokenFile | np.ndarray | ShardedTokens, vocab_size: int) -> None:
    """Scan all ids, in pieces of a few MiB, and raise ValueError at the first that is not below vocab_size.

    Meant to run once before training: in a step on a GPU, such an id is a device assert that names nothing.
    """
    check_int("vocab_size", vocab_size, 1)
    name = tokens.path if isinstance(tokens, TokenFile) else "tokens"
    for start in range(0, len(tokens), SCAN_TOKENS):
        piece = np.asarray(tokens[start : start + SCAN_TOKENS])
        if int(piece.max()) >= vocab_size or int(piece.min()) < 0:
            bad = int(np.argmax((piece >= vocab_size) | (piece < 0)))
            raise ValueError(outside_message(name, start + bad, int(piece[bad]), vocab_size))


def check_tokenizer(file: TokenFile, tokenizer_sha256: str) -> None:
    """Raise ValueError when the file says that another tokenizer made it; a bare `.bin` says nothing and passes."""
    if file.tokenizer_sha256 is not None and file.tokenizer_sha256 != tokenizer_sha256:
        raise ValueError(
            f"{file.path}: made with the tokenizer of sha256 {file.tokenizer_sha256}, "
            f"but the one given has {tokenizer_sha256}; encode the text again"
        )


def _resolve(path: str | os.PathLike) -> list[Path]:
    name = os.fspath(path)
    target = Path(name)
    if target.is_dir():
        files = sorted(target.glob("*.bin"), key=_shard_order)
        if not files:
            raise FileNotFoundError(f"{name}: this folder holds no token file (*.bin)")
        stems = {match.group(1) if (match := _SHARD.match(file.stem)) else file.stem for file in files}
        if len(stems) > 1 or (len(files) > 1 and any(not _SHARD.match(file.stem) for file in files)):
            listed = ", ".join(file.name for file in files[:4])
            raise ValueError(f"{name}: this folder holds several token files ({listed}); name one, or give a glob")
        return files
    # The sidecar alone also counts: it is committed first (see token_format.py).
    if target.exists() or (target.suffix == ".bin" and target.with_suffix(".json").exists()):
        return [target]
    if any(letter in name for letter in "*?["):
        files = sorted((Path(file) for file in glob.glob(name) if file.endswith(".bin")), key=_shard_order)
        if files:
            return files
        raise FileNotFoundError(f"{name}: no token file (*.bin) matches this pattern")
    if target.suffix == ".bin" and (files := shard_files(target)):
        return files
    raise FileNotFoundError(f"{name}: no such token file")


def _shard_order(file: Path) -> tuple[str, int, str]:
    match = re.fullmatch(r"(.*?)(\d+)", file.stem)
    return (match.group(1), int(match.group(2)), file.name) if match else (file.stem, -1, file.name)


def _open_one(target: Path, dtype: str | None, verify: bool) -> tuple[np.ndarray, dict[str, Any]]:
    for sidecar, file in _candidates(target):
        try:
            found = file.stat().st_size
        except FileNotFoundError:
            continue  # a writer renamed it just now: look again
        bare = sidecar is None
        if sidecar is None:
            if dtype is None:
                raise ValueError(missing_sidecar(target, found))
            sidecar = {"dtype": dtype}
        stated = str(sidecar.get("dtype"))
        if stated not in DTYPES:
            raise ValueError(
                f"{target.with_suffix('.json')}: dtype is {stated!r}: allowed are {', '.join(DTYPES)}"
            )
        if dtype is not None and dtype != stated:
            raise ValueError(f"{target}: holds {stated}, but dtype={dtype!r} was asked for")
        itemsize = DTYPES[stated].itemsize
        n_tokens = sidecar.get("n_tokens", found // itemsize if bare else None)
        check_sidecar({**sidecar, "n_tokens": n_tokens}, target.with_suffix(".json"))
        assert n_tokens is not None
        if found % itemsize:
            raise ValueError(f"{target}: {found} bytes is not a whole number of {stated} tokens; truncated?")
        if found != n_tokens * itemsize:
            raise ValueError(
                f"{target}: truncated or damaged: expected {n_tokens * itemsize} bytes "
                f"({n_tokens} {stated} tokens), found {found}"
            )
        check_sums(target, file, sidecar, verify)
        # An empty file cannot be mapped.
        empty = np.zeros(0, DTYPES[stated])
        return (np.memmap(file, DTYPES[stated], mode="r") if n_tokens else empty), sidecar
    raise FileNotFoundError(f"{target}: the sidecar is there, but the ids are missing")


def _candidates(target: Path) -> Iterator[tuple[dict[str, Any] | None, Path]]:
    """Pairs of sidecar and data file to try: twice, because a writer may publish between our two looks."""
    for _ in range(2):
        if not target.with_suffix(".json").exists():
            yield None, target
            continue
        sidecar = read_sidecar(target)
        pending = uncommitted(target, str(sidecar.get("id")))
        yield sidecar, pending if pending.exists() else target


def _check_set(path: str | os.PathLike, files: list[Path], sidecars: list[dict[str, Any]]) -> None:
    if len({sidecar.get("id") if "n_shards" in sidecar else None for sidecar in sidecars}) > 1:
        raise ValueError(f"{os.fspath(path)}: these shards come from different writes; write the set again")
    n_shards = sidecars[0].get("n_shards")
    if n_shards is None or (len(files) == 1 and files[0] == Path(path)):
        return  # one shard asked for by its own name is fine
    missing = sorted(set(range(n_shards)) - {sidecar.get("shard") for sidecar in sidecars})
    if missing:
        raise ValueError(f"{os.fspath(path)}: shard {missing[0]} of {n_shards} is missing")
