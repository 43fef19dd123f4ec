"""Prompts and responses from JSON-lines files, by templates, as token ids."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.console import say
from purelm import random
from purelm.align.responses import packed_responses, response_batch
from purelm.data.json_lines import json_rows
from purelm.data.packing import first_fit
from purelm.tokenizer import BPE
from purelm.tokenizer.chat import encode_parts

__all__ = [
    "Example", "Pair", "batch_maker", "batch_of", "content", "filled", "read_examples", "read_pairs", "rows_of_step",
    "text_of",
]  # fmt: skip

Parts = list[tuple[str, bool]]  # pieces of a text, and whether the template wrote them

_FIELD = re.compile(r"\{(\w+)\}")


class Pair(NamedTuple):
    """One example as text."""

    prompt: Parts
    response: Parts
    gold: Parts  # what a response is graded by


class Example(NamedTuple):
    """A pair as text and as ids."""

    pair: Pair
    prompt: np.ndarray
    response: np.ndarray


def read_pairs(path: Path, prompt: str, response: str, gold: str, limit: int | None = None) -> list[Pair]:
    """A Pair of each row of a JSON-lines file; {name} in a template is the row's field of that name.

    ValueError with the number of the line: what is not JSON, lacks a field, or has one that is neither text nor number.
    """
    pairs: list[Pair] = []
    for where, row in json_rows(path):
        if limit is not None and len(pairs) == limit:
            break
        try:
            pairs.append(Pair(filled(prompt, row), filled(response, row), filled(gold, row)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not pairs:
        raise ValueError(f"{path}: has no rows")
    return pairs


def filled(template: str, values: Mapping[str, Any]) -> Parts:
    r"""The template with values in place of {name}, and a new line for \n; a value is not a template again."""
    parts = []
    for i, part in enumerate(_FIELD.split(template.replace("\\n", "\n"))):
        if i % 2 == 0:
            parts.append((part, True))
        elif isinstance(values.get(part), (str, int, float)):
            parts.append((str(values[part]), False))
        else:
            raise ValueError(f"has no text or number {part!r}; its fields are {', '.join(values)}")
    return parts


def text_of(parts: Parts) -> str:
    """All pieces as one text."""
    return "".join(text for text, _ in parts)


def read_examples(
    path: Path,
    bpe: BPE,
    prompt: str,
    response: str,
    *,
    gold: str,
    before: Sequence[int],
    after: Sequence[int],
    max_length: int,
    overlong: str,
    limit: int | None = None,
) -> list[Example]:
    """The examples of a file: `before` begins each prompt, `after` ends each response.

    Special tokens of the templates are special; in the data they are ordinary text, so that no example ends itself. Of
    more than max_length tokens, overlong "error" names the first, "truncate" cuts the end of the response (and leaves
    the example out where the prompt alone is too long), "drop" leaves it out.
    """
    kept: list[Example] = []
    pairs = read_pairs(path, prompt, response, gold, limit)
    for i, pair in enumerate(pairs):
        p, r = (encode_parts(bpe, parts).astype(np.int64) for parts in (pair.prompt, pair.response))
        p, r = np.concatenate([np.asarray(before, np.int64), p]), np.concatenate([r, np.asarray(after, np.int64)])
        n = len(p) + len(r)
        if n > max_length and overlong == "error":
            raise ValueError(f"{path}: example {i} has {n} tokens, more than max_length {max_length}")
        if n <= max_length or (overlong == "truncate" and len(p) < max_length):
            kept.append(Example(pair, p, r[: max_length - len(p)]))
    if len(kept) < len(pairs):
        say(f"{path}: {len(pairs) - len(kept):,} of {len(pairs):,} examples are longer than max_length and left out")
    return kept


def content(examples: Sequence[Example]) -> str:
    """A hash of all ids."""
    digest = hashlib.sha256()
    for example in examples:
        for ids in (example.prompt, example.response):
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    return digest.hexdigest()


def batch_of(examples: Sequence[Example], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The examples as a batch of `align.responses`, of a length that is a multiple of 32."""
    made = response_batch([x.prompt for x in examples], [x.response for x in examples], pad_id=pad, multiple_of=32)
    return {name: x.to(device) for name, x in made.items()}


def rows_of_step(i: int, n_rows: int, batch_size: int, seed: int) -> list[int]:
    """The numbers of step i's rows: each once an epoch, in an order of its own; the last few wait for the next."""
    per_epoch = n_rows // batch_size
    at = (i % per_epoch) * batch_size
    order_key = random.fold_in(random.key(seed), 1)
    return random.permutation(random.fold_in(order_key, i // per_epoch), n_rows)[at : at + batch_size].tolist()


def batch_maker(
    examples: Sequence[Example], batch_size: int, seed: int, pad: int, *, packed: int | None
) -> tuple[int, Callable[[int], dict[str, torch.Tensor]]]:
    """(number of rows, function that makes the batch of step i, on the CPU): a pure function of (examples, seed, i).

    A row is one example, and a batch is as long as its longest; or with `packed` rows of that many predictions hold
    several. Rows come in the order of `rows_of_step`.
    """
    plan_key = random.fold_in(random.key(seed), 2)
    rows = [[k] for k in range(len(examples))]
    if packed is not None:
        sizes = [len(x.prompt) + len(x.response) - 1 for x in examples]
        shuffled = (k for k in random.permutation(plan_key, len(examples)).tolist() if sizes[k] > 0)
        rows = list(first_fit(shuffled, lambda k: sizes[k], packed, open_rows=256))

    def packed_row(numbers: list[int]) -> dict[str, np.ndarray]:
        chosen = [examples[k] for k in numbers]
        assert packed is not None
        (row,) = packed_responses([x.prompt for x in chosen], [x.response for x in chosen], packed, pad_id=pad)
        return row

    def batch(i: int) -> dict[str, torch.Tensor]:
        chosen = [rows[k] for k in rows_of_step(i, len(rows), batch_size, seed)]
        if packed is None:
            return batch_of([examples[k] for (k,) in chosen], pad, torch.device("cpu"))
        made = [packed_row(numbers) for numbers in chosen]
        return {name: torch.from_numpy(np.stack([row[name] for row in made])) for name in made[0]}

    return len(rows), batch
