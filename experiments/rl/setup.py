"""From a configuration of `experiments.grpo` to the functions and data of a run: all checked, nothing written."""

import dataclasses
import functools
import json
from functools import partial
from typing import Any, NamedTuple

import torch

from experiments import resume
from experiments.console import in_bf16, say
from experiments.finetune.setup import loss_chunk, special_ids, template_of
from experiments.grading import grader_named
from experiments.open_model import open_model
from experiments.ops import generation_options, ops_for_generation, ops_named
from experiments.rl.config import MAY_CHANGE, Grpo
from experiments.rl.problems import Problem, content, read_problems
from experiments.rl.sampling import Sampler
from experiments.rl.update import Trainer, loss_of
from experiments.setup import make_core, make_deterministic, make_schedule
from purelm import generate, tree
from purelm.align.recipe import Recipe, adapted, described, fields_of
from purelm.align.recipes import RECIPES
from purelm.align.whole import drop_zero_advantage
from purelm.dist.agreement import fingerprint as tensors_of
from purelm.models import transformer
from purelm.tokenizer import BPE, fingerprint
from purelm.tokenizer.chat import Chat
from purelm.train import FULL, MIXED, Precision, make_step
from purelm.transforms import remat

__all__ = ["Ready", "start"]


class Ready(NamedTuple):
    """The functions and data of a run."""

    model: transformer.Config
    params: Any  # of the start
    bpe: BPE
    chat: Chat | None
    recipe: Recipe
    sampler: Sampler
    trainer: Trainer
    optimizer: Any
    precision: Precision
    epochs: int
    minibatches: int
    problems: list[Problem]
    heldout: list[Problem]
    end: list[int]
    meta: dict[str, Any]  # of checkpoints
    done: int  # rollout batches of the checkpoint that the run goes on from


def start(cfg: Grpo, device: torch.device) -> Ready:
    """ValueError names what does not fit."""
    reward = grader_named(cfg.grade)
    if reward is None:
        raise ValueError("grade: none is no reward; give exact, number, boxed or r1_zero")
    recipe = _recipe(cfg)
    make_deterministic()
    params, model, bpe = open_model(cfg.model, cfg.tokenizer, device)
    chat = template_of(cfg.model, bpe, says=True)
    if cfg.chat and chat is None:
        raise ValueError(f"chat: {cfg.model} has no chat template that goes with the tokenizer")
    begin, end = special_ids(bpe, cfg.begin, "begin"), special_ids(bpe, cfg.end, "end")
    longest = model.context_length - cfg.max_new_tokens
    if longest < 1:
        raise ValueError(f"max_new_tokens must be below the model's context_length {model.context_length}")
    read = partial(
        read_problems, bpe=bpe, prompt=cfg.prompt, gold=cfg.gold, before=begin, chat=chat if cfg.chat else None,
        longest=longest,
    )  # fmt: skip
    problems = read(cfg.train)
    heldout = read(cfg.heldout, limit=cfg.eval_prompts) if cfg.heldout is not None else []
    for x in (*problems, *heldout):
        reward("", x.gold)  # a right answer that the grader cannot read is an error now
    precision = MIXED if in_bf16(cfg.compute, device) else FULL
    stop = generate.Stop(tuple(end), cfg.stop, recipe.min_new_tokens if recipe.min_new_tokens > 1 else 0)
    sampler = Sampler(
        transformer.make(model, ops_for_generation(model, device)), bpe, stop, cfg.max_new_tokens,
        cfg.sample_rows, reward, generation_options(device),
    )  # fmt: skip
    optimizer = make_core(cfg.optim, transformer.leaves(model))
    epochs, minibatches = cfg.epochs or recipe.epochs, cfg.minibatches or recipe.minibatches
    minibatches = min(minibatches, cfg.prompts)
    trainer = _trainer(
        cfg, model, recipe, params, optimizer, precision, updates=epochs * minibatches, pad=(end or begin or [0])[0],
        longest=max(len(x.ids) for x in problems) + cfg.max_new_tokens,
    )  # fmt: skip
    fields = {name: x for name, x in dataclasses.asdict(cfg).items() if name != "model"}
    given = {**fields, "model": dataclasses.asdict(model), "recipe_fields": fields_of(recipe)}
    meta = {
        "config": json.loads(json.dumps(given, default=str)),
        "fingerprints": {
            "model": tensors_of(params), "train": content(problems), "heldout": content(heldout),
            "tokenizer": fingerprint(bpe),
        },
    }  # fmt: skip
    done = resume.checked(cfg.run, cfg.steps, meta, MAY_CHANGE) if cfg.resume else 0
    say(f"{tree.n_params(params):,} parameters on {device}; {len(problems):,} problems; {cfg.recipe}: "
        f"{described(recipe.objective.advantage)}, {described(recipe.objective.region)}, "
        f"{described(recipe.objective.aggregate)}")  # fmt: skip
    return Ready(
        model, params, bpe, chat, recipe, sampler, trainer, optimizer, precision, epochs, minibatches, problems,
        heldout, end, meta, done,
    )  # fmt: skip


def _recipe(cfg: Grpo) -> Recipe:
    """The recipe at the sizes of the configuration."""
    if cfg.recipe not in RECIPES:
        raise ValueError(f"recipe: {cfg.recipe!r} is not known; there are {', '.join(RECIPES)}")
    recipe = RECIPES[cfg.recipe]
    if recipe.kl_in_reward:
        raise ValueError(f"recipe: {cfg.recipe} takes a KL term from the rewards, which is not done here")
    if cfg.group_size == 1 and _compares(recipe):
        raise ValueError(f"group_size must be at least 2 for {cfg.recipe}, which compares a prompt's answers")
    return adapted(
        recipe, group_size=cfg.group_size, prompts=cfg.prompts, max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
    )  # fmt: skip


def _compares(recipe: Recipe) -> bool:
    """Whether the one answer to a prompt has no advantage, whatever its reward."""
    try:
        advantages, _ = recipe.objective.advantage(torch.tensor([[1.0], [0.0]]))
    except ValueError:
        return True
    return not bool(advantages.any())


def _trainer(
    cfg: Grpo, model: transformer.Config, recipe: Recipe, params: Any, optimizer: Any, precision: Precision,
    *, updates: int, pad: int, longest: int,
) -> Trainer:  # fmt: skip
    ops = ops_named("reference" if model.attention_softcap is not None else "sdpa")
    made = transformer.make(model, ops, remat if cfg.remat else transformer.identity)
    chunk = loss_chunk(cfg.loss_chunk, cfg.rows_per_pass * longest, model.vocab_size)
    loss = loss_of(made, recipe.objective, cfg.temperature, chunk)
    schedule = make_schedule(cfg.optim, cfg.steps * updates)

    @functools.cache
    def step(n_passes: int) -> Any:
        return make_step(
            loss, optimizer, schedule, microbatches=n_passes, precision=precision,
            max_norm=cfg.optim.clip if cfg.optim.clip > 0 else None,
        )  # fmt: skip

    kl = recipe.objective.kl is not None
    return Trainer(
        made, recipe, step, cfg.rows_per_pass, pad, chunk, precision.compute, cfg.old_log_probs == "recomputed",
        params if kl else None, _drops(recipe), cfg.seed,
    )  # fmt: skip


def _drops(recipe: Recipe) -> bool:
    """Whether rows of advantage 0 have no gradient under this recipe, and may be left out."""
    B, T = 2, 2
    one = torch.zeros(B, T)
    batch = {"mask": torch.ones(B, T), "advantages": torch.ones(B), "old_log_probs": one, "sampler_log_probs": one}
    try:
        drop_zero_advantage(recipe.objective, batch)
    except ValueError:
        return False
    return True
