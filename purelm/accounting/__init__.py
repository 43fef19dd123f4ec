"""What a model costs: parameters, FLOPs and bytes by part, and the share of a device's peak that a run reaches.

Plain arithmetic on a `transformer.Config`; no tensor is made. A function that returns a dict returns the parts, which
sum to the whole. FLOPs are those of matrix products, 2 m n k for (m, k) times (k, n); norms, softmax and other
element-wise work are left out, as in CS336 (they are less than a percent).

Legend: B batch, T positions, D d_model, H query heads, G key/value heads, K head dim, F ffn width, V vocabulary,
L layers, N parameters.
"""

from purelm.accounting.costs import (
    activation_bytes,
    adamw_flops,
    forward_flops,
    kv_cache_bytes,
    max_batch_size,
    n_params,
    n_params_without_embeddings,
    optimizer_bytes,
    params,
    params_by_part,
    six_n_d,
    train_bytes,
    train_flops,
    visible_pairs,
)
from purelm.accounting.peaks import (
    mfu,
    peak_flops,
    train_seconds,
)

__all__ = [
    "activation_bytes",
    "adamw_flops",
    "forward_flops",
    "kv_cache_bytes",
    "max_batch_size",
    "mfu",
    "n_params",
    "n_params_without_embeddings",
    "optimizer_bytes",
    "params",
    "params_by_part",
    "peak_flops",
    "six_n_d",
    "train_bytes",
    "train_flops",
    "train_seconds",
    "visible_pairs",
]
