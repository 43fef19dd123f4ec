"""Resuming a run: which settings may differ from the checkpoint's, and which must not.

A checkpoint's meta holds the configuration and fingerprints of token files and tokenizer. A run that goes on is
compared with these before anything is written. A difference in a field that is not in `MAY_CHANGE` is an error that
names it; with `--resume-anyway` it is written to metrics.jsonl instead.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from purelm import checkpoint, track
from purelm.data.tokens import TokenFile

# Fields of Pretrain, with all fields within them.
MAY_CHANGE = (
    "steps",  # may only grow; a schedule that depends on it goes on as if the new number had always been set
    "log_every",
    "save_every",
    "eval_every",
    "keep_last",
    "tensorboard",
    "sample",
    # Where and how steps are computed; the result is the same up to the order of sums.
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
    # Paths; the files are compared by their fingerprints.
    "run",
    "train",
    "heldout",
    "tokenizer",
    "token_dtype",
    "verify",
    # The flags that ask for resuming.
    "resume",
    "resume_anyway",
)
# Of these, the fields that may differ between ranks: paths on a rank's machine, and what only rank 0 does.
MAY_DIFFER = ("device", "train", "heldout", "tokenizer", "tensorboard")
BLOCK = 1 << 22  # tokens hashed at a time
ABSENT = "none"


def content(tokens: TokenFile | None) -> str:
    """Hash of a token file's ids and their format, whatever shards they lie in; `ABSENT` for no file.

    (BLAKE2b, which is twice as fast as SHA-256 on machines without instructions for that.)
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


def may_change(name: str, free: Sequence[str] = MAY_CHANGE) -> bool:
    return any(name == field or name.startswith(field + ".") for field in free)


def differences(
    saved: Mapping[str, Any],
    config: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    free: Sequence[str] = MAY_CHANGE,
) -> Iterator[tuple[str, Any, Any]]:
    """(name, given, saved) of each field that differs from the checkpoint's meta; what an older meta lacks passes.

    free: fields that may differ, with all fields within them.
    """
    before, now = dict(flat(saved["config"])), dict(flat(config))
    # rope_scaling is one field (None) or several: a field that one side lacks counts as None.
    groups = {name.split(".")[0] for name in before}
    for name in sorted({*before, *now}):
        known = name in before or ("." in name and name.split(".")[0] in groups)
        if known and not may_change(name, free) and before.get(name) != now.get(name):
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
    """Lines that describe the forced differences; ValueError that names all if not forced, or if steps decrease."""
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
    """The settings that must be equal on all ranks, as `purelm.dist.agreement.check_same` takes them."""
    same = {name: repr(value) for name, value in flat(config) if name not in MAY_DIFFER}
    return {**same, **{name: str(value) for name, value in extra.items()}}



def checked(run: Path, steps: int, meta: Mapping[str, Any], free: Sequence[str]) -> int:
    """Steps of the newest checkpoint; ValueError names what differs from the run that it is of, but for `free`."""
    done, saved = newest(run)
    found = differences(saved, meta["config"], meta["fingerprints"], free)
    if lines := [f"{name} {now!r} is not that of the checkpoint, {before!r}" for name, now, before in found]:
        raise ValueError(f"--resume: {'; '.join(lines)}: the run would go on as another one")
    if done > steps:
        raise ValueError(f"steps must be at least {done}, those of the checkpoint that is resumed, got {steps}")
    return done
