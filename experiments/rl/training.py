"""The course of a run that learns from rewards: rollout batches, updates, evaluations, checkpoints, export, report."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch

from experiments import limits
from experiments.console import progress_bar, quiet, say
from experiments.export import export
from experiments.lock import locked
from experiments.processes import joined
from experiments.rl.config import FromRewards
from experiments.rl.report import finish
from experiments.rl.sampling import Batch, answers, collect
from experiments.rl.setup import Ready
from experiments.run_state import begin_files, first_state, save_state
from experiments.setup import check_run_folder
from experiments.signals import asked_to_stop
from purelm import random, track, tree
from purelm.align.filters import zero_gradient
from purelm.align.groups import grouped
from purelm.dist.world import World
from purelm.train import TrainState

__all__ = ["learn_from_rewards"]

C = TypeVar("C", bound=FromRewards)
UNIT = "rollout batch"  # what a step is called


def learn_from_rewards(cfg: C, start: Callable[[C, World], Ready], title: str) -> None:
    """The whole run, on one process or many. start: checks all and reads all. title: of the report."""
    limits.check(cfg)
    with joined(cfg.device, cfg.parallel.timeout) as here:
        check_run_folder(cfg.run, cfg.resume)
        with locked(cfg.run) if here.rank == 0 else nullcontext():
            ready = start(cfg, here)
            params = _run(cfg, ready)
            if ready.first:
                if cfg.export:
                    fields = {"eos_token_id": ready.end[0]} if ready.end else {}
                    export(cfg.run, params, ready.model, ready.bpe, fields, ready.chat)
                finish(cfg, ready.meta["config"], title)


def _run(cfg: FromRewards, ready: Ready) -> Any:
    """The whole parameters after the last rollout batch."""
    names = ("metrics.jsonl", "rollouts.jsonl")
    emit = begin_files(cfg.run, names, ready.meta["config"], ready.bpe, ready.world, done=ready.done)
    state = first_state(cfg.run, ready.run, ready.world, done=ready.done, unit=UNIT)
    device = ready.world.device
    if ready.done == 0:
        emit({"step": 0, **_evaluate(cfg, ready, state)})
    with progress_bar("learning", cfg.steps, "batches") if ready.first else nullcontext(quiet) as bar:
        with asked_to_stop(ready.world) as asked:
            for i in range(ready.done, cfg.steps):
                number = i + 1
                begin = time.perf_counter()
                batch = collect(
                    ready.sampler, ready.recipe, _whole(ready, state), ready.problems, prompts=cfg.prompts,
                    seed=cfg.seed, i=i, max_rounds=ready.max_rounds, device=device,
                )  # fmt: skip
                asked()  # a rank's wish is known to the others one call later: so it is at the end of this batch
                sampled = time.perf_counter()
                state, metrics, aux = ready.learn(state, batch, i)
                row = {"step": number, **_of_batch(batch, ready), **_means(metrics), "updates": int(state.step)}
                row |= {name: float(x) for name, x in aux.items() if x.ndim == 0 and name not in row}
                row |= {"seconds_sampling": sampled - begin, "seconds_training": time.perf_counter() - sampled}
                if not all(abs(m["loss"]) < float("inf") for m in metrics):
                    lower = f"lower optim.lr ({cfg.optim.lr})"
                    raise ValueError(f"the loss is not finite at rollout batch {number}: {lower}")
                if number % cfg.log_every == 0 or number == cfg.steps:
                    emit({k: float(f"{x:.6g}") if isinstance(x, float) else x for k, x in row.items()})
                bar(number, f"reward {row['reward']:.3f}  {row['length']:.0f} tokens")
                signal, last = asked(), number == cfg.steps
                # Evaluated before it is saved: what is saved has its rows, and rows after it are written again.
                if not signal and (last or (cfg.eval_every and number % cfg.eval_every == 0)):
                    emit({"step": number, **_evaluate(cfg, ready, state)})
                    if ready.first:
                        _show(cfg, batch, number)
                if last or signal or (cfg.save_every and number % cfg.save_every == 0):
                    meta = {**ready.meta, "updates": int(state.step)}
                    save_state(cfg.run, ready.run, state, number, meta, keep_last=cfg.keep_last, unit=UNIT)
                if signal and not last:
                    if ready.first:
                        said = f"rollout batch {number:,} is saved in {cfg.run}"
                        say(f"{said}: the same command and --resume go on from there")
                    raise SystemExit(128 + signal)
    return ready.run.whole(state.params)


def _whole(ready: Ready, state: TrainState) -> Any:
    """The parameters as one process has them, in the dtype of the forward pass."""
    return tree.cast(ready.run.whole(state.params), ready.precision.compute)


def _of_batch(batch: Batch, ready: Ready) -> dict[str, float]:
    """Rewards by part, lengths, what ended answers, flat groups."""
    rewards, n = batch.rollouts.rewards_B, len(batch.texts)
    lengths = torch.tensor([len(x) for x in batch.rollouts.responses], dtype=torch.float64)
    out = {name: sum(part[name] for part in batch.parts) / n for name in batch.parts[0]}
    out["length"] = float(lengths.mean())
    for name, chosen in (("length_right", rewards >= 1), ("length_wrong", rewards < 1)):
        if bool(chosen.any()):
            out[name] = float(lengths[chosen].mean())
    out["cut_off"] = batch.rollouts.finish_reasons.count("length") / n
    flat = zero_gradient(grouped(rewards, ready.recipe.group_size))
    out["flat_groups"] = float(flat.double().mean())
    out["groups_sampled"] = float(batch.n_sampled)
    return out


def _means(metrics: list[dict[str, float]]) -> dict[str, float]:
    """The means over optimizer steps."""
    names = dict.fromkeys(name for m in metrics for name in m)
    return {name: sum(m[name] for m in metrics if name in m) / len([m for m in metrics if name in m]) for name in names}


def _evaluate(cfg: FromRewards, ready: Ready, state: TrainState) -> dict[str, float]:
    """Mean reward of greedy answers to the held-out problems."""
    if not ready.heldout:
        return {}
    key = random.key(cfg.seed).to(ready.world.device)
    _, parts = answers(ready.sampler, _whole(ready, state), ready.heldout, key, n_samples=1, temperature=0.0)
    return {"heldout_reward": sum(part["reward"] for part in parts) / len(parts)}


def _show(cfg: FromRewards, batch: Batch, step: int) -> None:
    """Some rollouts into rollouts.jsonl, of different problems."""
    sink = track.jsonl_sink(cfg.run / "rollouts.jsonl")
    size = len(batch.texts) // len(batch.problems)
    for p, problem in enumerate(batch.problems[: cfg.shown]):
        k = p * size
        sink({
            "step": step, "prompt": problem.text, "response": batch.texts[k], "gold": problem.gold, **batch.parts[k],
            "n_tokens": len(batch.rollouts.responses[k]), "finish_reason": batch.rollouts.finish_reasons[k],
        })  # fmt: skip
