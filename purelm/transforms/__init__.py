"""Transformations of pure functions: gradients, compilation with donation, rematerialisation, accumulation.

Each takes a function of trees and returns one. None changes its arguments, except that `jit` and `cuda_graph` consume
donated ones. `value_and_grad` is first-order reverse mode through torch.autograd. For forward mode, per-sample
gradients and higher derivatives apply torch.func to the same functions.

`value_and_grad` and `accumulate` break the graph of torch.compile: see `purelm.transforms.gradients`.
"""

from purelm.transforms.donation import in_stages, jit
from purelm.transforms.gradients import accumulate, grad, remat, save_matmuls, value_and_grad
from purelm.transforms.graph import cuda_graph

__all__ = [
    "accumulate",
    "cuda_graph",
    "grad",
    "in_stages",
    "jit",
    "remat",
    "save_matmuls",
    "value_and_grad",
]
