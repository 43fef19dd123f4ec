"""First values of parameters: shapes from the Config, spread from a rule, randomness from the key and the path.

A leaf's own key is fold_in(key, crc32(path)), so that adding a layer or a parameter changes no other leaf.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from purelm import random
from purelm.models.config import Config

__all__ = ["Variance", "course_init", "gpt2_init", "init", "leaf_key", "param_shapes", "scaled_residual"]

# (path, shape) -> standard deviation of a weight matrix before truncation.
Variance = Callable[[str, tuple[int, ...]], float]

EMBEDDINGS = ("token_embeddings.", "position_embeddings.")
RESIDUAL_OUTPUTS = (".attn.output_proj.weight", ".ffn.w2.weight")


def course_init(path: str, shape: tuple[int, ...]) -> float:
    """sqrt(2 / (fan_in + fan_out)) for linear layers (Glorot and Bengio 2010, eq. 16), 1 for embeddings."""
    return 1.0 if path.startswith(EMBEDDINGS) else math.sqrt(2.0 / (shape[0] + shape[1]))


def gpt2_init(path: str, shape: tuple[int, ...]) -> float:
    """0.02 for every matrix (Radford et al. 2018, GPT, section 4.1). Use with tied embeddings."""
    return 0.02


def scaled_residual(variance: Variance, n_layers: int) -> Variance:
    """`variance`, with what writes to the residual stream divided by sqrt(2 n_layers) (GPT-2, section 2.3).

    The 2 n_layers sublayers then add up to a stream whose spread does not grow with depth.

    >>> rule = scaled_residual(gpt2_init, n_layers=8)
    >>> rule("layers.0.ffn.w1.weight", (8, 4)), rule("layers.0.ffn.w2.weight", (4, 8))
    (0.02, 0.005)
    """

    def rule(path: str, shape: tuple[int, ...]) -> float:
        std = variance(path, shape)
        return std / math.sqrt(2.0 * n_layers) if path.endswith(RESIDUAL_OUTPUTS) else std

    return rule


def param_shapes(cfg: Config) -> dict[str, Any]:
    """The parameter tree with the shape of each leaf (a tuple) in its place.

    Names are the course's state_dict: layers.0.attn.q_proj.weight. Absent from a model without them: ln1, ln2,
    ln_final (no norm), ln1_post, ln2_post (not sandwich), w3 (not gated), lm_head (tied), position_embeddings.
    """
    D, F, V, K = cfg.d_model, cfg.ff_width, cfg.vocab_size, cfg.head_width
    q_width, kv_width = cfg.n_heads * K, cfg.kv_heads * K

    def norm() -> dict[str, Any]:
        bias = {"bias": (D,)} if cfg.norm == "layer" and cfg.biases == "all" else {}
        return {"weight": (D,), **bias}

    def linear(n_out: int, n_in: int, *, bias: bool) -> dict[str, Any]:
        return {"weight": (n_out, n_in), **({"bias": (n_out,)} if bias else {})}

    every, qkv = cfg.biases == "all", cfg.biases in ("all", "qkv")

    def layer() -> dict[str, Any]:
        attn = {
            "q_proj": linear(q_width, D, bias=qkv),
            "k_proj": linear(kv_width, D, bias=qkv),
            "v_proj": linear(kv_width, D, bias=qkv),
            "output_proj": linear(D, q_width, bias=every),
        }
        if cfg.qk_norm != "none":
            head = cfg.qk_norm == "head"
            attn |= {"q_norm": {"weight": (K if head else q_width,)}, "k_norm": {"weight": (K if head else kv_width,)}}
        ffn = {"w1": linear(F, D, bias=every), "w2": linear(D, F, bias=every)}
        if cfg.gated:
            ffn["w3"] = linear(F, D, bias=every)
        norms = {} if cfg.norm == "none" else {"ln1": norm(), "ln2": norm()}
        if cfg.norm_position == "sandwich":
            norms |= {"ln1_post": norm(), "ln2_post": norm()}
        return {"attn": attn, "ffn": ffn, **norms}

    shapes: dict[str, Any] = {
        "token_embeddings": {"weight": (V, D)},
        "layers": [layer() for _ in range(cfg.n_layers)],
    }
    if cfg.position == "learned":
        shapes["position_embeddings"] = {"weight": (cfg.context_length, D)}
    if cfg.norm != "none":
        shapes["ln_final"] = norm()
    if not cfg.tie_embeddings:
        shapes["lm_head"] = {"weight": (V, D)}
    return shapes


def leaf_key(key: random.Key, path: str) -> random.Key:
    """The key of the leaf at `path`."""
    return random.fold_in(key, zlib.crc32(path.encode()))


def init(
    key: random.Key, cfg: Config, variance: Variance = course_init, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Fresh parameters: matrices std * N(0, 1) cut at 3 std, std = variance(path, shape); norms 1; biases 0.

    Drawn in fp32 and cast to `dtype`, on the key's device.

    >>> cfg = Config(vocab_size=8, context_length=4, d_model=4, n_layers=1, n_heads=2)
    >>> init(random.key(0), cfg)["layers"][0]["attn"]["q_proj"]["weight"].shape
    torch.Size([4, 4])
    """

    def leaf(path: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            fill = 0.0 if path.endswith("bias") else 1.0
            return torch.full(shape, fill, dtype=dtype, device=key.device)
        draw = torch.float64 if dtype == torch.float64 else torch.float32
        x = random.truncated_normal(leaf_key(key, path), shape, -3.0, 3.0, draw)
        return (x * variance(path, shape)).to(dtype)

    return _map_shapes(leaf, "", param_shapes(cfg))


def _map_shapes(f: Callable[[str, tuple[int, ...]], Tensor], path: str, shapes: Any) -> Any:
    """f(path, shape) in a tree of shapes, whose tuples `purelm.tree` would take for nodes."""
    if isinstance(shapes, tuple):
        return f(path, shapes)
    items = shapes.items() if isinstance(shapes, dict) else enumerate(shapes)
    new = {name: _map_shapes(f, f"{path}.{name}" if path else str(name), x) for name, x in items}
    return new if isinstance(shapes, dict) else list(new.values())
