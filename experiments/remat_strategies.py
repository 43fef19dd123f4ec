"""Strategies of activation checkpointing as functions, and what each one should cost.

A strategy maps the L functions of the blocks to one function; all give the same value and gradients (checked here).
remat(f) keeps only f's input for backward.

    none        f_L . ... . f_1
    per block   remat(f_L) . ... . remat(f_1)
    groups      remat(f_2g . ... . f_g+1) . remat(f_g . ... . f_1)        g = 2, and g = round(sqrt L)
    recursive   R(f_1..f_L) = R(right half) . remat(R(left half)),        R(f) = f
    selective   per block, but the results of the attention op (o and log-sum-exp) are kept

Bytes of activations at the first step of backward, where a tensor between two blocks has b bytes, one block saves A
bytes (its input included; measured), and o and log-sum-exp have s bytes:

    none L A;  per block L b + A;  groups (L/g) b + g A;  recursive ceil(log2 L) b + A;  selective L (b + s) + A

The predicted peak adds what the formula leaves out (`predict`): a block's temporaries, gradients, and the loss.
Recomputation, in forward passes of a block: per block and groups L; recursive (L/2) log2 L (each level runs its left
halves once more); selective L, without attention's two products. torch stops a recomputation at the last tensor that
backward needs, so each one omits the product by W2 in its last block (with pre-norm).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from experiments.memory import Use
from purelm import accounting
from purelm.models.config import Config
from purelm.transforms import remat

Layer = Callable[[Tensor], Tensor]  # x_BTD -> x_BTD
Strategy = Callable[[Sequence[Layer]], Layer]


def compose(fs: Sequence[Layer]) -> Layer:
    """The function that runs fs one after another."""

    def f(x: Tensor) -> Tensor:
        for g in fs:
            x = g(x)
        return x

    return f


def per_block(fs: Sequence[Layer]) -> Layer:
    return compose([remat(f) for f in fs])


def groups(size: int, fs: Sequence[Layer]) -> Layer:
    return compose([remat(compose(fs[i : i + size])) for i in range(0, len(fs), size)])


def recursive(fs: Sequence[Layer]) -> Layer:
    if len(fs) == 1:
        return fs[0]
    half = len(fs) // 2
    return compose([remat(recursive(fs[:half])), recursive(fs[half:])])


def is_attention(op: Any) -> bool:
    """Policy of `remat`: whether op computes attention, our kernel's or SDPA's."""
    name = str(op)
    return name.startswith(("purelm.flash_attention_fwd", "aten._scaled_dot_product_")) and "backward" not in name


def selective(fs: Sequence[Layer]) -> Layer:
    return compose([remat(f, policy=is_attention) for f in fs])


def strategies(n_layers: int, ops_name: str) -> dict[str, Strategy]:
    """The strategies by name; groups of sqrt(L) only if that is not 2."""
    root = max(1, round(math.sqrt(n_layers)))
    sizes = sorted({2, root} - {1}) if n_layers > 1 else []
    return {
        "none": compose,
        "per block": per_block,
        **{f"groups of {g}": partial(groups, g) for g in sizes},
        "recursive": recursive,
        **({} if ops_name == "reference" else {"selective": selective}),
    }


class Parts(NamedTuple):
    """Bytes that appear in the formulas."""

    b: int  # a tensor between two blocks
    A: int  # saved by one block, input included
    s: int  # o and log-sum-exp of one block
    block: Use  # one block's forward and backward, its input not counted
    head: Use  # final norm and loss, their input not counted
    P: int  # gradients of one block's parameters
    E: int  # gradients of the unembedding and the final norm
    V: int  # gradient of the embeddings


def formula(name: str, L: int, p: Parts) -> int:
    """Bytes of activations at the first step of backward: the table at the top of the file."""
    if name.startswith("groups"):
        g = min(int(name.split()[-1]), L)
        return -(-L // g) * p.b + g * p.A
    depth = math.ceil(math.log2(L))
    return {
        "none": L * p.A,
        "per block": L * p.b + p.A,
        "recursive": depth * p.b + p.A,
        "selective": L * (p.b + p.s) + p.A,
    }[name]


def predict(name: str, L: int, p: Parts) -> Use:
    """(kept, peak) in bytes: the formula, and a block's temporaries, the gradients and the loss.

    kept = what the strategy's forward leaves + b (the last block's result) + what the loss keeps
    peak = the largest of
        in the loss:           left + b + peak of the loss
        first step back:       left by the other blocks + E + U
        last step back:        E + (L - u) P + (u - 1) A + U      for u blocks computed again at a time
        gradient of embedding: E + L P + b + V
    where U = b (input) + b (gradient of the output) + the peak of one block, its gradients included.
    """
    U = 2 * p.b + p.block.peak
    g = min(int(name.split()[-1]), L) if name.startswith("groups") else 1
    left, others = {
        "none": (L * p.A, (L - 1) * p.A),
        "per block": (L * p.b, (L - 1) * p.b),
        "recursive": (math.ceil(math.log2(L)) * p.b + p.A, math.ceil(math.log2(L)) * p.b),
        "selective": (L * (p.b + p.s), (L - 1) * (p.b + p.s)),
    }.get(name, (-(-L // g) * p.b, (-(-L // g) - 1) * p.b + (g - 1) * p.A))
    peak = max(
        left + p.b + p.head.peak,
        others + p.E + U,
        p.E + (L - g) * p.P + (g - 1) * p.A + U,
        p.E + L * p.P + p.b + p.V,
    )
    return Use(left + p.b + p.head.kept, peak)


def extra_flops(name: str, cfg: Config, batch_size: int) -> float:
    """FLOPs computed again, by the rule at the top of the file."""
    L = cfg.n_layers
    parts = {k: v / L for k, v in accounting.forward_flops(cfg, batch_size).items() if k != "lm_head"}  # of a block
    one, spared = sum(parts.values()), parts["ffn_w2"] if cfg.norm_position == "pre" else 0.0
    if name == "none":
        return 0.0
    if name == "recursive":
        return _run_again(L) * one - (L - 1) * spared
    if name.startswith("groups"):
        return L * one - math.ceil(L / int(name.split()[-1])) * spared
    kept = parts["scores"] + parts["values"] if name == "selective" else 0.0
    return L * (one - kept - spared)


def _run_again(n: int) -> int:
    """Number of blocks that recursive checkpointing of n blocks recomputes: (n/2) log2 n for a power of two."""
    return 0 if n == 1 else n // 2 + _run_again(n // 2) + _run_again(n - n // 2)
