"""Parameters, FLOPs and bytes of a model, by part."""

import math
from typing import Any

from purelm.models.config import Config
from purelm.models.layers import counted_layers, leaves_of_layer, leaves_outside
from purelm.models.leaves import Leaves
from purelm.models.mixers import Cost
from purelm.models.mixers.attention import visible_pairs

__all__ = [
    "activation_bytes",
    "adamw_flops",
    "forward_flops",
    "kv_cache_bytes",
    "max_batch_size",
    "n_params",
    "n_params_without_embeddings",
    "optimizer_bytes",
    "params",
    "params_by_part",
    "six_n_d",
    "train_bytes",
    "train_flops",
    "visible_pairs",
]


def params(cfg: Config) -> dict[str, int]:
    """Parameters by part; the sum is what `init(key, cfg)` makes.

    >>> cfg = Config(vocab_size=50257, context_length=1024, d_model=1600, n_layers=48, n_heads=25, d_ff=4288)
    >>> sum(params(cfg).values())
    1640452800
    """
    parts = dict.fromkeys(("token_embeddings", "position_embeddings", "attention", "ffn", "norms", "lm_head"), 0)
    before, behind = leaves_outside(cfg)
    layers = [_times(params_by_part(leaves_of_layer(cfg, layer)), n) for layer, n in counted_layers(cfg)]
    return _sum(parts, params_by_part({**before, **behind}), *layers)


def params_by_part(table: Leaves) -> dict[str, int]:
    """Parameters of any model by part, from its leaf table."""
    return _sum(*[{leaf.part: math.prod(leaf.shape)} for leaf in table.values()])


def n_params(cfg: Config) -> int:
    """N, the number of all parameters."""
    return sum(params(cfg).values())


def n_params_without_embeddings(cfg: Config) -> int:
    """N minus token embeddings, position embeddings and output head (Kaplan et al., 2001.08361, section 1.3)."""
    outside = ("token_embeddings", "position_embeddings", "lm_head")
    return sum(n for part, n in params(cfg).items() if part not in outside)


def forward_flops(
    cfg: Config, batch_size: int = 1, length: int | None = None, *, skip_masked: bool = False
) -> dict[str, int]:
    """FLOPs of a forward pass over batch_size sequences of `length` (context_length when None), by part.

    Args:
        skip_masked: count attention only over the (query, key) pairs that the mask allows, about what a flash kernel
            computes; else over all T^2 pairs, as CS336 does and as is usual for MFU.

    >>> cfg = Config(vocab_size=50257, context_length=1024, d_model=1600, n_layers=48, n_heads=25, d_ff=4288)
    >>> sum(forward_flops(cfg).values()) / 1e12
    3.5167...
    """
    T = cfg.context_length if length is None else length
    head = {"lm_head": 2 * batch_size * T * cfg.d_model * cfg.vocab_size}
    costs = _costs(cfg, batch_size, T, skip_masked=skip_masked)
    return _sum(*[_times(cost.flops, n) for cost, n in costs], head)


def train_flops(
    cfg: Config, batch_size: int = 1, length: int | None = None, *, remat: bool = False, skip_masked: bool = False
) -> int:
    """FLOPs of forward and backward: 3 times the forward pass, since backward has two products for each one in forward.

    remat: 4 times, since forward runs twice. For MFU leave remat False, since recomputation does not count as useful.
    """
    return (4 if remat else 3) * sum(forward_flops(cfg, batch_size, length, skip_masked=skip_masked).values())


def six_n_d(n_params: int, n_tokens: int) -> int:
    """6 N D, the usual approximation of training FLOPs for N parameters and D tokens (2001.08361, section 2.1)."""
    return 6 * n_params * n_tokens


def adamw_flops(n_params: int) -> int:
    """Element-wise FLOPs of one AdamW step: 14 a parameter.

    First moment m: 3 (two products, a sum). Second moment v: 4 (three products, a sum). Weight decay: 2. Update: 5
    (square root, + eps, quotient, times the learning rate alpha_t, difference).
    """
    return 14 * n_params


def activation_bytes(
    cfg: Config,
    batch_size: int = 1,
    length: int | None = None,
    *,
    bytes_per_element: int = 4,
    flash: bool = False,
    remat: bool = False,
) -> dict[str, int]:
    """Bytes of activations that backward needs, by part, if one tensor is kept for the result of each operation.

    The operations are those that CS336 lists: norms, q k v, scores, softmax, weighted values, output projection, ffn
    (W1, activation, W3, product, W2), final norm, logits, cross-entropy. This is an estimate: compiled code keeps less,
    eager code more (fp32 copies, masks, rotary products).

    Args:
        bytes_per_element: 4 for fp32, 2 for bf16.
        flash: instead of scores and softmax, one fp32 log-sum-exp for each query and head is kept.
        remat: kept are the input of each block, and all activations of the one block that is being recomputed.
    """
    T = cfg.context_length if length is None else length
    N, D, e = batch_size * T, cfg.d_model, bytes_per_element
    n_norms = 0 if cfg.norm == "none" else 4 if cfg.norm_position == "sandwich" else 2
    costs = _costs(cfg, batch_size, T, bytes_per_element=e, flash=flash)
    layers = [({"norms": n_norms * N * D * e, **cost.activation_bytes}, n) for cost, n in costs]
    if remat:
        layers = [(max((parts for parts, _ in layers), key=lambda parts: sum(parts.values())), 1)]
    return {
        **({"block_inputs": cfg.n_layers * N * D * e} if remat else {}),
        **_sum(*[_times(parts, n) for parts, n in layers]),
        "final_norm": 0 if cfg.norm == "none" else N * D * e,
        "lm_head": N * cfg.vocab_size * e,
        "cross_entropy": N * cfg.vocab_size * e,
    }


def _costs(
    cfg: Config, batch_size: int, length: int, *, bytes_per_element: int = 4, **options: Any
) -> list[tuple[Cost, int]]:
    """For each distinct layer, (cost of its mixer and feed-forward layer together, how many of it the model has)."""
    out = []
    for layer, n in counted_layers(cfg):
        mixer, ffn = layer.mixer, layer.feed_forward
        one = mixer.cost(mixer.config, batch_size, length, bytes_per_element=bytes_per_element, **options)
        two = ffn.cost(
            ffn.config, cfg.d_model, cfg.ff_width, batch_size, length, bytes_per_element=bytes_per_element
        )
        flops, kept = _sum(one.flops, two.flops), _sum(one.activation_bytes, two.activation_bytes)
        out.append((Cost(flops, kept, one.cache_elements), n))
    return out


def _times(parts: dict[str, int], n: int) -> dict[str, int]:
    return {name: n * x for name, x in parts.items()}


def _sum(*parts: dict[str, int]) -> dict[str, int]:
    names = dict.fromkeys(name for some in parts for name in some)
    return {name: sum(some.get(name, 0) for some in parts) for name in names}


def optimizer_bytes(n_params: int, *, n_moments: int = 2, bytes_per_element: int = 4) -> int:
    """Bytes of optimizer state. n_moments: 2 for AdamW; 1 for Muon, Lion and SGD with momentum."""
    return n_moments * bytes_per_element * n_params


def train_bytes(
    cfg: Config,
    batch_size: int = 1,
    length: int | None = None,
    *,
    param_bytes: int = 4,
    grad_bytes: int = 4,
    copy_bytes: int = 0,
    n_moments: int = 2,
    moment_bytes: int = 4,
    bytes_per_element: int = 4,
    flash: bool = False,
    remat: bool = False,
) -> dict[str, int]:
    """Bytes of a training step by kind; the defaults are those of CS336, AdamW with everything in fp32.

    Args:
        param_bytes, grad_bytes, moment_bytes: bytes of one element of parameters, gradients and moments.
        copy_bytes: bytes of one element of the cast copy of parameters for forward and backward (2 for bf16 with fp32
            master weights); 0: no copy.
        bytes_per_element, flash, remat: as for `activation_bytes`.
    """
    N = n_params(cfg)
    activations = activation_bytes(
        cfg, batch_size, length, bytes_per_element=bytes_per_element, flash=flash, remat=remat
    )
    return {
        "parameters": (param_bytes + copy_bytes) * N,
        "gradients": grad_bytes * N,
        "optimizer": optimizer_bytes(N, n_moments=n_moments, bytes_per_element=moment_bytes),
        "activations": sum(activations.values()),
    }


def max_batch_size(cfg: Config, memory_bytes: float, length: int | None = None, **kinds: Any) -> int:
    """The largest batch (sequences) whose `train_bytes` fit into memory_bytes; 0 if one sequence does not fit.

    kinds: keywords of `train_bytes`.

    >>> cfg = Config(vocab_size=50257, context_length=1024, d_model=1600, n_layers=48, n_heads=25, d_ff=4288)
    >>> max_batch_size(cfg, 80e9)
    3
    """
    one = train_bytes(cfg, 1, length, **kinds)
    fixed = sum(one.values()) - one["activations"]
    return max(0, int((memory_bytes - fixed) // one["activations"]))


def kv_cache_bytes(cfg: Config, batch_size: int = 1, length: int | None = None, *, bytes_per_element: int = 2) -> int:
    """Bytes of a decoding cache after `length` positions (context_length when None): attention's keys and values."""
    T = cfg.context_length if length is None else length
    return bytes_per_element * sum(n * cost.cache_elements for cost, n in _costs(cfg, batch_size, T))
