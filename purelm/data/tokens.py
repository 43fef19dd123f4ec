"""Token files: raw little-endian uint16 or uint32 ids in `NAME.bin`, and what is known of them in `NAME.json`.

The sidecar holds dtype, n_tokens, vocab_size, tokenizer_sha256 and n_bytes (of the source text, so that bits per
byte can be computed). A bare `.bin` without sidecar is accepted. A large corpus may be cut into shards
`NAME-00000.bin`, `NAME-00001.bin`, ...; `open_tokens` shows a shard set as one sequence.

Writing is atomic although a pair is two files. The ids go to `NAME.bin.<id>` and the sidecar, which carries the
same random `<id>`, is renamed first: that one rename is the commit. Only then `NAME.bin.<id>` becomes `NAME.bin`.
A reader takes `NAME.bin.<id>` where it exists for the sidecar's id, else `NAME.bin`; so a writer killed at any
instant leaves either the old pair or the new one readable. Shards are all written first and published together; each
sidecar carries its number, the count and the id of the set, so that a mixture of two sets is refused.
"""

import glob
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

__all__ = ["ShardedTokens", "TokenFile", "TokenWriter", "check_ids", "check_tokenizer", "open_tokens"]

DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
BUFFER_BYTES = 1 << 20  # of the writer; appends are often one short document
SCAN_TOKENS = 1 << 22  # of check_ids: 8-16 MiB at a time
_SHARD = re.compile(r"(.*?)[-_]?\d+$")


class ShardedTokens:
    """Several arrays seen as one sequence: `len`, an int index or a slice (copied only where it spans shards)."""

    def __init__(self, shards: Iterable[np.ndarray]):
        self.shards = tuple(shards)
        self.dtype = self.shards[0].dtype
        self._ends = np.cumsum([len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index):
        if not isinstance(index, slice):
            i = int(index) + (len(self) if index < 0 else 0)
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
    """An opened token file. It can be used in place of its `tokens`: it has a length and slices."""

    path: str  # as given to open_tokens, for messages
    tokens: np.ndarray | ShardedTokens  # np.memmap of one file, or the view over shards
    dtype: str  # "uint16" | "uint32"
    n_tokens: int
    vocab_size: int | None  # None: a bare .bin
    tokenizer_sha256: str | None
    n_bytes: int | None  # of the source text in UTF-8, document delimiters as the writer counted them

    def __len__(self) -> int:
        return self.n_tokens

    def __getitem__(self, index):
        return self.tokens[index]


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
        if not 0 < vocab_size <= 2**32:
            raise ValueError(f"vocab_size={vocab_size}: allowed is 1 to 2**32")
        dtype = dtype or ("uint16" if vocab_size <= 2**16 else "uint32")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
        if vocab_size > 2 ** (8 * DTYPES[dtype].itemsize):
            raise ValueError(f"dtype={dtype!r} cannot hold the ids of vocab_size={vocab_size}")
        if shard_tokens is not None and shard_tokens < 1:
            raise ValueError(f"shard_tokens={shard_tokens}: allowed is 1 or more, or None")
        self.vocab_size, self.dtype, self.tokenizer_sha256 = vocab_size, dtype, tokenizer_sha256
        self.n_bytes, self.n_tokens, self.shard_tokens = n_bytes, 0, shard_tokens
        self._id = secrets.token_hex(8)
        self._file: IO[bytes] | None = None
        self._counts: list[int] = []  # tokens of each shard

    def __enter__(self) -> "TokenWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._next_shard()
        return self

    def append(self, ids: np.ndarray | Iterable[int], n_bytes: int | None = None) -> None:
        """Add ids (any integer array, or an iterable of int) and, if given, n_bytes of source text."""
        if self._file is None:
            raise ValueError(f"{self.path}: append outside of the writer's with-block")
        array = np.asarray(ids if hasattr(ids, "__array__") else list(ids)).reshape(-1)
        if array.size and array.dtype.kind not in "iu":
            raise ValueError(f"ids for {self.path} have dtype {array.dtype}: allowed are integers")
        if array.size and (int(array.max()) >= self.vocab_size or int(array.min()) < 0):
            bad = int(np.argmax((array >= self.vocab_size) | (array < 0)))
            raise ValueError(_outside(str(self.path), self.n_tokens + bad, int(array[bad]), self.vocab_size))
        if n_bytes is not None:
            self.n_bytes = (self.n_bytes or 0) + n_bytes
        array = array.astype(DTYPES[self.dtype], copy=False)
        while array.size:
            room = array.size if self.shard_tokens is None else self.shard_tokens - self._counts[-1]
            if not room:
                self._next_shard()
                continue
            self._file.write(np.ascontiguousarray(array[:room]).data)
            self._counts[-1] += min(room, array.size)
            self.n_tokens += min(room, array.size)
            array = array[room:]

    def __exit__(self, kind, value, traceback) -> None:
        try:
            self._close()
        except OSError:  # a full disk shows here
            self._discard()
            raise
        if kind is None:
            self._publish()
        else:
            self._discard()

    def _discard(self) -> None:
        for shard in range(len(self._counts)):
            self._temporary(shard).unlink(missing_ok=True)

    def _target(self, shard: int) -> Path:
        if self.shard_tokens is None:
            return self.path
        return self.path.with_name(f"{self.path.stem}-{shard:05d}.bin")

    def _temporary(self, shard: int) -> Path:
        return _uncommitted(self._target(shard), self._id)

    def _next_shard(self) -> None:
        self._close()
        self._counts.append(0)
        self._file = open(self._temporary(len(self._counts) - 1), "wb", buffering=BUFFER_BYTES)

    def _close(self) -> None:
        if self._file is not None:
            with self._file as file:
                self._file = None
                file.flush()
                os.fsync(file.fileno())

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
            }
            if self.shard_tokens is not None:
                sidecar |= {"shard": shard, "n_shards": len(self._counts)}
            previous = _identity(target)
            temporary = target.with_name(f"{target.stem}.json.{self._id}")
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(sidecar, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target.with_suffix(".json"))  # the commit
            _sync_folder(target.parent)  # the two renames must reach the disk in this order
            os.replace(self._temporary(shard), target)
            if previous:  # a writer killed between its two renames left this behind
                _uncommitted(target, previous).unlink(missing_ok=True)
        # What was written under this path before in another cut would be opened instead, or mixed in.
        written = {self._target(shard) for shard in range(len(self._counts))}
        for old in [self.path, *_shard_files(self.path)]:
            if old not in written and _identity(old):
                old.unlink(missing_ok=True)
                old.with_suffix(".json").unlink()
        _sync_folder(self.path.parent)


def open_tokens(
    path: str | os.PathLike, *, dtype: str | None = None, tokenizer_sha256: str | None = None
) -> TokenFile:
    """Open a token file, a folder of shards or a glob of them, without reading the ids into memory.

    Args:
        path: `NAME.bin`; or, where only `NAME-00000.bin`, ... exist, that shard set; or a folder that holds one
            shard set; or a glob pattern, its matches taken in sorted order.
        dtype: what the file must be; needed for a bare uint32 `.bin` (without sidecar uint16 is assumed).
        tokenizer_sha256: if given, the file must have been made by this tokenizer.

    Raises ValueError naming the file when it is truncated, has another dtype, another tokenizer, a damaged sidecar,
    missing shards or shards of different sets; FileNotFoundError when there is nothing.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
    files = _resolve(path)
    opened = [_open_one(file, dtype) for file in files]
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
    )
    if tokenizer_sha256 is not None:
        check_tokenizer(result, tokenizer_sha256)
    return result


def check_ids(tokens: TokenFile | np.ndarray | ShardedTokens, vocab_size: int) -> None:
    """Scan all ids, in pieces of a few MiB, and raise ValueError at the first that is not below vocab_size.

    Meant to run once before training: an id outside the vocabulary is a device assert deep inside a GPU step.
    """
    name = tokens.path if isinstance(tokens, TokenFile) else "tokens"
    for start in range(0, len(tokens), SCAN_TOKENS):
        piece = np.asarray(tokens[start : start + SCAN_TOKENS])
        if int(piece.max()) >= vocab_size or int(piece.min()) < 0:
            bad = int(np.argmax((piece >= vocab_size) | (piece < 0)))
            raise ValueError(_outside(name, start + bad, int(piece[bad]), vocab_size))


def check_tokenizer(file: TokenFile, tokenizer_sha256: str) -> None:
    """Raise ValueError when the file says that another tokenizer made it; a bare `.bin` says nothing and passes."""
    if file.tokenizer_sha256 is not None and file.tokenizer_sha256 != tokenizer_sha256:
        raise ValueError(
            f"{file.path}: made with the tokenizer of sha256 {file.tokenizer_sha256}, "
            f"but the one given has {tokenizer_sha256}; encode the text again"
        )


def _outside(name: str, index: int, token: int, vocab_size: int) -> str:
    return f"{name}: id {token} at index {index} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1})"


def _uncommitted(target: Path, identity: str) -> Path:
    return target.with_name(f"{target.name}.{identity}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _shard_files(path: Path) -> list[Path]:
    pattern = re.compile(re.escape(path.stem) + r"-\d{5,}\.bin")
    found = [file for file in path.parent.glob("*.bin") if pattern.fullmatch(file.name)]
    return sorted(found, key=lambda file: int(file.stem.rsplit("-", 1)[1]))


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
    # The sidecar alone also counts: it is committed first (see the head of this file).
    if target.exists() or (target.suffix == ".bin" and target.with_suffix(".json").exists()):
        return [target]
    if any(letter in name for letter in "*?["):
        files = sorted((Path(file) for file in glob.glob(name) if file.endswith(".bin")), key=_shard_order)
        if files:
            return files
        raise FileNotFoundError(f"{name}: no token file (*.bin) matches this pattern")
    if target.suffix == ".bin" and (files := _shard_files(target)):
        return files
    raise FileNotFoundError(f"{name}: no such token file")


def _shard_order(file: Path) -> tuple[str, int, str]:
    match = re.fullmatch(r"(.*?)(\d+)", file.stem)
    return (match.group(1), int(match.group(2)), file.name) if match else (file.stem, -1, file.name)


def _read_sidecar(target: Path) -> dict[str, Any]:
    path = target.with_suffix(".json")
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(sidecar, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ValueError(f"{path}: damaged sidecar of a token file: {error}") from None
    return sidecar


def _identity(target: Path) -> str | None:
    """The id of the write that made `target`, or None where there is none that can be read."""
    try:
        return _read_sidecar(target).get("id")
    except (OSError, ValueError):
        return None


def _open_one(target: Path, dtype: str | None) -> tuple[np.ndarray, dict[str, Any]]:
    for sidecar, file in _candidates(target):
        try:
            found = file.stat().st_size
        except FileNotFoundError:
            continue  # a writer renamed it just now: look again
        bare = sidecar is None
        sidecar = {"dtype": dtype or "uint16"} if sidecar is None else sidecar
        stated = str(sidecar.get("dtype"))
        if stated not in DTYPES:
            raise ValueError(
                f"{target.with_suffix('.json')}: dtype is {stated!r}: allowed are {', '.join(DTYPES)}"
            )
        if dtype is not None and dtype != stated:
            raise ValueError(f"{target}: holds {stated}, but dtype={dtype!r} was asked for")
        itemsize = DTYPES[stated].itemsize
        n_tokens = sidecar.get("n_tokens", found // itemsize if bare else None)
        if not isinstance(n_tokens, int) or n_tokens < 0:
            raise ValueError(f"{target.with_suffix('.json')}: n_tokens is {n_tokens!r}: allowed is a count")
        if found % itemsize:
            raise ValueError(f"{target}: {found} bytes is not a whole number of {stated} tokens; truncated?")
        if found != n_tokens * itemsize:
            raise ValueError(
                f"{target}: truncated or damaged: expected {n_tokens * itemsize} bytes "
                f"({n_tokens} {stated} tokens), found {found}"
            )
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
        sidecar = _read_sidecar(target)
        uncommitted = _uncommitted(target, str(sidecar.get("id")))
        yield sidecar, uncommitted if uncommitted.exists() else target


def _check_set(path: str | os.PathLike, files: list[Path], sidecars: list[dict[str, Any]]) -> None:
    if len({sidecar.get("id") if "n_shards" in sidecar else None for sidecar in sidecars}) > 1:
        raise ValueError(f"{os.fspath(path)}: these shards come from different writes; write the set again")
    n_shards = sidecars[0].get("n_shards")
    if n_shards is None or (len(files) == 1 and files[0] == Path(path)):
        return  # one shard asked for by its own name is fine
    missing = sorted(set(range(n_shards)) - {sidecar.get("shard") for sidecar in sidecars})
    if missing:
        raise ValueError(f"{os.fspath(path)}: shard {missing[0]} of {n_shards} is missing")
