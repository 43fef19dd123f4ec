"""What programs that learn from rewards have in common before the first step: all is checked, and nothing written."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from experiments import resume
from experiments.console import in_bf16, say
from experiments.finetune.setup import loss_chunk, special_ids, template_of
from experiments.grading import Reward, grader_named
from experiments.open_model import open_model
from experiments.ops import evaluating_ops, generation_options, ops_for_generation, ops_named, sampling_weights
from experiments.parallel import Job, Run, alone, layout
from experiments.rl.config import MAY_CHANGE, Answers, FromRewards
from experiments.rl.passes import in_passes, recorded
from experiments.rl.problems import Problem, content, read_problems
from experiments.rl.sampling import Batch, Sampler
from experiments.rl.update import Trainer, loss_of
from experiments.setup import make_core, make_deterministic, make_schedule
from purelm import generate, tree
from purelm.align.advantages import Aux
from purelm.align.recipe import Recipe
from purelm.dist.agreement import check_same
from purelm.dist.agreement import fingerprint as tensors_of
from purelm.dist.world import World
from purelm.models import transformer
from purelm.ops import Ops
from purelm.optim import Optimizer
from purelm.tokenizer import BPE, fingerprint
from purelm.tokenizer.chat import Chat
from purelm.train import FULL, MIXED, Precision, TrainState
from purelm.transforms import remat

__all__ = ["Learn", "Opened", "Ready", "described", "on_graph", "opened", "run_of", "sampler_of", "say_what_is_trained"]

# (state, rollout batch, its number) -> (state, metrics of each optimizer step, figures of the whole)
Learn = Callable[[TrainState, Batch, int], tuple[TrainState, list[dict[str, float]], Aux]]


class Ready(NamedTuple):
    """The functions and data of a run."""

    model: transformer.Config
    bpe: BPE
    chat: Chat | None  # the model's template, for its export
    recipe: Recipe
    sampler: Sampler
    run: Run
    learn: Learn
    max_rounds: int
    problems: list[Problem]
    heldout: list[Problem]
    end: list[int]
    precision: Precision
    world: World
    meta: dict[str, Any]  # of checkpoints
    done: int  # rollout batches of the checkpoint that the run goes on from

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone prints and writes."""
        return self.world.rank == 0


class Opened(NamedTuple):
    """The model to start from, and the problems."""

    params: Any  # fp32
    model: transformer.Config
    bpe: BPE
    chat: Chat | None
    end: list[int]  # ids that end an answer
    pad: int
    problems: list[Problem]
    heldout: list[Problem]
    reward: Reward
    precision: Precision


def opened(
    cfg: Answers, world: World, *, limit: int | None = None, heldout: Path | None = None,
    heldout_limit: int | None = None,
) -> Opened:  # fmt: skip
    """ValueError names what does not fit: settings with the model, its tokenizer, the problems.

    limit, heldout_limit: the first problems alone.
    """
    reward = grader_named(cfg.grade)
    if reward is None:
        raise ValueError("grade: none is no reward; give exact, number, boxed or r1_zero")
    make_deterministic()
    params, model, bpe = open_model(cfg.model, cfg.tokenizer, world.device)
    chat = template_of(cfg.model, bpe, says=world.rank == 0)
    if cfg.chat and chat is None:
        raise ValueError(f"chat: {cfg.model} has no chat template that goes with the tokenizer")
    begin, end = special_ids(bpe, cfg.begin, "begin"), special_ids(bpe, cfg.end, "end")
    longest = model.context_length - cfg.max_new_tokens
    if longest < 1:
        raise ValueError(f"max_new_tokens must be below the model's context_length {model.context_length}")
    read = partial(
        read_problems, bpe=bpe, prompt=cfg.prompt, gold=cfg.gold, before=begin, chat=chat if cfg.chat else None,
        longest=longest, says=world.rank == 0,
    )  # fmt: skip
    problems = read(cfg.train, limit=limit)
    tested = read(heldout, limit=heldout_limit) if heldout is not None else []
    for x in (*problems, *tested):
        reward("", x.gold)  # a right answer that the grader cannot read is an error now
    precision = MIXED if in_bf16(cfg.compute, world.device) else FULL
    return Opened(params, model, bpe, chat, end, (end or begin or [0])[0], problems, tested, reward, precision)


def described(cfg: FromRewards, world: World, given: Opened, fields: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """(meta of checkpoints, rollout batches of the one that the run goes on from). fields: more of the configuration.

    ValueError where the checkpoint is of another run, or other processes were started differently.
    """
    own = {name: x for name, x in dataclasses.asdict(cfg).items() if name != "model"}
    config = json.loads(json.dumps({**own, "model": dataclasses.asdict(given.model), **fields}, default=str))
    meta = {
        "config": config,
        "fingerprints": {
            "model": tensors_of(given.params), "train": content(given.problems), "heldout": content(given.heldout),
            "tokenizer": fingerprint(given.bpe),
        },
    }  # fmt: skip
    done = resume.checked(cfg.run, cfg.steps, meta, MAY_CHANGE) if cfg.resume else 0
    if world.size > 1:
        check_same(resume.for_ranks(config, {**meta["fingerprints"], "newest checkpoint": done}))
    return meta, done


def sampler_of(cfg: Answers, world: World, given: Opened, min_new_tokens: int) -> Sampler:
    """The sampler of answers; ValueError where they would end before they may."""
    if min_new_tokens > cfg.max_new_tokens:
        raise ValueError(f"max_new_tokens is {cfg.max_new_tokens}: an answer has at least {min_new_tokens} here")
    stop = generate.Stop(tuple(given.end), cfg.stop, min_new_tokens if min_new_tokens > 1 else 0)
    if cfg.exact and world.device.type != "cuda":
        raise ValueError("exact: needs a GPU, whose kernels have one order of summation for all batches")
    if cfg.exact and stop.min_new_tokens:
        raise ValueError(
            f"exact: answers of at least {min_new_tokens} tokens are drawn from other log-probabilities than the "
            "model's; take a recipe without a least length"
        )
    model = transformer.make(given.model, _ops(cfg, ops_for_generation(given.model, world.device)))
    return Sampler(
        model, given.bpe, stop, cfg.max_new_tokens, cfg.sample_rows, given.reward, world,
        generation_options(world.device), sampling_weights(world.device),
    )  # fmt: skip


def _ops(cfg: Answers, otherwise: Ops) -> Ops:
    """Those of an exact run, else the given ones."""
    if not cfg.exact:
        return otherwise
    from purelm.kernels.invariant import INVARIANT

    return INVARIANT


def _core(cfg: FromRewards, model: transformer.Config, world: World) -> Optimizer:
    """The optimizer without clipping; on a GPU, which steps in eager code keep waiting, AdamW as one launch."""
    if world.device.type != "cuda" or world.size > 1:
        return make_core(cfg.optim, transformer.leaves(model))
    from purelm.kernels.adamw import adamw

    return make_core(cfg.optim, transformer.leaves(model), adamw)


def run_of(
    cfg: FromRewards, world: World, given: Opened, recipe: Recipe, *, updates: int, temperature: float,
    reference: bool, drops: bool, recompute: bool,
) -> tuple[Run, Trainer]:  # fmt: skip
    """The run's functions, and what an update depends on.

    updates: optimizer steps of a rollout batch, by which schedules are as long as the run. temperature: of the
    log-probabilities that are trained. The rest are the trainer's fields.
    """
    model = given.model
    # Passes are of rows that differ in number and length, so they are not compiled: on a GPU kernels spare launches.
    ops = _ops(cfg, ops_named("fused") if world.device.type == "cuda" else evaluating_ops(model))
    longest = max(len(x.ids) for x in given.problems) + cfg.max_new_tokens
    job = Job(
        model=model,
        init=lambda: given.params,
        core=_core(cfg, model, world),
        max_norm=cfg.optim.clip,
        whole_matrices=cfg.optim.name == "muon",
        schedule=make_schedule(cfg.optim, cfg.steps * updates),
        ops=ops,
        wrap_block=remat if cfg.remat else transformer.identity,
        precision=given.precision,
        microbatches=1,
        loss_chunk=loss_chunk(cfg.loss_chunk, cfg.rows_per_pass * longest, model.vocab_size),
        loss=lambda made, chunk: loss_of(made, recipe.objective, temperature, chunk),
    )

    @functools.cache
    def run(n_passes: int) -> Run:
        """The number of passes is a step's own, and differs with the rows that have an advantage."""
        some = job._replace(microbatches=n_passes)
        if world.size == 1:
            return alone(some, world.device, compiled=False, graph=False)
        return layout(world, cfg.parallel, some, compiled=False)

    made = transformer.make(model, ops)
    trainer = Trainer(
        made, recipe, lambda n_passes: run(n_passes).step, cfg.rows_per_pass, given.pad, job.loss_chunk,
        given.precision.compute, recompute, given.params if reference else None, drops, cfg.seed, world, run(1).whole,
    )  # fmt: skip
    if not on_graph(cfg, world):
        return run(1), trainer
    passes = alone(job, world.device, compiled=False, graph=False, differentiate=in_passes(cfg.rows_per_pass))
    return passes, trainer._replace(
        model=made._replace(log_probs=recorded(made.log_probs)), step=lambda n_passes: passes.step, same_shape=True
    )


def on_graph(cfg: FromRewards, world: World) -> bool:
    """Whether passes are replays of CUDA graphs; ValueError where they cannot be."""
    possible = world.device.type == "cuda" and world.size == 1
    if cfg.graph == "yes" and not possible:
        raise ValueError("graph: yes needs one process on a GPU")
    return cfg.graph == "yes" or (cfg.graph == "auto" and possible and not cfg.exact)


def say_what_is_trained(world: World, cfg: FromRewards, given: Opened, how: str) -> None:
    """One line on the terminal, of the first process."""
    if world.rank == 0:
        where = f"{world.size} processes, {cfg.parallel.mode}" if world.size > 1 else str(world.device)
        passes = "; passes are CUDA graphs" if on_graph(cfg, world) else ""
        say(f"{tree.n_params(given.params):,} parameters on {where}; {len(given.problems):,} problems; {how}{passes}")
