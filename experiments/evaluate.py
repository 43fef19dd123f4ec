"""Answer question sets with a model, grade the answers, and show them.

    python -m experiments.evaluate SmolLM2-135M-Instruct --tasks gsm8k mmlu --data data --out evals/smol
    python -m experiments.evaluate runs/math/export --tasks svamp --data data --out evals/math --limit 200

Writes OUT/TASK.jsonl, a row an example as soon as its batch is done, TASK.html to browse right and wrong answers, and
summary.json with 95 % intervals. The same command again goes on where it was stopped. An answer depends on the
example, the seed and the settings, not on the batch that it was in.
"""

import html
import json
import zlib
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from experiments import limits
from experiments.console import pick_device, program, progress_bar, say
from experiments.generate import known_text
from experiments.limits import Count, Place, Range, Seed, Text
from experiments.lock import locked
from experiments.open_model import open_model
from experiments.pairs import filled, text_of
from purelm import generate, random, track, tree
from purelm.dist.agreement import fingerprint as tensors_of
from purelm.evals.accuracy import majority, pass_at_k, wilson
from purelm.evals.tasks import TASKS, Example, Task
from purelm.models import transformer
from purelm.tokenizer import BPE, fingerprint, token_to_id
from purelm.tokenizer.chat import Chat, encode_chat, encode_parts, load_chat


@dataclass(frozen=True)
class Args:
    """Answer question sets with a model, and grade the answers."""

    model: Annotated[Place, tyro.conf.Positional]
    """folder of open weights, .gguf file, or folder of a run"""
    out: Place
    """folder of the results"""
    data: Place
    """folder with the question sets: gsm8k-test.jsonl, svamp.test.jsonl, mmlu/*_test.csv, ... anywhere in it"""
    tasks: tuple[Text, ...] = ("gsm8k",)
    """of gsm8k, svamp, asdiv, mawps, mmlu"""
    tokenizer: Place | None = None
    limit: Count | None = None
    """first examples of each set"""
    template: Text = "{prompt}"
    r"""text around {prompt}, the question set's own, or around the bare {question}; \n is a new line"""
    chat: bool = False
    """put the text as a user's message into the chat template of the model's folder"""
    stop: tuple[Text, ...] = ()
    """strings that end an answer"""
    end: tuple[Text, ...] = ("<|endoftext|>", "<|im_end|>")
    """special tokens that end an answer, where the tokenizer has them"""
    n_samples: Count = 1
    """answers to each question: pass@k and maj@k"""
    temperature: Annotated[float, Range(1e-6, 1e6, or_zero=True)] = 0.0
    """0: greedy"""
    max_new_tokens: Count = 256
    batch_size: Count = 16
    seed: Seed = 0
    device: str = "auto"


@program
def main(args: Args) -> None:
    limits.check(args)
    device = pick_device(args.device)
    unknown = [name for name in args.tasks if name not in TASKS]
    if unknown:
        raise ValueError(f"tasks: {', '.join(unknown)}: not known; there are {', '.join(TASKS)}")
    if args.n_samples > 1 and args.temperature == 0.0:
        raise ValueError("n_samples: several greedy answers are all the same; give a temperature")
    sets = {name: _examples(args, name) for name in args.tasks}
    params, cfg, bpe = open_model(args.model, args.tokenizer, device)
    free = ("out", "model", "data", "tokenizer", "tasks", "limit", "batch_size", "device")  # compared by what they hold
    settings = {name: str(value) for name, value in asdict(args).items() if name not in free}
    settings |= {"model": tensors_of(params), "tokenizer": fingerprint(bpe)}
    chat = load_chat(args.model) if args.chat else None
    with locked(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        _check_settings(args.out / "settings.json", settings)
        track.write_json(args.out / "settings.json", settings)
        summary = {}
        for name, examples in sets.items():
            rows = _answer(args, name, examples, transformer.make(cfg), params, bpe, chat)
            summary[name] = _summary(rows)
            _page(args.out / f"{name}.html", name, rows, summary[name])
        track.write_json(args.out / "summary.json", summary)
    for name, found in summary.items():
        print("  ".join([f"{name:8}", *(f"{k} {track.show(v)}" for k, v in found.items())]))
    print(f"{args.out}: summary.json, {', '.join(f'{name}.jsonl, {name}.html' for name in summary)}")


def _examples(args: Args, name: str) -> list[Example]:
    task = TASKS[name]
    files = sorted(args.data.glob(task.files))
    if not files:
        raise ValueError(f"tasks: {name}: no file {task.files} in {args.data}")
    found = [example for file in files for example in task.load(file)]
    return found[: args.limit]


def _check_settings(path: Path, settings: dict[str, str]) -> None:
    """ValueError if answers of another model or of other settings lie there."""
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [f"{name} ({before.get(name)})" for name in settings if before.get(name) != settings[name]]
    if changed:
        raise ValueError(f"{path.parent}: has answers with another {', '.join(changed)}: give another --out")


def _answer(
    args: Args, name: str, examples: list[Example], model: Any, params: Any, bpe: BPE, chat: Chat | None
) -> list[dict[str, Any]]:
    """Rows of all examples: those that lie there, and the others, which are written as they come."""
    path = args.out / f"{name}.jsonl"
    track.drop_rows(path, lambda row: False)  # but for a last line that a kill cut short
    known = {row["id"]: row for row in track.read_rows(path)}
    other = [x.id for x in examples if x.id in known and (known[x.id]["question"], known[x.id]["gold"]) != x[1:3]]
    if other:
        raise ValueError(f"{path}: {other[0]} is another question than in {args.data}: give another --out")
    sink = track.jsonl_sink(path)
    left = [x for x in examples if x.id not in known]
    if len(left) < len(examples):
        say(f"{name}: {len(examples) - len(left):,} of {len(examples):,} answers are there")
    per_batch = max(args.batch_size // args.n_samples, 1)
    with progress_bar(name, len(left), "questions") as update:
        for at in range(0, len(left), per_batch):
            chosen = left[at : at + per_batch]
            answered = _texts(args, TASKS[name], chosen, model, params, bpe, chat)
            for example, texts in zip(chosen, answered, strict=True):
                graded = [TASKS[name].grade(text, example) for text in texts]
                answers = [g.answer for g in graded]
                known[example.id] = {
                    "id": example.id, "question": example.question, "gold": example.gold, "responses": texts,
                    "answers": answers, "right": [g.right for g in graded],
                }  # fmt: skip
                sink(known[example.id])
            done = [known[x.id] for x in examples if x.id in known]
            share = sum(row["right"][0] for row in done) / len(done)
            update(at + len(chosen), f"{100 * share:.1f} % right")
    return [known[x.id] for x in examples]


def _texts(
    args: Args, task: Task, examples: list[Example], model: Any, params: Any, bpe: BPE, chat: Chat | None
) -> list[list[str]]:
    """n_samples responses to each example. Of a prompt that does not fit the end is kept, and it is said."""
    device = tree.leaves(params)[0].device
    ends = tuple(token_to_id(bpe, name) for name in args.end if name in bpe.special_tokens)
    room = max(model.context_length - args.max_new_tokens, 1)
    prompts, keys = [], []
    for example in examples:
        # Special tokens are the template's alone: in a question they are ordinary text.
        parts = filled(args.template, {"prompt": task.prompt(example), "question": example.question})
        ids = encode_parts(bpe, parts)
        if chat is not None:
            ids = encode_chat(bpe, chat, [{"role": "user", "content": text_of(parts)}])
        if len(ids) > room:
            say(f"{example.id}: of the prompt's {len(ids)} tokens the last {room} fit before {args.max_new_tokens} new")
        key = random.fold_in(random.key(args.seed), zlib.crc32(example.id.encode()))
        for k in range(args.n_samples):
            prompts.append(ids.astype(np.int64)[-room:].tolist())
            keys.append(random.fold_in(key, k))
    out = generate.generate(
        model,
        params,
        prompts,
        torch.stack(keys).to(device),
        max_new_tokens=args.max_new_tokens,
        sampling=generate.Sampling(temperature=args.temperature),
        stop=generate.Stop(ends, args.stop),
        decode_fn=partial(known_text, bpe),
    )
    texts = out.texts or []
    return [texts[i : i + args.n_samples] for i in range(0, len(texts), args.n_samples)]


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of right answers, with the interval of the first samples'."""
    n, k = len(rows), len(rows[0]["right"])
    right = sum(row["right"][0] for row in rows)
    low, high = wilson(right, n)
    found = {
        "n": n, "right": right, "accuracy": right / n, "low": low, "high": high,
        "unparsed": sum(row["answers"][0] is None for row in rows),
    }  # fmt: skip
    if k > 1:
        found["mean accuracy"] = sum(sum(row["right"]) / k for row in rows) / n
        found[f"pass@{k}"] = sum(pass_at_k(k, sum(row["right"]), k) for row in rows) / n
        chosen = [majority(row["answers"]) for row in rows]
        found[f"maj@{k}"] = sum(
            answer is not None and row["right"][row["answers"].index(answer)]
            for answer, row in zip(chosen, rows, strict=True)
        ) / n  # fmt: skip
    return found


def _page(path: Path, name: str, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """A page of its own with all answers; buttons show the right ones, the wrong ones, or all."""
    cells = []
    for row in rows:
        kind = "right" if row["right"][0] else "wrong"
        said = "<hr>".join(html.escape(text) for text in row["responses"])
        answers = ", ".join(map(str, row["answers"]))
        cells.append(
            f'<tr class="{kind}"><td>{html.escape(row["id"])}</td><td>{html.escape(row["question"])}</td>'
            f"<td>{said}</td><td>{html.escape(answers)}</td><td>{html.escape(row['gold'])}</td></tr>"
        )
    shown = ", ".join(f"{k} {track.show(v)}" for k, v in summary.items())
    style = "td{vertical-align:top;white-space:pre-wrap;border-top:1px solid #ccc}.wrong td{background:#fee}"
    script = "const show=k=>document.querySelectorAll('tr').forEach(r=>r.hidden=k&&r.className&&r.className!=k)"
    track.write_text(
        path,
        f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{style}</style><script>{script}</script>"
        f"<h1>{name}</h1><p>{html.escape(shown)}</p><p><button onclick=\"show('')\">all</button> "
        "<button onclick=\"show('right')\">right</button> <button onclick=\"show('wrong')\">wrong</button></p>"
        f"<table><tr><th>id<th>question<th>response<th>answer<th>gold</tr>{''.join(cells)}</table>",
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
