"""From a configuration of `experiments.sft` to the functions and data of a run: all checked, nothing written."""

from functools import partial
from typing import Any

import torch

from experiments.console import can_compile
from experiments.finetune.config import Sft
from experiments.finetune.heldout import Measure
from experiments.finetune.setup import (
    Ready,
    described,
    opened,
    run_of,
    say_what_is_trained,
    template_of,
    tokens_at_a_time,
)
from experiments.ops import evaluating_ops
from experiments.pairs import Example, batch_maker, batch_of, content, read_chats, read_examples
from purelm.dist.world import World
from purelm.models import transformer


def start(cfg: Sft, world: World) -> Ready:
    """ValueError names what does not fit: files, model, checkpoint, other processes."""
    if cfg.grade != "none" and not (cfg.heldout and cfg.generations):
        raise ValueError("grade: responses to held-out prompts are graded: give --heldout, and --generations")
    given = opened(cfg, world)
    chat = template_of(cfg.model, given.bpe, says=world.rank == 0)
    limits: dict[str, Any] = {"max_length": cfg.max_length, "overlong": cfg.overlong}
    if cfg.chat:
        if (cfg.prompt, cfg.response, cfg.begin) != (Sft.prompt, Sft.response, Sft.begin):
            raise ValueError("chat: the template writes the conversation: leave out --prompt, --response and --begin")
        if chat is None:
            raise ValueError(f"chat: {cfg.model} has no chat template that goes with the tokenizer")
        examples: Any = partial(read_chats, bpe=given.bpe, chat=chat, gold=cfg.gold, ends=given.end, **limits)
    else:
        examples = partial(
            read_examples, bpe=given.bpe, prompt=cfg.prompt, response=cfg.response, gold=cfg.gold or cfg.response,
            before=given.begin, after=given.end, **limits,
        )  # fmt: skip
    pairs = examples(cfg.train)
    heldout = examples(cfg.heldout, limit=cfg.eval_pairs) if cfg.heldout is not None else []
    n_rows, rows = batch_maker(
        pairs, cfg.batch_size, cfg.seed, given.pad, packed=cfg.max_length if cfg.packing else None,
    )  # fmt: skip
    if n_rows < cfg.batch_size:
        raise ValueError(f"{cfg.train}: {n_rows} rows of at most {cfg.max_length} tokens; batch_size is more")

    def batch(i: int) -> dict[str, torch.Tensor]:
        n = cfg.batch_size // world.size
        return {k: x[world.rank * n : world.rank * n + n].to(world.device) for k, x in rows(i).items()}

    meta, done = described(cfg, given, {"train": content(pairs), "heldout": content(heldout)})
    compiled = cfg.compile == "yes" or (cfg.compile == "auto" and cfg.packing and can_compile(world.device))
    run = run_of(cfg, world, given, compiled=compiled)
    packed = f" in {n_rows:,} rows of {cfg.max_length} tokens" if cfg.packing else ""
    say_what_is_trained(cfg, world, given.params, f"{len(pairs):,} pairs{packed}")
    return Ready(
        given.model, given.bpe, chat, run, batch, heldout, given.pad, given.end, given.precision, world, meta, done
    )


def measure(cfg: Sft, ready: Ready) -> Measure:
    """{"heldout_loss"}: nats a token of the responses."""
    model = transformer.make(ready.model, evaluating_ops(ready.model))
    chunk = tokens_at_a_time(ready.model.vocab_size)

    def part(params: Any, mine: list[Example]) -> tuple[float, float]:
        total = count = 0.0
        for start in range(0, len(mine), cfg.batch_size):
            batch = batch_of(mine[start : start + cfg.batch_size], ready.pad, ready.world.device)
            log_p, _ = model.log_probs(params, batch, chunk=chunk)
            total -= float(log_p.double().sum())
            count += float(batch["weights"].sum())
        return total, count

    def together(parts: list[tuple[float, float]]) -> dict[str, float]:
        return {"heldout_loss": sum(x for x, _ in parts) / max(sum(n for _, n in parts), 1.0)}

    return Measure(part, together, lambda x: x)
