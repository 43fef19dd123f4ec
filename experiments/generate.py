"""Continue a prompt with a trained run.

    python -m experiments.generate runs/quickstart --prompt "Once upon a time"

Text appears as it is sampled, on a terminal without control characters. The same prompt, seed and settings give the
same text.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from experiments.console import pick_device, program, safe, say
from experiments.limits import Count, Range, Seed, Share, Text, Whole
from experiments.ops import ops_for_generation
from purelm import checkpoint, random, tree
from purelm.generate import Sampling, Stop, stream
from purelm.models import transformer
from purelm.tokenizer import BPE, decode, encode, fingerprint
from purelm.tokenizer import load as load_tokenizer

END = "<|endoftext|>"


@dataclass(frozen=True)
class Args:
    """Continue a prompt with a trained run."""

    run: Annotated[Path, tyro.conf.Positional]
    """folder of the run"""
    prompt: Text = ""
    """empty: start a new document"""
    n: Count = 1
    """samples"""
    max_new_tokens: Count = 200
    # Logits divided by less than 1e-6 overflow fp32; whoever wants that wants 0, greedy.
    temperature: Annotated[float, Range(1e-6, 1e6, or_zero=True)] = 0.8
    """0: greedy"""
    top_k: Count | None = None
    top_p: Annotated[float, Range(0, 1, open_low=True)] | None = 0.95
    min_p: Share | None = None
    stop: tuple[Text, ...] = ()
    """strings that end the text"""
    seed: Seed = 0
    step: Whole | None = None
    """checkpoint; the newest if not given"""
    device: str = "auto"


def load_run(run: Path, step: int | None, device: torch.device) -> tuple[Any, transformer.Config, BPE]:
    """(params, model config, tokenizer) of a run's checkpoint."""
    if not run.is_dir():
        raise ValueError(f"run {run}: no such folder")
    path = run / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"run {run}: has no tokenizer.json")
    bpe = load_tokenizer(path)
    meta = checkpoint.read_manifest(run / "checkpoints", step)["meta"]
    if "model" not in meta.get("config", {}):
        raise ValueError(f"run {run}: its checkpoints do not hold the configuration of a model")
    if (meta["config"].get("lora") or {}).get("rank"):
        raise ValueError(f"run {run}: its checkpoints hold low-rank updates alone: give the whole model, {run}/export")
    made_with = meta.get("fingerprints", {}).get("tokenizer", "none")  # "none": not recorded
    if made_with not in ("none", fingerprint(bpe)):
        raise ValueError(
            f"{path}: its sha256 is {fingerprint(bpe)}, but the model was trained on the ids of {made_with}: "
            "put that tokenizer there"
        )
    trees, meta = checkpoint.load(run / "checkpoints", step, only=["params"], device=device)
    return trees["params"], transformer.config_from_dict(meta["config"]["model"]), bpe


def known_text(bpe: BPE, ids: Sequence[int]) -> str:
    """The text of ids, without those that are no token: a model may have more rows than its tokenizer has tokens."""
    return decode(bpe, [i for i in ids if i in bpe.vocab])


def prompt_ids(bpe: BPE, prompt: str) -> list[int]:
    """The ids of the prompt after the delimiter, which precedes every document in training."""
    end = [i for i, token in bpe.vocab.items() if token == END.encode()]
    ids = [*end, *encode(bpe, prompt).tolist()]
    if not ids:
        raise ValueError(f"prompt is empty, and the tokenizer has no {END} to start a document with")
    return ids


def text_stream(
    params: Any,
    cfg: transformer.Config,
    bpe: BPE,
    prompt: str,
    key: torch.Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_strings: tuple[str, ...] = (),
) -> Iterator[str]:
    """Pieces of text as they are sampled: whole characters only, without the stop token."""
    ids = prompt_ids(bpe, prompt)
    stops = tuple(i for i, token in bpe.vocab.items() if token == END.encode())
    keep = ids[-(cfg.context_length - 1) :]
    if len(keep) < len(ids):
        say(f"prompt: {len(ids)} tokens; only the last {len(keep)} fit into the context of {cfg.context_length}")
    device = tree.leaves(params)[0].device
    new: list[int] = []
    shown = 0
    steps = stream(
        transformer.make(cfg, ops_for_generation(cfg, device)),
        params,
        [keep],
        key.to(device),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=Stop(stops, stop_strings),
        decode_fn=lambda tokens: known_text(bpe, tokens),
    )
    for step in steps:
        token = step.tokens[0]
        if token is None or token in stops:
            continue
        new.append(token)
        text = known_text(bpe, new)
        # A character whose last bytes are not sampled yet decodes to U+FFFD: hold it back.
        whole = text.rstrip("\ufffd") if step.finish_reasons[0] is None else text
        yield whole[shown:]
        shown = max(shown, len(whole))


def complete(
    params: Any, cfg: transformer.Config, bpe: BPE, prompt: str, *, seed: int = 0, max_new_tokens: int = 200
) -> str:
    """The prompt with its continuation, as in a run's report."""
    sampling = Sampling(temperature=0.8, top_p=0.95)
    pieces = text_stream(
        params, cfg, bpe, prompt, random.key(seed), max_new_tokens=max_new_tokens, sampling=sampling
    )
    return prompt + "".join(pieces)


@program
def main(args: Args) -> None:
    device = pick_device(args.device)
    params, cfg, bpe = load_run(args.run, args.step, device)
    for i in range(args.n):
        if args.n > 1:
            print(f"--- {i + 1}")
        print(args.prompt, end="", flush=True)
        pieces = text_stream(
            params,
            cfg,
            bpe,
            args.prompt,
            random.fold_in(random.key(args.seed), i),
            max_new_tokens=args.max_new_tokens,
            sampling=Sampling(args.temperature, args.top_k, args.top_p, args.min_p),
            stop_strings=args.stop,
        )
        for piece in pieces:
            sys.stdout.write(safe(piece))
            sys.stdout.flush()
        print()


if __name__ == "__main__":
    main(tyro.cli(Args))
