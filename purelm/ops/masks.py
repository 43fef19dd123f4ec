"""Which keys a query sees. Legend: B batch, T query positions, S key positions."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["Segments", "Window", "segment_pair", "span", "visible"]

Window = int | tuple[int | None, int | None] | None
Segments = Int[Tensor, "*batch t"] | tuple[Int[Tensor, "*batch t"], Int[Tensor, "*batch s"]] | None


def span(n_queries: int, n_keys: int, causal: bool, window: Window) -> tuple[int | None, int | None]:
    """(left, right): how far a query sees to each side of its own position; None where nothing is cut off.

    Query i of T stands at key position i + S - T (bottom-right alignment). Limits that no pair of these lengths can
    reach become None, so that for one query over all its past no mask is needed.

    >>> span(4, 4, True, None), span(1, 4, True, None), span(4, 4, True, 2), span(4, 4, False, (9, 1))
    ((None, 0), (None, None), (2, 0), (None, 1))
    """
    left, right = window if isinstance(window, tuple) else (window, None)
    for side in (left, right):
        if side is not None and side < 0:
            raise ValueError(f"window must have sides of at least 0 (None: unlimited), got {window}")
    if causal:
        right = 0
    if left is not None and left >= n_keys - 1:
        left = None
    if right is not None and right >= n_queries - 1:
        right = None
    return left, right


def segment_pair(segment_ids: Segments, n_queries: int, n_keys: int) -> tuple[Tensor, Tensor] | None:
    """(ids of queries, ids of keys); one tensor stands for both where their numbers are equal."""
    if segment_ids is None:
        return None
    q_ids_BT, kv_ids_BS = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if q_ids_BT.is_floating_point() or kv_ids_BS.is_floating_point():
        raise ValueError(f"segment_ids must be integers, got {q_ids_BT.dtype} and {kv_ids_BS.dtype}")
    if q_ids_BT.shape[-1] != n_queries or kv_ids_BS.shape[-1] != n_keys:
        raise ValueError(
            f"segment_ids must have {n_queries} ids for queries and {n_keys} for keys, "
            f"got {tuple(q_ids_BT.shape)} and {tuple(kv_ids_BS.shape)}"
        )
    return q_ids_BT, kv_ids_BS


def visible(
    n_queries: int,
    n_keys: int,
    *,
    causal: bool,
    window: Window,
    segment_ids: Segments,
    device: torch.device,
) -> Bool[Tensor, "*b t s"] | None:
    """True where query t sees key s: (T, S), or (B, T, S) with segment ids; None when every query sees every key.

    -left <= s - (t + S - T) <= right, and equal segment ids.
    """
    left, right = span(n_queries, n_keys, causal, window)
    mask = None
    if left is not None or right is not None:
        t = torch.arange(n_keys - n_queries, n_keys, device=device).unsqueeze(-1)
        offset = torch.arange(n_keys, device=device) - t
        if right is not None:
            mask = offset <= right
        if left is not None:
            near = offset >= -left
            mask = near if mask is None else mask & near
    segments = segment_pair(segment_ids, n_queries, n_keys)
    if segments is not None:
        same = segments[0].unsqueeze(-1) == segments[1].unsqueeze(-2)
        mask = same if mask is None else mask & same
    return mask
