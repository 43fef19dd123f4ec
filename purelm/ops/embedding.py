"""Rows of a table by number."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["embedding"]


def embedding(ids: Int[Tensor, "*batch"], weight_VD: Float[Tensor, "v d"]) -> Float[Tensor, "*batch d"]:
    """y = W[ids]. The gradient of a row is the sum over its occurrences.

    An id outside 0..V-1 is an IndexError on a CPU and a device-side assertion on a GPU: validate ids where they
    enter (`purelm.models.transformer.check_tokens`), not here, where a check would wait for the device.
    """
    # The ATen op and not weight[ids]: its backward is a sorted sum, several times faster than index_put's.
    return torch.embedding(weight_VD, ids)
