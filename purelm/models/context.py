"""What all blocks of a forward pass share: rotary tables, and which document each position belongs to.

Legend: B batch, T positions, K head dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from purelm.models.config import Config
from purelm.ops.masks import Segments
from purelm.ops.rope import RopeScaling, rope_tables

__all__ = ["Context", "contexts", "segment_lengths", "segment_positions"]


class Context(NamedTuple):
    """What every block of a forward pass gets; the tables are None without rope, the ids where rows are not packed."""

    cos: Tensor | None  # (T, K/2) or (B, T, K/2): rotary tables
    sin: Tensor | None
    segment_ids: Segments  # (B, T), or a pair (ids of queries, ids of keys)


def segment_positions(segment_ids: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Position of each token in its document (a run of equal ids): 0 at the document's first token.

    >>> segment_positions(torch.tensor([[1, 1, 2, 2, 2, 0]]))
    tensor([[0, 1, 0, 1, 2, 0]])
    """
    at = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    begins = torch.zeros_like(segment_ids, dtype=torch.bool)
    begins = torch.cat([begins[:, :1], segment_ids[:, 1:] != segment_ids[:, :-1]], 1)
    return at - torch.cummax(torch.where(begins, at, 0), 1).values


def segment_lengths(segment_ids: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """For each position, how many positions of its row have its id: the length of its document.

    >>> segment_lengths(torch.tensor([[1, 1, 2, 2, 2, 0]]))
    tensor([[2, 2, 3, 3, 3, 1]])
    """
    ids_BT = segment_ids.contiguous()
    sorted_BT = torch.sort(ids_BT, -1).values
    return torch.searchsorted(sorted_BT, ids_BT, right=True) - torch.searchsorted(sorted_BT, ids_BT)


def contexts(
    positions: Tensor,
    segment_ids: Segments,
    cfg: Config,
    ropes: Sequence[tuple[float, RopeScaling | None]],
    *,
    length: int,
    dtype: torch.dtype,
) -> list[Context]:
    """The Context of these positions, (T,) or (B, T), for each of the (theta, scaling) in `ropes`.

    Equal entries share their tables. length: the sequence length, which only dynamic_ntk needs.
    """
    made: dict[tuple[float, RopeScaling | None], Context] = {}
    for theta, scaling in ropes:
        if (theta, scaling) not in made:
            made[theta, scaling] = _context(positions, segment_ids, cfg, theta, scaling, length, dtype)
    return [made[rope] for rope in ropes]


def _context(
    positions: Tensor,
    segment_ids: Segments,
    cfg: Config,
    theta: float,
    scaling: RopeScaling | None,
    length: int,
    dtype: torch.dtype,
) -> Context:
    if cfg.position != "rope":
        return Context(None, None, segment_ids)
    n: int | Tensor = length
    if segment_ids is not None and scaling is not None and scaling.kind == "dynamic_ntk":
        # The document's length: by the row's, a document's result would depend on the others packed with it.
        n = segment_lengths(segment_ids[0] if isinstance(segment_ids, tuple) else segment_ids)
    # At least fp32: rounded to bf16, cosines would be off by up to 0.2 %. fp64 for models in fp64, as in tests.
    dtype = torch.promote_types(dtype, torch.float32)
    cos, sin = rope_tables(positions, cfg.head_width, theta, scaling, length=n, dtype=dtype)
    return Context(cos, sin, segment_ids)
