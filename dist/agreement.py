"""Checks that the ranks of a group agree: on a difference all of them raise and name it, and none hangs."""

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from purelm import tree
from purelm.dist.world import Group, all_gather_single, device_of, size_of

__all__ = ["check_equal", "check_same", "check_same_kind", "fingerprint", "kinds", "non_finite_ranks"]

_MISSING = "no such leaf"
_LONGEST = 80  # characters of a value that an error shows


def kinds(values: Any) -> dict[str, str]:
    """Path -> shape and dtype of each leaf, in order.

    >>> kinds({"w": torch.ones(2, 3), "b": [None, torch.tensor(1)]})
    {'b.1': '() int64', 'w': '(2, 3) float32'}
    """
    return {
        path: f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" if isinstance(x, Tensor) else repr(x)
        for path, x in zip(tree.paths(values), tree.leaves(values), strict=True)
    }


def check_same_kind(values: Any, group: Group = None, what: str = "tree") -> None:
    """ValueError on every rank, naming the leaf and the ranks, unless all hold trees of equal paths, shapes and dtypes.

    A collective on trees that differ would hang or mix up leaves. Each rank sends a digest of 32 bytes, and reading
    them waits for the device; the descriptions themselves are sent only if digests differ.
    """
    if size_of(group) == 1:
        return
    mine = kinds(values)
    digests = _gather_bytes(_digest(repr(mine).encode()), group)
    if all(d == digests[0] for d in digests):
        return
    everyone: list[Any] = [None] * size_of(group)
    dist.all_gather_object(everyone, mine, group=group)
    raise ValueError(_difference(everyone, what))


def check_same(values: dict[str, str], *, group: Group = None) -> None:
    """ValueError on every rank, naming each field that differs and the ranks, unless all ranks give equal values.

    For what a program was started with (seed, settings, hashes of data), once, before anything is computed: ranks that
    differ in these compute wrong results without an error. Values are strings; pass a hash of a long one. Each rank
    sends 32 bytes, and the values only if digests differ.

    >>> check_same({"seed": "0", "data": "5f1d"})
    """
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ValueError(f"check_same: values must map names to text, got {name!r}: {value!r}")
    if size_of(group) == 1:
        return
    mine = dict(sorted(values.items()))
    digests = _gather_bytes(_digest(repr(mine).encode()), group)
    if all(d == digests[0] for d in digests):
        return
    everyone: list[Any] = [None] * size_of(group)
    dist.all_gather_object(everyone, mine, group=group)
    problems = []
    for name in sorted({name for one in everyone for name in one}):
        found = [_shown(one[name]) if name in one else "absent" for one in everyone]
        if len({one.get(name) for one in everyone}) > 1:
            problems.append(f"{name} is {_by_rank(found)}")
    raise ValueError(f"ranks differ: {'. '.join(problems)}. Start all ranks with the same settings")


def _shown(value: str) -> str:
    """The value; of a long one its beginning and a hash, so that two with the same beginning look different."""
    if len(value) <= _LONGEST:
        return repr(value)
    return f"{value[:_LONGEST]!r}... (SHA-256 {_digest(value.encode()).hex()[:8]})"


def _by_rank(found: list[str]) -> str:
    """Each value and the ranks that have it."""
    by_value: dict[str, list[int]] = {}
    for rank, value in enumerate(found):
        by_value.setdefault(value, []).append(rank)
    texts = [f"{value} on rank{'s' * (len(ranks) > 1)} {_list(ranks)}" for value, ranks in by_value.items()]
    return "; ".join(texts)


def _difference(everyone: list[dict[str, str]], what: str) -> str:
    paths = list(dict.fromkeys(path for one in everyone for path in one))
    for path in paths:
        found = [one.get(path, _MISSING) for one in everyone]
        if len(set(found)) > 1:
            return f"{what}: ranks differ at {path}: {_by_rank(found)}"
    return f"{what}: ranks have the same leaves in another order"


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def fingerprint(values: Any) -> str:
    """SHA-256 of paths, shapes, dtypes and bytes of all leaves; waits for the device and copies to the host."""
    digest = hashlib.sha256(repr(kinds(values)).encode())
    for x in tree.leaves(values):
        if isinstance(x, Tensor):
            digest.update(tree.as_bytes(x.to("cpu")).numpy().tobytes())
    return digest.hexdigest()


def check_equal(values: Any, group: Group = None, what: str = "tree") -> None:
    """ValueError on every rank, naming the first leaf that differs, unless all ranks hold the same bits.

    Each rank hashes its leaves and sends 32 bytes a leaf. For parameters after a broadcast or a restart; too slow for
    every step.
    """
    check_same_kind(values, group, what)
    if size_of(group) == 1:
        return
    paths = list(tree.paths(values))
    mine = b"".join(bytes.fromhex(fingerprint(x)) for x in tree.leaves(values))
    everyone = _gather_bytes(mine, group)
    for i, path in enumerate(paths):
        parts = [one[32 * i : 32 * i + 32] for one in everyone]
        others = [rank for rank, part in enumerate(parts) if part != parts[0]]
        if others:
            ranks = f"rank{'s' * (len(others) > 1)} {_list(others)}"
            raise ValueError(f"{what}: {path} differs on {ranks} from rank 0")


def non_finite_ranks(values: Any, group: Group = None) -> list[int]:
    """The ranks that hold an inf or a nan. Each sends one byte; waits for the device."""
    finite = bool(tree.all_finite(values))
    return [rank for rank, one in enumerate(_gather_bytes(bytes([finite]), group)) if one == b"\x00"]


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _gather_bytes(data: bytes, group: Group) -> list[bytes]:
    """The data of each rank, in order of rank; all must be of one length."""
    if size_of(group) == 1:
        return [data]
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device_of(group))
    out = mine.new_empty(size_of(group) * len(data))
    all_gather_single(out, mine, group)
    whole = out.cpu().numpy().tobytes()
    return [whole[i : i + len(data)] for i in range(0, len(whole), len(data))]
