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
from purelm.align.chats import assistant_tokens
from purelm.align.responses import masked_batch, packed_masked
from purelm.data.json_lines import json_rows
from purelm.data.packing import first_fit
from purelm.tokenizer import BPE, decode
from purelm.tokenizer.chat import Chat, encode_chat, encode_parts

__all__ = [
    "Example",
    "Pair",
    "batch_maker",
    "batch_of",
    "check_names_a_field",
    "content",
    "example",
    "filled",
    "read_chats",
    "read_examples",
    "read_pairs",
    "rows_of_step",
    "text_of",
]

Parts = list[tuple[str, bool]]  # pieces of a text, and whether the template wrote them

_FIELD = re.compile(r"\{(\w+)\}")


class Pair(NamedTuple):
    """One example as text."""

    prompt: Parts
    response: Parts
    gold: Parts  # what a response is graded by


class Example(NamedTuple):
    """A pair as text, and its ids."""

    pair: Pair
    ids: np.ndarray
    mask: np.ndarray  # bool: which of them are trained
    n_prompt: int  # ids of what a model is asked: all before the response, or before a conversation's last answer

    @property
    def prompt(self) -> np.ndarray:
        """What a model is asked."""
        return self.ids[: self.n_prompt]

    @property
    def response(self) -> np.ndarray:
        """What it is to say."""
        return self.ids[self.n_prompt :]


def example(pair: Pair, prompt: np.ndarray, response: np.ndarray) -> Example:
    """The example whose response alone is trained."""
    ids = np.concatenate([prompt, response])
    return Example(pair, ids, np.arange(len(ids)) >= len(prompt), len(prompt))


def read_pairs(
    path: Path, prompt: str, response: str, gold: str | None = None, limit: int | None = None
) -> list[Pair]:
    """A Pair of each row of a JSON-lines file; {name} in a template is the row's field of that name.

    gold: template of the text that a response is graded by; None: that of the response.
    ValueError with the number of the line: what is not JSON, lacks a field, or has one that is neither text nor number.
    """
    pairs: list[Pair] = []
    for where, row in json_rows(path):
        if limit is not None and len(pairs) == limit:
            break
        try:
            pairs.append(Pair(filled(prompt, row), filled(response, row), filled(gold or response, row)))
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


def check_names_a_field(name: str, template: str) -> None:
    """ValueError unless the template has a {field}: without one, as after a forgotten brace, all rows are the same."""
    if not _FIELD.search(template):
        raise ValueError(f"{name}: {template!r} names no field of the rows, as {{prompt}} does: all would be the same")


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
            kept.append(example(pair, p, r[: max_length - len(p)]))
    _say_left_out(path, len(kept), len(pairs))
    return kept


def read_chats(
    path: Path,
    bpe: BPE,
    chat: Chat,
    *,
    gold: str,
    ends: Sequence[int],
    max_length: int,
    overlong: str,
    limit: int | None = None,
) -> list[Example]:
    """The conversations of a file of {"messages": [{"role", "content"}, ...]}, by a model's template.

    Every message of the assistant is trained (`align.chats`), and the last one is what held-out prompts are asked for.
    overlong: as for `read_examples`; a conversation of which no trained token is left counts as too long.
    """
    kept: list[Example] = []
    n = 0

    def encode(messages: Sequence[Any], opens_an_answer: bool) -> np.ndarray:
        return encode_chat(bpe, chat, messages, opens_an_answer)

    for where, row in json_rows(path):
        if limit is not None and n == limit:
            break
        n += 1
        messages = row.get("messages")
        try:
            if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
                raise ValueError(f"has no list 'messages'; its fields are {', '.join(row)}")
            ids, mask = assistant_tokens(encode, messages, ends)
            last = max(k for k, m in enumerate(messages) if m.get("role") == "assistant")
            answer = [(str(messages[last].get("content", "")), False)]
            wanted = filled(gold, row) if gold else answer
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if len(ids) > max_length and overlong == "error":
            raise ValueError(f"{where}: has {len(ids)} tokens, more than max_length {max_length}")
        n_prompt = len(encode(messages[:last], True))
        if len(ids) <= max_length or (overlong == "truncate" and n_prompt < max_length and mask[:max_length].any()):
            prompt = [(decode(bpe, ids[:n_prompt].tolist()), True)]
            kept.append(Example(Pair(prompt, answer, wanted), ids[:max_length], mask[:max_length], n_prompt))
    if not n:
        raise ValueError(f"{path}: has no rows")
    _say_left_out(path, len(kept), n)
    return kept


def _say_left_out(path: Path, n_kept: int, n: int) -> None:
    if n_kept < n:
        say(f"{path}: {n - n_kept:,} of {n:,} examples are longer than max_length and left out")


def content(examples: Sequence[Example]) -> str:
    """A hash of all ids, and of which are trained."""
    digest = hashlib.sha256()
    for x in examples:
        digest.update(len(x.ids).to_bytes(8, "little") + x.ids.tobytes() + x.mask.tobytes())
    return digest.hexdigest()


def batch_of(examples: Sequence[Example], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The examples as a batch of `align.responses`, of a length that is a multiple of 32."""
    made = masked_batch([x.ids for x in examples], [x.mask for x in examples], pad_id=pad, multiple_of=32)
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
        sizes = [len(x.ids) - 1 for x in examples]
        shuffled = (k for k in random.permutation(plan_key, len(examples)).tolist() if sizes[k] > 0)
        rows = list(first_fit(shuffled, lambda k: sizes[k], packed, open_rows=256))

    def packed_row(numbers: list[int]) -> dict[str, np.ndarray]:
        chosen = [examples[k] for k in numbers]
        assert packed is not None
        (row,) = packed_masked([(x.ids, x.mask) for x in chosen], packed, pad_id=pad)
        return row

    def batch(i: int) -> dict[str, torch.Tensor]:
        chosen = [rows[k] for k in rows_of_step(i, len(rows), batch_size, seed)]
        if packed is None:
            return batch_of([examples[k] for (k,) in chosen], pad, torch.device("cpu"))
        made = [packed_row(numbers) for numbers in chosen]
        return {name: torch.from_numpy(np.stack([row[name] for row in made])) for name in made[0]}

    return len(rows), batch
