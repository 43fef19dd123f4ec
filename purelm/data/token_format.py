"""Token files: raw little-endian uint16 or uint32 ids in `NAME.bin`, and what is known of them in `NAME.json`.

The sidecar holds dtype, n_tokens, vocab_size, tokenizer_sha256, n_bytes (of the source text, so that bits per byte can
be computed) and two checksums: sha256 of the whole `.bin`, and sample_sha256 of a few blocks of it, which is compared
whenever the file is opened. Older sidecars have no checksums and are read too. A `.bin` without sidecar is opened only
if the caller gives its dtype. A large corpus may be cut into shards `NAME-00000.bin`, `NAME-00001.bin`, ...;
`open_tokens` shows a shard set as one sequence.

Writing is atomic although there are two files. The ids are written to `NAME.bin.<id>`, and the sidecar, which has the
same random `<id>`, to a temporary file. Renaming the sidecar to `NAME.json` is the commit; after it `NAME.bin.<id>`
is renamed to `NAME.bin`. A reader takes `NAME.bin.<id>` with the sidecar's id if it exists, else `NAME.bin`. So a
writer killed at any instant leaves either the old pair or the new one readable. All shards are written before any is
renamed; each sidecar has the shard's number, their count and the id of the set, so that a mixture of two sets is
refused.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from purelm.files import sync

__all__ = [
    "DTYPES",
    "check_sidecar",
    "check_sums",
    "identity_of",
    "missing_sidecar",
    "move",
    "outside_message",
    "read_sidecar",
    "remove",
    "sample_sha256",
    "shard_files",
    "uncommitted",
    "whole_sha256",
]

DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


SAMPLES, SAMPLE_BYTES = 16, 4096  # compared at opening: finds a replaced or truncated file, not one changed bit


def sample_sha256(path: Path) -> str:
    """sha256 of SAMPLES blocks of a file, evenly spaced from its first bytes to its last; of all of a small file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        last = os.fstat(file.fileno()).st_size - SAMPLE_BYTES
        if last < SAMPLES * SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for k in range(SAMPLES):
                file.seek(last * k // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def whole_sha256(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def outside_message(name: str, index: int, token: int, vocab_size: int) -> str:
    """The error message for an id that is not in the vocabulary."""
    return f"{name}: id {token} at index {index} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1})"


def uncommitted(target: Path, identity: str) -> Path:
    """`NAME.bin.<id>`, where the ids of `NAME.bin` are until they are renamed."""
    return target.with_name(f"{target.name}.{identity}")


def shard_files(path: Path) -> list[Path]:
    """The files `NAME-00000.bin`, ... of `NAME.bin`, by number."""
    pattern = re.compile(re.escape(path.stem) + r"-\d{5,}\.bin")
    found = [file for file in path.parent.glob("*.bin") if pattern.fullmatch(file.name)]
    return sorted(found, key=lambda file: int(file.stem.rsplit("-", 1)[1]))


def read_sidecar(target: Path) -> dict[str, Any]:
    """The sidecar of `NAME.bin`; ValueError where it is damaged, FileNotFoundError where there is none."""
    path = target.with_suffix(".json")
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(sidecar, dict):
            raise ValueError("not an object")
        identity = sidecar.get("id")  # a part of a file's name
        if identity is not None and not (isinstance(identity, str) and identity.isalnum()):
            raise ValueError(f"id is {identity!r}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged sidecar of a token file: {error}") from None
    return sidecar


def identity_of(target: Path) -> str | None:
    """The id in the sidecar of `target`, or None where no sidecar can be read."""
    try:
        return read_sidecar(target).get("id")
    except (OSError, ValueError):
        return None


def missing_sidecar(target: Path, n_bytes: int) -> str:
    """The error message for a `.bin` of n_bytes without sidecar, with what to do about it."""
    sidecar = target.with_suffix(".json")
    lines = " or ".join(
        f'{{"dtype": "{name}", "n_tokens": {n_bytes // dtype.itemsize}}}' for name, dtype in DTYPES.items()
    )
    return (
        f"{target}: its sidecar {sidecar.name} is missing, so nothing says what its {n_bytes} bytes are: encode the "
        f"text again, give open_tokens dtype='uint16' or 'uint32', or write {sidecar} with {lines}"
    )


def check_sidecar(sidecar: dict[str, Any], path: Path) -> None:
    """ValueError unless the sidecar's counts are counts and its names strings; any of them may be absent."""
    for name in ("n_tokens", "vocab_size", "n_bytes", "shard", "n_shards"):
        value = sidecar.get(name)
        if (value is not None or name == "n_tokens") and (type(value) is not int or value < 0):
            raise ValueError(f"{path}: {name} is {value!r}: allowed is a count")
    for name in ("tokenizer_sha256", "id", "sha256", "sample_sha256"):
        value = sidecar.get(name)
        if value is not None and (not isinstance(value, str) or not value.isalnum()):
            raise ValueError(f"{path}: {name} is {value!r}: allowed is a string of letters and digits")


def check_sums(target: Path, file: Path, sidecar: dict[str, Any], verify: bool) -> None:
    """Compare `file`, which holds the ids of `target`, with a checksum of its sidecar; see `open_tokens`."""
    stated = sidecar.get("sha256" if verify else "sample_sha256")
    if verify and stated is None:
        raise ValueError(f"{target}: cannot be verified, its sidecar has no checksum; encode the text again")
    found = None if stated is None else (whole_sha256 if verify else sample_sha256)(file)
    if found != stated:
        raise ValueError(
            f"{target}: damaged: its bytes are not those that were written (sha256 {found}, the sidecar has {stated}); "
            "encode the text again"
        )


def move(source: Path, target: Path) -> None:
    """Move a finished pair of files, as `TokenWriter` leaves them, to another name on the same disk, atomically."""
    identity, previous = str(read_sidecar(source)["id"]), identity_of(target)
    os.replace(source, uncommitted(target, identity))
    os.replace(source.with_suffix(".json"), target.with_suffix(".json"))  # the commit
    sync(target.parent)
    os.replace(uncommitted(target, identity), target)
    if previous:
        uncommitted(target, previous).unlink(missing_ok=True)


def remove(target: Path) -> None:
    """Remove a pair of files, the sidecar first: a `.bin` without it is not opened by mistake."""
    identity = identity_of(target)
    target.with_suffix(".json").unlink(missing_ok=True)
    target.unlink(missing_ok=True)
    if identity:
        uncommitted(target, identity).unlink(missing_ok=True)
