"""Reading checkpoints: whole trees or subtrees, each file checked against its SHA-256."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from purelm import tree
from purelm.checkpoint import folder as checkpoints
from purelm.checkpoint import shards
from purelm.checkpoint.manifest import below, leaf_paths, rebuild

__all__ = ["as_like", "check_dtype", "load"]


def load(
    root: str | Path,
    step: int | None = None,
    *,
    like: Mapping[str, Any] | None = None,
    only: Iterable[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the newest (or the given) checkpoint -> ({name: tree}, meta), every file checked against its SHA-256.

    Args:
        root: the folder of checkpoints, or one checkpoint's folder.
        like: name -> tree with the structure, shapes and dtypes that are expected; the result has exactly that
            structure (NamedTuples included). ValueError names the first leaf that differs: a checkpoint of another
            config is refused whole. Without it, trees come back as stored, NamedTuples as dicts.
        only: the names to read (default: those of `like`, else all). A name, here and in `like`, is that of a tree
            ("params"), or the path of a subtree or leaf ("params.layers.0"). Only those leaves are read into memory;
            the files that hold them are still checked whole.
        device: where the tensors go.
        dtype: what floating leaves are cast to, each as it is read, before it is compared with `like`.

    >>> import tempfile
    >>> from purelm import checkpoint
    >>> with tempfile.TemporaryDirectory() as root:
    ...     path = checkpoint.save(root, 10, {"params": {"layers": [{"w": torch.ones(2)}, {"w": torch.zeros(2)}]}})
    ...     trees, meta = checkpoint.load(root, only=["params.layers.0"], dtype=torch.bfloat16)
    >>> trees
    {'params.layers.0': {'w': tensor([1., 1.], dtype=torch.bfloat16)}}
    """
    if isinstance(only, str):
        raise ValueError(f"load: only must be a list of names, got {only!r}: give [{only!r}]")
    check_dtype(dtype)
    folder = checkpoints.locate(Path(root), step)
    manifest = checkpoints.read_manifest(folder)
    names = list(only) if only is not None else list(like if like is not None else manifest["files"])
    places = {name: _place(folder, manifest, name) for name in names}
    for shard in manifest.get("shards", ()):
        checkpoints.check_file(folder / shard["file"], shard)
    checked: set[str] = set()
    out = {}
    for name, (file, path, shape) in places.items():
        entry = manifest["files"][file]
        where = folder / entry.get("file", file)
        if "file" in entry:
            if file not in checked:
                checkpoints.check_file(where, entry)
                checked.add(file)
            tensors = _from_file(where, leaf_paths(shape, path) if path else None, device, dtype)
        else:
            with shards.Reader(folder) as reader:
                stored = shards.leaves(folder, manifest, file)
                chosen = leaf_paths(shape, path) if path else list(stored)
                tensors = {k: cast(reader.whole(stored[k], device), dtype) for k in chosen if k in stored}
        if like is not None and name in like:
            here = {k.removeprefix(path).removeprefix(".") if path else k: x for k, x in tensors.items()}
            out[name] = as_like(where, here, like[name])
        else:
            try:
                out[name] = rebuild(shape, tensors, path)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
    checkpoints.check_unchanged(folder, manifest)
    return out, {**manifest["meta"], "step": manifest["step"]}


def as_like(where: Any, tensors: Mapping[str, Tensor], like: Any) -> Any:
    """The tensors by path in the structure of `like`; ValueError names the first that differs."""
    wanted = dict(zip(tree.paths(like), tree.leaves(like), strict=True))
    problem = checkpoints.mismatch(where, tensors, wanted)
    if problem:
        raise ValueError(problem)
    return tree.unflatten(tree.structure(like), [tensors[k] for k in wanted])


def check_dtype(dtype: torch.dtype | None) -> None:
    """ValueError unless dtype is None or a floating one."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"load: dtype is {dtype!r}; a floating dtype is needed, to which floating leaves are cast")


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x in dtype if x is floating and dtype is not None, else x."""
    return x if dtype is None or not tree.is_floating(x) else x.to(dtype)


def _place(folder: Path, manifest: Mapping[str, Any], name: str) -> tuple[str, str, Any]:
    """(name of the tree, path in it, skeleton there) of a name such as "params" or "params.layers.0"."""
    files = manifest["files"]
    if name in files:
        return name, "", files[name]["tree"]
    fitting = [file for file in files if name.startswith(f"{file}.")]
    if not fitting:
        raise ValueError(f"{folder}: has no {name!r}; it holds {sorted(files)}")
    file = max(fitting, key=len)
    path = name[len(file) + 1 :]
    try:
        return file, path, below(files[file]["tree"], path)
    except ValueError as error:
        raise ValueError(f"{folder}: {file} {error}") from None


def _from_file(
    path: Path, chosen: list[str] | None, device: str | torch.device, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The chosen leaves of a safetensors file, less those that it does not have; None: all leaves."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            keys = list(file.keys())
            wanted = keys if chosen is None else [key for key in chosen if key in set(keys)]
            return {key: cast(file.get_tensor(key), dtype) for key in wanted}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
