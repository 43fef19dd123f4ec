"""Problems with a right answer: prompts as ids, and what answers are graded by."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.console import say
from experiments.pairs import check_names_a_field, filled, text_of
from purelm import random
from purelm.data.json_lines import json_rows
from purelm.tokenizer import BPE
from purelm.tokenizer.chat import Chat, encode_chat, encode_parts

__all__ = ["Problem", "content", "order", "read_problems"]


class Problem(NamedTuple):
    """One problem."""

    text: str
    ids: np.ndarray
    gold: str


def read_problems(
    path: Path, bpe: BPE, prompt: str, gold: str, *, before: Sequence[int], chat: Chat | None, longest: int,
    limit: int | None = None, says: bool = True,
) -> list[Problem]:  # fmt: skip
    """The problems of a JSON-lines file; those of more than `longest` tokens are left out, which is said with `says`.

    ValueError for a template without a field, and with the number of a line that lacks a field of a template.
    """
    check_names_a_field("prompt", prompt)
    if "{" in gold:  # one text for all may be meant, but not a brace without a field
        check_names_a_field("gold", gold)
    found: list[Problem] = []
    n = 0
    for where, row in json_rows(path):
        if limit is not None and n == limit:
            break
        n += 1
        try:
            parts, right = filled(prompt, row), text_of(filled(gold, row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if chat is not None:
            ids = encode_chat(bpe, chat, [{"role": "user", "content": text_of(parts)}])
        else:
            ids = encode_parts(bpe, parts)
        ids = np.concatenate([np.asarray(before, np.int64), ids.astype(np.int64)])
        if not len(ids):
            raise ValueError(f"{where}: the prompt has no token; give --begin")
        if len(ids) <= longest:
            found.append(Problem(text_of(parts), ids, right))
    if n > len(found) and says:
        say(f"{path}: {n - len(found):,} of {n:,} problems have more than {longest} tokens and are left out")
    if not found:
        raise ValueError(f"{path}: has no problem of at most {longest} tokens")
    return found


def order(n: int, size: int, seed: int, i: int) -> list[int]:
    """Numbers of the problems of draw i: a pure function of its arguments.

    Draw i has problems i size .. i size + size - 1 of an endless list, in which every n are a permutation of all.
    """
    key, out = random.fold_in(random.key(seed), 1), []
    for epoch in range(i * size // n, (i * size + size - 1) // n + 1):
        shuffled = random.permutation(random.fold_in(key, epoch), n).tolist()
        out += shuffled[max(i * size - epoch * n, 0) : i * size + size - epoch * n]
    return out


def content(problems: Sequence[Problem]) -> str:
    """A hash of all prompts and right answers."""
    digest = hashlib.sha256()
    for x in problems:
        for part in (x.ids.tobytes(), x.gold.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
