"""Tensors of safetensors files and parameters, in both directions, one tensor at a time."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from purelm import tree
from purelm.models.config import Config
from purelm.models.hf.families import Family, Tensors
from purelm.models.layers import leaves
from purelm.models.leaves import Params

__all__ = ["Stored", "read", "stored_by", "write"]

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Stored:
    """The tensors of some safetensors files: name -> (file, dtype, shape, first byte); `load` reads one."""

    def __init__(self, files: list[Path]) -> None:
        self.found: dict[str, tuple[Path, str, tuple[int, ...], int]] = {}
        for path in files:
            for name, entry, begin in _header(path):
                if name in self.found:
                    raise ValueError(f"{path}: {name} is in {self.found[name][0].name}, too")
                self.found[name] = (path, entry["dtype"], tuple(entry["shape"]), begin + entry["data_offsets"][0])

    def load(self, name: str) -> Tensor:
        """The tensor, in memory of its own: no more than itself is held, and the file may change afterwards."""
        path, dtype, shape, begin = self.found[name]
        x = torch.empty(shape, dtype=DTYPES[dtype])
        with open(path, "rb") as file:
            file.seek(begin)
            if x.numel() and file.readinto(x.view(-1).view(torch.uint8).numpy()) != x.nbytes:  # type: ignore[arg-type]
                raise ValueError(f"{path}: ends within {name}")
        return x


def _header(path: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(name, its entry, where the data begin) of each tensor of a file that the library finds to be sound."""
    try:
        with safe_open(path, framework="pt"):
            pass  # names, sizes and offsets fit together and into the file
        with open(path, "rb") as file:
            n = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(n))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: not a safetensors file, or cut short ({error})") from None
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, entry, 8 + n


def files_of(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that an index names, or model.safetensors."""
    if (folder / INDEX).exists():
        try:
            names = {*json.loads((folder / INDEX).read_text())["weight_map"].values()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{folder / INDEX}: not an index of safetensors files ({error!r})") from None
        odd = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if odd:
            raise ValueError(f"{folder / INDEX}: names files outside of its folder: {odd}")
        return [folder / name for name in sorted(names)]
    if (folder / ONE).exists():
        return [folder / ONE]
    others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pth"))
    found = f"; it has {', '.join(others)}, which hold code: convert them to safetensors" if others else ""
    raise ValueError(f"{folder}: has neither {ONE} nor {INDEX}{found}")


def stored_by(family: Family, cfg: Config) -> dict[str, Tensors]:
    """name in the file -> the leaves that it holds, for every leaf of cfg; ValueError if the family lacks one."""
    wanted = leaves(cfg)
    found: dict[str, Tensors] = {}
    for name, entry in family.names.items():
        for i in range(cfg.n_layers if "{i}" in name else 1):
            tensors = entry if isinstance(entry, Tensors) else Tensors((entry,))
            paths = tuple([path.format(i=i) for path in tensors.paths])
            if all(path in wanted for path in paths):
                found[name.format(i=i)] = Tensors(paths, tensors.transposed)
    missing = sorted({*wanted} - {path for tensors in found.values() for path in tensors.paths})
    if missing:
        raise ValueError(f"{family.model_type} has no tensor for {', '.join(missing)}")
    return found


def read(
    stored: Stored, family: Family, cfg: Config, what: str, dtype: torch.dtype | None, device: torch.device | str | None
) -> Params:
    """The parameters of cfg. ValueError names every tensor that is missing, unknown or of another shape."""
    wanted, table = stored_by(family, cfg), leaves(cfg)
    names = {_full(name, family, wanted): name for name in stored.found}
    unknown = sorted(
        name for full, name in names.items() if full not in wanted and not _ignored(full, family, cfg, names, stored)
    )
    problems = [f"lacks {', '.join(missing)}"] if (missing := sorted({*wanted} - {*names})) else []
    problems += [f"has {', '.join(unknown)}, unknown to model_type {family.model_type}"] if unknown else []
    for name, tensors in wanted.items():
        if name not in names:
            continue
        _, kind, shape, _ = stored.found[names[name]]
        if kind not in DTYPES:
            problems.append(f"{name} is {kind}; supported are {', '.join(DTYPES)}")
        first = table[tensors.paths[0]].shape
        expected = (sum(table[path].shape[0] for path in tensors.paths), *first[1:])
        expected = expected[::-1] if tensors.transposed else expected
        if shape != expected:
            problems.append(f"{name} has shape {shape}, and the config says {expected}")
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems)}")
    flat: dict[str, Tensor] = {}
    for name, tensors in wanted.items():
        x = stored.load(names[name])
        x = x.T if tensors.transposed else x
        for path, part in zip(tensors.paths, x.split([table[p].shape[0] for p in tensors.paths]), strict=True):
            part = part.to(device=device, dtype=dtype or part.dtype)
            flat[path] = part.clone(memory_format=torch.contiguous_format) if _is_view(part) else part
    return tree.from_flat({path: flat[path] for path in table})


def _full(name: str, family: Family, wanted: Mapping[str, Tensors]) -> str:
    """The name with the prefix that some files of the family leave out."""
    full = family.prefix + name
    is_buffer = any(re.fullmatch(pattern, full) for pattern in family.buffers)
    return full if name not in wanted and (full in wanted or is_buffer) else name


def _ignored(full: str, family: Family, cfg: Config, names: Mapping[str, str], stored: Stored) -> bool:
    """Whether the tensor holds nothing of its own: a buffer, or a head that is the embedding once more."""
    if any(re.fullmatch(pattern, full) for pattern in family.buffers):
        return True
    if not cfg.tie_embeddings or family.names.get(full) != "lm_head.weight":
        return False
    embedding = next(name for name, path in family.names.items() if path == "token_embeddings.weight")
    if embedding not in names or stored.found[names[embedding]][1:3] != stored.found[names[full]][1:3]:
        return False
    return torch.equal(stored.load(names[embedding]), stored.load(names[full]))


def _is_view(x: Tensor) -> bool:
    return not x.is_contiguous() or x.untyped_storage().nbytes() != x.nbytes


def write(
    folder: Path, params: Params, family: Family, cfg: Config, dtype: torch.dtype | None, max_shard_bytes: int
) -> None:
    """model.safetensors, or several files and their index if that were larger than max_shard_bytes."""
    flat = dict(zip(tree.paths(params), tree.leaves(params), strict=True))

    def made(tensors: Tensors) -> Tensor:
        parts = [flat[path].detach() for path in tensors.paths]
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
        x = x.T if tensors.transposed else x
        return x.to(device="cpu", dtype=dtype or x.dtype).contiguous()

    groups: list[dict[str, Tensors]] = [{}]
    size = total = 0
    for name, tensors in stored_by(family, cfg).items():
        n = sum(flat[p].numel() * (dtype or flat[p].dtype).itemsize for p in tensors.paths)
        if size and size + n > max_shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = tensors
        size, total = size + n, total + n
    where: dict[str, str] = {}
    for i, group in enumerate(groups):
        file = ONE if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        content = {name: made(tensors) for name, tensors in group.items()}
        save_file({name: _own(x, content) for name, x in content.items()}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(group, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _own(x: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    """x, copied if it shares memory with another of the tensors, which the library refuses."""
    n = sum(x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() for y in others.values())
    return x.clone() if n > 1 else x
