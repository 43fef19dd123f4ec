"""What fine-tuning programs have in common before the first step: all is checked, and nothing written."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments import resume
from experiments.console import in_bf16, say
from experiments.finetune.config import MAY_CHANGE, FineTuning
from experiments.finetune.lora import low_rank
from experiments.open_model import open_model
from experiments.ops import ops_named
from experiments.parallel import Job, Run, alone, layout
from experiments.setup import make_core, make_deterministic, make_schedule
from purelm import tree
from purelm.dist.agreement import check_same
from purelm.dist.agreement import fingerprint as tensors_of
from purelm.dist.world import World
from purelm.models import hf, transformer
from purelm.tokenizer import BPE, fingerprint, token_to_id
from purelm.tokenizer.chat import Chat, find_chat
from purelm.train import FULL, MIXED, Loss, Precision
from purelm.transforms import remat

LOGITS = 2**30  # bytes of fp32 logits from which on a chunk's are held at a time
CHUNK = 2**28


class Ready(NamedTuple):
    """The functions and data of a run."""

    model: transformer.Config
    bpe: BPE
    chat: Chat | None  # the model's template, for its export
    run: Run
    batch: Callable[[int], dict[str, torch.Tensor]]  # this process's part of step i's batch
    heldout: list[Any]
    pad: int
    end: list[int]
    precision: Precision
    world: World
    meta: dict[str, Any]  # of checkpoints
    done: int  # steps of the checkpoint that the run goes on from

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone prints and writes."""
        return self.world.rank == 0


class Opened(NamedTuple):
    """The model to start from."""

    params: Any  # fp32
    model: transformer.Config
    bpe: BPE
    begin: list[int]  # ids before a prompt
    end: list[int]  # ids after a response
    pad: int
    precision: Precision


def opened(cfg: FineTuning, world: World) -> Opened:
    """ValueError names what does not fit: settings among each other, with the model, its tokenizer."""
    if cfg.batch_size % (world.size * cfg.microbatches):
        parts = f"{world.size} processes x {cfg.microbatches} microbatches"
        raise ValueError(f"batch_size {cfg.batch_size} is not divisible by {parts}")
    if cfg.lora.rank and cfg.optim.name != "adamw":
        raise ValueError(f"optim.name is {cfg.optim.name}: low-rank updates are trained by adamw")
    if cfg.lora.rank and world.size > 1 and cfg.parallel.mode != "ddp":
        raise ValueError(f"parallel.mode is {cfg.parallel.mode}: low-rank updates are small, and every process has all")
    make_deterministic()
    params, model, bpe = open_model(cfg.model, cfg.tokenizer, world.device)
    begin, end = special_ids(bpe, cfg.begin, "begin"), special_ids(bpe, cfg.end, "end")
    if cfg.max_length > model.context_length:
        raise ValueError(f"max_length is {cfg.max_length}: the model's context_length is {model.context_length}")
    precision = MIXED if in_bf16(cfg.compute, world.device) else FULL
    return Opened(params, model, bpe, begin, end, (end or begin or [0])[0], precision)


def described(cfg: FineTuning, given: Opened, data: Mapping[str, str]) -> tuple[dict[str, Any], int]:
    """(meta of checkpoints, steps of the one that the run goes on from). data: fingerprints of train and heldout.

    ValueError where the checkpoint is of another run, or other processes were started differently.
    """
    fields = {name: x for name, x in dataclasses.asdict(cfg).items() if name != "model"}
    meta = {
        "config": json.loads(json.dumps({**fields, "model": dataclasses.asdict(given.model)}, default=str)),
        "fingerprints": {"model": tensors_of(given.params), **data, "tokenizer": fingerprint(given.bpe)},
    }
    done = resume.checked(cfg.run, cfg.steps, meta, MAY_CHANGE) if cfg.resume else 0
    check_same(resume.for_ranks(meta["config"], {**meta["fingerprints"], "newest checkpoint": done}))
    return meta, done


def say_what_is_trained(cfg: FineTuning, world: World, params: Any, data: str) -> None:
    """One line on the terminal, of the first process."""
    if world.rank == 0:
        trained = f"low-rank updates of {tree.n_params(params):,}" if cfg.lora.rank else f"{tree.n_params(params):,}"
        where = f"{world.size} processes, {cfg.parallel.mode}" if world.size > 1 else str(world.device)
        say(f"{trained} parameters are trained, on {where}; {data}")


def run_of(
    cfg: FineTuning,
    world: World,
    given: Opened,
    *,
    compiled: bool,
    rows: int = 1,
    loss: Callable[[transformer.Model, int | None], Loss] | None = None,
) -> Run:
    """The run's functions. rows: sequences in one item of a batch; loss: as of `Job`."""
    params, model, precision = given.params, given.model, given.precision
    n_tokens = cfg.batch_size // (world.size * cfg.microbatches) * cfg.max_length * rows
    table = transformer.leaves(model)
    job = Job(
        model=model,
        init=lambda: params,
        core=make_core(cfg.optim, table),
        max_norm=cfg.optim.clip,
        whole_matrices=cfg.optim.name == "muon",
        schedule=make_schedule(cfg.optim, cfg.steps),
        # PyTorch's attention has no soft cap: with one, attention is the reference's.
        ops=ops_named("reference" if cfg.ops == "sdpa" and model.attention_softcap is not None else cfg.ops),
        wrap_block=remat if cfg.remat else transformer.identity,
        precision=precision,
        microbatches=cfg.microbatches,
        loss_chunk=loss_chunk(cfg.loss_chunk, n_tokens, model.vocab_size),
        loss=loss,
    )
    if cfg.lora.rank:
        return low_rank(cfg, world, job, params, compiled=compiled)
    if world.size == 1:
        return alone(job, world.device, compiled=compiled, graph=False)
    return layout(world, cfg.parallel, job, compiled=compiled)


def loss_chunk(given: int | None, n_tokens: int, vocab_size: int) -> int | None:
    """Tokens whose logits are held at a time: the given number, else all, or 256 MiB where all would take 1 GiB."""
    if given is None and 4 * n_tokens * vocab_size > LOGITS:
        return tokens_at_a_time(vocab_size)
    return given


def tokens_at_a_time(vocab_size: int) -> int:
    """Tokens whose fp32 logits take 256 MiB; at least 1."""
    return max(CHUNK // (4 * vocab_size), 1)


def special_ids(bpe: BPE, token: str, name: str) -> list[int]:
    """The id of a special token; no id for the empty text."""
    if not token:
        return []
    if token not in bpe.special_tokens:
        some = ", ".join(sorted(bpe.special_tokens)[:8]) or "none"
        raise ValueError(f"{name}: the tokenizer has no special token {token!r}; it has {some}")
    return [token_to_id(bpe, token)]


def template_of(model: Path, bpe: BPE, *, says: bool) -> Chat | None:
    """The model's chat template; None where it has none that goes with the tokenizer, which is said."""
    chat = find_chat(model)
    if chat is not None and (lacks := hf.chat_lacks(bpe, chat)):
        if says:
            say(f"export/ will have no chat template: its {', '.join(lacks)} is no special token of the tokenizer")
        return None
    return chat
