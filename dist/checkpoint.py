"""Checkpoints of trees whose leaves are spread over ranks: saved on N ranks, loaded on any M.

    save(root, step, {"params": parts, "opt_state": state}, like=wholes)      # on every rank
    trees, meta = load(root, like=wholes)                                     # on every rank, of any number

`like` has the shapes and dtypes of the whole leaves (meta tensors will do). A leaf is cut along axis 0 as in
`purelm.dist.sharding`, or replicated, or on one rank alone and None on the others (`zero.whole_tensors`). Each rank
writes one file: its rows of the leaves that are cut (without padding), the leaves that it alone has, and its share of
the replicated leaves, each of which is written once. Nothing is gathered. Rank 0 writes the manifest when all files are
flushed, and renames the folder, with the guarantee of `purelm.checkpoint`: a kill of any rank at any instant leaves the
previous checkpoint loadable. `steps`, `latest`, `read_manifest` and `load` of that module work on these folders too.

All ranks must see one file system. Messages are of a few hundred bytes (texts of errors, checksums of files), and if
one rank fails, all raise. If a rank dies, the others' next message fails: over Gloo at once, over NCCL after the
group's timeout. The times that ranks take to write must not differ by more than that.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from purelm import tree
from purelm.checkpoint import folder as one_process
from purelm.checkpoint import shards
from purelm.checkpoint.manifest import check_meta, check_structure, is_finite, skeleton
from purelm.dist.agreement import check_same_kind
from purelm.dist.sharding import part_shape
from purelm.dist.world import Group, rank_of, size_of

__all__ = ["has_axes", "load", "save"]

# Which leaves are cut: f(path, whole leaf) -> bool, where paths begin with the tree's name; or a tree of bools, one of
# which may stand for a whole subtree: {"params": True, "opt_state": {"step": False, "mu": True}}.
Layout = Callable[[str, Tensor], bool] | Mapping[str, Any] | bool


def has_axes(path: str, x: Tensor) -> bool:
    """True for all leaves but 0-d ones, such as an optimizer's count of steps.

    `sharding.shard` cuts 0-d parameters too, into parts of one element: for these give `sharded` as a tree, or True.

    >>> has_axes("params.w", torch.zeros(2, 3)), has_axes("opt_state.step", torch.tensor(0))
    (True, False)
    """
    return x.ndim > 0


class _Placed(NamedTuple):
    """A leaf, and who writes it."""

    name: str  # of the tree
    path: str
    like: Tensor  # shape and dtype of the whole leaf
    local: Tensor | None  # None: another rank has it
    shard: int | None  # the rank that writes all of it; None: each rank writes its rows

    @property
    def full_name(self) -> str:
        return f"{self.name}.{self.path}"


def save(
    root: str | Path,
    step: int,
    trees: Mapping[str, Any],
    *,
    like: Mapping[str, Any],
    sharded: Layout | None = None,
    group: Group = None,
    meta: Mapping[str, Any] | None = None,
    keep_last: int | None = None,
    finite: bool | None = None,
) -> Path:
    """Write `root/step-XXXXXXXX/` with all ranks of the group; returns its path, on every rank, once it is complete.

    Args:
        trees: name -> tree of this rank's parts and of replicated tensors; None where one other rank has the leaf.
        like: name -> tree of the same structure with the whole leaves' shapes and dtypes.
        sharded: which leaves are parts. None: those with the shape of a part. This is not ambiguous: part and whole
            have one shape only if axis 0 has at most one row (or N is 1), and then rank 0's part is the whole.
        meta, keep_last: as in `purelm.checkpoint.save`; those of rank 0 are used.
        finite: as there, for this rank's leaves; the manifest says whether those of all ranks are finite.

    If any rank fails, all raise an error that names it, and `root` is as it was before.
    """
    rank, N, what = rank_of(group), size_of(group), f"save of step {step}"
    begun: list[Path] = []

    def begin() -> tuple[list[_Placed], Any]:
        nonlocal step, meta
        step = one_process.as_step(step)
        meta = check_meta(meta, step)
        plan = _plan(trees, like, sharded, N)
        if rank == 0:
            begun.append(one_process.begin(Path(root), step, keep_last))
        return plan, (step, begun[0].name if begun else None, [p.full_name for p in plan if p.local is None])

    try:
        plan, everyone = _together(begin, group, what)
        if len({s for s, *_ in everyone}) > 1:
            raise ValueError(f"save: ranks differ in step: {[s for s, *_ in everyone]}")
        plan, common = _placed(plan, [absent for *_, absent in everyone])
        check_same_kind(common, group, what)
        temporary = Path(root) / everyone[0][1]
        path = temporary / shards.file_name(rank, N)

        def write() -> tuple[None, Any]:
            good = is_finite(dict(trees)) if finite is None else bool(finite)
            return None, (shards.write(path, _own(plan, rank, N)), good)

        _, written = _together(write, group, what)

        def finish() -> tuple[None, None]:
            if rank == 0:
                content: dict[str, Any] = {"format": one_process.SHARDED, "files": _describe(like, plan), "meta": meta}
                content |= {"shards": [entry for entry, _ in written], "finite": all(good for _, good in written)}
                one_process.finish(temporary, step, content, keep_last)
            return None, None

        _together(finish, group, what)
    except BaseException:
        for path in begun:
            shutil.rmtree(path, ignore_errors=True)
        raise
    return one_process.folder_of(Path(root), step)


def load(
    root: str | Path,
    like: Mapping[str, Any],
    *,
    sharded: Layout = has_axes,
    absent: Layout = False,
    whole: bool = False,
    step: int | None = None,
    group: Group = None,
    device: str | torch.device = "cpu",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the newest (or the given) checkpoint, of one process or several: ({name: tree of this rank's parts}, meta).

    Args:
        root: the folder of checkpoints, or one checkpoint's folder.
        like: name -> tree with the structure and the whole leaves' shapes and dtypes; only these names are read.
            ValueError names the first leaf that is stored with another shape or dtype.
        sharded: which leaves are returned as this rank's part, padded with zeros as by `sharding.part_of`; the others
            are returned whole. It need not be what was cut when the checkpoint was saved.
        absent: which leaves are not read and are returned as None, because another rank has them.
        whole: return all leaves whole, whatever `sharded` says.
        device: of the tensors; the host's memory holds one leaf's rows from one file at a time.

    Each file's checksum is computed by one rank; then each rank reads the rows that it needs. If any rank fails, all
    raise.
    """
    rank, N, what = rank_of(group), size_of(group), "load"

    def locate() -> tuple[None, Path | None]:  # rank 0 decides, since a newer checkpoint may appear meanwhile
        return None, one_process.locate(Path(root), step).relative_to(root) if rank == 0 else None

    folder = Path(root) / _together(locate, group, what)[1][0]

    def check() -> tuple[Any, str]:
        manifest = one_process.read_manifest(folder)
        files = manifest.get("shards") or [entry for name, entry in manifest["files"].items() if name in like]
        for entry in files[rank::N]:
            one_process.check_file(folder / entry["file"], entry)
        return manifest, manifest["sha256"]

    manifest, seals = _together(check, group, what)
    if len(set(seals)) > 1:
        raise ValueError(f"load: ranks see different files at {folder}: is it one file system?")

    def read() -> tuple[dict[str, Any], None]:
        cut, skipped = _cut(like, False if whole else sharded), _cut(like, absent)
        how = tree.map(lambda is_cut, skip: "skip" if skip else "part" if is_cut else "whole", cut, skipped)
        with shards.Reader(folder) as reader:
            found = {n: _read(reader, folder, manifest, n, like[n], how[n], rank, N, device) for n in like}
        one_process.check_unchanged(folder, manifest)
        return found, None

    return _together(read, group, what)[0], {**manifest["meta"], "step": manifest["step"]}


def _read(
    reader: shards.Reader,
    folder: Path,
    manifest: Mapping[str, Any],
    name: str,
    like: Any,
    how: Any,
    rank: int,
    n_ranks: int,
    device: str | torch.device,
) -> Any:
    if name not in manifest["files"]:
        raise ValueError(f"{folder}: has no {name!r}; it holds {sorted(manifest['files'])}")
    stored = shards.leaves(folder, manifest, name)
    wanted = dict(zip(tree.paths(like), tree.leaves(like), strict=True))
    kinds = {path: torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") for path, leaf in stored.items()}
    problem = one_process.mismatch(folder / name, kinds, wanted)
    if problem:
        raise ValueError(problem)
    out: list[Tensor | None] = []
    for path, kind in zip(wanted, tree.leaves(how), strict=True):
        leaf = stored[path]
        if kind == "skip":
            out.append(None)
        elif kind == "part":
            shape = part_shape(leaf.shape, n_ranks)
            part = torch.zeros(shape, dtype=leaf.dtype, device=device)
            out.append(reader.fill(part, leaf, rank * shape[0]))
        else:
            out.append(reader.whole(leaf, device))
    return tree.unflatten(tree.structure(like), out)


def _cut(like: Mapping[str, Any], sharded: Layout) -> Any:
    """A tree of bools with the structure of `like`."""
    if callable(sharded):
        return tree.map_with_path(lambda path, x: bool(sharded(path, x)), dict(like))
    if isinstance(sharded, bool):
        return tree.map(lambda x: sharded, dict(like))
    for path, flag in zip(tree.paths(sharded), tree.leaves(sharded), strict=True):
        if not isinstance(flag, bool):
            raise ValueError(f"sharded must be a tree of bools, got {flag!r} at {path}")
    return tree.map(lambda flag, below: tree.map(lambda x: flag, below), dict(sharded), dict(like))


def _plan(trees: Mapping[str, Any], like: Mapping[str, Any], sharded: Layout | None, n_ranks: int) -> list[_Placed]:
    """All leaves of all trees, those that are cut with shard None; ValueError names a leaf that does not fit `like`.

    Whole leaves are given to rank 0 here, and spread by `_placed`. So are leaves of at most one row: their part and
    whole have one shape, and rank 0's is right in either case.
    """
    if odd := sorted(trees.keys() ^ like.keys()):
        raise ValueError(f"save: trees and like differ in {odd[0]}")
    cut = None if sharded is None else _cut(like, sharded)
    plan = []
    for name, value in trees.items():
        paths = tree.paths(like[name])
        check_structure(name, like[name])
        for path, whole in zip(paths, tree.leaves(like[name]), strict=True):
            if not isinstance(whole, Tensor):
                raise ValueError(f"save: like.{name}.{path} is a {type(whole).__name__}: leaves are tensors")
        try:
            (wholes, leaves), _ = tree.flatten_up_to(like[name], value)
        except ValueError:
            odd = sorted(set(paths) ^ set(tree.paths(value))) or ["structure"]
            raise ValueError(f"save: trees and like differ in {name}.{odd[0]}") from None
        flags = None if cut is None else tree.leaves(cut[name])
        for i, (path, x, whole) in enumerate(zip(paths, leaves, wholes, strict=True)):
            if whole.dtype not in shards.NAMES:
                raise ValueError(f"save: {name}.{path} is {whole.dtype}, which cannot be stored")
            if x is None:
                plan.append(_Placed(name, path, whole, None, 0))
                continue
            shapes = {True: part_shape(whole.shape, n_ranks), False: tuple(whole.shape)}
            allowed = [shapes[flags[i]]] if flags else list(dict.fromkeys([shapes[True], shapes[False]]))
            if not isinstance(x, Tensor) or x.dtype != whole.dtype or tuple(x.shape) not in allowed:
                kind = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(
                    f"save: {name}.{path} is {kind}; like says {' or '.join(map(str, allowed))} "
                    f"{whole.dtype}, for {tuple(whole.shape)} on {n_ranks} ranks"
                )
            in_parts = tuple(x.shape) == shapes[True] and whole.ndim > 0 and whole.shape[0] > 1
            plan.append(_Placed(name, path, whole, x, None if in_parts else 0))
    return plan


def _placed(plan: list[_Placed], absent: Sequence[Sequence[str]]) -> tuple[list[_Placed], dict[str, Tensor]]:
    """(the plan with the rank that writes each leaf, the leaves that all ranks have); the same on all ranks.

    A leaf that one rank alone has is written by that rank. Replicated leaves are spread, largest first, each to the
    rank with the fewest bytes to write so far. absent: for each rank, the names of the leaves that it does not have.
    """
    lacking = [set(names) for names in absent]
    out, written = list(plan), [0] * len(absent)
    common: dict[str, Tensor] = {}
    for i, p in enumerate(plan):
        holders = [rank for rank, names in enumerate(lacking) if p.full_name not in names]
        if len(holders) == len(absent):
            common[p.full_name] = p.local  # type: ignore[assignment]
        elif len(holders) == 1:
            out[i] = p._replace(shard=holders[0])
            written[holders[0]] += p.like.nbytes
        else:
            who = f"ranks {', '.join(map(str, holders))} have" if holders else "no rank has"
            raise ValueError(f"save: {who} {p.full_name}, the others None: it must be on one rank, or on all")
    whole = [i for i, p in enumerate(plan) if p.full_name in common and p.shard is not None and len(p.like.shape[:1])]
    for i in sorted(whole, key=lambda i: -plan[i].like.nbytes):
        if plan[i].like.shape[0] > 1:
            rank = written.index(min(written))
            written[rank] += plan[i].like.nbytes
            out[i] = plan[i]._replace(shard=rank)
    return out, common


def _own(plan: list[_Placed], rank: int, n_ranks: int) -> dict[str, Tensor]:
    """The tensors that this rank writes, as views."""
    out = {}
    for p in plan:
        if p.local is None:
            continue
        if p.shard is None:
            m = part_shape(p.like.shape, n_ranks)[0]
            rows = min(m, p.like.shape[0] - rank * m)
            if rows > 0:
                out[f"{p.name}/{p.path}"] = p.local[:rows]
        elif p.shard == rank:
            if p.local.numel() != p.like.numel():
                has, whole = tuple(p.local.shape), tuple(p.like.shape)
                raise ValueError(f"save: {p.full_name} is {has}; no other rank has it, so it must be whole, {whole}")
            out[f"{p.name}/{p.path}"] = p.local.reshape(p.like.shape)
    return out


def _describe(like: Mapping[str, Any], plan: list[_Placed]) -> dict[str, Any]:
    return {
        name: {
            "tree": skeleton(value),
            "leaves": {p.path: shards.describe(p.like, p.shard) for p in plan if p.name == name},
        }
        for name, value in like.items()
    }


def _together(f: Callable[[], tuple[Any, Any]], group: Group, what: str) -> tuple[Any, list[Any]]:
    """Call f() -> (kept, sent) on all ranks; returns (kept, what each rank sent).

    An error on any rank is raised on all, naming the ranks: as a ValueError if all errors are, else as a RuntimeError.
    One message of pickled bytes, and so a barrier.
    """
    N = size_of(group)
    if N == 1:
        kept, sent = f()
        return kept, [sent]
    kept, sent, failure = None, None, None
    try:
        kept, sent = f()
    except Exception as error:
        failure = error
    text = None if failure is None else f"{type(failure).__name__}: {failure}"
    everyone: list[Any] = [None] * N
    try:
        dist.all_gather_object(everyone, (sent, text, isinstance(failure, ValueError)), group=group)
    except RuntimeError as error:
        raise RuntimeError(f"{what}: a rank is gone or late: {error}") from failure or error
    ranks: dict[str, list[str]] = {}
    for rank, (_, text, _) in enumerate(everyone):
        if text is not None:
            ranks.setdefault(text, []).append(str(rank))
    if ranks:
        kind = ValueError if all(is_value for _, text, is_value in everyone if text is not None) else RuntimeError
        raise kind(f"{what}: " + "; ".join(f"rank {', '.join(r)}: {text}" for text, r in ranks.items())) from failure
    return kept, [sent for sent, _, _ in everyone]
