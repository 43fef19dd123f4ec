"""Subtrees of a checkpoint, and loading in another dtype. Oracle: that part of what was saved, and tree.cast."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import checkpoint, tree
from purelm.checkpoint.manifest import below, leaf_paths, rebuild, skeleton
from purelm.dist import checkpoint as dist_checkpoint


class State(NamedTuple):
    step: torch.Tensor
    m: dict


def make():
    g = torch.Generator().manual_seed(0)
    layers = [{"w": torch.randn(3, 2, generator=g), "n": torch.tensor(i)} for i in range(12)]
    params = {
        "layers": layers,
        "none": None,
        "a.b": {"c": torch.ones(1)},
        "a": {"d": torch.ones(2)},
        "ints": {3: torch.ones(2), 30: torch.ones(3)},
    }
    return {"params": params, "opt": (State(torch.tensor(7), {"w": torch.randn(4, generator=g)}), ())}


def save(root, kind):
    trees = make()
    if kind == "one":
        checkpoint.save(root, 5, trees, meta={"seed": 1})
    else:
        dist_checkpoint.save(root, 5, trees, meta={"seed": 1}, like=trees)
    return trees


def same(a, b):
    assert tree.structure(a) == tree.structure(b)
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


KINDS = pytest.mark.parametrize("kind", ["one", "many"])


@KINDS
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_subtrees_and_leaves(tmp_path, kind, dtype):
    trees = save(tmp_path, kind)
    expected = {
        "params.layers.1": trees["params"]["layers"][1],  # not 10 and 11
        "params.layers": trees["params"]["layers"],
        "params.layers.2.w": trees["params"]["layers"][2]["w"],
        "params.a.b": trees["params"]["a.b"],
        "params.a.b.c": trees["params"]["a.b"]["c"],
        "params.a.d": trees["params"]["a"]["d"],
        "params.none": None,
        "params.ints.3": trees["params"]["ints"][3],
        "params.ints": trees["params"]["ints"],
        "opt.0.m": trees["opt"][0].m,
        "params": trees["params"],
    }
    if dtype is not None:
        expected = tree.cast(expected, dtype)
    found, meta = checkpoint.load(tmp_path, only=list(expected), dtype=dtype)
    assert list(found) == list(expected) and meta == {"seed": 1, "step": 5}
    same(found, expected)
    like = {name: tree.map(torch.empty_like, value) for name, value in expected.items()}
    same(checkpoint.load(tmp_path, like=like, dtype=dtype)[0], expected)
    state = {"opt.0": trees["opt"][0]}
    found, _ = checkpoint.load(tmp_path, like=state)
    assert isinstance(found["opt.0"], State)
    same(found, state)


@KINDS
def test_no_other_leaf_is_read(tmp_path, monkeypatch, kind):
    """Oracle: the leaves that are asked of the files."""
    import safetensors

    from purelm.checkpoint import reading, shards

    save(tmp_path, kind)
    asked = []

    class Counted:
        def __init__(self, *args, **kwargs):
            self.file = safetensors.safe_open(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, key):
            asked.append(key)
            return self.file.get_tensor(key)

        def get_slice(self, key):
            asked.append(key.removeprefix("params/"))
            return self.file.get_slice(key)

    monkeypatch.setattr(reading, "safe_open", Counted)
    monkeypatch.setattr(shards, "safe_open", Counted)
    checkpoint.load(tmp_path, only=["params.layers.3"])
    assert sorted(asked) == ["layers.3.n", "layers.3.w"]


@KINDS
def test_what_is_not_there_is_named(tmp_path, kind):
    trees = save(tmp_path, kind)
    cases = {
        "params.layers.12": r"params has no 'layers\.12': layers holds \['0', '1', .*'11'\]",
        "params.layer": r"params has no 'layer': the root holds \['layers', 'none', 'a\.b', 'a', 'ints'\]",
        "params.layers.0.w.x": r"params has no 'layers\.0\.w\.x': layers\.0\.w is a leaf",
        "params.none.x": r"params has no 'none\.x': none is empty",
        "param.layers": r"has no 'param\.layers'; it holds \['opt', 'params'\]",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            checkpoint.load(tmp_path, only=[name])
    wrong = {"params.layers.0": {"w": torch.zeros(3, 3), "n": torch.tensor(0)}}
    with pytest.raises(ValueError, match=r"w is \(3, 2\) torch.float32, the given config needs \(3, 3\)"):
        checkpoint.load(tmp_path, like=wrong)
    with pytest.raises(ValueError, match=r"w is .* torch\.bfloat16, .* needs .* torch\.float32"):
        checkpoint.load(tmp_path, like={"params.layers.0": trees["params"]["layers"][0]}, dtype=torch.bfloat16)
    for dtype in (torch.int64, "bfloat16"):
        with pytest.raises(ValueError, match=f"load: dtype is {dtype!r}; a floating dtype is needed"):
            checkpoint.load(tmp_path, dtype=dtype)


@KINDS
def test_a_damaged_file_is_refused_for_any_of_its_leaves(tmp_path, kind):
    save(tmp_path, kind)
    (path,) = [p for p in (tmp_path / "step-00000005").glob("*.safetensors") if not p.name.startswith("opt")]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="SHA-256 differs"):
        checkpoint.load(tmp_path, only=["params.layers.0"])


names = st.text("abc", min_size=1, max_size=2)
values = st.recursive(
    st.none() | st.integers(0, 9).map(torch.tensor),
    lambda child: st.dictionaries(names, child, max_size=3) | st.lists(child, max_size=3),
    max_leaves=8,
)


@given(values, st.data())
def test_a_skeleton_cut_at_a_path(value, data):
    """Law: rebuilt from the skeleton below a path, the subtree at the path is there; its paths are those below it."""
    leaves = tree.to_flat(value)
    path, at = [], value
    while isinstance(at, dict | list) and at and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        path, at = [*path, str(key)], at[key]
    where = ".".join(path)
    shape = below(skeleton(value), where)
    same(rebuild(shape, leaves, where), at)
    assert sorted(leaf_paths(shape, where)) == sorted(
        p for p in leaves if f"{p}.".startswith(f"{where}." * bool(where))
    )
