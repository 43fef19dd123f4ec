"""Tokens per second of one conversation, greedy, with open weights: ours beside transformers' generate, in turns.

    python -m experiments.bench.one_row MODEL [--prompt 96] [--new-tokens 64] [--rounds 5] [--json FILE]

transformers loads the same weights from a folder that `hf.save` writes, eager, with its dynamic cache. Both continue
the same random ids; equal continuations are checked first. Each round runs every way once, and the best round counts.
The floor is the time that a copy would take to read the weights once a token.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from experiments import limits
from experiments.bench.norms import copy_bandwidth
from experiments.bench.report import publish, row
from experiments.console import pick_device, program, say
from experiments.limits import Count, Place
from experiments.open_model import open_model
from experiments.ops import SDPA, ops_for_generation
from purelm import generate, random, tree
from purelm.models import hf, transformer

PACKAGES = ("torch", "transformers", "purelm")


@dataclass(frozen=True)
class Args:
    """Speed of one row, beside transformers."""

    model: Annotated[Place, tyro.conf.Positional]
    """folder of open weights, or .gguf file"""
    prompt: Count = 96
    """tokens of the prompt"""
    new_tokens: Count = 64
    rounds: Count = 5
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    json: Path | None = None


def measure(args: Args, device: torch.device) -> list[dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    params, cfg, bpe = open_model(args.model, None, device)
    params = tree.cast(params, getattr(torch, args.dtype))
    with tempfile.TemporaryDirectory() as folder:
        hf.save(Path(folder) / "model", params, cfg, bpe)
        peer: Any = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=getattr(torch, args.dtype))
    peer = peer.to(device).eval()
    ids = random.randint(random.key(0), (args.prompt,), 0, cfg.vocab_size)

    def theirs() -> list[int]:
        with torch.no_grad():
            out = peer.generate(
                ids.unsqueeze(0).to(device), attention_mask=torch.ones(1, args.prompt, device=device),
                max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens, do_sample=False, pad_token_id=0,
            )  # fmt: skip
        return out[0, args.prompt :].tolist()

    def ours(ops: Any) -> list[int]:
        out = generate.generate(
            transformer.make(cfg, ops), params, [ids], random.key(0).to(device), max_new_tokens=args.new_tokens,
            sampling=generate.Sampling(temperature=0.0),
        )  # fmt: skip
        return out.tokens[0].tolist()

    ways: dict[str, Callable[[], list[int]]] = {
        "transformers": theirs,
        "one row": lambda: ours(ops_for_generation(cfg, torch.device("cpu"))),
        "one row, torch's linear": lambda: ours(SDPA),
    }
    found = {name: way() for name, way in ways.items()}
    for name, tokens in found.items():
        same = next((i for i, (a, b) in enumerate(zip(tokens, found["transformers"], strict=False)) if a != b), None)
        say(f"{name}: tokens {'are those of transformers' if same is None else f'differ from token {same}'}")
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(args.rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - begin)
    where: dict[str, Any] = dict(device=str(device), packages=PACKAGES)
    rates = {name: args.new_tokens / seconds for name, seconds in best.items()}
    floor = 1e9 * copy_bandwidth(device, 5) / tree.n_bytes(params)
    rows = []
    for name in list(ways)[1:]:
        rows.append(
            row(name, rates[name], "tokens/s", peer="transformers", peer_value=rates["transformers"], **where)
        )
        rows.append(row(f"{name}: share of the bandwidth of a copy", rates[name] / floor, "", **where))
    return rows


@program
def main(args: Args) -> None:
    limits.check(args)
    publish(measure(args, pick_device(args.device)), args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
