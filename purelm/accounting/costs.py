"""Parameters, FLOPs and bytes of a model, by part."""

from typing import Any

from purelm.models.config import Config

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
    _check_mixers(cfg)
    D, F, L, V = cfg.d_model, cfg.ff_width, cfg.n_layers, cfg.vocab_size
    q_width, kv_width = cfg.n_heads * cfg.head_width, cfg.kv_heads * cfg.head_width
    n_ffn = 3 if cfg.gated else 2
    attention = 2 * D * q_width + 2 * D * kv_width
    ffn = n_ffn * D * F
    if cfg.biases in ("qkv", "all"):
        attention += q_width + 2 * kv_width
    if cfg.biases == "all":
        attention += D
        ffn += (n_ffn - 1) * F + D
    attention += {"none": 0, "head": 2 * cfg.head_width, "full": q_width + kv_width}[cfg.qk_norm]
    one_norm = 2 * D if cfg.norm == "layer" and cfg.biases == "all" else D
    n_norms = 0 if cfg.norm == "none" else (4 if cfg.norm_position == "sandwich" else 2) * L + 1
    return {
        "token_embeddings": V * D,
        "position_embeddings": cfg.context_length * D if cfg.position == "learned" else 0,
        "attention": L * attention,
        "ffn": L * ffn,
        "norms": n_norms * one_norm,
        "lm_head": 0 if cfg.tie_embeddings else V * D,
    }


def n_params(cfg: Config) -> int:
    """N, all parameters."""
    return sum(params(cfg).values())


def n_params_without_embeddings(cfg: Config) -> int:
    """N less token embeddings, position embeddings and output head (Kaplan et al., 2001.08361, section 1.3)."""
    parts = params(cfg)
    return parts["attention"] + parts["ffn"] + parts["norms"]


def visible_pairs(length: int, *, causal: bool = True, window: int | None = None) -> int:
    """(query, key) pairs that attention over `length` positions sees; window as in Config.

    >>> visible_pairs(4), visible_pairs(4, window=1), visible_pairs(4, causal=False)
    (10, 7, 16)
    """
    reach = length if window is None else min(window + 1, length)
    to_the_left = reach * (reach + 1) // 2 + (length - reach) * reach  # own position included
    return to_the_left if causal else 2 * to_the_left - length


def forward_flops(
    cfg: Config, batch_size: int = 1, length: int | None = None, *, skip_masked: bool = False
) -> dict[str, int]:
    """FLOPs of a forward pass over batch_size sequences of `length` (context_length when None), by part.

    Args:
        skip_masked: count attention over visible pairs alone, which a flash kernel comes near; else all T^2 pairs,
            as the course does and as MFU is usually stated.

    >>> cfg = Config(vocab_size=50257, context_length=1024, d_model=1600, n_layers=48, n_heads=25, d_ff=4288)
    >>> sum(forward_flops(cfg).values()) / 1e12
    3.5167...
    """
    _check_mixers(cfg)
    T = cfg.context_length if length is None else length
    D, F, L = cfg.d_model, cfg.ff_width, cfg.n_layers
    q_width, kv_width = cfg.n_heads * cfg.head_width, cfg.kv_heads * cfg.head_width
    pairs = L * T * T
    if skip_masked:
        pairs = sum(visible_pairs(T, causal=cfg.causal, window=cfg.window_of(i)) for i in range(L))
    B, N = batch_size, batch_size * T
    return {
        "qkv": L * 2 * N * D * (q_width + 2 * kv_width),
        "scores": 2 * B * pairs * q_width,
        "values": 2 * B * pairs * q_width,
        "output": L * 2 * N * q_width * D,
        "ffn_w1": L * 2 * N * D * F,
        "ffn_w3": L * 2 * N * D * F if cfg.gated else 0,
        "ffn_w2": L * 2 * N * F * D,
        "lm_head": 2 * N * D * cfg.vocab_size,
    }


def train_flops(
    cfg: Config, batch_size: int = 1, length: int | None = None, *, remat: bool = False, skip_masked: bool = False
) -> int:
    """FLOPs of forward and backward: 3 times the forward pass, since backward forms two products for each one.

    remat: 4 times, every product once more. For MFU leave it False: recomputation is not useful work.
    """
    return (4 if remat else 3) * sum(forward_flops(cfg, batch_size, length, skip_masked=skip_masked).values())


def six_n_d(n_params: int, n_tokens: int) -> int:
    """6 N D, the usual approximation of training FLOPs for N parameters and D tokens (2001.08361, section 2.1)."""
    return 6 * n_params * n_tokens


def adamw_flops(n_params: int) -> int:
    """Element-wise FLOPs of one AdamW step: 14 a parameter.

    m: 3 (two products, a sum). v: 4 (three products, a sum). Decay: 2. Root, + eps, quotient, times alpha_t,
    difference: 5.
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
    """Bytes that backward needs from forward, by part: the course's list, one tensor for each operation's result.

    norms, q k v, scores, softmax, weighted values, output projection, ffn (W1, activation, W3, product, W2), final
    norm, logits, cross-entropy. A model of memory, not a measurement: a compiler keeps less, plain eager code more
    (fp32 copies, masks, rotary products).

    Args:
        bytes_per_element: 4 for fp32, 2 for bf16.
        flash: no scores and no softmax are kept, but one fp32 log-sum-exp for each query and head.
        remat: of each block only its input is kept; one block at a time is computed again.
    """
    _check_mixers(cfg)
    T = cfg.context_length if length is None else length
    N, L, D, F = batch_size * T, cfg.n_layers, cfg.d_model, cfg.ff_width
    q_width, kv_width = cfg.n_heads * cfg.head_width, cfg.kv_heads * cfg.head_width
    n_norms = 0 if cfg.norm == "none" else 4 if cfg.norm_position == "sandwich" else 2
    square, e = cfg.n_heads * N * T, bytes_per_element
    block = {
        "norms": n_norms * N * D * e,
        "qkv": N * (q_width + 2 * kv_width) * e,
        "scores": 0 if flash else square * e,
        "softmax": cfg.n_heads * N * 4 if flash else square * e,
        "values": N * q_width * e,
        "output": N * D * e,
        "ffn": (N * F * (4 if cfg.gated else 2) + N * D) * e,
    }
    blocks = {name: size * (1 if remat else L) for name, size in block.items()}
    return {
        **({"block_inputs": L * N * D * e} if remat else {}),
        **blocks,
        "final_norm": 0 if cfg.norm == "none" else N * D * e,
        "lm_head": N * cfg.vocab_size * e,
        "cross_entropy": N * cfg.vocab_size * e,
    }


def optimizer_bytes(n_params: int, *, n_moments: int = 2, bytes_per_element: int = 4) -> int:
    """Bytes of optimizer state: two moments for AdamW, one for Muon, Lion and SGD with momentum."""
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
    """Bytes of a training step by kind; the defaults are the course's, AdamW with everything in fp32.

    Args:
        param_bytes, grad_bytes, moment_bytes: of one element. copy_bytes: of the cast copy that computes (2 for bf16
            beside fp32 masters).
        bytes_per_element, flash, remat: of `activation_bytes`.
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
    """The largest batch whose `train_bytes` (keywords as there) fit into memory_bytes; 0 when one sequence does not.

    >>> cfg = Config(vocab_size=50257, context_length=1024, d_model=1600, n_layers=48, n_heads=25, d_ff=4288)
    >>> max_batch_size(cfg, 80e9)
    3
    """
    one = train_bytes(cfg, 1, length, **kinds)
    fixed = sum(one.values()) - one["activations"]
    return max(0, int((memory_bytes - fixed) // one["activations"]))


def kv_cache_bytes(cfg: Config, batch_size: int = 1, length: int | None = None, *, bytes_per_element: int = 2) -> int:
    """Bytes of the keys and values of `length` slots (context_length when None) in all layers."""
    _check_mixers(cfg)
    T = cfg.context_length if length is None else length
    return 2 * cfg.n_layers * batch_size * T * cfg.kv_heads * cfg.head_width * bytes_per_element


def _check_mixers(cfg: Config) -> None:
    names = cfg.mixer if isinstance(cfg.mixer, tuple) else (cfg.mixer,)
    for name in names:
        if name != "attention":
            raise ValueError(f"accounting counts layers whose mixer is 'attention', got {name!r}")
