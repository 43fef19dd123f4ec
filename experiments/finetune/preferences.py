"""From a configuration of `experiments.dpo` to the functions and data of a run.

All is checked before anything is written; then the reference's log-probabilities are computed, or read from the run's
folder. Legend: N pairs, T positions.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from experiments import resume
from experiments.choices import Choice, batch_of_choices, content_of, mismatched, read_choices
from experiments.console import progress_bar, quiet
from experiments.finetune.config import Dpo
from experiments.finetune.heldout import Measure
from experiments.finetune.objectives import NAMES, Objective, Sums, objective
from experiments.finetune.pair_scores import Scores, evaluating, sums_of, sums_of_pairs
from experiments.finetune.reference import cached
from experiments.finetune.setup import Opened, Ready, described, opened, run_of, say_what_is_trained, template_of
from experiments.open_model import open_model
from experiments.ops import evaluating_ops
from experiments.pairs import Example, batch_of, rows_of_step
from purelm import tree
from purelm.align.preferences import kto_kl
from purelm.dist.agreement import fingerprint as tensors_of
from purelm.dist.collectives import all_reduce
from purelm.dist.world import World
from purelm.models import transformer
from purelm.tokenizer import fingerprint
from purelm.train import Loss, TrainState

FILE = "reference.safetensors"
Batch = dict[str, Any]


class Held(NamedTuple):
    """A held-out pair."""

    choice: Choice
    other: Example  # its prompt with another's answer
    ref: Tensor  # (2,): the reference's sums
    ref_other: Tensor  # 0-d


def start(cfg: Dpo, world: World) -> Ready:
    """ValueError names what does not fit: files, model, the loss's options, checkpoint, other processes."""
    goal = objective_of(cfg)
    given = opened(cfg, world)
    reference = reference_of(cfg, goal, given, world)
    choices = partial(
        read_choices, bpe=given.bpe, prompt=cfg.prompt, chosen=cfg.chosen, rejected=cfg.rejected, turns=cfg.turns,
        before=given.begin, after=given.end, max_length=cfg.max_length, overlong=cfg.overlong, says=world.rank == 0,
    )  # fmt: skip
    pairs = choices(cfg.train)
    heldout = choices(cfg.heldout, limit=cfg.eval_pairs) if cfg.heldout is not None else []
    if len(pairs) < cfg.batch_size:
        raise ValueError(f"{cfg.train}: {len(pairs)} pairs of at most {cfg.max_length} tokens; batch_size is more")
    if goal.needs_kl and (len(pairs) < 2 or len(heldout) == 1):
        raise ValueError("loss kto: its KL is of prompts with answers to other prompts: at least 2 pairs are needed")
    data = {"train": content_of(pairs), "heldout": content_of(heldout), "reference": reference.content}
    meta, done = described(cfg, given, data)
    run = run_of(cfg, world, given, compiled=cfg.compile == "yes", rows=2, loss=partial(_loss, goal, cfg.ld_alpha))
    say_what_is_trained(cfg, world, given.params, f"{len(pairs):,} pairs of answers")
    known = _references(cfg, world, given, goal, reference, meta["fingerprints"], pairs, heldout)
    others = mismatched(pairs, cfg.max_length) if goal.needs_kl else []

    def batch(i: int) -> Batch:
        n = cfg.batch_size // world.size
        every = rows_of_step(i, len(pairs), cfg.batch_size, cfg.seed)
        # As long as the longest of all processes' pairs, so that a process's part does not depend on their number.
        whole = batch_of_choices([pairs[k] for k in every], given.pad, world.device)
        part = slice(world.rank * n, world.rank * n + n)
        mine = torch.tensor(every[part])
        made: Batch = {name: x[part].contiguous() for name, x in whole.items()}
        made["ref"] = known["train"][mine].to(world.device)
        made["denominator"] = torch.tensor(float(cfg.batch_size), device=world.device)
        if others:
            made["others"] = batch_of([others[k] for k in every[part]], given.pad, world.device)
            made["others"]["ref"] = known["train_others"][mine].to(world.device)
        return made

    if goal.needs_kl:
        run = run._replace(step=_with_kl(cfg, world, given, run.step, run.whole))
    chat = template_of(cfg.model, given.bpe, says=world.rank == 0)
    rest = mismatched(heldout, cfg.max_length), known["heldout"], known["heldout_others"]
    items = [Held(*x) for x in zip(heldout, *rest, strict=True)]
    return Ready(
        given.model, given.bpe, chat, run, batch, items, given.pad, given.end, given.precision, world, meta, done
    )


class Reference(NamedTuple):
    """The model whose log-probabilities the policy's are compared with."""

    params: Any  # fp32
    model: transformer.Config
    content: str  # fingerprint of both; `resume.ABSENT` where the reference is the start


def reference_of(cfg: Dpo, goal: Objective, given: Opened, world: World) -> Reference:
    """The start, or the model of --reference; ValueError where that has another tokenizer or is too short."""
    if cfg.reference is None:
        return Reference(given.params, given.model, resume.ABSENT)
    if not goal.has_reference:
        raise ValueError(f"reference is {cfg.reference}: the loss {cfg.loss} has none; take it away, or another loss")
    params, model, bpe = open_model(cfg.reference, cfg.tokenizer, world.device)
    if fingerprint(bpe) != fingerprint(given.bpe):
        raise ValueError(f"reference {cfg.reference} has another tokenizer than {cfg.model}: its log-probabilities "
                         "would be of other tokens")  # fmt: skip
    if cfg.max_length > model.context_length:
        raise ValueError(f"max_length is {cfg.max_length}: the reference's context_length is {model.context_length}")
    content = hashlib.sha256(f"{tensors_of(params)} {dataclasses.asdict(model)}".encode()).hexdigest()
    return Reference(params, model, content)


def objective_of(cfg: Dpo) -> Objective:
    """The loss that the configuration names; ValueError for an option that it does not have."""
    if cfg.ld_alpha < 1 and cfg.loss != "dpo":
        raise ValueError(f"ld_alpha is {cfg.ld_alpha}: LD-DPO has the loss dpo, not {cfg.loss}")
    return objective(cfg.loss, {name: getattr(cfg, name) for name in NAMES})


def _loss(goal: Objective, ld_alpha: float, model: transformer.Model, chunk: int | None) -> Loss:
    """The mean over the pairs of the whole batch, and of aux."""

    def loss(params: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        sums, n = sums_of_pairs(model, params, batch, chunk, ld_alpha)
        kl = batch["kl"] if "kl" in batch else torch.zeros_like(sums[:, 0])
        losses, aux = goal.loss(_as_sums(sums, batch["ref"], n, kl))
        figures = {**aux, "chosen_log_p": sums[:, 0].detach(), "rejected_log_p": sums[:, 1].detach()}
        if goal.needs_kl:
            figures["kl"] = kl
        over = batch["denominator"]
        return losses.sum() / over, {name: x.sum() / over for name, x in figures.items()}

    return loss


def _with_kl(
    cfg: Dpo, world: World, given: Opened, step: Callable[..., Any], whole: Callable[[Any], Any]
) -> Callable[[TrainState, Batch], Any]:
    """The step with "kl" in its batch: KTO's estimate, of all processes' pairs, before any microbatch has its loss."""
    model = transformer.make(given.model, evaluating_ops(given.model))

    def stepped(state: TrainState, batch: Batch) -> Any:
        others = batch["others"]
        with torch.no_grad():
            params = tree.cast(whole(state.params), given.precision.compute)
            found = [
                sums_of(model, params, {name: x[rows] for name, x in others.items()})
                for rows in torch.arange(len(others["ref"]), device=world.device).chunk(cfg.microbatches)
            ]
            apart = torch.stack([torch.cat(found).double().sum(), others["ref"].double().sum()])
            if world.size > 1:
                apart = all_reduce(apart, check=False)
            kl = kto_kl(apart[0], apart[1], denominator=cfg.batch_size).float()
        rest = {name: x for name, x in batch.items() if name != "others"}
        return step(state, {**rest, "kl": kl.expand(len(others["ref"])).contiguous()})

    return stepped


def _references(
    cfg: Dpo, world: World, given: Opened, goal: Objective, reference: Reference, prints: dict[str, str],
    pairs: Sequence[Choice], heldout: Sequence[Choice],
) -> dict[str, Tensor]:  # fmt: skip
    """{"train", "heldout"} (N, 2) and {"train_others", "heldout_others"} (N,), fp32 on the CPU; 0 if there is none."""
    sets = {"train": pairs, "heldout": heldout}
    none = {name: torch.zeros(len(x), 2) for name, x in sets.items()}
    none |= {f"{name}_others": torch.zeros(len(x)) for name, x in sets.items()}
    if not goal.has_reference:
        return none
    depends: dict[str, Any] = {name: prints[name] for name in ("model", "train", "heldout")}
    if reference.content != resume.ABSENT:
        depends["model"] = reference.content
    # ops and the like are not among these: they change the order of sums alone.
    depends |= {"compute": str(given.precision.compute), "ld_alpha": cfg.ld_alpha, "others": goal.needs_kl}
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()

    scores = _scores(cfg, world, reference.model, given.pad)

    def compute() -> dict[str, Tensor]:
        params = tree.cast(reference.params, given.precision.compute)
        found, before, total = dict(none), 0, len(pairs) + len(heldout)
        with progress_bar("reference", total, "pairs") if world.rank == 0 else nullcontext(quiet) as update:
            for name, choices in sets.items():
                others = mismatched(choices, cfg.max_length) if goal.needs_kl else []
                share = slice(world.rank, None, world.size)
                told = partial(_told, update, before, world.size)
                found |= _of_all(world, name, scores(params, choices[share], others[share], told), len(choices))
                before += len(choices)
        return found

    return cached(cfg.run / FILE, key, compute, world)


def _of_all(world: World, name: str, mine: Scores, n: int) -> dict[str, Tensor]:
    """All processes' scores: of process r are the pairs r, r + size, ..."""
    parts: list[Any] = [mine]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, mine)
    sums, others = torch.zeros(n, 2), torch.zeros(n)
    for rank, part in enumerate(parts):
        sums[rank :: world.size], others[rank :: world.size] = part.sums, part.others
    return {name: sums, f"{name}_others": others}


def _scores(cfg: Dpo, world: World, model: transformer.Config, pad: int) -> Callable[..., Scores]:
    rows = cfg.batch_size // (world.size * cfg.microbatches)
    return evaluating(model, pad, world.device, ld_alpha=cfg.ld_alpha, rows=rows)


def measure(cfg: Dpo, ready: Ready) -> Measure:
    """Held-out loss, rewards, margins and both accuracies: means over pairs."""
    goal = objective_of(cfg)
    scores = _scores(cfg, ready.world, ready.model, ready.pad)

    def part(params: Any, mine: list[Held]) -> tuple[Scores, Tensor, Tensor]:
        found = scores(params, [x.choice for x in mine], [x.other for x in mine] if goal.needs_kl else [])
        if not mine:
            return found, found.sums, found.others
        return found, torch.stack([x.ref for x in mine]), torch.stack([x.ref_other for x in mine])

    def together(parts: list[tuple[Scores, Tensor, Tensor]]) -> dict[str, float]:
        flat = [(*found, ref, ref_apart) for found, ref, ref_apart in parts]
        sums, apart, n, ref, ref_apart = (torch.cat(x).double() for x in zip(*flat, strict=True))
        kl = kto_kl(apart, ref_apart).expand(len(sums))
        losses, aux = goal.loss(_as_sums(sums, ref, n, kl))
        figures = {"loss": losses, **aux, "chosen_log_p": sums[:, 0], "rejected_log_p": sums[:, 1]}
        if goal.needs_kl:
            figures["kl"] = kl
        return {f"heldout_{name}": float(x.mean()) for name, x in figures.items()}

    return Measure(part, together, lambda item: item.choice.chosen)


def _told(update: Callable[..., None], before: int, size: int, n: int) -> None:
    update(before + n * size)


def _as_sums(sums_N2: Tensor, ref_N2: Tensor, n_N2: Tensor, kl_N: Tensor) -> Sums:
    return Sums(sums_N2[:, 0], sums_N2[:, 1], ref_N2[:, 0], ref_N2[:, 1], n_N2[:, 0], n_N2[:, 1], kl_N)
