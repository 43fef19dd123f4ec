"""From a configuration to the functions and data of a run, with everything checked and nothing written."""

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments import capacity, limits, resume
from experiments.config import Optim, Pretrain, config_json
from experiments.console import can_compile, in_bf16, pick_device, say
from experiments.generate import prompt_ids
from experiments.ops import ops_named
from experiments.parallel import Job, Run, alone, layout
from purelm import accounting, checkpoint, random, tree
from purelm.data import eval_windows, open_tokens, random_windows, shuffled_windows
from purelm.data.tokens import TokenFile, check_ids, check_tokenizer
from purelm.dist.agreement import check_same
from purelm.dist.world import World
from purelm.evals import Score
from purelm.models import transformer
from purelm.models.leaves import Leaves, of_kind
from purelm.ops import Ops
from purelm.optim import Optimizer, adamw, muon_adamw, rmsprop, schedules
from purelm.tokenizer import BPE, fingerprint
from purelm.tokenizer import load as load_tokenizer
from purelm.train import FULL, MIXED
from purelm.transforms import remat


class Setup(NamedTuple):
    """The functions and data of a run, made from its configuration."""

    model: transformer.Config
    run: Run
    batch: Callable[[int], dict]
    evaluate: Callable[[Any, int | None], Score | None]
    world: World
    compiled: bool
    config: dict[str, Any]  # as in the meta of checkpoints
    fingerprints: dict[str, str]  # of the data and the tokenizer, as in the meta of checkpoints
    done: int  # steps of the checkpoint from which the run goes on
    finished: bool  # nothing is left to do
    forced: list[str]  # differences from the checkpoint that --resume-anyway accepts

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone prints and writes."""
        return self.world.rank == 0


def start(cfg: Pretrain, world: World | None = None) -> Setup:
    """Check the configuration against its ranges, the files, the memory, the checkpoint and the other processes."""
    limits.check(cfg)
    world = world or World(0, 1, pick_device(cfg.device))
    _check_folder(cfg)
    stride, context_length = cfg.eval_stride, cfg.model.context_length
    if stride is not None and stride > context_length:
        raise ValueError(f"eval_stride is {stride}: allowed is 1 to model.context_length, {context_length}")
    if cfg.batch_size % (world.size * cfg.microbatches):
        parts = f"{world.size} processes x {cfg.microbatches} microbatches"
        raise ValueError(f"batch_size {cfg.batch_size} is not divisible by {parts}")
    ready = setup(cfg, world)
    if ready.first:
        n_params = accounting.n_params(ready.model)
        where = f"{world.size} processes, {cfg.parallel.mode}" if world.size > 1 else str(world.device)
        say(f"{n_params:,} parameters on {where}; {cfg.steps:,} steps of {cfg.batch_size} x {context_length} tokens")
    return ready


def _check_folder(cfg: Pretrain) -> None:
    """The run's folder must be new or a run's, and a checkpoint in it must be meant to be resumed."""
    there = checkpoint.latest(cfg.run / "checkpoints")
    if there is not None and not cfg.goes_on:
        raise ValueError(f"run {cfg.run} has a checkpoint of step {there}: give --resume, or another --run")
    path = cfg.run / "config.json"
    if path.is_file():
        try:
            ours = {"model", "optim", "steps"} <= set(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            ours = False
        if not ours:
            raise ValueError(f"run {cfg.run}: its config.json is not that of a run: give another --run")
    if cfg.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("tensorboard: the package is not installed (pip install tensorboard)")


def setup(cfg: Pretrain, world: World) -> Setup:
    device = world.device
    tokens = open_tokens(cfg.train, dtype=cfg.token_dtype, verify=cfg.verify)
    heldout = open_tokens(cfg.heldout, dtype=cfg.token_dtype, verify=cfg.verify) if cfg.heldout else None
    model = resolve_model(cfg, tokens.vocab_size)
    precision = MIXED if in_bf16(cfg.compute, device) else FULL
    _check_memory(cfg, model, world, precision.compute.itemsize)
    bpe = load_tokenizer(cfg.tokenizer) if cfg.tokenizer else None
    for file in (tokens, heldout):
        if file is not None:
            check_ids(file, model.vocab_size)
            if bpe is not None:
                check_tokenizer(file, fingerprint(bpe))
    _check_tokenizer(cfg, bpe)
    init_key, data_key = random.split(random.key(cfg.seed))
    windows = random_windows if cfg.order == "windows" else shuffled_windows

    def batch(i: int) -> dict:
        place = {"rank": world.rank, "world_size": world.size}
        return windows(tokens, data_key, i, cfg.batch_size, model.context_length, device=device, **place)

    batch(0)  # raises now if there are too few tokens
    sizes = token_bytes(bpe) if bpe is not None else None
    if heldout is not None and len(heldout) < 2:
        raise ValueError(f"{cfg.heldout}: {len(heldout)} tokens; an evaluation needs at least 2")

    def evaluate(params: Any, limit: int | None) -> Score | None:
        """Windows overlap: after the first, each token that counts has context_length - stride or more before it."""
        if heldout is None:
            return None
        part = heldout.tokens[: limit + 1] if limit is not None else heldout.tokens[:]
        if sizes is None:
            n_bytes = heldout.n_bytes if limit is None and heldout.n_bytes else 0
        else:  # the first token is context only: nothing predicts it
            n_bytes = int(sizes[torch.from_numpy(part[1:].astype("int64"))].sum())
        params = tree.cast(params, precision.compute)
        size = model.context_length
        stride = max(size // 2, 1) if cfg.eval_stride is None else cfg.eval_stride
        windows = eval_windows(part, min(cfg.batch_size, 16), size, device=device, stride=stride)
        return run.evaluate(params, windows, n_bytes)

    compiled = cfg.compile == "yes" or (cfg.compile == "auto" and can_compile(device))
    config = config_json(cfg, model)
    fingerprints = _fingerprints(tokens, heldout, bpe)
    newest = checkpoint.latest(cfg.run / "checkpoints")
    derived = {"precision": precision.compute, "compiled": compiled, "newest checkpoint": newest, **fingerprints}
    check_same(resume.for_ranks(config, derived))
    done, forced = 0, []
    if cfg.goes_on:
        done, saved = resume.newest(cfg.run)
        forced = resume.check(saved, done, config, fingerprints, anyway=cfg.resume_anyway)
    if cfg.deterministic:
        make_deterministic()
    job = Job(
        model=model,
        init=partial(transformer.init, init_key, model),
        core=make_core(cfg.optim, transformer.leaves(model)),
        max_norm=cfg.optim.clip,
        whole_matrices=cfg.optim.name == "muon",
        schedule=make_schedule(cfg.optim, cfg.steps),
        ops=pick_ops(cfg),
        wrap_block=remat if cfg.remat else transformer.identity,
        precision=precision,
        microbatches=cfg.microbatches,
    )
    if world.size == 1:
        graph = cfg.graph == "yes" or (cfg.graph == "auto" and compiled and device.type == "cuda")
        run = alone(job, device, compiled=compiled, graph=graph)
    else:
        run = layout(world, cfg.parallel, job, compiled=compiled)
    finished = cfg.goes_on and resume.finished(cfg.run, done, cfg.steps)
    return Setup(model, run, batch, evaluate, world, compiled, config, fingerprints, done, finished, forced)


def resolve_model(cfg: Pretrain, vocab_size: int | None) -> transformer.Config:
    """The model with the token file's vocabulary; for a .bin without .json the flag must give it."""
    if vocab_size is None:
        if cfg.model.vocab_size == 1:
            raise ValueError(f"model.vocab_size must be given: {cfg.train} has no .json beside it that tells it")
        return cfg.model
    if cfg.model.vocab_size == 1:
        return dataclasses.replace(cfg.model, vocab_size=vocab_size)
    if cfg.model.vocab_size < vocab_size:
        raise ValueError(f"model.vocab_size {cfg.model.vocab_size} is below {vocab_size}, that of {cfg.train}")
    return cfg.model


def _check_memory(cfg: Pretrain, model: transformer.Config, world: World, element: int) -> None:
    """Processes on the CPU of one host share its memory."""
    mode = cfg.parallel.mode if world.size > 1 else "ddp"
    capacity.check_fits(
        model,
        cfg.batch_size // (world.size * cfg.microbatches),
        world.device,
        moments=n_moments(cfg.optim),
        element=element,
        param_share=1 / world.size if mode == "fsdp" else 1,
        state_share=1 / world.size if mode != "ddp" else 1,
        processes=min(capacity.on_this_host(), world.size) if world.device.type == "cpu" else 1,
    )


def _check_tokenizer(cfg: Pretrain, bpe: BPE | None) -> None:
    """Check that prompts can be encoded, and that no other tokenizer in the run's folder would be overwritten."""
    if bpe is None:
        if cfg.sample:
            raise ValueError(f"sample: {cfg.sample[0]!r} cannot be encoded without a --tokenizer")
        return
    for prompt in cfg.sample:
        prompt_ids(bpe, prompt)
    there = cfg.run / "tokenizer.json"
    if not cfg.goes_on and there.is_file() and fingerprint(load_tokenizer(there)) != fingerprint(bpe):
        raise ValueError(f"run {cfg.run} has another tokenizer.json than {cfg.tokenizer}: give another --run")


def _fingerprints(tokens: TokenFile, heldout: TokenFile | None, bpe: BPE | None) -> dict[str, str]:
    made_with = fingerprint(bpe) if bpe is not None else tokens.tokenizer_sha256
    return {
        "train": resume.content(tokens),
        "heldout": resume.content(heldout),
        "tokenizer": made_with or resume.ABSENT,
    }


def make_core(optim: Optim, leaves: Leaves, adamw: Callable[..., Optimizer] = adamw) -> Optimizer:
    """The optimizer without clipping. All matrices decay; Muon updates the hidden ones. adamw: what `adamw` is."""
    betas, decay = (optim.beta1, optim.beta2), of_kind(leaves, "matrix", "embedding", "head")
    for name, value in (("alpha", optim.alpha), ("momentum", optim.momentum)):
        if value is not None and optim.name != "rmsprop":
            raise ValueError(f"optim.{name} is {value}: rmsprop has it, not {optim.name}")
    if optim.name == "rmsprop":
        return rmsprop(
            0.99 if optim.alpha is None else optim.alpha,
            optim.eps,
            optim.weight_decay,
            momentum=optim.momentum or 0.0,
            mask=decay,
        )
    if optim.name == "muon":
        return muon_adamw(
            betas=betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            mask=decay,
            adamw_lr_scale=optim.adamw_lr_ratio,
            predicate=of_kind(leaves, "matrix"),
        )
    return adamw(betas=betas, eps=optim.eps, weight_decay=optim.weight_decay, mask=decay)


def n_moments(optim: Optim) -> int:
    """Tensors of the parameters' size that the optimizer keeps, about: of Muon's, AdamW's part is left out."""
    return 1 if optim.name == "muon" or (optim.name == "rmsprop" and not optim.momentum) else 2


def make_schedule(optim: Optim, steps: int) -> Callable[[torch.Tensor], torch.Tensor]:
    final, warmup = optim.lr * optim.lr_min_ratio, min(optim.warmup_steps, steps)
    if optim.schedule == "cosine":
        return schedules.cosine(optim.lr, steps, n_warmup=warmup, lr_final=final)
    if optim.schedule == "linear":
        return schedules.linear(optim.lr, steps, n_warmup=warmup, lr_final=final)
    if optim.schedule == "wsd":
        decay = min(max(round(optim.decay_ratio * steps), 1), steps - warmup)
        return schedules.wsd(optim.lr, steps, n_warmup=warmup, n_decay=decay, lr_final=final)
    return schedules.constant(optim.lr, n_warmup=warmup)


def token_bytes(bpe: BPE) -> torch.Tensor:
    """Number of bytes of each token; special tokens are not text and have 0."""
    special = {s.encode() for s in bpe.special_tokens}
    sizes = torch.zeros(max(bpe.vocab) + 1, dtype=torch.int64)
    for i, piece in bpe.vocab.items():
        sizes[i] = 0 if piece in special else len(piece)
    return sizes


def pick_ops(cfg: Pretrain) -> Ops:
    # SDPA has no soft cap: with one, attention is the reference's.
    uncapped = cfg.model.attention_softcap is None
    return ops_named(cfg.ops if uncapped or cfg.ops != "sdpa" else "reference")


def make_deterministic() -> None:
    """Ask torch for kernels that add in a fixed order (compiled code otherwise uses atomics, on a CPU too)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first call
    torch.use_deterministic_algorithms(True)
    # Off: a debugging aid that costs a pass over each new buffer.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def check_run_folder(run: Path, resumes: bool) -> None:
    """ValueError for a checkpoint that is not meant to be resumed, and for none where one is."""
    there = checkpoint.latest(run / "checkpoints")
    if there is not None and not resumes:
        raise ValueError(f"run {run} has a checkpoint of step {there}: give --resume, or another --run")
    if there is None and resumes:
        raise ValueError(f"run {run} has no checkpoint to go on from")
