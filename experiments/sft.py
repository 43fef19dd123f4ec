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
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import tyro

from experiments import limits, resume
from experiments.config import Optim
from experiments.console import in_bf16, pick_device, program, progress_bar, say
from experiments.generate import known_text
from experiments.limits import Count, Factor, Place, Seed, Text, Whole
from experiments.lock import locked
from experiments.open_model import open_model
from experiments.pairs import Example, batch_of, content, read_examples, text_of
from experiments.setup import make_core, make_deterministic, make_schedule
from experiments.signals import asked_to_stop
from purelm import checkpoint, generate, random, track, tree
from purelm.align import lora
from purelm.dist.agreement import fingerprint as tensors_of
from purelm.dist.agreement import non_finite_ranks
from purelm.dist.world import World
from purelm.models import hf, transformer
from purelm.models.leaves import of_kind
from purelm.optim import adamw
from purelm.tokenizer import BPE, fingerprint, token_to_id
from purelm.tokenizer import save as save_tokenizer
from purelm.tokenizer.chat import Chat, find_chat
from purelm.train import FULL, MIXED, TrainState, init_state, make_step

# May differ when a run goes on; files and the model are compared by what they hold.
FREE = (
    "steps", "save_every", "eval_every", "log_every", "keep_last", "export", "generations", "max_new_tokens", "device",
    "microbatches", "resume", "run", "train", "heldout", "tokenizer",
)  # fmt: skip


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
    if cfg.lora.rank and cfg.optim.name != "adamw":
        raise ValueError(f"optim.name is {cfg.optim.name}: low-rank updates are trained by adamw")
    there = checkpoint.latest(cfg.run / "checkpoints")
    if there is not None and not cfg.resume:
        raise ValueError(f"run {cfg.run} has a checkpoint of step {there}: give --resume, or another --run")
    if there is None and cfg.resume:
        raise ValueError(f"run {cfg.run} has no checkpoint to go on from")
    make_deterministic()
    with locked(cfg.run):
        _run(cfg, device)


def _run(cfg: Sft, device: torch.device) -> None:
    params, config, bpe = open_model(cfg.model, cfg.tokenizer, device)
    chat = _chat(cfg, bpe)
    begin, end = _special(bpe, cfg.begin, "begin"), _special(bpe, cfg.end, "end")
    if cfg.max_length > config.context_length:
        raise ValueError(f"max_length is {cfg.max_length}: the model's context_length is {config.context_length}")
    examples = partial(
        read_examples, bpe=bpe, prompt=cfg.prompt, response=cfg.response, before=begin, after=end,
        max_length=cfg.max_length, overlong=cfg.overlong,
    )  # fmt: skip
    pairs = examples(cfg.train)
    if len(pairs) < cfg.batch_size:
        raise ValueError(f"{cfg.train}: {len(pairs)} pairs of at most {cfg.max_length} tokens; batch_size is more")
    heldout = examples(cfg.heldout, limit=cfg.eval_pairs) if cfg.heldout is not None else []
    model = transformer.make(config)
    pad = (end or begin or [0])[0]
    state, step, whole = _training(cfg, model, params, device)
    fields = {name: x for name, x in dataclasses.asdict(cfg).items() if name != "model"}
    meta = {
        "config": json.loads(json.dumps({**fields, "model": dataclasses.asdict(config)}, default=str)),
        "fingerprints": {
            "model": tensors_of(params), "train": content(pairs), "heldout": content(heldout),
            "tokenizer": fingerprint(bpe),
        },
    }  # fmt: skip
    metrics_file, generations_file = cfg.run / "metrics.jsonl", cfg.run / "generations.jsonl"
    first = 0
    if cfg.resume:
        first, state = _resumed(cfg, state, meta)
    for file in (metrics_file, generations_file):  # rows that come again, and what a run without checkpoint left
        track.drop_rows(file, lambda row: first == 0 or row["step"] > first)
    cfg.run.mkdir(parents=True, exist_ok=True)
    track.write_json(cfg.run / "config.json", meta["config"])
    save_tokenizer(bpe, cfg.run / "tokenizer.json")
    emit = track.jsonl_sink(metrics_file)
    say(f"{tree.n_params(state.params):,} parameters are trained of {tree.n_params(params):,}, on {device}; "
        f"{len(pairs):,} pairs")  # fmt: skip

    def evaluate(number: int) -> None:
        if heldout:
            emit({"step": number, **_evaluate(cfg, model, whole(state.params), heldout, pad, device)})
            if cfg.generations:
                _generations(cfg, model, whole(state.params), heldout[: cfg.generations], bpe, end, number)

    def save(number: int) -> None:
        trees = {"params": state.params, "opt_state": state.opt_state}
        for name, values in trees.items():
            if non_finite_ranks(values):
                raise ValueError(f"{name} hold inf or nan after step {number}: nothing is saved; lower optim.lr")
        checkpoint.save(cfg.run / "checkpoints", number, trees, meta=meta, keep_last=cfg.keep_last, finite=True)

    if first == 0:
        evaluate(0)
    with progress_bar("fine-tuning", cfg.steps, "steps") as update, asked_to_stop(World(0, 1, device)) as asked:
        for i in range(first, cfg.steps):
            before = time.perf_counter()
            chosen = [pairs[k] for k in _order(cfg.seed, len(pairs), i, cfg.batch_size)]
            data = batch_of(chosen, pad, device)
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
            # Evaluated before it is saved: what is saved has its rows, and rows after a checkpoint are written again.
            if not signal and (number == cfg.steps or (cfg.eval_every and number % cfg.eval_every == 0)):
                evaluate(number)
            if number == cfg.steps or signal or (cfg.save_every and number % cfg.save_every == 0):
                save(number)
            if signal and number < cfg.steps:
                say(f"step {number:,} is saved in {cfg.run}: the same command and --resume go on from there")
                raise SystemExit(128 + signal)
    if cfg.export:
        _export(cfg, whole(state.params), config, bpe, {"eos_token_id": end[0], "pad_token_id": pad} if end else {},
                chat)  # fmt: skip
    for row in track.read_rows(metrics_file)[-2:]:
        print("  ".join(f"{name} {track.show(value)}" for name, value in row.items()))
    print(f"{cfg.run}: config.json, metrics.jsonl, generations.jsonl, checkpoints/{', export/' * cfg.export}")


def _special(bpe: BPE, token: str, name: str) -> list[int]:
    """The id of a special token; no id for the empty text."""
    if not token:
        return []
    if token not in bpe.special_tokens:
        some = ", ".join(sorted(bpe.special_tokens)[:8]) or "none"
        raise ValueError(f"{name}: the tokenizer has no special token {token!r}; it has {some}")
    return [token_to_id(bpe, token)]


def _order(seed: int, n: int, i: int, batch_size: int) -> list[int]:
    """Numbers of the pairs of step i: every pair once an epoch, in an order of its own; the last few wait."""
    per_epoch = n // batch_size
    key = random.fold_in(random.fold_in(random.key(seed), 1), i // per_epoch)
    at = (i % per_epoch) * batch_size
    return random.permutation(key, n)[at : at + batch_size].tolist()


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


def _resumed(cfg: Sft, state: TrainState, meta: dict[str, Any]) -> tuple[int, TrainState]:
    """(step, state) of the newest checkpoint; ValueError names what differs from the run that it is of."""
    done, saved = resume.newest(cfg.run)
    found = resume.differences(saved, meta["config"], meta["fingerprints"], FREE)
    if lines := [f"{name} {now!r} is not that of the checkpoint, {before!r}" for name, now, before in found]:
        raise ValueError(f"--resume: {'; '.join(lines)}: the run would go on as another one")
    if done > cfg.steps:
        raise ValueError(f"steps must be at least {done}, those of the checkpoint that is resumed, got {cfg.steps}")
    like = {"params": state.params, "opt_state": state.opt_state}
    trees, _ = checkpoint.load(cfg.run / "checkpoints", done, like=like)
    say(f"resumed from step {done:,}")
    step = torch.full((), done, dtype=torch.int64, device=state.step.device)
    return done, TrainState(trees["params"], trees["opt_state"], step)


@torch.no_grad()
def _evaluate(
    cfg: Sft, model: transformer.Model, params: Any, examples: list[Example], pad: int, device: torch.device
) -> dict[str, float]:
    """Mean loss of held-out response tokens, in nats."""
    total = count = 0.0
    for start in range(0, len(examples), cfg.batch_size):
        batch = batch_of(examples[start : start + cfg.batch_size], pad, device)
        log_p, _ = model.log_probs(params, batch)
        total -= float(log_p.double().sum())
        count += float(batch["weights"].sum())
    return {"heldout_loss": total / max(count, 1.0)}


def _generations(
    cfg: Sft, model: transformer.Model, params: Any, examples: list[Example], bpe: BPE, end: list[int], step: int
) -> None:
    """Greedy continuations of held-out prompts, appended to generations.jsonl."""
    out = generate.generate(
        model,
        params,
        [x.prompt.tolist() for x in examples],
        random.key(cfg.seed).to(tree.leaves(params)[0].device),
        max_new_tokens=cfg.max_new_tokens,
        sampling=generate.Sampling(temperature=0.0),
        stop=generate.Stop(tuple(end)),
        decode_fn=partial(known_text, bpe),
    )
    sink = track.jsonl_sink(cfg.run / "generations.jsonl")
    for x, ids, reason, text in zip(examples, out.tokens, out.finish_reasons, out.texts or [], strict=True):
        row = {"step": step, "prompt": text_of(x.pair.prompt), "response": text, "wanted": text_of(x.pair.response)}
        sink({**row, "n_tokens": len(ids), "finish_reason": reason})


def _chat(cfg: Sft, bpe: BPE) -> Chat | None:
    """The model's chat template, for its export; None where it has none that goes with the tokenizer."""
    chat = find_chat(cfg.model)
    if chat is not None and (lacks := hf.chat_lacks(bpe, chat)):
        say(f"export/ will have no chat template: its {', '.join(lacks)} is no special token of the tokenizer")
        return None
    return chat


def _export(
    cfg: Sft, params: Any, config: transformer.Config, bpe: BPE, fields: dict[str, Any], chat: Chat | None
) -> None:
    """The model as open weights, in place of an earlier export of the run."""
    new, place = cfg.run / "export.new", cfg.run / "export"
    shutil.rmtree(new, ignore_errors=True)
    hf.save(new, tree.to(params, "cpu"), config, bpe, fields=fields, chat=chat)
    shutil.rmtree(place, ignore_errors=True)
    new.rename(place)


if __name__ == "__main__":
    main(tyro.cli(Sft))
