"""What all blocks of a forward pass share: rotary tables, and which positions are of one document.

Legend: B batch, T positions, K head dim.
"""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from purelm.models.config import Config
from purelm.ops.masks import Segments
from purelm.ops.rope import rope_tables

__all__ = ["Context", "context", "segment_lengths", "segment_positions"]


class Context(NamedTuple):
    """What every block of one forward pass shares; None where the model or the batch has no such thing."""

    cos: Tensor | None  # (T, K/2) or (B, T, K/2): rotary tables
    sin: Tensor | None
    segment_ids: Segments  # (B, T), or a pair for queries and keys


def segment_positions(segment_ids: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Position within the run of equal ids: 0 where an id begins.

    >>> segment_positions(torch.tensor([[1, 1, 2, 2, 2, 0]]))
    tensor([[0, 1, 0, 1, 2, 0]])
    """
    at = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    begins = torch.zeros_like(segment_ids, dtype=torch.bool)
    begins = torch.cat([begins[:, :1], segment_ids[:, 1:] != segment_ids[:, :-1]], 1)
    return at - torch.cummax(torch.where(begins, at, 0), 1).values


def segment_lengths(segment_ids: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Number of positions of the row that have the same id.

    >>> segment_lengths(torch.tensor([[1, 1, 2, 2, 2, 0]]))
    tensor([[2, 2, 3, 3, 3, 1]])
    """
    ids_BT = segment_ids.contiguous()
    sorted_BT = torch.sort(ids_BT, -1).values
    return torch.searchsorted(sorted_BT, ids_BT, right=True) - torch.searchsorted(sorted_BT, ids_BT)


def context(positions: Tensor, segment_ids: Segments, cfg: Config, *, length: int, dtype: torch.dtype) -> Context:
    """Tables for these positions, (T,) or (B, T); `length` positions are in play (dynamic_ntk looks at it)."""
    if cfg.position != "rope":
        return Context(None, None, segment_ids)
    n: int | Tensor = length
    if segment_ids is not None and cfg.rope_scaling is not None and cfg.rope_scaling.kind == "dynamic_ntk":
        # Of the document, or what it shares a row with would change it.
        n = segment_lengths(segment_ids[0] if isinstance(segment_ids, tuple) else segment_ids)
    # fp32 whatever the compute dtype: a bf16 cosine is off by 0.2 %. fp64 where a test asks for it.
    dtype = torch.promote_types(dtype, torch.float32)
    cos, sin = rope_tables(
        positions, cfg.head_width, cfg.rope_theta, cfg.rope_scaling, length=n, dtype=dtype
    )
    return Context(cos, sin, segment_ids)
