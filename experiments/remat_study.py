"""Activation checkpointing as composition of functions: memory, time and FLOPs of six strategies, beside formulas.

    python -m experiments.remat_study [--size 134m] [--json FILE]
    python -m experiments.remat_study --model.n-layers 16 --model.d-model 64 --model.n-heads 2

The strategies, the formula and the prediction of the peak are those of experiments/remat_strategies.py. Every strategy
must give the gradients of "none" (to 1e-6 of the largest in fp32), else the program ends with an error. The table:

    formula               activations at the first step of backward: L b + A and the like
    kept after forward    bytes held between forward and backward, and their ratio to the prediction
    peak, predicted       bytes in forward and backward, with gradients and without parameters; ratio: peak / predicted
    extra FLOPs %         recomputed products, counted by torch, in percent of forward and backward; and predicted

On a CPU memory is read off the profiler's record of allocations, on a GPU off the allocator's counters.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from experiments.bench.report import row
from experiments.bench.train_step import batches, synchronize
from experiments.console import in_bf16, pick_device, program, say
from experiments.limits import Count
from experiments.memory import SMALL, Use, chosen, columns, human, memory_of, record_saved
from experiments.ops import OpsName, ops_named
from experiments.remat_strategies import Layer, Parts, Strategy, extra_flops, formula, predict, strategies
from purelm import accounting, random, tree
from purelm.models import transformer
from purelm.models.block import apply_norm, block
from purelm.models.config import Config
from purelm.models.context import contexts
from purelm.models.embedding import embed, unembedding
from purelm.models.layers import layer_of, norm_of
from purelm.ops import Ops


@dataclass(frozen=True)
class Args:
    """Strategies of activation checkpointing, measured."""

    size: str | None = None
    """a size of experiments.bench.train_step (3m, 22m, 134m, 374m); default the --model flags"""
    model: Config = field(default_factory=lambda: SMALL)
    batch_size: Count | None = None
    """sequences in a batch; default that of the size, or 4"""
    ops: OpsName = "fused"
    """bundle of ops; 'reference' has no selective strategy, since its attention is not a single op"""
    compute: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU with units for it, else fp32"""
    repeats: Count = 5
    """timed passes of each strategy"""
    device: str = "auto"
    json: Path | None = None


def layers(params: Any, cfg: Config, ops: Ops, ctxs: Any) -> list[Layer]:
    """The blocks as functions of x alone."""
    kinds = [layer_of(cfg, i) for i in range(cfg.n_layers)]
    return [partial(_call, kind, p, ctx, ops) for kind, p, ctx in zip(kinds, params["layers"], ctxs, strict=True)]


def _call(kind: Any, layer: Any, ctx: Any, ops: Ops, x: Tensor) -> Tensor:
    return block(kind, layer, x, ctx, ops)


def start(params: Any, tokens: Tensor, cfg: Config, ops: Ops) -> tuple[Tensor, Any]:
    """(x_BTD before the first block, the Context of each block)."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    x = embed(params, tokens, positions, cfg, ops)
    ropes = [cfg.rope_of(i) for i in range(cfg.n_layers)]
    return x, contexts(positions, None, cfg, ropes, length=tokens.shape[1], dtype=x.dtype)


def head(params: Any, x: Tensor, targets: Tensor, cfg: Config, ops: Ops) -> Tensor:
    """Mean loss of final states, nats."""
    h = apply_norm(norm_of(cfg), params, "ln_final", x, ops)
    n = float(targets.numel())
    return ops.linear_cross_entropy(
        h, unembedding(params, cfg), targets, denominator=n, softcap=cfg.logit_softcap
    )[0]


def model_loss(params: Any, batch: dict[str, Tensor], cfg: Config, ops: Ops, strategy: Strategy) -> Tensor:
    """`transformer.loss` with the blocks composed by a strategy."""
    x, ctxs = start(params, batch["tokens"], cfg, ops)
    return head(params, strategy(layers(params, cfg, ops, ctxs))(x), batch["targets"], cfg, ops)


def measure_parts(params: Any, batch: dict[str, Tensor], cfg: Config, ops: Ops) -> Parts:
    """Measure one block and the loss, each by itself."""
    device = batch["tokens"].device
    with torch.no_grad():
        x, ctxs = start(params, batch["tokens"], cfg, ops)
    x = x.detach().requires_grad_()
    f, weights = layers(params, cfg, ops, ctxs)[0], tree.leaves(params["layers"][0])
    top = [v for k, v in params.items() if k in ("ln_final", "lm_head") or (cfg.tie_embeddings and "token" in k)]
    tables = [t for t in ctxs[0] if isinstance(t, Tensor)]
    with record_saved(known=[*weights, *tables]) as saved:
        f(x)
    cotangent, targets = torch.ones_like(x), batch["targets"]
    for _ in range(2):  # the first one for warm-up
        of_block = memory_of(lambda: f(x), [x, *weights], device, cotangent)
        of_head = memory_of(lambda: head(params, x, targets, cfg, ops), [x, *tree.leaves(top)], device)
    e = x.element_size()
    return Parts(
        b=x.numel() * e,
        A=sum(t.bytes for t in saved),
        s=targets.numel() * cfg.n_heads * (cfg.head_width * e + 4),
        block=of_block,
        head=of_head,
        P=tree.n_bytes(params["layers"][0]),
        E=tree.n_bytes(top),
        V=tree.n_bytes(params["token_embeddings"]),
    )


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of matrix products and of attention over all pairs of positions; not those in the kernels' loss."""

    def products(time: int) -> Callable[..., int]:
        """Scores and values of attention(q, k, ...); `time` is the axis of positions."""

        def flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
            return 4 * math.prod(shapes[0]) * shapes[1][time]

        return flops

    import purelm.kernels.flash_attention  # noqa: F401  registers the ops

    # Ops that torch's counter does not know: ours, and SDPA's on a CPU (heads before time).
    mapping = {
        torch.ops.purelm.flash_attention_fwd: products(1),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: products(2),
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter:
        run()
    return counter.get_total_flops()


class Result(NamedTuple):
    """What was measured of one strategy."""

    use: Use
    ms: float
    flops: int
    difference: float  # largest |gradient - gradient of none| / largest |gradient of none|


def study(
    params: Any, batch: dict[str, Tensor], cfg: Config, ops: Ops, ways: dict[str, Strategy], repeats: int
) -> dict[str, Result]:
    """Each strategy's memory, time, FLOPs and gradients."""
    device, leaves = batch["tokens"].device, tree.leaves(params)
    wanted: list[Tensor] = []
    out = {}
    for name, strategy in ways.items():
        forward = partial(model_loss, params, batch, cfg, ops, strategy)
        grads = torch.autograd.grad(forward(), leaves)
        wanted = wanted or [g.cpu() for g in grads]
        scale = max(float(g.abs().max()) for g in wanted)
        difference = max(float((g.cpu() - w).abs().max()) for g, w in zip(grads, wanted, strict=True)) / scale
        allowed = 1e-6 if leaves[0].dtype == torch.float32 else 2e-2  # bf16: two roundings of 2^-8 each
        if not difference <= allowed:
            raise ValueError(f"{name}: gradients differ from those of none by {difference:.2g}; allowed is {allowed}")
        del grads
        flops = count_flops(lambda forward=forward: torch.autograd.grad(forward(), leaves))  # type: ignore[misc]
        seconds = []
        for _ in range(repeats):
            synchronize(device)
            begin = time.perf_counter()
            torch.autograd.grad(forward(), leaves)
            synchronize(device)
            seconds.append(time.perf_counter() - begin)
        use = memory_of(forward, leaves, device)
        out[name] = Result(use, 1e3 * statistics.median(seconds), flops, difference)
    return out


def show(found: dict[str, Result], parts: Parts, cfg: Config, batch_size: int) -> None:
    L, none = cfg.n_layers, found["none"]
    whole = accounting.train_flops(cfg, batch_size)
    lines = []
    for name, r in found.items():
        said = predict(name, L, parts)
        lines.append(
            [
                name, human(formula(name, L, parts)),
                human(r.use.kept), f"{r.use.kept / said.kept:.2f}",
                human(r.use.peak), human(said.peak), f"{r.use.peak / said.peak:.2f}",
                f"{r.ms:,.1f}", f"{r.ms / none.ms:.2f}",
                f"{100 * (r.flops - none.flops) / whole:.1f}",
                f"{100 * extra_flops(name, cfg, batch_size) / whole:.1f}", f"{r.difference:.1e}",
            ]
        )  # fmt: skip
    header = (
        "strategy", "formula", "kept after forward", "/ predicted", "peak", "predicted", "ratio", "ms", "x none",
        "extra FLOPs %", "predicted %", "gradients differ by",
    )  # fmt: skip
    print(columns(header, lines))
    print(
        f"\nb {human(parts.b)}, A {human(parts.A)}, s {human(parts.s)}; one block's peak {human(parts.block.peak)}, "
        f"the loss's {human(parts.head.peak)}; gradients: a block {human(parts.P)}, head {human(parts.E)}, "
        f"embedding {human(parts.V)}. Extra FLOPs are in percent of forward and backward."
    )


def as_rows(found: dict[str, Result], parts: Parts, cfg: Config, batch_size: int, device: str) -> list[dict[str, Any]]:
    whole = accounting.train_flops(cfg, batch_size)
    rows = []
    for name, r in found.items():
        said = predict(name, cfg.n_layers, parts)
        extra = 100 * (r.flops - found["none"].flops) / whole
        said_extra = 100 * extra_flops(name, cfg, batch_size) / whole
        for metric, value, unit, peer, peer_value in (
            ("peak memory", r.use.peak, "bytes", "predicted", said.peak),
            ("kept after forward", r.use.kept, "bytes", "predicted", said.kept),
            ("time", r.ms, "ms", "none", found["none"].ms),
            ("extra FLOPs", extra, "%", "predicted", said_extra),
            ("gradient difference", r.difference, "relative", None, None),
        ):
            rows.append(row(f"{name}: {metric}", value, unit, peer=peer, peer_value=peer_value, device=device))
    return rows


@program
def main(args: Args) -> None:
    device = pick_device(args.device)
    cfg, batch_size = chosen(args.size, args.model, args.batch_size, device)
    ops = ops_named(args.ops)
    dtype = torch.bfloat16 if in_bf16(args.compute, device) else torch.float32
    params = tree.cast(transformer.init(random.key(0, device=device), cfg), dtype)
    params = tree.map(lambda x: x.detach().requires_grad_(), params)
    batch = batches(cfg, batch_size, device, n=1)[0]
    say(f"{tree.n_params(params):,} parameters, {cfg.n_layers} blocks, {batch_size} x {cfg.context_length} tokens")
    parts = measure_parts(params, batch, cfg, ops)
    found = study(params, batch, cfg, ops, strategies(cfg.n_layers, args.ops), args.repeats)
    show(found, parts, cfg, batch_size)
    if args.json is not None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(as_rows(found, parts, cfg, batch_size, name), indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
