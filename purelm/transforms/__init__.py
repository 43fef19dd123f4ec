"""Transformations of pure functions: gradients, compilation with donation, rematerialisation, accumulation.

Each takes a function of trees and returns one; none changes its arguments (`jit` consumes what it was told to).
`value_and_grad` is first-order reverse mode through torch.autograd. For forward mode, per-sample gradients and
higher derivatives apply torch.func to the same functions.

Inside torch.compile, `value_and_grad` and `accumulate` end a graph: the differentiated function becomes a forward
and a backward graph, with torch's partitioner between them, and what follows another. Dynamo can trace
torch.autograd.grad into one graph from torch 2.13 on, but that one has no partitioner: for a small Transformer it
took 2.6 times as long to compile and ran 4 % slower.
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
