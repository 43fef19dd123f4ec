"""A model's answers to a question set: prompts, generation and grading, a row an example."""

import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.console import progress_bar, say
from experiments.eval_sets import Asked, Shot, digest, shots_of
from experiments.generate import known_text
from experiments.pairs import Parts, filled, text_of
from purelm import generate, random, track, tree
from purelm.evals.tasks import Example
from purelm.tokenizer import BPE
from purelm.tokenizer.chat import Chat, encode_chat, encode_parts

__all__ = ["Answering", "answer", "prompt_ids"]

BORDER = "\n\n"  # between worked examples


class Answering(NamedTuple):
    """A model, and how it answers."""

    model: Any
    params: Any
    bpe: BPE
    chat: Chat | None
    template: str
    n_samples: int
    sampling: generate.Sampling
    stop: generate.Stop
    max_new_tokens: int
    batch_size: int
    seed: int
    options: Mapping[str, Any] = MappingProxyType({})  # further keywords of `generate`


def answer(how: Answering, asked: Asked, path: Path, data: Path) -> list[dict[str, Any]]:
    """Rows of all examples: those that lie in the file, and the others, which are written as they come."""
    track.drop_rows(path, lambda row: False)  # but for a last line that a kill cut short
    known = {row["id"]: row for row in track.read_rows(path)}
    shots = {x.id: shots_of(asked, x) for x in asked.examples}
    _check(asked, known, shots, path, data)
    few = sum(len(chosen) < asked.shots.n for chosen in shots.values())
    if few:
        say(f"{asked.name}: {few} questions are among the worked examples, and have fewer of those")
    sink = track.jsonl_sink(path)
    left = [x for x in asked.examples if x.id not in known]
    if len(left) < len(asked.examples):
        say(f"{asked.name}: {len(asked.examples) - len(left):,} of {len(asked.examples):,} answers are there")
    per_batch = max(how.batch_size // how.n_samples, 1)
    with progress_bar(asked.name, len(left), "questions") as update:
        for at in range(0, len(left), per_batch):
            chosen = left[at : at + per_batch]
            answered = _texts(how, asked, chosen, [shots[x.id] for x in chosen])
            for example, texts in zip(chosen, answered, strict=True):
                known[example.id] = _row(asked, example, texts, digest(shots[example.id]))
                sink(known[example.id])
            done = [known[x.id] for x in asked.examples if x.id in known]
            right = f"{100 * sum(row['right'][0] for row in done) / len(done):.1f} % right" if asked.grade else ""
            update(at + len(chosen), right)
    return [known[x.id] for x in asked.examples]


def _check(
    asked: Asked, known: dict[str, dict[str, Any]], shots: dict[str, list[Shot]], path: Path, data: Path
) -> None:
    """ValueError if rows are of other questions, or of other worked examples before them."""
    for x in asked.examples:
        row = known.get(x.id)
        if row is not None and (row["question"], row["gold"]) != x[1:3]:
            raise ValueError(f"{path}: {x.id} is another question than in {data}: give another --out")
        if row is not None and row.get("shots", "") != digest(shots[x.id]):
            raise ValueError(f"{path}: {x.id} was asked after other worked examples: give another --out")


def _row(asked: Asked, example: Example, texts: list[str], shots: str) -> dict[str, Any]:
    row: dict[str, Any] = {"id": example.id, "question": example.question, "gold": example.gold, "responses": texts}
    if asked.grade is not None:
        graded = [asked.grade(text, example) for text in texts]
        row |= {"answers": [g.answer for g in graded], "right": [g.right for g in graded]}
    return row | ({"shots": shots} if shots else {})


def _texts(
    how: Answering, asked: Asked, examples: Sequence[Example], shots: Sequence[list[Shot]]
) -> list[list[str]]:
    """n_samples responses to each example. Of a prompt that does not fit the end is kept, and it is said."""
    device = tree.leaves(how.params)[0].device
    room = max(how.model.context_length - how.max_new_tokens, 1)
    prompts, keys = [], []
    for example, before in zip(examples, shots, strict=True):
        ids = prompt_ids(how, asked, example, before)
        if len(ids) > room:
            new = how.max_new_tokens
            say(f"{example.id}: of the prompt's {len(ids)} tokens the last {room} fit before {new} new")
        key = random.fold_in(random.key(how.seed), zlib.crc32(example.id.encode()))
        for k in range(how.n_samples):
            prompts.append(ids.astype(np.int64)[-room:].tolist())
            keys.append(random.fold_in(key, k))
    # Without an end a model goes on with the next question, whose numbers are no answer to this one.
    ends = any(shots) and how.chat is None and not any(BORDER in response for chosen in shots for _, response in chosen)
    out = generate.generate(
        how.model,
        how.params,
        prompts,
        torch.stack(keys).to(device),
        max_new_tokens=how.max_new_tokens,
        sampling=how.sampling,
        stop=generate.Stop(how.stop.ids, (*how.stop.strings, BORDER)) if ends else how.stop,
        decode_fn=partial(known_text, how.bpe),
        **how.options,
    )
    texts = out.texts or []
    return [texts[i : i + how.n_samples] for i in range(0, len(texts), how.n_samples)]


def prompt_ids(how: Answering, asked: Asked, example: Example, shots: list[Shot]) -> np.ndarray:
    """Special tokens are the template's alone: in questions and in worked responses they are ordinary text."""

    def parts(x: Example) -> Parts:
        return filled(how.template, {"prompt": asked.prompt(x), "question": x.question})

    if how.chat is None:
        before = [part for x, response in shots for part in (*parts(x), (f" {response}{BORDER}", False))]
        return encode_parts(how.bpe, [*before, *parts(example)])
    turns = [(("user", text_of(parts(x))), ("assistant", response)) for x, response in shots]
    said = [*(turn for pair in turns for turn in pair), ("user", text_of(parts(example)))]
    return encode_chat(how.bpe, how.chat, [{"role": role, "content": content} for role, content in said])
