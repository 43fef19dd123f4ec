"""Folders of checkpoints: which are there, how one is written (under a temporary name, then renamed) and checked."""

import hashlib
import json
import operator
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from purelm import tree
from purelm.checkpoint.manifest import (
    check_leaves,
    check_manifest,
    check_meta,
    check_structure,
    is_finite,
    skeleton,
)
from purelm.files import sync

__all__ = ["latest", "latest_finite", "read_manifest", "save", "steps"]

FORMAT = 1
SHARDED = 2
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})(\.replaced)?")


def folder_of(root: Path, step: int) -> Path:
    """root/step-XXXXXXXX, where the checkpoint of this step is kept."""
    return root / f"step-{step:08d}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def storable(leaves: list[Tensor]) -> list[Tensor]:
    """Contiguous CPU tensors, no two of which share memory (safetensors refuses that); copied only where needed."""
    out, seen = [], set()
    for leaf in leaves:
        x = leaf.detach().to("cpu").contiguous().resolve_conj().resolve_neg()
        storage = x.untyped_storage()
        if storage.nbytes() != x.nbytes or storage.data_ptr() in seen:
            x = x.clone(memory_format=torch.contiguous_format)
        seen.add(x.untyped_storage().data_ptr())
        out.append(x)
    return out


def _seal(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest without its own entry "sha256"."""
    content = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _remove(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a half-deleted folder does not look like a checkpoint; where
    a kill leaves one, the next save removes it.
    """
    aside = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)


def steps(root: str | Path) -> list[int]:
    """Steps of the complete checkpoints under `root`, ascending; an interrupted save is not among them."""
    found = set()
    if Path(root).is_dir():
        for entry in Path(root).iterdir():
            match = _NAME.fullmatch(entry.name)
            if match and (entry / MANIFEST).is_file():
                found.add(int(match[1]))
    return sorted(found)


def latest(root: str | Path) -> int | None:
    """The newest complete checkpoint's step, or None."""
    found = steps(root)
    return found[-1] if found else None


def latest_finite(root: str | Path) -> int | None:
    """The newest step whose checkpoint is complete and not marked as having an inf or a nan; None without one."""
    for step in reversed(steps(root)):
        try:
            if read_manifest(root, step).get("finite", True):
                return step
        except ValueError:  # damaged
            continue
    return None


def save(
    root: str | Path,
    step: int,
    trees: Mapping[str, Any],
    *,
    meta: Mapping[str, Any] | None = None,
    keep_last: int | None = None,
    finite: bool | None = None,
) -> Path:
    """Write `root/step-XXXXXXXX/` with one NAME.safetensors per entry of `trees`, and return its path.

    Args:
        trees: name -> tree of tensors, e.g. {"params": ..., "opt_state": ...}; NamedTuples are stored by field name.
            Keys of a dict are all strings or all integers. ValueError for a tree that `load` could not give back.
        meta: JSON values for the manifest: config, key, position in the data.
        keep_last: afterwards delete all but this many newest checkpoints; None keeps all. This one is never deleted,
            nor the newest finite one, so a run that diverges keeps its last good state.
        finite: what the manifest says of the values, read by `latest_finite`. None: computed, by one pass over the
            floating leaves that looks for inf and nan.

    The order is: write files under a temporary name, flush, write the manifest last, flush, rename, flush the parent.
    A checkpoint of the same step is replaced: the old one is kept as `.replaced` until the new one is in its place.
    A save that fails leaves no files. One process at a time may save under a root.
    """
    step = as_step(step)
    for name, value in trees.items():
        check_structure(name, value)
        check_leaves(name, value)
    content = {"format": FORMAT, "meta": check_meta(meta, step)}
    content["finite"] = is_finite(dict(trees)) if finite is None else bool(finite)
    temporary = begin(Path(root), step, keep_last)
    try:
        files = {}
        for name, value in trees.items():
            path = temporary / f"{name}.safetensors"
            tensors = dict(zip(tree.paths(value), storable(tree.leaves(value)), strict=True))
            try:
                save_file(tensors, path)
            except SafetensorError as error:  # raised on a full disk, for example
                raise OSError(f"{path}: {error}") from error
            sync(path)
            files[name] = {
                "file": path.name,
                "bytes": path.stat().st_size,
                "sha256": _sha256(path),
                "tree": skeleton(value),
            }
        return finish(temporary, step, {**content, "files": files}, keep_last)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def begin(root: Path, step: int, keep_last: int | None) -> Path:
    """A new folder for the files, under a name that does not count as a checkpoint."""
    if keep_last is not None and (not isinstance(keep_last, int) or keep_last < 1):
        raise ValueError(f"keep_last must be at least 1 or None, got {keep_last!r}")
    root.mkdir(parents=True, exist_ok=True)
    for entry in root.glob(".tmp-step-*"):  # left by a killed save
        shutil.rmtree(entry, ignore_errors=True)
    for old in root.glob("step-*.replaced"):  # left by a save that was killed after its last rename
        if (old.with_suffix("") / MANIFEST).is_file():
            _remove(old)
    temporary = root / f".tmp-step-{step:08d}-{os.getpid()}"
    temporary.mkdir()
    return temporary


def finish(temporary: Path, step: int, content: Mapping[str, Any], keep_last: int | None) -> Path:
    """Write the manifest beside the flushed files, and give the folder its name."""
    root, final = temporary.parent, folder_of(temporary.parent, step)
    # In the form in which it will be read, for the checksum: JSON turns keys into strings and tuples into lists.
    manifest = json.loads(json.dumps({**content, "step": step, "torch": torch.__version__}))
    manifest["sha256"] = _seal(manifest)
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    sync(temporary / MANIFEST)
    sync(temporary)
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        _remove(replaced)
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync(root)
    _remove(replaced)
    if keep_last is not None:
        found = steps(root)
        kept = {step, latest_finite(root), *found[-keep_last:]}
        for old in found:
            if old not in kept:
                _remove(folder_of(root, old))
    return final


def as_step(step: int) -> int:
    """step as a Python int; ValueError unless it is an integer of at least 0."""
    try:
        number = operator.index(step)
    except TypeError:
        raise ValueError(f"step must be an integer, got {step!r}") from None
    if number < 0:
        raise ValueError(f"step must not be negative, got {number}")
    return number


def locate(root: Path, step: int | None) -> Path:
    """The folder of a checkpoint: `root` may be the folder of checkpoints or one checkpoint itself."""
    if step is None and (root / MANIFEST).is_file():
        return root
    if step is None:
        step = latest(root)
        if step is None:
            raise ValueError(f"{root}: no complete checkpoint here (looked for step-*/{MANIFEST})")
    for folder in (folder_of(root, step), folder_of(root, step).with_name(folder_of(root, step).name + ".replaced")):
        if (folder / MANIFEST).is_file():
            return folder
    raise ValueError(f"{root}: no checkpoint of step {step}; there are {steps(root) or 'none'}")


def read_manifest(root: str | Path, step: int | None = None) -> dict[str, Any]:
    """The manifest of the newest (or the given) checkpoint: format, step, files, meta, finite.

    ValueError names a field that is missing or of another type, and files that are not in the folder.
    """
    path = locate(Path(root), step) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable manifest ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") not in (FORMAT, SHARDED):
        given = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ValueError(f"{path}: format {given!r}; this version reads {FORMAT} and {SHARDED}")
    if manifest.get("sha256") != _seal(manifest):
        raise ValueError(f"{path}: its own SHA-256 does not match: the file was changed or damaged")
    check_manifest(path, manifest, sharded=manifest["format"] == SHARDED)
    return manifest


def check_unchanged(folder: Path, manifest: Mapping[str, Any]) -> None:
    """ValueError if the checkpoint in this folder was replaced since `manifest` was read."""
    if read_manifest(folder)["sha256"] != manifest["sha256"]:
        raise ValueError(f"{folder}: was replaced while it was read: load it again")


def check_file(path: Path, entry: Mapping[str, Any]) -> None:
    """ValueError unless the file has the size and the SHA-256 of its manifest entry."""
    if not path.is_file():
        raise ValueError(f"{path}: missing, though the manifest lists it")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ValueError(f"{path}: {size} bytes, the manifest says {entry['bytes']}: truncated or overwritten")
    if _sha256(path) != entry["sha256"]:
        raise ValueError(f"{path}: SHA-256 differs from the manifest: the file was changed or damaged")


def mismatch(path: Path, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """One line about the first leaf whose name, shape or dtype differs; None where all are as wanted."""
    for key in sorted(stored.keys() | wanted.keys()):
        if key not in wanted:
            return f"{path}: holds {key} {tuple(stored[key].shape)}, which the given config does not have"
        if key not in stored:
            return f"{path}: lacks {key} {tuple(wanted[key].shape)}, which the given config needs"
        a, b = stored[key], wanted[key]
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{path}: {key} is {tuple(a.shape)} {a.dtype}, the given config needs {tuple(b.shape)} {b.dtype}"
    return None
