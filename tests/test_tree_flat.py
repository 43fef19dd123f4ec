"""Trees stacked, and as flat dicts. Oracles: round trips, torch state_dicts and torch.vmap."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import tree
from purelm.testing.strategies import Pair, trees

names = st.text("abcxyz_", min_size=1, max_size=3)


full_trees = st.recursive(
    st.integers(),
    lambda below: st.dictionaries(names, below, min_size=1, max_size=4) | st.lists(below, min_size=1, max_size=12),
    max_leaves=20,
)


@given(trees(), st.integers(1, 4))
def test_unstack_is_the_inverse_of_stack(t, n):
    """Oracle: the trees themselves; torch.stack leaf by leaf."""
    many = [tree.map(lambda x, i=i: x + i, t) for i in range(n)]
    stacked = tree.stack(many)
    assert tree.structure(stacked) == tree.structure(t)
    for x, *xs in zip(tree.leaves(stacked), *map(tree.leaves, many), strict=True):
        assert torch.equal(x, torch.stack(xs)) and x.dtype == xs[0].dtype
    if tree.leaves(t):
        back = tree.unstack(stacked)
        assert len(back) == n
        for one, other in zip(back, many, strict=True):
            assert tree.structure(one) == tree.structure(other)
            assert all(torch.equal(x, y) for x, y in zip(tree.leaves(one), tree.leaves(other), strict=True))


def test_stacked_models_under_vmap_and_their_gradients():
    """Oracle: each model by itself."""
    models = [{"w": torch.randn(3, 2), "b": [torch.randn(2)]} for _ in range(4)]
    x = torch.randn(5, 3)

    def loss(p):
        return torch.tanh(x @ p["w"] + p["b"][0]).square().sum()

    found = tree.unstack(torch.vmap(torch.func.grad(loss))(tree.stack(models)))
    for p, g in zip(models, found, strict=True):
        for a, b in zip(tree.leaves(g), tree.leaves(torch.func.grad(loss)(p)), strict=True):
            torch.testing.assert_close(a, b)
    views = tree.unstack(stacked := tree.stack(models))
    views[1]["w"].zero_()
    assert not stacked["w"][1].any() and stacked["w"][0].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tree.stack([]), "stack: trees is empty"),
        (lambda: tree.stack([{"a": torch.ones(1)}, {"b": torch.ones(1)}]), "structures differ at the root"),
        (lambda: tree.stack([{"a": torch.ones(1)}, {"a": None}]), r"leaf 'a' of trees\[1\] is of type NoneType"),
        (lambda: tree.stack([{"a": 1}]), r"leaf 'a' of trees\[0\] is of type int"),
        (
            lambda: tree.stack([[torch.ones(2)], [torch.ones(3)]]),
            r"leaf '0' is \(3,\) torch.float32 in trees\[1\], \(2,\)",
        ),
        (lambda: tree.stack([torch.ones(1), torch.ones(1).half()]), "float16 in .*, .*float32 in "),
        (lambda: tree.unstack({"a": None}), "unstack: the tree has no leaves"),
        (lambda: tree.unstack({"a": torch.ones(())}), r"leaf 'a' is a tensor of shape \(\)"),
        (lambda: tree.unstack({"a": 1}), "leaf 'a' is a int"),
        (lambda: tree.unstack([torch.ones(2), torch.ones(3)]), "leaf '1' has a first axis of 3, others of 2"),
    ],
)
def test_stack_and_unstack_name_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(full_trees)
def test_from_flat_is_the_inverse_of_to_flat(t):
    """Law: for dicts and lists that are not empty, without None, with keys that are no numbers and have no dots."""
    flat = tree.to_flat(t)
    assert list(flat) == tree.paths(t) and list(flat.values()) == tree.leaves(t)
    assert tree.from_flat(flat) == t
    assert tree.from_flat(dict(reversed(flat.items()))) == t


@given(st.dictionaries(st.lists(names | st.sampled_from("012"), min_size=1, max_size=4).map(".".join), st.integers()))
def test_to_flat_is_the_inverse_of_from_flat_where_there_is_one(flat):
    """Law: what from_flat takes comes back from to_flat; what it refuses has a gap, or a leaf on the way."""
    try:
        t = tree.from_flat(flat)
    except ValueError as error:
        assert "is missing" in str(error) or "is a leaf" in str(error)
        return
    assert tree.to_flat(t) == flat


def test_flat_trees_are_state_dicts():
    """Oracle: torch's own names."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.LayerNorm(3)))
    t = tree.from_flat(net.state_dict())
    assert [sorted(t[0]), sorted(t[1][0])] == [["bias", "weight"]] * 2
    assert tree.to_flat(t).keys() == net.state_dict().keys()
    assert tree.from_flat({}) == {} and tree.to_flat({}) == {} and tree.from_flat({"": 3}) == 3 == tree.to_flat(3)[""]
    assert tree.to_flat(Pair((1, None), {})) == {"first.0": 1}
    assert tree.from_flat({"a.0": 1, "a.b": 2, "c.01": 3}) == {"a": {"0": 1, "b": 2}, "c": {"01": 3}}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tree.from_flat({"layers.0.w": 1, "layers.2.w": 2}),
            r"'layers\.1' is missing: layers has the .* \[0, 2",
        ),
        (lambda: tree.from_flat({"1": 1, "2000000000000": 1}), "'0' is missing: the root has"),
        (lambda: tree.from_flat({"w": 1, "w.scale": 2}), "'w' is a leaf, and other paths lead through it"),
        (lambda: tree.from_flat({"a..b": 1}), r"the path 'a\.\.b' has an empty name"),
        (lambda: tree.from_flat({"": 1, "a": 1}), "the path '' has an empty name"),
        (lambda: tree.from_flat({3: 1}), "the path 3 is a int"),
        (lambda: tree.to_flat({"a.b": 1, "a": {"b": 2}}), r"two leaves have the path 'a\.b'"),
    ],
)
def test_flat_trees_name_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
