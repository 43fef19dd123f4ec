"""The files of a checkpoint, written by one process or by several: which rows of a leaf are in which file.

Manifest of format 1 (`purelm.checkpoint.save`): a NAME.safetensors for each tree, its leaves under their paths.
Manifest of format 2 (`purelm.dist.checkpoint.save`): N files `shard-RANK-of-N.safetensors`, keys `NAME/PATH`, and

    "shards": [{"file", "bytes", "sha256"}, ...],                                   one for each rank, in order
    "files": {NAME: {"tree": ..., "leaves": {PATH: {"shape", "dtype", "shard"}}}}

"shard" is the number of the file that has the whole leaf. Where it is null the leaf is cut: with m = ceil(rows / N),
file r has rows r m to (r + 1) m - 1, and the last files have fewer or none.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from purelm import tree

# Names of the format (https://github.com/huggingface/safetensors) for what torch has.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Piece(NamedTuple):
    """Rows start to stop - 1 of a leaf: all of the tensor `key` in `file`. A 0-d leaf counts as one row."""

    file: str
    key: str
    start: int
    stop: int


class Leaf(NamedTuple):
    """A stored leaf."""

    shape: tuple[int, ...]  # of the whole
    dtype: torch.dtype
    pieces: list[Piece]  # ascending, none empty


def file_name(rank: int, n_ranks: int) -> str:
    """The name of the file that this rank writes."""
    return f"shard-{rank:05d}-of-{n_ranks:05d}.safetensors"


def describe(x: Tensor, shard: int | None) -> dict[str, Any]:
    """A leaf's entry in the manifest of format 2."""
    return {"shape": list(x.shape), "dtype": NAMES[x.dtype], "shard": shard}


def write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file, flushed to disk -> {"file", "bytes", "sha256"}.

    Leaf by leaf, so that the host holds one leaf at a time beside the tensors (safetensors' save_file needs all of them
    on the host, and old versions copy them once more). The checksum is formed of the bytes in memory, before they reach
    the disk. Widest dtypes come first, as in the library: then each leaf begins at a multiple of its element size.
    """
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header, end = {}, 0
    for key in order:
        x = tensors[key]
        begin, end = end, end + x.numel() * x.element_size()
        header[key] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    try:
        with open(path, "wb") as file:
            for block in (len(text).to_bytes(8, "little"), text):
                file.write(block)
                digest.update(block)
            for key in order:
                if tensors[key].numel():
                    data = tree.as_bytes(tensors[key].to("cpu")).numpy().data
                    file.write(data)
                    digest.update(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # the error of a full disk names no file
    return {"file": path.name, "bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}


def leaves(folder: Path, manifest: Mapping[str, Any], name: str) -> dict[str, Leaf]:
    """Path -> leaf of the tree `name`, for both formats."""
    entry = manifest["files"][name]
    found = {}
    if "leaves" in entry:
        files = [shard["file"] for shard in manifest["shards"]]
        for path, leaf in entry["leaves"].items():
            n, N = _rows(leaf["shape"]), len(files)
            m = -(-n // N)
            cuts = [(r * m, min((r + 1) * m, n)) for r in range(N)]
            if leaf["shard"] is not None:
                cuts = [(0, n if r == leaf["shard"] else 0) for r in range(N)]
            pieces = [Piece(f, f"{name}/{path}", a, b) for f, (a, b) in zip(files, cuts, strict=True) if a < b]
            found[path] = Leaf(tuple(leaf["shape"]), DTYPES[leaf["dtype"]], pieces)
        return found
    with safe_open(folder / entry["file"], framework="pt") as file:
        for key in file.keys():
            header = file.get_slice(key)
            shape = tuple(header.get_shape())
            piece = Piece(entry["file"], key, 0, _rows(shape))
            found[key] = Leaf(shape, DTYPES[header.get_dtype()], [piece] if piece.stop else [])
    return found


def _rows(shape: Any) -> int:
    return shape[0] if len(shape) else 1


class Reader:
    """Reads rows of leaves from a checkpoint's files; a context manager that opens each file once, and closes all."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[str, Any] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: Any) -> None:
        while self._open:
            self._open.popitem()[1].__exit__(None, None, None)

    def fill(self, out: Tensor, leaf: Leaf, start: int = 0) -> Tensor:
        """Copy rows start, start + 1, ... of the leaf into `out`, until either ends; reads one piece at a time."""
        rows = out[None] if out.ndim == 0 else out
        for piece in leaf.pieces:
            a, b = max(piece.start, start), min(piece.stop, start + len(rows))
            if a < b and out.numel():
                try:
                    stored = self._file(piece.file).get_slice(piece.key)
                    has = tuple(stored.get_shape()), DTYPES.get(stored.get_dtype())
                    value = stored[...] if not leaf.shape else stored[a - piece.start : b - piece.start]
                except SafetensorError as error:
                    raise ValueError(f"{self._folder / piece.file}: {piece.key}: {error}") from None
                says = ((piece.stop - piece.start, *leaf.shape[1:]) if leaf.shape else ()), leaf.dtype
                if has != says:
                    texts = [" ".join(map(str, x)) for x in (has, says)]
                    what = f"{self._folder / piece.file}: {piece.key}"
                    raise ValueError(f"{what} is {texts[0]}, the manifest says {texts[1]}")
                rows[a - start : b - start] = value
        return out

    def whole(self, leaf: Leaf, device: torch.device | str) -> Tensor:
        """The whole leaf, on `device`."""
        return self.fill(torch.empty(leaf.shape, dtype=leaf.dtype, device=device), leaf)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            opened = safe_open(self._folder / name, framework="pt")
            self._open[name] = opened.__enter__()
        return self._open[name]
