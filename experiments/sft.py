r"""Fine-tune a language model on prompts and responses: open weights (a folder, a .gguf file) or a run of `pretrain`.

    python -m experiments.sft --run runs/math --model SmolLM2-135M-Instruct --train gsm8k-train.jsonl \
        --heldout gsm8k-test.jsonl --prompt "Question: {question}\nAnswer:" --response " {answer}" --steps 200
    python -m experiments.sft ... --lora.rank 8            # low-rank updates of every matrix of the blocks
    python -m experiments.sft ... --resume                 # goes on from the newest checkpoint, bit for bit

The data are JSON lines; {name} in a template is a field of the row, and \n a new line. The loss is the mean over the
tokens of responses in a step's batch, whatever the number of microbatches. The batch of step i is a pure function of
(data, seed, i). On SIGTERM or Ctrl-C the step is finished and saved.

It leaves in the run's folder: config.json, metrics.jsonl, generations.jsonl (held-out prompts continued by the model,
with the wanted response), checkpoints/, and export/, a folder that transformers' from_pretrained loads.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from experiments import limits
from experiments.config import Optim
from experiments.console import in_bf16, pick_device, program, progress_bar, say
from experiments.generate import load_run
from experiments.limits import Count, Factor, Place, Seed, Text, Whole
from experiments.lock import locked
from experiments.pairs import encoded, read_pairs
from experiments.setup import make_core, make_schedule
from experiments.signals import asked_to_stop
from purelm import checkpoint, generate, random, track, tree
from purelm.align import lora
from purelm.align.responses import response_batch
from purelm.dist.world import World
from purelm.models import gguf, hf, transformer
from purelm.models.leaves import of_kind
from purelm.optim import adamw
from purelm.tokenizer import BPE, decode, fingerprint
from purelm.tokenizer import load as load_tokenizer
from purelm.train import FULL, MIXED, TrainState, init_state, make_step


@dataclass(frozen=True)
class Lora:
    """Low-rank updates in place of all parameters."""

    rank: Whole = 0
    """0: all parameters are trained"""
    alpha: Factor = 16.0
    """the update is alpha / rank B A"""


@dataclass(frozen=True)
class Sft:
    """Fine-tune a language model on prompts and responses."""

    run: Place
    """folder of the run"""
    model: Place
    """folder of open weights, .gguf file, or folder of a run of `pretrain`"""
    train: Place
    """JSON lines"""
    heldout: Place | None = None
    """JSON lines of an evaluation"""
    tokenizer: Place | None = None
    """tokenizer.json; default that of the model's folder"""
    prompt: Text = "{prompt}"
    response: Text = "{response}"
    end: Text = "<|endoftext|>"
    """special token that ends a response, such as <|im_end|>"""
    begin: Text = ""
    """special token before the prompt"""
    steps: Count = 100
    batch_size: Count = 8
    microbatches: Count = 1
    max_length: Count = 512
    """tokens of prompt and response together"""
    overlong: Literal["error", "truncate", "drop"] = "truncate"
    """what becomes of longer examples; truncate: the end of the response is cut"""
    optim: Optim = field(default_factory=lambda: Optim(lr=2e-5, warmup_steps=10, weight_decay=0.0, beta2=0.999))
    lora: Lora = field(default_factory=Lora)
    seed: Seed = 0
    eval_every: Whole = 50
    """steps from one evaluation to the next; 0: only at the end"""
    eval_pairs: Count = 64
    """held-out pairs in an evaluation"""
    generations: Whole = 4
    """held-out prompts that are continued at each evaluation"""
    max_new_tokens: Count = 128
    save_every: Whole = 100
    keep_last: Count = 2
    log_every: Count = 1
    compute: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    export: bool = True
    """write export/ at the end"""
    resume: bool = False


@program
def main(cfg: Sft) -> None:
    limits.check(cfg)
    device = pick_device(cfg.device)
    there = checkpoint.latest(cfg.run / "checkpoints")
    if there is not None and not cfg.resume:
        raise ValueError(f"run {cfg.run} has a checkpoint of step {there}: give --resume, or another --run")
    if there is None and cfg.resume:
        raise ValueError(f"run {cfg.run} has no checkpoint to go on from")
    with locked(cfg.run):
        _run(cfg, device, there)


def load_model(
    model: Path, tokenizer: Path | None, device: torch.device
) -> tuple[Any, transformer.Config, BPE]:
    """(params, configuration, tokenizer) of a folder of open weights, a .gguf file or a run's folder."""
    given = load_tokenizer(tokenizer, text_only=True) if tokenizer is not None else None
    if model.suffix == ".gguf":
        return gguf.load(model, device=device) if given is None else (*gguf.load_weights(model, device=device), given)
    if (model / "checkpoints").is_dir():
        params, cfg, bpe = load_run(model, None, device)
        return params, cfg, given or bpe
    if given is not None:
        return *hf.load_weights(model, dtype=torch.float32, device=device), given
    return hf.load(model, dtype=torch.float32, device=device)


def _run(cfg: Sft, device: torch.device, done: int | None) -> None:
    params, config, bpe = load_model(cfg.model, cfg.tokenizer, device)
    begin, end = _special(bpe, cfg.begin, "begin"), _special(bpe, cfg.end, "end")
    if cfg.max_length > config.context_length:
        raise ValueError(f"max_length is {cfg.max_length}: the model's context_length is {config.context_length}")
    as_ids = partial(encoded, bpe, before=begin, after=end)
    prompt, response = (t.replace("\\n", "\n") for t in (cfg.prompt, cfg.response))
    pairs = _fitting(cfg, as_ids(read_pairs(cfg.train, prompt, response)), cfg.train)
    if len(pairs) < cfg.batch_size:
        raise ValueError(f"{cfg.train}: {len(pairs)} pairs of at most {cfg.max_length} tokens; batch_size is more")
    wanted, heldout = [], []
    if cfg.heldout is not None:
        wanted = read_pairs(cfg.heldout, prompt, response, cfg.eval_pairs)
        heldout = _fitting(cfg, as_ids(wanted), cfg.heldout)
    model = transformer.make(config)
    pad = (end or begin or [0])[0]
    meta = {"sft": _plain(cfg), "model": dataclasses.asdict(config), "tokenizer": fingerprint(bpe)}
    state, step, whole = _training(cfg, model, params, device)
    if done is not None:
        state = _resumed(cfg, state, meta, done)
    first = done or 0
    cfg.run.mkdir(parents=True, exist_ok=True)
    track.write_json(cfg.run / "config.json", meta)
    emit = track.jsonl_sink(cfg.run / "metrics.jsonl")
    say(f"{tree.n_params(state.params):,} parameters are trained of {tree.n_params(params):,}, on {device}; "
        f"{len(pairs):,} pairs")  # fmt: skip

    def batch(i: int) -> dict[str, torch.Tensor]:
        chosen = [pairs[k] for k in _order(cfg.seed, len(pairs), i, cfg.batch_size)]
        return _batch(cfg, chosen, pad, device)

    def evaluate(number: int) -> None:
        if heldout:
            emit({"step": number, **_evaluate(cfg, model, whole(state.params), heldout, pad, device)})
            if cfg.generations:
                _generations(cfg, model, whole(state.params), wanted, as_ids, bpe, end, number)

    def save(number: int) -> None:
        trees = {"params": state.params, "opt_state": state.opt_state}
        checkpoint.save(cfg.run / "checkpoints", number, trees, meta=meta, keep_last=cfg.keep_last)

    if first == 0:
        evaluate(0)
    number = first
    with progress_bar("fine-tuning", cfg.steps, "steps") as update, asked_to_stop(World(0, 1, device)) as asked:
        for i in range(first, cfg.steps):
            before = time.perf_counter()
            data = batch(i)
            state, metrics = step(state, data)
            number = i + 1
            values = {name: float(x) for name, x in metrics.items()}
            if not np.isfinite(values["loss"]):
                raise ValueError(f"loss is {values['loss']} at step {number}: lower optim.lr ({cfg.optim.lr})")
            rate = data["tokens"].numel() / (time.perf_counter() - before)
            if number % cfg.log_every == 0 or number == cfg.steps:
                emit({"step": number, **values, "tokens_per_second": round(rate, 1)})
            update(number, f"loss {values['loss']:.3f}  {rate:,.0f} tokens/s")
            signal = asked()
            if number == cfg.steps or signal or (cfg.save_every and number % cfg.save_every == 0):
                save(number)
            if signal:
                say(f"step {number:,} is saved in {cfg.run}: the same command and --resume go on from there")
                raise SystemExit(128 + signal)
            if number == cfg.steps or (cfg.eval_every and number % cfg.eval_every == 0):
                evaluate(number)
    if cfg.export and not (cfg.run / "export").exists():
        ids = {"eos_token_id": end[0], "pad_token_id": pad} if end else {}
        hf.save(cfg.run / "export", tree.to(whole(state.params), "cpu"), config, bpe, fields=ids)
    for row in track.read_rows(cfg.run / "metrics.jsonl")[-2:]:
        print("  ".join(f"{name} {track.show(value)}" for name, value in row.items()))
    print(f"{cfg.run}: config.json, metrics.jsonl, generations.jsonl, checkpoints/, export/")


def _plain(cfg: Sft) -> dict[str, Any]:
    """The configuration as JSON has it, without what may change when a run goes on."""
    free = ("resume", "steps", "save_every", "eval_every", "log_every", "keep_last", "export", "generations", "device")
    found = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in free}
    return {name: value if isinstance(value, (int, float, str, dict, type(None))) else str(value)
            for name, value in found.items()}  # fmt: skip


def _special(bpe: BPE, token: str, name: str) -> list[int]:
    """The id of a special token; no id for the empty text."""
    if not token:
        return []
    found = [i for i, piece in bpe.vocab.items() if piece == token.encode() and token in bpe.special_tokens]
    if not found:
        some = ", ".join(sorted(bpe.special_tokens)[:8]) or "none"
        raise ValueError(f"{name}: the tokenizer has no special token {token!r}; it has {some}")
    return found[:1]


def _fitting(cfg: Sft, pairs: list[tuple[Any, Any]], path: Any) -> list[tuple[Any, Any]]:
    """The pairs that are trained on; ValueError names one that is too long, with overlong "error"."""
    kept = []
    for i, (prompt, response) in enumerate(pairs):
        n = len(prompt) + len(response)
        if n > cfg.max_length and cfg.overlong == "error":
            raise ValueError(f"{path}: example {i} has {n} tokens, more than max_length {cfg.max_length}")
        if n <= cfg.max_length or (cfg.overlong == "truncate" and len(prompt) < cfg.max_length):
            kept.append((prompt, response[: cfg.max_length - len(prompt)]))
    if len(kept) < len(pairs):
        say(f"{path}: {len(pairs) - len(kept):,} of {len(pairs):,} examples are longer than max_length and left out")
    return kept


def _order(seed: int, n: int, i: int, batch_size: int) -> list[int]:
    """Numbers of the pairs of step i: every pair once an epoch, in an order of its own; the last few wait."""
    per_epoch = n // batch_size
    key = random.fold_in(random.fold_in(random.key(seed), 1), i // per_epoch)
    at = (i % per_epoch) * batch_size
    return random.permutation(key, n)[at : at + batch_size].tolist()


def _batch(cfg: Sft, pairs: list[tuple[Any, Any]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    made = response_batch([p for p, _ in pairs], [r for _, r in pairs], pad_id=pad, multiple_of=32)
    return {name: x.to(device) for name, x in made.items()}


def _training(
    cfg: Sft, model: transformer.Model, params: Any, device: torch.device
) -> tuple[TrainState, Callable[..., Any], Callable[[Any], Any]]:
    """(state, step, what is trained -> whole parameters)."""
    precision = MIXED if in_bf16(cfg.compute, device) else FULL
    optimizer, schedule = make_core(cfg.optim, model.leaves), make_schedule(cfg.optim, cfg.steps)
    options: dict[str, Any] = {"microbatches": cfg.microbatches, "precision": precision}
    if cfg.optim.clip:
        options["max_norm"] = cfg.optim.clip
    if not cfg.lora.rank:
        step = make_step(model.loss, optimizer, schedule, **options)
        return init_state(params, optimizer, precision), step, lambda params: params
    matrices = of_kind(model.leaves, "matrix")
    adapters = lora.init(random.key(cfg.seed).to(device), params, cfg.lora.rank, matrices)
    base = tree.cast(params, precision.compute)

    def merged(adapters: Any) -> Any:
        return lora.merge(base, adapters, alpha=cfg.lora.alpha)

    def loss(adapters: Any, batch: Any) -> Any:
        return model.loss(merged(adapters), batch)

    plain = adamw((cfg.optim.beta1, cfg.optim.beta2), cfg.optim.eps, cfg.optim.weight_decay)
    step = make_step(loss, plain, schedule, **options)
    return init_state(adapters, plain, precision), step, lambda x: lora.merge(params, x, alpha=cfg.lora.alpha)


def _resumed(cfg: Sft, state: TrainState, meta: dict[str, Any], done: int) -> TrainState:
    like = {"params": state.params, "opt_state": state.opt_state}
    trees, saved = checkpoint.load(cfg.run / "checkpoints", done, like=like)
    for part, now in meta.items():
        before = saved.get(part)
        if before != now:
            names = [k for k in now if before.get(k) != now[k]] if isinstance(now, dict) and before else [part]
            raise ValueError(f"run {cfg.run}: {part} is not that of the checkpoint: {', '.join(names)}")
    if done >= cfg.steps:
        raise ValueError(f"run {cfg.run} is finished: {done} of {cfg.steps} steps; with more --steps it goes on")
    say(f"resumed from step {done:,}")
    step = torch.full((), done, dtype=torch.int64, device=state.step.device)
    return TrainState(trees["params"], trees["opt_state"], step)


@torch.no_grad()
def _evaluate(
    cfg: Sft, model: transformer.Model, params: Any, pairs: list[tuple[Any, Any]], pad: int, device: torch.device
) -> dict[str, float]:
    """Mean loss of held-out response tokens, in nats."""
    total = count = 0.0
    for start in range(0, len(pairs), cfg.batch_size):
        batch = _batch(cfg, pairs[start : start + cfg.batch_size], pad, device)
        log_p, _ = model.log_probs(params, batch)
        total -= float(log_p.double().sum())
        count += float(batch["weights"].sum())
    return {"heldout_loss": total / max(count, 1.0)}


def _generations(
    cfg: Sft, model: transformer.Model, params: Any, pairs: list[Any], as_ids: Any, bpe: BPE, end: list[int], step: int
) -> None:
    """Greedy continuations of the first held-out prompts, appended to generations.jsonl."""
    sink = track.jsonl_sink(cfg.run / "generations.jsonl")
    chosen = [p for p in pairs if len(as_ids([p])[0][0]) < cfg.max_length][: cfg.generations]
    prompts = [as_ids([p])[0][0].tolist() for p in chosen]
    if not prompts:
        return
    out = generate.generate(
        model,
        params,
        prompts,
        random.key(cfg.seed).to(tree.leaves(params)[0].device),
        max_new_tokens=cfg.max_new_tokens,
        sampling=generate.Sampling(temperature=0.0),
        stop=generate.Stop(tuple(end)),
        decode_fn=lambda ids: decode(bpe, [i for i in ids if i in bpe.vocab]),  # a model may have more rows than tokens
    )
    for pair, ids, reason, text in zip(chosen, out.tokens, out.finish_reasons, out.texts or [], strict=True):
        row = {"step": step, "prompt": pair.prompt, "response": text, "wanted": pair.response}
        sink({**row, "n_tokens": len(ids), "finish_reason": reason})


if __name__ == "__main__":
    main(tyro.cli(Sft))
