"""Pairs of answers from files, by templates, as token ids: a prompt, and what was chosen and rejected."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from experiments.console import say
from experiments.pairs import Example, Pair, batch_of, content, example, filled
from purelm.align.data import Removed, Row, clean, filtered, last_answers, read, table, transcripts
from purelm.tokenizer import BPE
from purelm.tokenizer.chat import encode_parts

__all__ = ["Choice", "batch_of_choices", "content_of", "mismatched", "read_choices"]


class Choice(NamedTuple):
    """Two examples with one prompt."""

    chosen: Example
    rejected: Example


def read_choices(
    path: Path,
    bpe: BPE,
    prompt: str,
    chosen: str,
    rejected: str,
    *,
    turns: Literal["any", "one"],
    before: Sequence[int],
    after: Sequence[int],
    max_length: int,
    overlong: str,
    limit: int | None = None,
    says: bool = True,
) -> list[Choice]:
    """The choices of a file, of any form that `align.data.transcripts` reads; {name} in a template is a row's field.

    `before` begins each prompt, `after` ends each answer. Of more than max_length tokens, overlong "error" names the
    first, "truncate" cuts the end of the answer (and leaves the pair out where the prompt alone is too long, or nothing
    is left that differs), "drop" leaves the pair out. What was left out is said, by reason. limit: of those kept.
    """

    def encoded(row: Row) -> Row | Removed:
        try:
            texts = [filled(template, row) for template in (prompt, chosen, rejected)]
        except ValueError as error:
            raise ValueError(f"{row['source']}: {error}") from None
        p, *answers = (encode_parts(bpe, parts).astype(np.int64) for parts in texts)
        p = np.concatenate([np.asarray(before, np.int64), p])
        a, b = (np.concatenate([x, np.asarray(after, np.int64)]) for x in answers)
        n = len(p) + max(len(a), len(b))
        if n > max_length and overlong == "error":
            raise ValueError(f"{row['source']}: has {n} tokens, more than max_length {max_length}")
        if n > max_length and overlong == "drop":
            return Removed(row, "longer than max_length")
        if len(p) >= max_length:
            return Removed(row, "prompt longer than max_length")
        a, b = a[: max_length - len(p)], b[: max_length - len(p)]
        if not len(a) or not len(b):
            return Removed(row, "answer without tokens")
        if np.array_equal(a, b):
            return Removed(row, "equal up to max_length")
        pairs = [Pair(texts[0], answer, []) for answer in texts[1:]]
        return {"choice": Choice(example(pairs[0], p, a), example(pairs[1], p, b))}

    kept: list[Choice] = []

    def rows() -> Iterator[Row]:
        for row in read(path, transcripts):
            if limit is not None and len(kept) >= limit:
                return
            yield row

    def keep(stream: Iterator[Row]) -> None:
        for row in stream:  # one by one: `rows` looks at how many there are
            kept.append(row["choice"])

    _, counts = clean(rows(), [last_answers(turns=turns), filtered("encoded", encoded)], into=keep)
    if not kept:
        raise ValueError(f"{path}: has no pair of answers that can be used\n{table(counts)}")
    if says and any(x.removed for x in counts):
        say(f"{path}: some pairs are left out\n{table(counts)}")
    return kept


def content_of(choices: Sequence[Choice]) -> str:
    """A hash of all ids."""
    return content([example for choice in choices for example in choice])


def mismatched(choices: Sequence[Choice], max_length: int) -> list[Example]:
    """For each pair its prompt with the chosen answer of the next pair (of the last: of the first), for KTO's KL.

    What is longer than max_length is cut at the end.
    """
    following = [*choices[1:], *choices[:1]]
    return [
        example(mine.chosen.pair, mine.chosen.prompt, other.chosen.response[: max_length - len(mine.chosen.prompt)])
        for mine, other in zip(choices, following, strict=True)
    ]


def batch_of_choices(choices: Sequence[Choice], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """{"tokens", "targets", "weights"}, each (pairs, 2, T), the chosen answer first: a pair is one item."""
    made = batch_of([example for choice in choices for example in choice], pad, device)
    return {name: x.unflatten(0, (len(choices), 2)) for name, x in made.items()}
