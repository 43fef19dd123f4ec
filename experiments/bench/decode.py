"""Time to generate tokens one by one: with a key/value cache, and without (all tokens are computed each time).

    python -m experiments.bench.decode [--device cuda] [--sizes 3m 22m] [--json FILE]

Both run the same model eagerly, batch 1, and compute logits of the last position alone. Two measures: one more token
after N, and all N from a prompt of one token. For the second the uncached model is timed only at every stride-th
length, which stands for the lengths between. `generate` is the library's function, sampling included.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from experiments.bench.report import publish, row
from experiments.console import pick_device, program, say
from purelm import random, tree
from purelm.generate import generate
from purelm.models import transformer
from purelm.ops import REFERENCE
from purelm.ops.sdpa import sdpa_attention

OPS = REFERENCE._replace(attention=sdpa_attention)

# vocab, d_model, layers, heads, d_ff
SIZES = {
    "3m": (1024, 192, 4, 6, 512),
    "22m": (10_000, 512, 4, 16, 1344),
    "134m": (32_000, 768, 12, 12, 2048),
}


@dataclass(frozen=True)
class Args:
    """Cached against uncached decoding."""

    device: str = "auto"
    sizes: tuple[str, ...] = ("3m", "22m")
    tokens: int = 512
    """final length N, from a prompt of one token"""
    stride: int = 8
    """the uncached model is timed at every stride-th length"""
    json: Path | None = None


def seconds(f: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def cached(params: Any, model: transformer.Model, tokens: torch.Tensor) -> None:
    n = tokens.shape[1]
    cache = model.init_cache(1, n, device=tokens.device)
    with torch.no_grad():
        _, cache = model.prefill(params, tokens[:, :1], cache)
        for t in range(1, n):
            _, cache = model.decode_(params, tokens[:, t], cache, used=t)


def uncached(params: Any, model: transformer.Model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        h = model.hidden(params, tokens)[:, -1]
        return h @ model.unembedding(params).T


def measure(size: str, n: int, stride: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows of one model."""
    if size not in SIZES:
        raise ValueError(f"sizes: {size!r} is not one of {', '.join(SIZES)}")
    V, D, L, H, F = SIZES[size]
    cfg = transformer.Config(vocab_size=V, context_length=n, d_model=D, n_layers=L, n_heads=H, d_ff=F)
    model = transformer.make(cfg, OPS)
    params = tree.to(model.init(random.key(0)), device)
    tokens = random.randint(random.key(1), (1, n), 0, V).to(device)
    key, prompt = random.key(2), tokens[:, :1].tolist()
    say(f"{size}: {tree.n_params(params):,} parameters")
    for warm in (tokens[:, :8], tokens):
        uncached(params, model, warm)
    cached(params, model, tokens[:, :8])
    slow = [seconds(lambda t=t: uncached(params, model, tokens[:, :t]), device) for t in range(stride, n + 1, stride)]  # type: ignore[misc]
    whole = sum(slow) / len(slow) * n
    fast = seconds(lambda: cached(params, model, tokens), device)
    sampled = seconds(lambda: generate(model, params, prompt, key, max_new_tokens=n - 1), device)
    last_slow = min(seconds(lambda: uncached(params, model, tokens), device) for _ in range(5))
    last_fast = min(last_token(params, model, tokens, device) for _ in range(5))
    where = str(device)
    return [
        row(f"{size}: token {n}", last_fast, "s", peer="uncached", peer_value=last_slow, device=where),
        row(f"{size}: tokens 1 to {n}", fast, "s", peer="uncached", peer_value=whole, device=where),
        row(f"{size}: generate {n - 1} tokens", sampled, "s", peer="uncached", peer_value=whole, device=where),
    ]


def last_token(params: Any, model: transformer.Model, tokens: torch.Tensor, device: torch.device) -> float:
    """Seconds for the last token, with all before it in the cache."""
    n = tokens.shape[1]
    with torch.no_grad():
        cache = model.init_cache(1, n, device=device)
        _, cache = model.prefill(params, tokens[:, :-1], cache)
        return seconds(lambda: model.decode_(params, tokens[:, -1], cache, used=n - 1), device)


@program
def main(args: Args) -> None:
    device = pick_device(args.device)
    rows = [r for size in args.sizes for r in measure(size, args.tokens, args.stride, device)]
    publish(rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
