"""What a run may change when it goes on, and what goes on: the configuration and the data of the checkpoint.

A checkpoint's meta holds the configuration and fingerprints of token files and tokenizer. A run that goes on is
compared with these before anything is written. What differs and is not in `MAY_CHANGE` is refused by name, or written
to metrics.jsonl where `--resume-anyway` forces it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from purelm import checkpoint, track
from purelm.data.tokens import TokenFile

# Fields of Pretrain, or what begins with them and a dot.
MAY_CHANGE = (
    "steps",  # upward; a schedule that depends on it goes on as if it had been so from the start
    "log_every",
    "save_every",
    "eval_every",
    "keep_last",
    "tensorboard",
    "sample",
    # Where and how it is computed; the result is the same but for the order of sums.
    "device",
    "parallel.mode",
    "parallel.bucket_mb",
    "parallel.timeout",
    "microbatches",
    "remat",
    "ops",
    "compile",
    "graph",
    "deterministic",
    # Places; what lies there is compared by its fingerprint.
    "run",
    "train",
    "heldout",
    "tokenizer",
    "token_dtype",
    "verify",
    # What asks for all this.
    "resume",
    "resume_anyway",
)
# Of those, what may be another on another rank: names of its machine, and what rank 0 alone does.
MAY_DIFFER = ("device", "train", "heldout", "tokenizer", "tensorboard")
BLOCK = 1 << 22  # tokens that are hashed at a time
ABSENT = "none"


def content(tokens: TokenFile | None) -> str:
    """Hash of a token file's ids and their format, whatever shards they lie in; `ABSENT` for no file.

    (BLAKE2b: on machines without instructions for SHA-256 twice as fast.)
    """
    if tokens is None:
        return ABSENT
    digest = hashlib.blake2b(tokens.dtype.encode(), digest_size=16)
    for start in range(0, len(tokens), BLOCK):
        digest.update(np.ascontiguousarray(tokens[start : start + BLOCK]).data)
    return digest.hexdigest()


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name with dots, value) of a configuration as JSON has it.

    >>> list(flat({"optim": {"lr": 0.1}, "sample": ("a", "b")}))
    [('optim.lr', 0.1), ('sample', ['a', 'b'])]
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.loads(json.dumps(value, default=str))


def may_change(name: str) -> bool:
    return any(name == field or name.startswith(field + ".") for field in MAY_CHANGE)


def differences(
    saved: Mapping[str, Any], config: Mapping[str, Any], fingerprints: Mapping[str, str]
) -> Iterator[tuple[str, Any, Any]]:
    """(name, given, saved) of what is not that of the checkpoint's meta; a field that it does not know yet passes."""
    before, now = dict(flat(saved["config"])), dict(flat(config))
    # rope_scaling is one field without it and several with it: what one side lacks is None there.
    groups = {name.split(".")[0] for name in before}
    for name in sorted({*before, *now}):
        known = name in before or ("." in name and name.split(".")[0] in groups)
        if known and not may_change(name) and before.get(name) != now.get(name):
            yield name, now.get(name), before.get(name)
    for name, value in fingerprints.items():
        known = saved.get("fingerprints", {}).get(name, value)
        if known != value:
            yield f"{name} (its content)", value, known


def check(
    saved: Mapping[str, Any],
    step: int,
    config: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    *,
    anyway: bool = False,
) -> list[str]:
    """What differs and is forced, as lines; ValueError naming all of it when it is not, or when steps go backward."""
    steps = config["steps"]
    if steps < step:
        raise ValueError(f"steps must be at least {step}, those of the checkpoint that is resumed, got {steps}")
    found = list(differences(saved, config, fingerprints))
    planned = saved["config"].get("steps", 0)
    if steps < planned:
        found.append(("steps", steps, planned))
    lines = [f"{name} {now!r} is not that of the checkpoint, {before!r}" for name, now, before in found]
    if lines and not anyway:
        raise ValueError(
            f"--resume: {'; '.join(lines)} (of step {step}): the run would go on as another one; "
            "give the checkpoint's values, or force it by --resume-anyway"
        )
    return lines


def finished(run: Path, step: int, steps: int) -> bool:
    """Whether nothing is left to do: all steps are done, evaluated and reported."""
    if step != steps or not (run / "report.html").is_file():
        return False
    try:
        return json.loads((run / "summary.json").read_text(encoding="utf-8")).get("steps") == steps
    except (OSError, ValueError):
        return False


def rewind(path: Path, step: int, steps: int) -> None:
    """Drop the rows of metrics.jsonl that the run will write again: those after `step`, and the last evaluation's."""
    track.truncate_rows(path, step)
    if step == steps:
        track.drop_rows(path, lambda row: row.get("step") == step and "heldout_loss" in row)


def newest(run: Path) -> tuple[int, dict[str, Any]]:
    """(step, meta) of the checkpoint that a run goes on from."""
    manifest = checkpoint.read_manifest(run / "checkpoints")
    if not manifest.get("finite", True):
        where = run / "checkpoints" / f"step-{manifest['step']:08d}"
        raise ValueError(f"{where}: holds inf or nan, so nothing can go on from it: remove it to go on from one before")
    return int(manifest["step"]), manifest["meta"]


def for_ranks(config: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, str]:
    """What all ranks must have been started with, as `purelm.dist.agreement.check_same` takes it."""
    same = {name: repr(value) for name, value in flat(config) if name not in MAY_DIFFER}
    return {**same, **{name: str(value) for name, value in extra.items()}}

