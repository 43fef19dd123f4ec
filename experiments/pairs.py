"""Prompts and responses from JSON-lines files, by templates, as token ids."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from purelm.tokenizer import BPE, encode

__all__ = ["Pair", "encoded", "read_pairs"]

_FIELD = re.compile(r"\{(\w+)\}")


class Pair(NamedTuple):
    """One example as text."""

    prompt: str
    response: str


def read_pairs(path: Path, prompt: str, response: str, limit: int | None = None) -> list[Pair]:
    """A Pair of each row of a JSON-lines file; {name} in a template is the row's field of that name.

    ValueError with the number of the line: what is not JSON, lacks a field, or has one that is neither text nor number.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    pairs: list[Pair] = []
    with open(path, encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if limit is not None and len(pairs) == limit:
                    break
                if line.strip():
                    row = _row(line, f"{path}, line {number}")
                    pairs.append(Pair(*(_filled(t, row, f"{path}, line {number}") for t in (prompt, response))))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start} of a line)") from None
    if not pairs:
        raise ValueError(f"{path}: has no rows")
    return pairs


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object")
    return row


def _filled(template: str, row: dict[str, Any], where: str) -> str:
    """The template with the row's values; what stands in a value is not a template again."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not isinstance(row.get(name), (str, int, float)):
            raise ValueError(f"{where}: has no text or number {name!r}; its fields are {', '.join(row)}")
        return str(row[name])

    return _FIELD.sub(value, template)


def encoded(bpe: BPE, pairs: Sequence[Pair], before: Sequence[int], after: Sequence[int]) -> list[tuple[Any, Any]]:
    """(ids of the prompt, ids of the response) of each pair; `before` begins the prompt, `after` ends the response.

    Special tokens in the text are text: no example can end itself.
    """
    return [
        (
            np.concatenate([np.asarray(before, np.int64), np.asarray(encode(bpe, p.prompt), np.int64)]),
            np.concatenate([np.asarray(encode(bpe, p.response), np.int64), np.asarray(after, np.int64)]),
        )
        for p in pairs
    ]
