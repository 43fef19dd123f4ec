"""What checkpoint.save refuses since it would not come back, finiteness, pruning, manifests that are not believed.

Oracles: equality of trees; the definition of finite; each field's type in turn.
"""

import copy
import json
from collections import deque

import pytest
import torch

from purelm import checkpoint, tree
from purelm.checkpoint import manifest

X = torch.arange(3.0)


@pytest.mark.parametrize(
    "value",
    [
        {0: X, 2: X + 1, 10: X + 2},
        {-1: [X, None, {"a.b": X}], 7: (X, ())},
        {"": X, "a": {"": X}},
        {"weight": {}, "none": None},
        X,
    ],
    ids=["integers", "nested", "empty names", "no leaves", "a leaf"],
)
def test_keys_come_back(tmp_path, value):
    """Oracle: the tree itself, keys, their order and their types."""
    checkpoint.save(tmp_path, 1, {"params": value})
    found = checkpoint.load(tmp_path)[0]["params"]
    assert repr(found) == repr(value) and tree.structure(found) == tree.structure(value)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(found), tree.leaves(value), strict=True))
    assert list(tree.paths(checkpoint.load(tmp_path, like={"params": value})[0])) == list(tree.paths({"params": value}))


@pytest.mark.parametrize(
    ("trees", "message"),
    [
        ({"p": {"__metadata__": X}}, "a leaf of p is called '__metadata__', which safetensors files keep"),
        ({"p": {("a", "b"): X}}, r"p would not come back as it is: keys of a dict .* \('a', 'b'\) is among them"),
        ({"p": {0: X, "b": X}}, "p would not come back as it is: keys of a dict must all be strings, or .* 0 is among"),
        ({"p": {True: X}}, "keys of a dict must all be strings, or all integers; True"),
        ({"p": deque([X])}, "is a deque, which only works without paths"),
        ({"p": {"a\ud800": X}}, "p has a path that cannot be written as text"),
        ({"p": {"a": {"b": X}, "a.b": X}}, "two leaves of p have the path 'a.b'"),
        ({"state": {"step": 3}}, "state.step is 3, a int: leaves are tensors"),
        ({"p": {"w": "text"}}, "p.w is 'text', a str: leaves are tensors"),
        ({"p": {"w": torch.empty(2, device="meta")}}, "p.w is torch.float32, torch.strided, on meta, which cannot be"),
        ({"p": {"w": X.to_sparse()}}, "p.w is torch.float32, torch.sparse_coo, on cpu, which cannot be stored"),
        ({"a/b": X}, "'a/b' cannot name a tree"),
        ({3: X}, "3 cannot name a tree"),
    ],
    ids=str,
)
def test_what_would_not_come_back_is_refused(tmp_path, trees, message):
    """Before anything is written."""
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path, 1, trees)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(meta={"a": X}), "meta must be JSON values"),
        (dict(meta={"step": 2}), r'meta\["step"\] is 2, but the checkpoint is of step 1'),
        (dict(step=1.0), "step must be an integer, got 1.0"),
        (dict(step=-1), "step must not be negative, got -1"),
        (dict(keep_last=0), "keep_last must be at least 1 or None, got 0"),
        (dict(keep_last=1.5), "keep_last must be at least 1 or None, got 1.5"),
    ],
    ids=str,
)
def test_bad_arguments_of_save(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path, trees={"p": X}, **{"step": 1, **kwargs})
    assert not list(tmp_path.iterdir())


def test_only_is_a_list(tmp_path):
    checkpoint.save(tmp_path, torch.tensor(1), {"params": X}, meta={"step": 1})
    with pytest.raises(ValueError, match="only must be a list of names, got 'params'"):
        checkpoint.load(tmp_path, only="params")
    assert list(checkpoint.load(tmp_path, only=["params"])[0]) == ["params"]


def test_the_last_finite_checkpoint_is_never_pruned(tmp_path):
    """Oracle: which were finite. A run that diverges and saves each step keeps what it can go back to."""
    bad = torch.tensor([1.0, float("nan")])
    for step, x in enumerate([X, X, bad, bad, bad]):
        checkpoint.save(tmp_path, step, {"p": {"w": x}, "n": torch.tensor(step)}, keep_last=2)
        assert checkpoint.read_manifest(tmp_path)["finite"] == bool(x.isfinite().all())
    assert checkpoint.steps(tmp_path) == [1, 3, 4] and checkpoint.latest_finite(tmp_path) == 1
    checkpoint.save(tmp_path, 5, {"p": X}, keep_last=2)
    assert checkpoint.steps(tmp_path) == [4, 5] and checkpoint.latest_finite(tmp_path) == 5
    checkpoint.save(tmp_path, 6, {"p": X}, keep_last=1, finite=False)  # the caller knows of more
    assert checkpoint.steps(tmp_path) == [5, 6] and checkpoint.latest(tmp_path) == 6
    (tmp_path / "step-00000005" / "manifest.json").write_text("{")
    assert checkpoint.latest_finite(tmp_path) is None


def test_what_was_just_saved_is_not_pruned(tmp_path):
    """Also where it is older than what is there: a run that went back."""
    for step in (10, 20, 5):
        path = checkpoint.save(tmp_path, step, {"p": X}, keep_last=1)
        assert path.is_dir()
    assert checkpoint.steps(tmp_path) == [5, 20]


def test_formats_of_8_bits_are_looked_at():
    """Oracle: the values."""
    x = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    assert not manifest.is_finite({"x": x}) and manifest.is_finite({"x": x[:1], "n": torch.tensor(1)})


def forged(folder, change):
    """The manifest with `change` made to it, sealed again as one who means harm would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["sha256"] = checkpoint.folder._seal(manifest)
    path.write_text(json.dumps(manifest))


PLACES = [
    ("step", [None, "1", -1, True, 1.0]),
    ("meta", [None, [], "x"]),
    ("finite", [1, "yes"]),
    ("files", [None, [], {"p": None}, {"p": {}}]),
    ("files.p.file", [None, 3, "", ".", "..", "../p.safetensors", "/etc/passwd", "a\\b", "a\0b"]),
    ("files.p.bytes", [None, "8", -1, 1.5]),
    ("files.p.sha256", [None, 0]),
    ("files.p.tree", [0, "x", {}, {"dict": []}, {"list": {}}, {"set": []}, {"dict": {}, "list": []}]),
    ("files.p.tree", [{"int_dict": {"a": None}}, {"int_dict": {"01": None}}, {"dict": {"w": {"dict": {"w": 1}}}}]),
]


@pytest.mark.parametrize(("place", "values"), PLACES, ids=[place for place, _ in PLACES])
def test_manifests_are_not_believed(tmp_path, place, values):
    """Oracle: what the format says of each field; ValueError names it, and no file outside of the folder is opened."""
    folder = checkpoint.save(tmp_path, 1, {"p": {"w": X}})
    before = (folder / "manifest.json").read_text()
    *parents, last = place.split(".")
    for value in values:

        def change(manifest, value=value):
            at = manifest
            for name in parents:
                at = at[name]
            at[last] = copy.deepcopy(value)

        (folder / "manifest.json").write_text(before)
        forged(folder, change)
        for call in (checkpoint.load, checkpoint.read_manifest):
            with pytest.raises(ValueError, match=rf"manifest.json: {place}"):
                call(tmp_path)
    if last != "finite":  # which older checkpoints do not have
        (folder / "manifest.json").write_text(before)
        forged(folder, lambda manifest: change_away(manifest, parents, last))
        with pytest.raises(ValueError, match=rf"manifest.json: {place}"):
            checkpoint.load(tmp_path)


def change_away(manifest, parents, last):
    for name in parents:
        manifest = manifest[name]
    del manifest[last]


def test_a_tree_that_its_file_does_not_have(tmp_path):
    folder = checkpoint.save(tmp_path, 1, {"p": {"w": X}})
    forged(folder, lambda m: m["files"]["p"].update(tree={"dict": {"w": "leaf", "v": "leaf"}}))
    with pytest.raises(ValueError, match=r"p.safetensors: lacks the leaf 'v'"):
        checkpoint.load(tmp_path)


def test_a_manifest_that_is_deep_or_no_text(tmp_path):
    folder = checkpoint.save(tmp_path, 1, {"p": X})
    for content in (b"[" * 100_000, b"\xff\xfe", b"[]", b"{}"):
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"manifest.json: (not a readable manifest|format)"):
            checkpoint.load(tmp_path)
