"""Passes of one shape, each a replay of a CUDA graph: what an update does where the host's launches take the time.

An optimizer step of few rows is some thousands of kernels of some microseconds each. With as many rows in each pass,
and lengths in steps of LENGTHS, few shapes occur in a run, and a pass is one launch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from purelm import tree
from purelm.train import Differentiate, Loss
from purelm.transforms import accumulate, cuda_graph, value_and_grad

__all__ = ["LENGTHS", "in_passes", "recorded"]

LENGTHS = 64  # rows are as long as a multiple of this


def in_passes(rows: int) -> Differentiate:
    """Gradients of batches of a multiple of `rows`: the sum over passes, which are recorded once for each shape.

    ValueError for other batches, and for a step that divides batches itself.
    """

    def differentiate(loss: Loss, /, *, microbatches: int = 1, compute: torch.dtype | None = None) -> Any:
        if microbatches != 1:
            raise ValueError(f"in_passes: microbatches is {microbatches}; leave it at 1: a pass has {rows} rows")
        one = recorded(value_and_grad(loss, has_aux=True))

        def gradients(params: Any, batch: Any) -> Any:
            n = max((len(x) for x in tree.leaves(batch) if isinstance(x, Tensor) and x.ndim), default=0)
            if not n or n % rows:
                raise ValueError(f"in_passes: a batch of {n} rows does not divide into passes of {rows}")
            return accumulate(one, n // rows)(params, batch)

        return gradients

    return differentiate


def recorded(f: Callable[..., Any]) -> Callable[..., Any]:
    """f as a CUDA graph, recorded at the second call with arguments of one shape; on a CPU f itself."""
    return cuda_graph(f, n_warmup=1)
