"""Rows of caches of any model: put into another cache, taken out, repeated.

    _, prefix = model.prefill(params, prompt_1T, model.init_cache(1, 100))
    cache = take(prefix, [0] * 8)                        # a prompt computed once, eight continuations of it
    cache = insert(cache, [2, 5], other)                 # rows 0 and 1 of `other` in place of rows 2 and 5

A cache is a tree whose leaves have the batch as first axis. One that has others too, or lengths, says so by three
methods, as `purelm.models.cache.Cache` does: by_row(), the tree of the leaves that have it; with_rows(that tree), the
cache of these; and emptied(rows_B), the cache in which rows where rows_B is True have length 0. One that can forget its
last tokens has shortened(n) too.
Legend: B batch, N rows given.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from purelm import tree

__all__ = ["insert", "insert_", "keep", "shortened", "take", "with_lengths"]

Rows = Sequence[int] | Tensor  # row numbers; a tensor on the cache's device, (N,) int64, spares the host a copy


def take(cache: Any, rows: Rows) -> Any:
    """The cache whose row i is row rows[i] of the given one; a row may be taken any number of times."""
    at = _numbers(cache, rows, "rows")
    return _map(lambda x: x.index_select(0, at.to(x.device)), cache)


def insert(cache: Any, rows: Rows, other: Any) -> Any:
    """The cache with row i of `other` in place of its row rows[i].

    The caches must be of one model, dtype and number of slots, and rows must be distinct. A `Cache` of the result has
    a length for each row.
    """
    return _insert(cache, rows, other, in_place=False)


def insert_(cache: Any, rows: Rows, other: Any) -> Any:
    """`insert` that writes into the memory of the given cache, which must not be used any more."""
    with torch.no_grad():
        return _insert(cache, rows, other, in_place=True)


def keep(cache: Any, rows_B: Tensor) -> Any:
    """The cache with rows where rows_B (bool) is False emptied; a cache without lengths of its own is unchanged.

    A row that begins anew never reaches the end of its slots, however often it is given a token and emptied.
    """
    return cache.emptied(~rows_B) if hasattr(cache, "emptied") else cache


def shortened(cache: Any, n: int) -> Any | None:
    """The cache of the first n tokens of each row, of which each has at least n; None where a cache cannot forget."""
    return cache.shortened(n) if hasattr(cache, "shortened") else None


def with_lengths(cache: Any) -> Any:
    """The cache with a length for each row, if it has one for all rows: the form that `insert` gives it."""
    return cache.with_rows(cache.by_row()) if hasattr(cache, "by_row") else cache


def _insert(cache: Any, rows: Rows, other: Any, in_place: bool) -> Any:
    at = _numbers(cache, rows, "rows")
    if not isinstance(rows, Tensor) and len({*rows}) < len(rows):
        raise ValueError(f"rows must be distinct, got {list(rows)}")
    given, put = _leaves(cache), _leaves(other)
    fits = len(given) == len(put) and all(
        x.shape[1:] == y.shape[1:] and y.shape[0] == len(at) and x.dtype == y.dtype
        for x, y in zip(given, put, strict=True)
    )
    if not fits:
        raise ValueError(
            f"other must be a cache of {len(at)} rows (one for each of `rows`) with as many slots and the same dtypes, "
            f"got leaves of {_shapes(put)} for {_shapes(given)}"
        )

    def one(x: Tensor, y: Tensor) -> Tensor:
        return (x.index_copy_ if in_place else x.index_copy)(0, at.to(x.device), y)

    return _map(one, cache, other)


def _shapes(leaves: list[Tensor]) -> str:
    kinds = dict.fromkeys(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in leaves)
    return ", ".join(list(kinds)[:3])


def _parts(cache: Any) -> Any:
    """What has the batch as first axis."""
    return cache.by_row() if hasattr(cache, "by_row") else cache


def _leaves(cache: Any) -> list[Tensor]:
    return tree.leaves(_parts(cache))


def _map(f: Any, cache: Any, *others: Any) -> Any:
    parts = tree.map(f, _parts(cache), *[_parts(x) for x in others])
    return cache.with_rows(parts) if hasattr(cache, "with_rows") else parts


def _numbers(cache: Any, rows: Rows, name: str) -> Tensor:
    leaves = _leaves(cache)
    if isinstance(rows, Tensor):
        if rows.ndim != 1 or rows.dtype != torch.int64:
            raise ValueError(f"{name} must be row numbers (N,) in int64, got {rows.dtype} {tuple(rows.shape)}")
        return rows
    n = leaves[0].shape[0]
    if odd := [i for i in rows if not isinstance(i, int) or not 0 <= i < n]:
        raise ValueError(f"{name} must be in 0..{n - 1}, got {odd[0]!r}")
    return torch.tensor(list(rows), dtype=torch.int64, device=leaves[0].device)
