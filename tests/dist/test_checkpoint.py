"""Checkpoints of several ranks. Oracles: slices of the whole leaf for every pair of world sizes, purelm.checkpoint and
safetensors reading the same files, /proc for memory, the file system after each failure.

Ranks that die are in test_checkpoint_kills.
"""

import ctypes
import json
import os
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from purelm import checkpoint as one_process
from purelm import random, tree
from purelm.checkpoint import shards
from purelm.dist import checkpoint
from purelm.dist.sharding import part_of, part_shape
from purelm.dist.world import rank_of, size_of
from tests.dist.processes import RankError, run

SHAPES = [(8, 3), (5, 2), (1, 4), (), (0, 3), (3,), (2, 2, 2), (7, 0), (3, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.float64, torch.bool, torch.uint8, torch.float16]


class State(NamedTuple):
    step: torch.Tensor
    mu: dict


def wholes(seed=0):
    """Whole trees, every shape in several dtypes; every rank can make them."""
    key = random.key(seed)
    leaves = [random.normal(random.fold_in(key, i), s) for i, s in enumerate(SHAPES)]
    params = {
        "layers": [{"w": x, "none": None, "low": (9 * x).to(DTYPES[i % len(DTYPES)])} for i, x in enumerate(leaves)],
        "none": None,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "steps": torch.arange(11) + seed,
    }
    return {"params": params, "opt_state": (State(torch.tensor(7 + seed), {"w": leaves[1] * 2}), (), [])}


LIKE = tree.map(lambda x: torch.empty_like(x, device="meta"), wholes())
LAYOUTS = {
    "has_axes": checkpoint.has_axes,
    "every leaf": True,
    "none": False,
    "names": {"params": {"layers": True, "none": None, "scalar": True, "steps": False}, "opt_state": False},
}


def flags(layout):
    return checkpoint._cut(LIKE, layout)


def laid_out(trees, layout, rank, n_ranks):
    """What a rank holds: the oracle of load."""
    return tree.map(lambda cut, x: part_of(x, rank, n_ranks) if cut else x, flags(layout), trees)


def same(a, b):
    assert tree.structure(a) == tree.structure(b)
    for path, x, y in zip(tree.paths(a), tree.leaves(a), tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y) and x.is_contiguous(), path


def on_rank_save(root, step, layout, seed=0, given=None, **kwargs):
    trees = laid_out(wholes(seed), LAYOUTS[layout], rank_of(None), size_of(None))
    before = tree.map(torch.clone, trees)
    sharded = None if given is None else LAYOUTS[given]
    path = checkpoint.save(root, step, trees, like=LIKE, sharded=sharded, meta={"seed": seed}, **kwargs)
    same(trees, before)
    assert one_process.latest(root) == max(one_process.steps(root)) and (path / "manifest.json").is_file()


def on_rank_load(root, layout, seed=0, whole=False):
    got, meta = checkpoint.load(root, LIKE, sharded=LAYOUTS[layout], whole=whole)
    expected = laid_out(wholes(seed), False if whole else LAYOUTS[layout], rank_of(None), size_of(None))
    same(got, expected)
    assert isinstance(got["opt_state"][0], State) and meta["seed"] == seed


def go(f, *args, size=2, **kwargs):
    """On `size` ranks; one rank is this process."""
    return [f(*args, **kwargs)] if size == 1 else run(f, *args, *kwargs.values(), size=size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_saved", [1, 2, 4])
def test_saved_on_n_ranks_loaded_on_m(tmp_path, n_saved, layout):
    """Every layout back into every layout, to the bit; and on one process by purelm.checkpoint, in both its ways."""
    go(on_rank_save, tmp_path, 3, layout, size=n_saved)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
    for n_loaded in (1, 2, 4):
        for back in LAYOUTS:
            go(on_rank_load, tmp_path, back, size=n_loaded)
        go(on_rank_load, tmp_path, "has_axes", 0, True, size=n_loaded)
    same(one_process.load(tmp_path, like=LIKE)[0], wholes())
    plain, meta = one_process.load(tmp_path)
    same(plain["params"], wholes()["params"])
    assert set(plain["opt_state"][0]) == {"step", "mu"} and meta == {"seed": 0, "step": 3}


def test_a_layout_may_be_given_and_is_checked(tmp_path):
    run(on_rank_save, tmp_path, 1, "names", 0, "names")
    run(on_rank_load, tmp_path, "every leaf")
    for layout, given_one, message in [
        ("none", "every leaf", r"params.layers.0.low is \(8, 3\) torch.float32; like says \(4, 3\) torch.float32"),
        ("every leaf", "names", r"params.steps is \(6,\) torch.int64; like says \(11,\) torch.int64"),
    ]:
        with pytest.raises(RankError, match=message) as error:
            run(on_rank_save, tmp_path, 1, layout, 0, given_one)
        assert set(error.value.errors) == {0, 1}
    with pytest.raises(ValueError, match="sharded must be a tree of bools, got 'yes' at params"):
        checkpoint.load(tmp_path, LIKE, sharded={"params": "yes", "opt_state": True})


def test_loads_what_one_process_saved(tmp_path):
    """Folders of purelm.checkpoint.save, and both kinds under one root: steps, latest, keep_last, replacement."""
    one_process.save(tmp_path, 5, wholes(1), meta={"seed": 1})
    for size in (1, 2):
        go(on_rank_load, tmp_path, "has_axes", 1, size=size)
    run(on_rank_save, tmp_path, 7, "has_axes", 2)
    one_process.save(tmp_path, 8, wholes(3), meta={"seed": 3})
    assert one_process.steps(tmp_path) == [5, 7, 8]
    run(on_rank_save, tmp_path, 9, "has_axes", 4, None)
    one_process.save(tmp_path, 9, wholes(5), meta={"seed": 5}, keep_last=3)
    assert one_process.steps(tmp_path) == [7, 8, 9]
    run(on_rank_load, tmp_path, "has_axes", 5)
    run(on_rank_save, tmp_path, 9, "none", 6)
    run(on_rank_load, tmp_path, "has_axes", 6)
    run(on_rank_keep, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]
    run(on_rank_load, tmp_path / "step-00000010", "none", 7)


def on_rank_keep(root):
    on_rank_save(root, 10, "every leaf", 7, keep_last=1)


def test_each_rank_writes_its_rows_and_replicated_leaves_are_written_once(tmp_path):
    run(on_rank_save, tmp_path, 1, "names")
    manifest = one_process.read_manifest(tmp_path)
    assert manifest["format"] == 2
    files = [tmp_path / "step-00000001" / shard["file"] for shard in manifest["shards"]]
    assert [f.name for f in files] == ["shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"]
    stored = [load_file(f) for f in files]
    assert stored[0]["params/layers.1.w"].shape == (3, 2) and stored[1]["params/layers.1.w"].shape == (2, 2)
    for path, x in zip(tree.paths(wholes()), tree.leaves(wholes()), strict=True):
        name, _, rest = path.partition(".")
        found = [s[f"{name}/{rest}"] for s in stored if f"{name}/{rest}" in s]
        assert torch.equal(torch.cat(found) if x.ndim else found[0], x), path
        if x.ndim == 0 or len(x) < 2 or "steps" in path or "opt_state" in path:
            assert len(found) == 1, path
    once = {"opt_state/0.step", "opt_state/0.mu.w", "params/steps"}
    assert once & stored[0].keys() and once & stored[1].keys()  # spread


@pytest.mark.parametrize("n_ranks", [2, 3, 4])
def test_replicated_leaves_are_spread_by_size(n_ranks):
    """Closed form: greedy by size leaves no rank more than the largest leaf above another."""
    sizes = [3, 90, 50, 40, 30, 30, 20, 7, 2]
    trees = {"t": {f"{i:02d}": torch.zeros(n) for i, n in enumerate(sizes)}}
    plan, _ = checkpoint._placed(checkpoint._plan(trees, trees, False, n_ranks), [[]] * n_ranks)
    written = [sum(x.numel() for x in checkpoint._own(plan, r, n_ranks).values()) for r in range(n_ranks)]
    assert sum(written) == sum(sizes) and max(written) - min(written) <= 90 and min(written) > 0


def on_rank_wrong(root, kind):
    rank = rank_of(None)
    trees, like = laid_out(wholes(), True, rank, size_of(None)), dict(LIKE)
    step = 2
    if rank == 1 and kind in ("dtype", "both"):
        trees["params"]["steps"] = trees["params"]["steps"].int()
    if rank == 1 and kind == "leaf":
        del trees["params"]["steps"]
    if rank == 1 and kind == "layout":
        trees["params"]["steps"] = wholes()["params"]["steps"]
    if rank == 1 and kind == "step":
        step = 3
    if kind == "both" and rank == 0:
        root = root / "step-00000001" / "manifest.json"  # no folder can be made there
    if kind == "disk":
        real, full = shards.write, OSError(28, "No space left on device")

        def write(path, tensors):
            out = real(path, tensors)
            if rank == 1:
                raise full
            return out

        shards.write = write
    try:
        checkpoint.save(root, step, trees, like=like, keep_last=0 if kind == "keep" else None)
    finally:
        if kind == "disk":
            shards.write = real
        if kind == "rename":
            os.rename = rename


rename = os.rename


def on_rank_rename(root):
    """Rank 0 cannot give the folder its name."""

    def refuse(a, b):
        raise PermissionError(13, "Permission denied")

    if rank_of(None) == 0:
        os.rename = refuse
    on_rank_wrong(root, "rename")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("disk", "RuntimeError: save of step 2: rank 1: OSError: [Errno 28] No space left on device"),
        ("rename", "RuntimeError: save of step 2: rank 0: PermissionError: [Errno 13] Permission denied"),
        (
            "dtype",
            "ValueError: save of step 2: rank 1: ValueError: save: params.steps is (6,) torch.int32; "
            "like says (6,) or (11,) torch.int64, for (11,) on 2 ranks",
        ),
        (
            "both",  # a wrong argument and a disk: not a ValueError alone
            "RuntimeError: save of step 2: rank 0: FileExistsError: [Errno 17] File exists: 'ROOT/manifest.json'; "
            "rank 1: ValueError: save: params.steps is (6,) torch.int32; like says (6,) or (11,) torch.int64, "
            "for (11,) on 2 ranks",
        ),
        ("leaf", "ValueError: save of step 2: rank 1: ValueError: save: trees and like differ in params.steps"),
        (
            "layout",
            "ValueError: save of step 2: ranks differ at params.steps: (6,) int64 on rank 0; (11,) int64 on rank 1",
        ),
        ("step", None),
        ("keep", "ValueError: save of step 2: rank 0: ValueError: keep_last must be at least 1 or None, got 0"),
    ],
)
def test_where_one_rank_fails_all_raise_and_nothing_is_left(tmp_path, kind, message):
    run(on_rank_save, tmp_path, 1, "has_axes")
    with pytest.raises(RankError) as error:
        run(on_rank_rename, tmp_path) if kind == "rename" else run(on_rank_wrong, tmp_path, kind)
    if message is None:
        assert set(error.value.errors) == {0, 1}
        assert all(e.endswith("ranks differ in step: [2, 3]") for e in error.value.errors.values())
    else:
        message = message.replace("ROOT", str(tmp_path / "step-00000001"))
        assert error.value.errors == {0: message, 1: message}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    run(on_rank_load, tmp_path, "every leaf")


@pytest.mark.parametrize("name", ["shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"])
@pytest.mark.parametrize("damage", ["first", "middle", "last", "cut", "gone"])
def test_a_damaged_file_is_named_on_all_ranks(tmp_path, name, damage):
    run(on_rank_save, tmp_path, 1, "has_axes")
    path = tmp_path / "step-00000001" / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        at = {"first": 0, "middle": len(data) // 2, "last": len(data) - 1, "cut": 0}[damage]
        data[at] ^= 1
        path.write_bytes(path.read_bytes()[:-1] if damage == "cut" else data)
    with pytest.raises(RankError) as error:
        run(on_rank_load, tmp_path, "has_axes")
    assert error.value.errors[0] == error.value.errors[1] and name in error.value.errors[0]
    for read in (lambda: checkpoint.load(tmp_path, LIKE), lambda: one_process.load(tmp_path)):
        with pytest.raises(ValueError, match=name):
            read()


def test_a_damaged_manifest_and_no_checkpoint_are_named(tmp_path):
    with pytest.raises(RankError, match=r"rank 0: ValueError: .*no complete checkpoint here"):
        run(on_rank_load, tmp_path, "has_axes")
    run(on_rank_save, tmp_path, 1, "has_axes")
    path = tmp_path / "step-00000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["params"]["leaves"]["steps"]["shard"] = 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(RankError, match=r"rank 0, 1: ValueError: .*manifest\.json: its own SHA-256 does not match"):
        run(on_rank_load, tmp_path, "has_axes")


def on_rank_other(root, kind):
    like = {"params": dict(LIKE["params"]), "opt_state": LIKE["opt_state"]}
    if kind == "shape":
        like["params"]["steps"] = torch.empty(12, dtype=torch.int64, device="meta")
    if kind == "dtype":
        like["params"]["steps"] = torch.empty(11, dtype=torch.int32, device="meta")
    if kind == "less":
        del like["params"]["steps"]
    if kind == "more":
        like["params"]["extra"] = torch.empty(2, device="meta")
    if kind == "name":
        like["key"] = torch.empty(2, device="meta")
    checkpoint.load(root, like)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shape", r"step-00000001/params: steps is \(11,\) torch.int64, the given config needs \(12,\) torch.int64"),
        ("dtype", r"steps is \(11,\) torch.int64, the given config needs \(11,\) torch.int32"),
        ("less", r"holds steps \(11,\)"),
        ("more", r"lacks extra \(2,\)"),
        ("name", r"has no 'key'; it holds \['opt_state', 'params'\]"),
    ],
)
def test_another_config_is_refused_by_leaf(tmp_path, kind, message, size):
    run(on_rank_save, tmp_path, 1, "has_axes")
    with pytest.raises((ValueError, RankError), match=message):
        go(on_rank_other, tmp_path, kind, size=size)
    go(on_rank_load, tmp_path, "has_axes", size=size)


def test_names_alone_are_read(tmp_path):
    run(on_rank_save, tmp_path, 1, "has_axes")
    got, _ = checkpoint.load(tmp_path, {"params": LIKE["params"]}, step=1)
    same(got, {"params": wholes()["params"]})
    with pytest.raises(ValueError, match="no checkpoint of step 9"):
        checkpoint.load(tmp_path, LIKE, step=9)


tensors = st.tuples(st.sampled_from(list(shards.NAMES)), st.lists(st.integers(0, 3), max_size=3)).map(
    lambda t: torch.arange(27, dtype=torch.uint8).repeat(16)[: torch.Size(t[1]).numel() * t[0].itemsize].clone()
    .view(t[0]).view(t[1])
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=3), tensors, max_size=5))
def test_files_are_safetensors(tmp_path_factory, values):
    """Oracle: the library's own reader; and, with a view, its own writer."""
    folder = tmp_path_factory.mktemp("files")
    values = {k: x % 2 == 0 if x.dtype == torch.bool else x for k, x in values.items() if k != "__metadata__"}
    entry = shards.write(folder / "a", values)
    data = (folder / "a").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    assert end % 8 == 0 and all(header[k]["data_offsets"][0] % x.element_size() == 0 for k, x in values.items())
    read = load_file(folder / "a")
    assert read.keys() == values.keys()
    for key, x in values.items():
        bits = [y.contiguous().view(-1).view(torch.uint8) for y in (x, read[key])]  # NaNs too
        assert x.dtype == read[key].dtype and x.shape == read[key].shape and torch.equal(*bits)
    assert entry["bytes"] == (folder / "a").stat().st_size
    one_process.folder.check_file(folder / "a", entry)
    save_file(values, folder / "b")
    assert (folder / "a").stat().st_size - entry["bytes"] == 0 and load_file(folder / "b").keys() == values.keys()


@given(st.integers(0, 9), st.integers(1, 5), st.integers(1, 5))
def test_rows_of_any_cut(tmp_path_factory, n, n_saved, n_loaded):
    """N files written one by one, read as M parts. Oracle: part_of."""
    folder, x = tmp_path_factory.mktemp("rows"), torch.arange(2.0 * n).view(n, 2)
    files = []
    for r in range(n_saved):
        plan = checkpoint._plan({"t": part_of(x, r, n_saved)}, {"t": x}, True, n_saved)
        files.append(shards.write(folder / f"{r}", checkpoint._own(plan, r, n_saved)))
    manifest = {"shards": files, "files": checkpoint._describe({"t": x}, plan)}
    (leaf,) = shards.leaves(folder, manifest, "t").values()
    with shards.Reader(folder) as reader:
        for r in range(n_loaded):
            shape = part_shape(x.shape, n_loaded)
            assert torch.equal(reader.fill(torch.zeros(shape), leaf, r * shape[0]), part_of(x, r, n_loaded))


def anonymous() -> int:
    """Bytes of memory of this process that no file backs."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def on_rank_memory(root, n_leaves, rows):
    """(bytes that a save holds beside its arguments, those that a load holds, rows read) at most."""
    rank, N = rank_of(None), size_of(None)
    like = {"p": [torch.empty(rows, 1024, device="meta") for _ in range(n_leaves)]}
    parts = {"p": [torch.full((rows // N, 1024), float(rank + 1)) for _ in range(n_leaves)]}
    seen, read = [], []

    class Slice:
        def __init__(self, inner):
            self.inner = inner

        def __getitem__(self, index):
            out = self.inner[index]
            read.append(out.nbytes)
            out.sum()  # touches all of it
            seen.append(anonymous())
            return out

        def __getattr__(self, name):
            return getattr(self.inner, name)

    class File:
        def __init__(self, *args, **kwargs):
            self.inner = safe_open(*args, **kwargs)

        def __enter__(self):
            self.inner.__enter__()
            return self

        def __exit__(self, *error):
            self.inner.__exit__(*error)

        def get_slice(self, key):
            return Slice(self.inner.get_slice(key))

    class Digest:  # called with every leaf's bytes while they are held
        def __init__(self, *args):
            self.inner = hashlib.sha256(*args)

        def update(self, data):
            self.inner.update(data)
            seen.append(anonymous())

        def hexdigest(self):
            return self.inner.hexdigest()

    hashlib = shards.hashlib
    shards.hashlib = type("H", (), {"sha256": Digest})
    before = anonymous()
    try:
        checkpoint.save(root, 1, parts, like=like)
    finally:
        shards.hashlib = hashlib
    saving = max(seen) - before
    del parts
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the kernel
    seen.clear()
    shards.safe_open = File
    before = anonymous()
    try:
        got, _ = checkpoint.load(root, like)
    finally:
        shards.safe_open = safe_open
    loading = max([*seen, anonymous()]) - before
    assert all((x == rank + 1).all() for x in got["p"])
    return saving, loading, sum(read), max(read)


def test_a_rank_holds_its_part_and_one_leaf_at_most(tmp_path):
    """32 leaves of 4 MiB on two ranks: a part is 64 MiB. Oracle: the kernel's count of anonymous memory."""
    part, leaf, slack = 64 << 20, 4 << 20, 6 << 20
    for saving, loading, read, largest in run(on_rank_memory, tmp_path, 32, 1024):
        assert saving <= leaf + slack
        assert part <= loading <= part + leaf + slack
        assert read == part and largest == leaf // 2
