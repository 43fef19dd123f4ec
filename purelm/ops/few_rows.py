"""Matrix product of a few rows on all cores of a CPU, for decoding. Legend: I input features, O output features.

    fast = REFERENCE._replace(linear=few_rows.linear, linear_out=few_rows.linear, unembed=few_rows.linear)

A product with one row reads each weight once and is as fast as memory. PyTorch computes it on one core, which on most
machines cannot ask for all that memory gives; the products of a batch, though, are spread over the cores. So here the
rows of W are a batch of blocks.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.ops import linear as _plain

__all__ = ["linear"]

MOST_ROWS = 4  # of 8 rows, PyTorch's own product is as fast
BLOCKS = (8, 4, 2)  # the most that divides O: more cores than blocks would wait, and small blocks cost calls


def linear(
    x: Float[Tensor, "*batch i"], weight_OI: Float[Tensor, "o i"], bias_O: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*batch o"]:
    """`purelm.ops.linear.linear`, y = x W^T + b; its own way is taken for up to 4 rows of fp32 or fp64 on a CPU."""
    O, n_rows = weight_OI.shape[0], x.shape[:-1].numel()
    blocks = next((n for n in BLOCKS if O % n == 0), 1)
    if x.device.type != "cpu" or x.dtype.itemsize < 4 or not 0 < n_rows <= MOST_ROWS or blocks == 1 or x.shape[-1] == 0:
        return _plain.linear(x, weight_OI, bias_O)
    # bmm, since the operator @ would fold the blocks into one product again.
    x_NIR = x.reshape(n_rows, x.shape[-1]).mT.expand(blocks, -1, -1)
    y_NbR = torch.bmm(weight_OI.unflatten(0, (blocks, O // blocks)), x_NIR)
    y = y_NbR.flatten(0, 1).mT.reshape(*x.shape[:-1], O)
    return y if bias_O is None else y + bias_O
