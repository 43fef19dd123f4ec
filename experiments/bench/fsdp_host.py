"""The host's time for sharded parameters: a deep and thin model in a process group that sends nothing.

    python -m experiments.bench.fsdp_host [--n-layers 48] [--n-ranks 2] [--json FILE]

There is one process; torch's "fake" process group says that there are several. Nothing is sent and next to nothing is
computed, so the time that forward and backward take longer than with whole parameters is the host's: Python, dispatch,
packing of small messages. Wherever a GPU computes a block in less time, it waits for the host. Peer: fully_shard of the
same blocks as modules. Blocks are compiled one by one; steps of both take turns; figures are medians.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from experiments.bench.module_baseline import Module, on_many
from experiments.bench.report import publish, row
from experiments.console import program
from purelm import random
from purelm.dist import ddp, fsdp
from purelm.models import transformer
from purelm.ops import REFERENCE
from purelm.transforms import jit, value_and_grad


@dataclass(frozen=True)
class Args:
    """The host's work for sharded parameters."""

    n_layers: int = 48
    n_ranks: int = 2
    steps: int = 40
    compile: bool = True
    json: Path | None = None


def ours(cfg: transformer.Config, batch: dict[str, Tensor], compiled: bool, sharded: bool) -> Callable[[], object]:
    params = transformer.init(random.key(0), cfg)
    wrap = jit if compiled else transformer.identity
    batch = ddp.with_global_denominator(batch)
    if not sharded:
        return partial(value_and_grad(transformer.make(cfg, wrap_block=wrap).loss, has_aux=True), params, batch)
    plan = fsdp.plan(params)
    model = transformer.make(cfg, fsdp.ops(REFERENCE), lambda f: fsdp.gathered(wrap(f)))
    return partial(fsdp.differentiate(model.loss, plan), plan.shard(params), batch)


def peer(cfg: transformer.Config, batch: dict[str, Tensor], compiled: bool, sharded: bool) -> Callable[[], object]:
    model: Any = Module(cfg, cfg.ff_width)
    if compiled:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = torch.compile(block)
    if sharded:
        on_many(model, "torch_fsdp2", torch.device("cpu"))

    def run() -> None:
        model(batch["tokens"], batch["targets"]).backward()
        model.zero_grad(set_to_none=True)

    return run


def medians(runs: dict[str, Callable[[], object]], steps: int) -> dict[str, float]:
    """Median seconds of a step of each run; steps of the runs take turns."""
    for run in runs.values():
        for _ in range(3):
            run()
    gc.collect()
    gc.freeze()  # else each collection goes through all objects that compilation made
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(steps):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    gc.unfreeze()
    return {name: statistics.median(found) for name, found in times.items()}


@program
def main(args: Args) -> None:
    if args.n_ranks < 2 or args.n_layers < 1 or args.steps < 1:
        raise ValueError(
            f"two ranks, a layer and a step are least: {args.n_ranks} ranks, {args.n_layers} layers, {args.steps} steps"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=args.n_ranks)
    cfg = transformer.Config(vocab_size=64, context_length=16, d_model=16, n_layers=args.n_layers, n_heads=2, d_ff=32)
    x = random.randint(random.key(1), (1, cfg.context_length + 1), 0, cfg.vocab_size)
    batch = {"tokens": x[:, :-1], "targets": x[:, 1:]}
    runs = {
        f"{name}{'_sharded' if sharded else ''}": make(cfg, batch, args.compile, sharded)
        for name, make in (("ours", ours), ("peer", peer))
        for sharded in (False, True)
    }
    found = medians(runs, args.steps)
    what = f"{args.n_layers} layers, {args.n_ranks} ranks"
    rows = []
    for metric, name in (("forward and backward, whole", ""), ("forward and backward, sharded", "_sharded")):
        values = [1e3 * found[who + name] for who in ("ours", "peer")]
        of = "fully_shard" if name else "nn.Module"
        rows.append(row(f"{what}, {metric}", values[0], "ms", peer=of, peer_value=values[1]))
    values = [1e6 * (found[f"{who}_sharded"] - found[who]) / args.n_layers for who in ("ours", "peer")]
    rows.append(row(f"{what}, sharding, a layer", values[0], "us", peer="fully_shard", peer_value=values[1]))
    publish(rows, args.json)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Args))
