"""dist.checkpoint: finiteness over ranks, the last finite one, keys that come back, manifests that are not believed.

Oracles: the values; the tree itself; what the format says of each field.
"""

import json

import pytest
import torch

from purelm import checkpoint as one_process
from purelm.dist import checkpoint
from purelm.dist.world import rank_of
from tests.dist.processes import RankError, run

X = torch.arange(6.0).view(3, 2)


def on_rank_saves(root, bad_rank, given):
    part = torch.ones(2, 3)
    if rank_of(None) == bad_rank:
        part[1, 2] = float("inf")
    for step, x in enumerate([torch.ones(2, 3), part, part]):
        tree = {"p": {0: x, 10: x, 2: x}}
        like = {"p": {k: torch.empty(4, 3) for k in (0, 10, 2)}}
        checkpoint.save(root, step, tree, like=like, keep_last=1, finite=given if step else None)
    return one_process.steps(root), one_process.read_manifest(root)["finite"], one_process.latest_finite(root)


@pytest.mark.parametrize(
    ("bad_rank", "given", "expected"),
    [
        (None, None, ([2], True, 2)),
        (0, None, ([0, 2], False, 0)),
        (1, None, ([0, 2], False, 0)),
        (0, True, ([2], True, 2)),
    ],
)
def test_one_rank_that_is_not_finite_is_enough(tmp_path, bad_rank, given, expected):
    """The last finite checkpoint stays, whatever keep_last says; an argument has the last word."""
    assert run(on_rank_saves, tmp_path, bad_rank, given) == [expected] * 2
    found = one_process.load(tmp_path)[0]["p"]
    assert list(found) == [0, 10, 2] and found[10].shape == (4, 3)


def on_rank_refused(root, case):
    trees, more = {"p": {"w": torch.ones(2, 2)}}, {}
    if case == "key":
        trees = {"p": {(1, 2): torch.ones(2, 2)}}
    elif case == "number":
        trees = {"p": {"w": 3}}
    elif case == "meta":
        more = {"meta": {"x": X}}
    checkpoint.save(root, 1, trees, like=trees, **more)


@pytest.mark.parametrize(
    ("case", "message"),
    [("key", "p would not come back as it is: keys"), ("number", "like.p.w is a int"), ("meta", "meta must be JSON")],
)
def test_refused_on_every_rank(tmp_path, case, message):
    with pytest.raises(RankError, match=message) as error:
        run(on_rank_refused, tmp_path, case)
    assert len(error.value.errors) == 2 and not list(tmp_path.iterdir())


PLACES = [
    ("shards", [None, {}, [3], [{}]]),
    ("shards.0.file", [None, "..", "../x", "/etc/passwd"]),
    ("shards.0.bytes", [None, -1, "8"]),
    ("files.p.leaves", [None, []]),
    ("files.p.leaves.w", [None, 3]),
    ("files.p.leaves.w.shape", [None, "3", [3.0, 2], [-1, 2], [True, 2]]),
    ("files.p.leaves.w.dtype", [None, "F31"]),
    ("files.p.leaves.w.shard", [1, -1, "0"]),
    ("files.p.tree", [None, {"dict": {"w": "leaf", "v": "leaf"}}]),
]


@pytest.mark.parametrize(("place", "values"), PLACES, ids=[place for place, _ in PLACES])
def test_manifests_are_not_believed(tmp_path, place, values):
    """Alone is enough: every rank reads the same file. ValueError names the field, and nothing else is opened."""
    trees = {"p": {"w": X}}
    folder = checkpoint.save(tmp_path, 1, trees, like=trees)
    path = folder / "manifest.json"
    before = path.read_text()
    for value in values:
        manifest = json.loads(before)
        *parents, last = [int(name) if name == "0" else name for name in place.split(".")]
        at = manifest
        for name in parents:
            at = at[name]
        at[last] = value
        manifest["sha256"] = one_process.folder._seal(manifest)
        path.write_text(json.dumps(manifest))
        if place == "files.p.tree":  # a tree that is one, but of other leaves
            if value is None:
                assert checkpoint.load(tmp_path, like=trees)[0]["p"]["w"].equal(X)
                continue
            with pytest.raises(ValueError, match="lacks the leaf 'v'"):
                one_process.load(tmp_path)
            continue
        for load in (lambda: checkpoint.load(tmp_path, like=trees), lambda: one_process.load(tmp_path)):
            with pytest.raises(ValueError, match=rf"manifest.json: {place}"):
                load()


def test_leaves_that_files_cannot_hold(tmp_path):
    """More bytes than the files have would be allocated before anything is read."""
    trees = {"p": {"w": X}}
    path = checkpoint.save(tmp_path, 1, trees, like=trees) / "manifest.json"
    for shape, message in (([10**9, 10**6], "its leaves have .* bytes more than its"), ([2, 2], "the manifest says")):
        manifest = json.loads(path.read_text())
        manifest["files"]["p"]["leaves"]["w"]["shape"] = shape
        manifest["sha256"] = one_process.folder._seal(manifest)
        path.write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=message):
            one_process.load(tmp_path)
