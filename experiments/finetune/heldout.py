"""Held-out pairs of a fine-tuning run: measured, and their prompts continued, graded and written down."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from experiments.finetune.config import FineTuning
from experiments.finetune.setup import Ready, tokens_at_a_time
from experiments.generate import known_text
from experiments.grading import Reward
from experiments.ops import evaluating_ops, generation_options, ops_for_generation
from experiments.pairs import Example, text_of
from purelm import generate, random, track, tree
from purelm.align.responses import response_batch
from purelm.models import transformer


class Measure(NamedTuple):
    """What is measured of held-out pairs, on several processes."""

    part: Callable[[Any, list[Any]], Any]  # (params in the compute dtype, a process's pairs) -> its part
    together: Callable[[list[Any]], dict[str, float]]  # the parts of all processes -> figures
    example: Callable[[Any], Example]  # of a pair: what is continued


class Heldout:
    """Evaluates on all processes, each its share of the pairs; the first writes generations.jsonl."""

    def __init__(self, cfg: FineTuning, ready: Ready, measure: Measure, reward: Reward | None = None):
        self.cfg, self.ready, self.measure, self.reward = cfg, ready, measure, reward
        self.model = transformer.make(ready.model, evaluating_ops(ready.model))
        self.generating = transformer.make(ready.model, ops_for_generation(ready.model, ready.world.device))
        self.options = generation_options(ready.world.device)
        self.chunk = tokens_at_a_time(ready.model.vocab_size)

    @torch.no_grad()
    def evaluate(self, params: Any, step: int) -> dict[str, float]:
        """The figures of `measure`; with generations also their mean reward, length, entropy."""
        ready, cfg = self.ready, self.cfg
        if not ready.heldout:
            return {}
        params = tree.cast(params, ready.precision.compute)
        rank, size = ready.world.rank, ready.world.size
        mine = self.measure.part(params, ready.heldout[rank::size])
        chosen = [self.measure.example(x) for x in ready.heldout[: cfg.generations]]
        rows = self._continued(params, chosen[rank::size], step)
        found: list[Any] = [(mine, rows)]
        if size > 1:
            found = [None] * size
            dist.all_gather_object(found, (mine, rows))
        row = self.measure.together([x[0] for x in found])
        # Rank r has prompts r, r + size, ...
        rows = [found[i % size][1][i // size] for i in range(len(chosen))]
        if rows and ready.first:
            sink = track.jsonl_sink(cfg.run / "generations.jsonl")
            for one in rows:
                sink(one)
        if rows:
            for name, key in (("heldout_tokens", "n_tokens"), ("heldout_entropy", "entropy"), ("reward", "reward")):
                if key in rows[0]:
                    row[name] = sum(one[key] for one in rows) / len(rows)
        return row

    def _continued(self, params: Any, examples: list[Example], step: int) -> list[dict[str, Any]]:
        """Greedy continuations: prompt, response, gold, parts of the reward, length, mean entropy of its tokens."""
        if not examples:
            return []
        ready, cfg, device = self.ready, self.cfg, self.ready.world.device
        prompts = [x.prompt.tolist() for x in examples]
        out = generate.generate(
            self.generating, params, prompts, random.key(cfg.seed).to(device), max_new_tokens=cfg.max_new_tokens,
            sampling=generate.Sampling(temperature=0.0), stop=generate.Stop(tuple(ready.end)),
            decode_fn=partial(known_text, ready.bpe), batch_size=max(cfg.batch_size, 16),
            **self.options,
        )  # fmt: skip
        rows = []
        for i, (x, ids, reason) in enumerate(zip(examples, out.tokens, out.finish_reasons, strict=True)):
            text = (out.texts or [])[i]
            gold = text_of(x.pair.gold)
            row: dict[str, Any] = {
                "step": step, "prompt": text_of(x.pair.prompt), "response": text, "wanted": text_of(x.pair.response),
                "gold": gold, "n_tokens": len(ids), "finish_reason": reason, "entropy": 0.0,
            }  # fmt: skip
            if len(ids):
                batch = response_batch([prompts[i]], [ids.numpy()], pad_id=ready.pad)
                batch = {name: value.to(device) for name, value in batch.items()}
                _, entropy = self.model.log_probs(params, batch, chunk=self.chunk)
                row["entropy"] = round(float(entropy.double().sum() / batch["weights"].sum().clamp(min=1.0)), 5)
            if self.reward is not None:
                row |= self.reward(text, gold)
            rows.append(row)
        return rows
