"""Token files: raw little-endian uint16 or uint32 ids in `NAME.bin`, and what is known of them in `NAME.json`.

The sidecar holds dtype, n_tokens, vocab_size, tokenizer_sha256 and n_bytes (of the source text, so that bits per
byte can be computed). A bare `.bin` without sidecar is accepted. A large corpus may be cut into shards
`NAME-00000.bin`, `NAME-00001.bin`, ...; `open_tokens` shows a shard set as one sequence.

Writing is atomic although a pair is two files. The ids go to `NAME.bin.<id>` and the sidecar, which carries the
same random `<id>`, is renamed first: that one rename is the commit. Only then `NAME.bin.<id>` becomes `NAME.bin`.
A reader takes `NAME.bin.<id>` where it exists for the sidecar's id, else `NAME.bin`; so a writer killed at any
instant leaves either the old pair or the new one readable. Shards are all written first and published together; each
sidecar carries its number, the count and the id of the set, so that a mixture of two sets is refused.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["DTYPES", "identity_of", "outside_message", "read_sidecar", "shard_files", "uncommitted"]

DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def outside_message(name: str, index: int, token: int, vocab_size: int) -> str:
    return f"{name}: id {token} at index {index} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1})"


def uncommitted(target: Path, identity: str) -> Path:
    return target.with_name(f"{target.name}.{identity}")


def shard_files(path: Path) -> list[Path]:
    pattern = re.compile(re.escape(path.stem) + r"-\d{5,}\.bin")
    found = [file for file in path.parent.glob("*.bin") if pattern.fullmatch(file.name)]
    return sorted(found, key=lambda file: int(file.stem.rsplit("-", 1)[1]))


def read_sidecar(target: Path) -> dict[str, Any]:
    path = target.with_suffix(".json")
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(sidecar, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ValueError(f"{path}: damaged sidecar of a token file: {error}") from None
    return sidecar


def identity_of(target: Path) -> str | None:
    """The id of the write that made `target`, or None where there is none that can be read."""
    try:
        return read_sidecar(target).get("id")
    except (OSError, ValueError):
        return None
