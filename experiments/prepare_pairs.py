r"""Make pairs for `experiments.dpo` from a model's own answers: to each problem a right one and a wrong one.

    python -m experiments.prepare_pairs --model runs/math/export --train train.jsonl --out pairs.jsonl \
        --prompt "Question: {prompt}\nAnswer:" --gold "{response}" --grade number --group-size 16 --pairs 2
    python -m experiments.dpo --run runs/dpo --model runs/math/export --train pairs.jsonl --prompt "{prompt}"

Flags are those of `grpo` where they mean the same. `group-size` answers to each problem are sampled and graded; those
of reward 1 or more are right, those below wrong. Of answers with the same text there is one, and one that was cut off
before its end, or has bytes that are no text, is in no pair. At most `pairs` pairs of a problem are drawn, each with
texts of its own: so a problem whose answers are all right, or all wrong, has none.

OUT has prompt (filled in, without a chat's template), chosen, rejected, and gold; beside it lies OUT.provenance.json:
hashes of model, tokenizer and problems, all settings, and counts. The same inputs and settings give the same rows on
the same device. Nothing that exists is overwritten.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import tyro

import purelm
from experiments import limits
from experiments.console import pick_device, program, progress_bar, say
from experiments.rl.config import Pairs
from experiments.rl.problems import content
from experiments.rl.sampling import answers
from experiments.rl.setup import opened, sampler_of
from purelm import random, tree
from purelm.dist.agreement import fingerprint as tensors_of
from purelm.dist.world import World
from purelm.files import staging, sync
from purelm.tokenizer import fingerprint

RIGHT = 1.0  # the reward from which an answer is right
NO_TEXT = "\ufffd"  # what bytes that are no UTF-8 are decoded to


@program
def main(cfg: Pairs) -> None:
    """Check, sample, write."""
    limits.check(cfg)
    if cfg.group_size < 2:
        raise ValueError("group_size: a pair needs at least 2 answers")
    if cfg.temperature < 1e-3:
        raise ValueError(f"temperature is {cfg.temperature}: the answers to a problem would be one and the same")
    beside = cfg.out.with_name(f"{cfg.out.name}.provenance.json")
    if cfg.out.suffix != ".jsonl":
        raise ValueError(f"out {cfg.out}: must end in .jsonl")
    _refuse_existing(cfg)
    device = pick_device(cfg.device)
    given = opened(cfg, World(0, 1, device), limit=cfg.problems)
    sampler = sampler_of(cfg, World(0, 1, device), given, 1)
    params = tree.cast(tree.to(given.params, device), given.precision.compute)
    at_once = max(cfg.sample_rows // cfg.group_size, 1) * 4  # so that finished rows are refilled
    counts = dict.fromkeys(("problems", "right", "wrong", "unusable", "without_a_right", "without_a_wrong", "pairs"), 0)
    found: list[dict[str, Any]] = []
    with progress_bar("answering", len(given.problems), "problems") as bar:
        for first in range(0, len(given.problems), at_once):
            some = given.problems[first : first + at_once]
            key = random.fold_in(random.key(cfg.seed), first).to(device)
            out, parts = answers(sampler, params, some, key, n_samples=cfg.group_size, temperature=cfg.temperature)
            assert out.texts is not None  # the sampler decodes
            for p, problem in enumerate(some):
                rows = range(p * cfg.group_size, (p + 1) * cfg.group_size)
                whole = [k for k in rows if out.finish_reasons[k] != "length" and NO_TEXT not in out.texts[k]]
                texts = {
                    name: list(dict.fromkeys(out.texts[k] for k in whole if (parts[k]["reward"] >= RIGHT) == is_right))
                    for name, is_right in (("right", True), ("wrong", False))
                }
                counts["unusable"] += cfg.group_size - len(whole)
                for name in texts:
                    counts[name] += len(texts[name])
                    counts[f"without_a_{name}"] += not texts[name]
                number = first + p
                mixed = random.fold_in(random.fold_in(random.key(cfg.seed), 1), number)
                for chosen, rejected in pairs_of(texts["right"], texts["wrong"], cfg.pairs, mixed):
                    row = {"prompt": problem.text, "chosen": chosen, "rejected": rejected, "gold": problem.gold}
                    found.append(row | {"source": f"problem {number + 1}"})
            bar(first + len(some), f"{len(found):,} pairs")
    counts |= {"problems": len(given.problems), "pairs": len(found)}
    said = ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in counts.items())
    if not found:
        raise ValueError(f"no problem has both a right and a wrong answer, so nothing is written: {said}")
    text = "".join(json.dumps(row) + "\n" for row in found)
    free = ("out", "model", "train", "tokenizer", "device")  # said by what they hold, or no matter
    provenance = {
        "program": "experiments.prepare_pairs", "purelm": purelm.__version__,
        "model": tensors_of(given.params), "tokenizer": fingerprint(given.bpe), "train": content(given.problems),
        "settings": {name: x for name, x in dataclasses.asdict(cfg).items() if name not in free},
        "compute": str(given.precision.compute), "device": device.type, "counts": counts,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }  # fmt: skip
    with staging(cfg.out.parent) as staged:
        (staged / "rows").write_text(text, encoding="utf-8")
        (staged / "beside").write_text(json.dumps(provenance, indent=1, default=str) + "\n", encoding="utf-8")
        _refuse_existing(cfg)  # another process may have written there meanwhile
        for name, path in (("beside", beside), ("rows", cfg.out)):  # provenance alone is what a kill may leave
            sync(staged / name)
            os.replace(staged / name, path)
    say(said)
    print(f"{cfg.out}: {len(found):,} pairs; beside it {beside.name}")


def pairs_of(right: Sequence[str], wrong: Sequence[str], most: int, key: Any) -> list[tuple[str, str]]:
    """At most `most` pairs, no text in two of them, drawn uniformly."""
    n = min(len(right), len(wrong), most)
    keys = random.split(key, 2)
    chosen = [random.permutation(k, len(x)).tolist()[:n] for k, x in zip(keys, (right, wrong), strict=True) if x]
    return [(right[i], wrong[j]) for i, j in zip(*chosen, strict=True)] if n else []


def _refuse_existing(cfg: Pairs) -> None:
    if os.path.lexists(cfg.out):
        raise ValueError(f"{cfg.out}: exists; remove it first, or write elsewhere")


if __name__ == "__main__":
    main(tyro.cli(Pairs))
