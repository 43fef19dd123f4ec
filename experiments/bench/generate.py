"""Tokens per second of generation: many prompts, refilled or not, beside transformers' generate with a static cache.

    python -m experiments.bench.generate [--device cuda] [--size 134m] [--json FILE]

Two tasks, each of a model with random parameters: prompts of one length, all rows at once and none ends early; and four
times as many prompts of mixed lengths, at most batch-size rows at a time, whose rows end by chance after about half of
the new tokens, which are at most as many as the longest prompt has. The second is run with refilling, and in batches
that each wait for their longest row. On a GPU the step is one CUDA graph, which all runs share. The median of
several runs counts.

Share of the roofline: bytes / (seconds x bandwidth). Bytes are the weights once a step (of the input embeddings only
rows are read) and each row's keys and values once a token; the bandwidth is that of a copy, measured here. The seconds
include the prompts', whose bytes are not counted.
"""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import tyro
from torch import Tensor

from experiments.bench.decode import SIZES as DECODE_SIZES
from experiments.bench.norms import copy_bandwidth
from experiments.bench.report import publish, row
from experiments.console import pick_device, program, say
from experiments.limits import Count, Whole
from experiments.ops import OpsName, generation_options, ops_named
from purelm import accounting, random, tree
from purelm.generate import Generation, Stop, generate
from purelm.models import transformer
from purelm.models.joined import join_weights

PACKAGES = ("torch", "transformers", "purelm")
KEY = random.key(0)

SIZES = {"tiny": (64, 32, 2, 2, 64), **DECODE_SIZES}


@dataclass(frozen=True)
class Args:
    """Speed of generation. What is not given is small on a CPU."""

    device: str = "auto"
    size: str | None = None
    """tiny, 3m, 22m or 134m"""
    ops: OpsName | None = None
    """default: fused on a GPU, sdpa on a CPU"""
    prompts: Count | None = None
    new_tokens: Count | None = None
    batch_size: Count | None = None
    """rows at a time, of the mixed task"""
    shortest: Count = 16
    """tokens of the shortest prompt"""
    longest: Count | None = None
    """tokens of the longest prompt; the first task's prompts have an eighth"""
    read_every: Count | None = None
    warm: Whole = 1
    rounds: Count = 3
    """runs after these, of which the median counts"""
    peer: bool = True
    """run transformers too, if it is installed"""
    json: Path | None = None


class Task(NamedTuple):
    name: str
    prompts: list[Tensor]
    new_tokens: int
    batch_size: int
    stops: list[int]


class Work(NamedTuple):
    """What a run did."""

    tokens: int
    seconds: float
    steps: int
    kv_tokens: int  # keys and values that steps had to read


def clock(f: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    out = f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, out


def in_batches(task: Task) -> list[list[Tensor]]:
    B = task.batch_size
    return [task.prompts[i : i + B] for i in range(0, len(task.prompts), B)]


class _Counted:
    """A `wrap_step` that counts steps."""

    def __init__(self, wrap_step: Callable[..., Any]):
        self.wrap_step, self.n = wrap_step, 0
        self.step: Any = None

    def wrapped(self, step: Any) -> Any:
        self.step = self.wrap_step(step)
        return self

    def __call__(self, *args: Any) -> Any:
        self.n += 1
        return self.step(*args)

    def many(self, params: Any, rows: Any, cache: Any, n: int) -> Any:
        self.n += n
        return self.step.many(params, rows, cache, n)

    def recorded(self, *args: Any) -> Any:
        return self.step.recorded(*args)


def ours(
    model: transformer.Model, params: Any, task: Task, refill: bool, read_every: int | None,
    device: torch.device, options: dict[str, Any],
) -> Work:  # fmt: skip
    steps = _Counted(options["wrap_step"]) if options else _Counted(lambda step: step)

    def one(prompts: list[Tensor]) -> Generation:
        return generate(
            model, params, prompts, KEY.to(device), max_new_tokens=task.new_tokens, stop=Stop(task.stops),
            batch_size=task.batch_size, read_every=read_every, **{**options, "wrap_step": steps.wrapped},
        )  # fmt: skip

    groups = [task.prompts] if refill else in_batches(task)
    seconds, outs = clock(lambda: [one(group) for group in groups], device)
    lengths = [len(t) for out in outs for t in out.tokens]
    # Token j of a row, from the second on, reads what came before it: prompt and j tokens.
    kv = sum(len(p) * (n - 1) + n * (n - 1) // 2 for p, n in zip(task.prompts, lengths, strict=True) if n)
    return Work(sum(lengths), seconds, steps.n, kv)


def peer(args: Args, cfg: transformer.Config, task: Task, dtype: torch.dtype, device: torch.device) -> Work:
    """transformers' Llama of the same size, in batches padded on the left."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, intermediate_size=cfg.ff_width,
        num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads, max_position_embeddings=cfg.context_length,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model = model.to(device, dtype).eval()
    count = 0

    def run() -> None:
        nonlocal count
        count = 0
        for group in in_batches(task):
            longest = max(map(len, group))
            ids = torch.stack([torch.cat([p.new_zeros(longest - len(p)), p]) for p in group]).to(device)
            mask = torch.stack([(torch.arange(longest) >= longest - len(p)).long() for p in group]).to(device)
            out = model.generate(
                ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=task.new_tokens, pad_token_id=0,
                cache_implementation="static", eos_token_id=task.stops or None,
            )[:, longest:]  # fmt: skip
            stops = torch.isin(out, torch.tensor(task.stops, dtype=torch.int64, device=device)).int()
            ended_before = stops.cumsum(1) - stops > 0
            count += int((~ended_before).sum())

    with torch.no_grad():
        for _ in range(args.warm):
            run()
        seconds = median(clock(run, device)[0] for _ in range(args.rounds))
    return Work(count, seconds, 0, 0)


def tasks(args: Args, cfg: transformer.Config, n: int, n_new: int, batch_size: int, longest: int) -> list[Task]:
    def prompt(i: int, length: int) -> Tensor:
        return random.randint(random.fold_in(KEY, i), (length,), 0, cfg.vocab_size)

    spread = random.randint(random.key(1), (4 * n,), args.shortest, longest + 1).tolist()
    # Parameters are random, so that all tokens are about equally probable.
    stops = list(range(1, 1 + max(1, cfg.vocab_size // max(longest // 2, 2))))
    return [
        Task("one length", [prompt(i, max(longest // 8, 1)) for i in range(n)], n_new, n, []),
        Task("mixed", [prompt(i, length) for i, length in enumerate(spread)], longest, batch_size, stops),
    ]


def measure(args: Args, device: torch.device) -> list[dict[str, Any]]:
    on_gpu = device.type == "cuda"
    size = args.size or ("134m" if on_gpu else "3m")
    if size not in SIZES:
        raise ValueError(f"size: {size!r} is not one of {', '.join(SIZES)}")
    n, n_new = args.prompts or (256 if on_gpu else 16), args.new_tokens or (256 if on_gpu else 32)
    batch_size = args.batch_size or (128 if on_gpu else 4)
    longest = args.longest or (512 if on_gpu else 64)
    if longest < args.shortest:
        raise ValueError(f"longest must be at least shortest {args.shortest}, got {longest}")
    V, D, L, H, F = SIZES[size]
    context = longest + max(n_new, longest)
    cfg = transformer.Config(vocab_size=V, context_length=context, d_model=D, n_layers=L, n_heads=H, d_ff=F)
    model = transformer.make(cfg, ops_named(args.ops or ("fused" if on_gpu else "sdpa")))
    options = generation_options(device)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    params = join_weights(tree.to(tree.cast(model.init(random.key(0)), dtype), device))
    bandwidth = 1e9 * copy_bandwidth(device, 5)
    weights = tree.n_bytes(params) - tree.n_bytes(params["token_embeddings"])
    per_token = accounting.kv_cache_bytes(cfg, 1, 1, bytes_per_element=dtype.itemsize)
    say(f"{size}: {tree.n_params(params):,} parameters in {dtype}; a copy moves {bandwidth / 1e9:,.0f} GB/s")
    has_peer = args.peer and importlib.util.find_spec("transformers") is not None
    rows = []
    for task in tasks(args, cfg, n, n_new, batch_size, longest):
        theirs = peer(args, cfg, task, dtype, device) if has_peer else None
        runs = {"": True} if task.name == "one length" else {", refilled": True, ", in batches": False}
        for way, refill in runs.items():
            works = [
                ours(model, params, task, refill, args.read_every, device, options)
                for _ in range(args.warm + args.rounds)
            ]
            work = works[-1]._replace(seconds=median(x.seconds for x in works[args.warm :]))
            name = f"{size}, {len(task.prompts)} prompts, {task.new_tokens} new tokens, {task.name}{way}"
            rate = None if theirs is None else theirs.tokens / theirs.seconds
            where: dict[str, Any] = dict(device=str(device), packages=PACKAGES)
            speed = work.tokens / work.seconds
            rows.append(row(name, speed, "tokens/s", peer="transformers", peer_value=rate, **where))
            bytes_read = work.steps * weights + work.kv_tokens * per_token
            rows.append(row(f"{name}: share of the roofline", bytes_read / work.seconds / bandwidth, "", **where))
            say(f"{name}: {speed:,.0f} tokens/s, {work.tokens} tokens in {work.steps} steps")
    return rows


@program
def main(args: Args) -> None:
    device = pick_device(args.device)
    publish(measure(args, device), args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
