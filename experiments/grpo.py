r"""Reinforcement learning from verifiable rewards: answers are sampled, graded, and made more or less probable.

    python -m experiments.grpo --run runs/rl --model runs/math/export --train train.jsonl --heldout test.jsonl \
        --prompt "Question: {prompt}\nAnswer:" --gold "{response}" --grade number --recipe dapo --steps 100
    python -m experiments.grpo ... --resume                # goes on from the newest checkpoint, bit for bit

The problems are JSON lines, {name} in a template is a field of the row. `--recipe` names an objective, epochs and
minibatches (`python -m experiments.recipes`). Answers stay ids from the sampler to the trainer, both of which are one
model and one tree of parameters. Rollout batch i is a pure function of (parameters, data, seed, i), so a run that goes
on samples what it would have sampled.

It leaves in the run's folder: config.json, metrics.jsonl (reward by part, lengths, ratios, shares clipped, entropy, gap
between sampler and trainer, ...), rollouts.jsonl, curves.png and report.html, checkpoints/ and export/.
"""

import time
from typing import Any

import torch
import tyro

from experiments import limits
from experiments.console import pick_device, program, progress_bar, say
from experiments.export import export
from experiments.lock import locked
from experiments.rl.config import Grpo
from experiments.rl.report import finish
from experiments.rl.sampling import Batch, answers, collect
from experiments.rl.setup import Ready, start
from experiments.rl.update import update
from experiments.setup import check_run_folder
from experiments.signals import asked_to_stop
from purelm import checkpoint, random, track, tree
from purelm.align.filters import zero_gradient
from purelm.align.groups import grouped
from purelm.dist.agreement import non_finite_ranks
from purelm.dist.world import World
from purelm.tokenizer import save as save_tokenizer
from purelm.train import TrainState, init_state


@program
def main(cfg: Grpo) -> None:
    limits.check(cfg)
    device = pick_device(cfg.device)
    check_run_folder(cfg.run, cfg.resume)
    with locked(cfg.run):
        _run(cfg, start(cfg, device), device)


def _run(cfg: Grpo, ready: Ready, device: torch.device) -> None:
    emit = _files(cfg, ready)
    state = init_state(ready.params, ready.optimizer, ready.precision)
    if cfg.resume:
        like = {"params": state.params, "opt_state": state.opt_state}
        trees, meta = checkpoint.load(cfg.run / "checkpoints", ready.done, like=like, device=device)
        step = torch.full((), meta["updates"], dtype=torch.int64, device=device)
        state = TrainState(trees["params"], trees["opt_state"], step)
        say(f"resumed from rollout batch {ready.done:,}")
    else:
        emit({"step": 0, **_evaluate(cfg, ready, state.params, device)})
    with progress_bar("learning", cfg.steps, "batches") as bar, asked_to_stop(World(0, 1, device)) as asked:
        for i in range(ready.done, cfg.steps):
            number = i + 1
            begin = time.perf_counter()
            batch = collect(
                ready.sampler, ready.recipe, tree.cast(state.params, ready.precision.compute), ready.problems,
                prompts=cfg.prompts, seed=cfg.seed, i=i, max_rounds=cfg.max_rounds, device=device,
            )  # fmt: skip
            sampled = time.perf_counter()
            state, metrics, aux = update(
                ready.trainer, state, batch.rollouts, i, epochs=ready.epochs, n_minibatches=ready.minibatches,
                device=device,
            )  # fmt: skip
            row = {"step": number, **_of_batch(batch, ready), **_means(metrics), "updates": int(state.step)}
            row |= {name: float(x) for name, x in aux.items() if x.ndim == 0 and name not in row}
            row |= {"seconds_sampling": sampled - begin, "seconds_training": time.perf_counter() - sampled}
            if not all(abs(m["loss"]) < float("inf") for m in metrics):
                raise ValueError(f"the loss is not finite at rollout batch {number}: lower optim.lr ({cfg.optim.lr})")
            if number % cfg.log_every == 0 or number == cfg.steps:
                emit({k: float(f"{x:.6g}") if isinstance(x, float) else x for k, x in row.items()})
            bar(number, f"reward {row['reward']:.3f}  {row['length']:.0f} tokens")
            signal, last = asked(), number == cfg.steps
            if not signal and (last or (cfg.eval_every and number % cfg.eval_every == 0)):
                emit({"step": number, **_evaluate(cfg, ready, state.params, device)})
                _show(cfg, batch, number)
            if last or signal or (cfg.save_every and number % cfg.save_every == 0):
                _save(cfg, ready, state, number)
            if signal and not last:
                say(f"rollout batch {number:,} is saved in {cfg.run}: the same command and --resume go on from there")
                raise SystemExit(128 + signal)
    if cfg.export:
        fields = {"eos_token_id": ready.end[0]} if ready.end else {}
        export(cfg.run, state.params, ready.model, ready.bpe, fields, ready.chat)
    finish(cfg, ready.meta["config"])


def _files(cfg: Grpo, ready: Ready) -> Any:
    for name in ("metrics.jsonl", "rollouts.jsonl"):  # rows that come again, and what a run without checkpoint left
        track.drop_rows(cfg.run / name, lambda row: not cfg.resume or row["step"] > ready.done)
    cfg.run.mkdir(parents=True, exist_ok=True)
    track.write_json(cfg.run / "config.json", ready.meta["config"])
    save_tokenizer(ready.bpe, cfg.run / "tokenizer.json")
    return track.jsonl_sink(cfg.run / "metrics.jsonl")


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


def _evaluate(cfg: Grpo, ready: Ready, params: Any, device: torch.device) -> dict[str, float]:
    """Mean reward of greedy answers to the held-out problems."""
    if not ready.heldout:
        return {}
    params = tree.cast(params, ready.precision.compute)
    key = random.key(cfg.seed).to(device)
    _, parts = answers(ready.sampler, params, ready.heldout, key, n_samples=1, temperature=0.0)
    return {"heldout_reward": sum(part["reward"] for part in parts) / len(parts)}


def _show(cfg: Grpo, batch: Batch, step: int) -> None:
    """Some rollouts into rollouts.jsonl, of different problems."""
    sink = track.jsonl_sink(cfg.run / "rollouts.jsonl")
    size = len(batch.texts) // len(batch.problems)
    for p, problem in enumerate(batch.problems[: cfg.shown]):
        k = p * size
        sink({
            "step": step, "prompt": problem.text, "response": batch.texts[k], "gold": problem.gold, **batch.parts[k],
            "n_tokens": len(batch.rollouts.responses[k]), "finish_reason": batch.rollouts.finish_reasons[k],
        })  # fmt: skip


def _save(cfg: Grpo, ready: Ready, state: TrainState, number: int) -> None:
    trees = {"params": state.params, "opt_state": state.opt_state}
    for name, values in trees.items():
        if non_finite_ranks(values):
            raise ValueError(f"{name} hold inf or nan after rollout batch {number}: nothing is saved; lower optim.lr")
    meta = {**ready.meta, "updates": int(state.step)}
    checkpoint.save(cfg.run / "checkpoints", number, trees, meta=meta, keep_last=cfg.keep_last, finite=True)


if __name__ == "__main__":
    main(tyro.cli(Grpo))
