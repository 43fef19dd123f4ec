"""The back end that trains: purelm's Transformer in the course's shape, on a token file, on this machine's devices.

The model is pre-norm with RMSNorm, an RMSNorm on the q and k of each head, interleaved RoPE and SwiGLU; weights start
uniform-like with std 1 / sqrt(3 fan_in), embeddings with std 1 (tied ones as the output layer that they are: with std 1
their first logits would have std sqrt(hidden_size)). Weights and moments are kept in the configured dtype. Where
the device computes bfloat16 in software (`computes_bf16`), products are in fp32 of the bfloat16 weights.

All runs see the same windows of the data in the same order, whatever their seed and batch size; validation is the first
n_val_tokens of the other file. The clock stands still while a checkpoint is written or a loss is reported, and starts
after the first step was compiled and tried. A run that is taken up again continues to the last bit.
"""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch

from experiments import capacity
from experiments.console import can_compile, in_bf16, pick_device
from experiments.limits import Count, Place, Range, Text, Whole
from experiments.ops import SDPA, ops_named
from experiments.parallel import Job, Run, alone
from experiments.scaling.service.backend import Backend, Broken, Control, Done, Late, Outcome, Stopped
from experiments.scaling.service.schemas import (
    AdamWConfig,
    ArchitectureConfig,
    Rules,
    SGDConfig,
    TrainingConfig,
    config_digest,
    eval_steps,
    total_steps,
)
from purelm import checkpoint, random, tree
from purelm.data import check_ids, eval_windows, open_tokens, shuffled_windows, windows_per_epoch
from purelm.data.tokens import TokenFile
from purelm.models import transformer
from purelm.models.leaves import Leaf
from purelm.optim import Optimizer, adamw, schedules, sgd
from purelm.train import Precision, TrainState

__all__ = ["Real", "backend", "model_of", "rules_of"]

SAVE_SHARE = 0.02  # of the time, at most, goes into checkpoints: those who watch the run do not see its clock stand
WARMUP = 4  # calls of a step, of which the last is recorded as a graph (`cuda_graph`)
DATA_KEY = 0  # of the one order in which all runs see the data


@dataclass(frozen=True)
class Real:
    """Trains on the token file `train`."""

    train: Place
    """token file or folder of shards"""
    val: Place
    """token file of other texts, with the same tokenizer"""
    seq_len: Count = 512
    n_val_tokens: Count = 2**18
    device: Text = "auto"
    compile: Literal["auto", "yes", "no"] = "auto"
    """auto: on a GPU; on a CPU compiling takes longer than most runs"""
    graph: Literal["auto", "yes", "no"] = "auto"
    """each update is a replay of a CUDA graph; auto: on a GPU"""
    rows: Whole = 0
    """most sequences in one pass, to bound memory: larger batches are accumulated; 0: all"""
    expected: tuple[str, ...] = ()
    """`sampled` of train and val as the server found them; runs on files that are other since then fail"""
    save_seconds: Annotated[float, Range(0, 86_400)] = 30.0
    """a checkpoint is written at an evaluation this long after the last one"""


def rules_of(settings: Real) -> Rules:
    """What the data allow: one pass over the windows, and their vocabulary. ValueError for files that do not fit."""
    train, val = _files(settings)
    if sampled(train) == sampled(val):
        raise ValueError(f"val {settings.val}: has the same tokens as train")
    if len(val) < settings.n_val_tokens + 1:
        needs = f"n_val_tokens {settings.n_val_tokens:,} takes one more"
        raise ValueError(f"val {settings.val}: {len(val):,} tokens; {needs} than that")
    if settings.n_val_tokens % settings.seq_len:
        raise ValueError(f"n_val_tokens {settings.n_val_tokens}: must be divisible by seq_len {settings.seq_len}")
    size = train.vocab_size
    if size is None or size != val.vocab_size or train.tokenizer_sha256 != val.tokenizer_sha256:
        raise ValueError(f"val {settings.val}: is not known to be of the tokenizer of {settings.train}")
    for file in (train, val):
        check_ids(file, size)
    return Rules(
        seq_len=settings.seq_len,
        n_val_tokens=settings.n_val_tokens,
        min_vocab_size=size,
        max_train_tokens=windows_per_epoch(len(train), settings.seq_len) * settings.seq_len,
        attention_bias=False,
    )


def _files(settings: Real) -> tuple[TokenFile, TokenFile]:
    return open_tokens(settings.train), open_tokens(settings.val)


def sampled(tokens: TokenFile) -> str:
    """Hash of the number of tokens and of 1,024 places of 4,096: quick for any size, and another for other data."""
    n, digest = len(tokens), hashlib.blake2b(digest_size=16)
    digest.update(f"{tokens.dtype} {n}".encode())
    for start in sorted({i * max(n - 4096, 0) // 1023 for i in range(1024)}):
        digest.update(np.ascontiguousarray(tokens[start : start + 4096]).data)
    return digest.hexdigest()


def model_of(a: ArchitectureConfig, seq_len: int) -> transformer.Config:
    """The course's architecture as a Config."""
    return transformer.Config(
        vocab_size=a.vocab_size, context_length=seq_len, d_model=a.hidden_size, n_layers=a.num_hidden_layers,
        n_heads=a.num_attention_heads, head_dim=a.head_dim, d_ff=a.intermediate_size, norm_eps=a.rms_norm_eps,
        rope_theta=float(a.rope_theta), qk_norm="head", tie_embeddings=a.tie_word_embeddings,
    )  # fmt: skip


def course_std(tied: bool) -> Callable[[str, Leaf], float]:
    """Standard deviations as in the course's model, whose linear layers are uniform in +- 1 / sqrt(fan_in)."""

    def rule(path: str, leaf: Leaf) -> float:
        return 1.0 if leaf.kind == "embedding" and not tied else 1.0 / math.sqrt(3 * leaf.shape[1])

    return rule


def optimizer_of(cfg: TrainingConfig, *, fused: bool = False) -> Optimizer:
    """Without clipping and schedule; every parameter decays. fused: AdamW is one launch, where nothing is compiled."""
    match cfg.optimizer_config:
        case SGDConfig():
            return sgd()
        case AdamWConfig(weight_decay=decay, beta1=b1, beta2=b2, eps=eps, eps_root=root):
            made = adamw
            if fused:
                from purelm.kernels.adamw import adamw as made
            return made((b1, b2), eps, decay, eps_root=root, dtype=_dtype(cfg))


def _dtype(cfg: TrainingConfig) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[cfg.architecture_config.dtype]


def job_of(cfg: TrainingConfig, rules: Rules, device: torch.device, rows: int) -> Job:
    """The run as the trainer takes it."""
    a, schedule = cfg.architecture_config, cfg.optimizer_config.lr_scheduler
    model, steps = model_of(a, rules.seq_len), total_steps(cfg, rules)
    stored = _dtype(cfg)
    computed = torch.float32 if stored == torch.bfloat16 and not in_bf16("auto", device) else stored
    rows = min(rows or cfg.train_batch_size, cfg.train_batch_size)
    parts = next(n for n in range(-(-cfg.train_batch_size // rows), cfg.train_batch_size + 1)
                 if cfg.train_batch_size % n == 0)  # fmt: skip
    return Job(
        model=model,
        init=partial(transformer.init, random.key(cfg.model_seed), model, course_std(a.tie_word_embeddings)),
        core=optimizer_of(cfg, fused=device.type == "cuda"),
        max_norm=cfg.optimizer_config.grad_clip_norm or 0.0,
        whole_matrices=False,
        schedule=schedules.cosine(
            schedule.peak_value, steps, n_warmup=int(steps * schedule.warmup_frac),
            lr_final=schedule.peak_value * schedule.final_lr_frac, lr_initial=schedule.init_value,
        ),
        ops=ops_named("fused") if device.type == "cuda" else SDPA,
        wrap_block=transformer.identity,
        precision=Precision(param=stored, compute=computed),
        microbatches=parts,
        loss_chunk=None,
    )  # fmt: skip


class _Place(NamedTuple):
    """How far a run is."""

    state: TrainState
    done: int  # updates
    losses: tuple[float, ...]
    seconds: float


class _Parts(NamedTuple):
    """What an experiment is made of."""

    run: Run
    batch: Callable[[int], dict[str, Any]]
    evaluate: Callable[[TrainState], float]
    identity: dict[str, str]  # what a checkpoint must be of


def backend(settings: Real) -> Backend:
    """The back end of these settings; the files are opened anew by each worker."""
    return Backend("real", partial(_train, settings))


def _train(settings: Real, cfg: TrainingConfig, rules: Rules, control: Control) -> Outcome:
    device = pick_device(settings.device)
    train, val = _files(settings)
    identity = {"config": config_digest(cfg), "train": sampled(train), "val": sampled(val)}
    for path, was, name in zip((settings.train, settings.val), settings.expected, ("train", "val"), strict=False):
        if was != identity[name]:  # losses would not be comparable
            raise ValueError(f"{path}: has other tokens than when the server was started")
    job = job_of(cfg, rules, device, settings.rows)
    a_pass = cfg.train_batch_size // job.microbatches
    capacity.check_fits(job.model, a_pass, device, moments=0 if isinstance(cfg.optimizer_config, SGDConfig) else 2)
    compiled = settings.compile == "yes" or (
        settings.compile == "auto" and device.type == "cuda" and can_compile(device)
    )
    graph = settings.graph == "yes" or (settings.graph == "auto" and device.type == "cuda")
    run = alone(job, device, compiled=compiled, graph=graph)
    order = random.key(DATA_KEY)

    def batch(step: int) -> dict[str, Any]:
        return shuffled_windows(train, order, step, cfg.train_batch_size, rules.seq_len, device)

    def evaluate(state: TrainState) -> float:
        part = val.tokens[: rules.n_val_tokens + 1]
        score = run.evaluate(state.params, eval_windows(part, cfg.val_batch_size, rules.seq_len, device), 0)
        return score.nats / score.n_tokens

    parts = _Parts(run, batch, evaluate, identity)
    return _updates(settings, cfg, rules, control, parts, _warm(parts) if device.type == "cuda" else None)


def _warm(parts: _Parts) -> TrainState:
    """A state of steps that compile, tune and record what is to be; its memory is that of the recorded graph."""
    state = parts.run.init()
    for _ in range(WARMUP):
        state, metrics = parts.run.step(state, parts.batch(0))
    parts.evaluate(state)
    float(metrics["loss"])  # waits for the device
    return state


def _begun(run: Run, folder: Path, identity: dict[str, str]) -> _Place:
    """The newest checkpoint, or the start. ValueError for a checkpoint of other data or another configuration."""
    if checkpoint.latest(folder) is None:
        return _Place(run.init(), 0, (), 0.0)
    trees, meta = run.load(folder)
    for name, value in identity.items():
        if meta["identity"][name] != value:
            raise ValueError(f"{folder}: its checkpoint is of another {name}")
    done = checkpoint.latest(folder)
    assert done is not None
    device = next(x.device for x in tree.leaves(trees["params"]))
    state = TrainState(trees["params"], trees["opt_state"], torch.tensor(done, dtype=torch.int64, device=device))
    return _Place(state, done, tuple(meta["val_losses"]), float(meta["seconds"]))


def _updates(
    settings: Real, cfg: TrainingConfig, rules: Rules, control: Control, parts: _Parts, memory: TrainState | None = None
) -> Outcome:
    """memory: a state, to be overwritten, in whose place the run's is put."""
    run, batch, evaluate, identity = parts
    state, done, losses, before = _begun(run, control.folder, identity)
    if memory is not None:
        state = tree.map(lambda old, new: old.copy_(new), memory, state)
        del memory
    steps, every = total_steps(cfg, rules), eval_steps(cfg, rules)
    begun, idle, saved, cost = time.perf_counter(), 0.0, time.perf_counter(), 0.0

    def seconds() -> float:
        return before + time.perf_counter() - begun - idle

    def save() -> None:
        nonlocal idle, saved, cost
        used = seconds()  # read before the clock stands, so that it never goes back
        start = time.perf_counter()
        trees = {"params": state.params, "opt_state": state.opt_state}
        meta = {"identity": identity, "val_losses": list(losses), "seconds": used}
        run.save(control.folder, done, trees, meta=meta, keep_last=1)
        saved = time.perf_counter()
        cost = saved - start
        idle += cost

    control.started(before)
    waiting: torch.Tensor | None = None  # the loss of the update before: reading it waits for that update alone
    while done < steps:
        if seconds() > cfg.max_runtime_seconds:
            return Late(seconds(), losses)
        if control.stop():
            save()
            return Stopped(seconds())
        state, metrics = run.step(state, batch(done))
        done += 1
        if waiting is not None and not math.isfinite(value := float(waiting)):
            return Broken(seconds(), f"the loss is {value} at update {done - 1} of {steps}: the run diverged")
        waiting = metrics["loss"].clone()
        if done % every == 0:
            value = evaluate(state)
            if not math.isfinite(value):
                return Broken(seconds(), f"the validation loss is {value} after {done} updates: the run diverged")
            losses = (*losses, value)
            start = time.perf_counter()  # of a report, for which a full disk or a busy database lets wait
            control.evaluated(losses, seconds())
            idle += time.perf_counter() - start
            if done < steps and time.perf_counter() - saved >= max(settings.save_seconds, cost / SAVE_SHARE):
                save()
    used = seconds()
    return Late(used, losses) if used > cfg.max_runtime_seconds else Done(used, losses)
