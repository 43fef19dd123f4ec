"""chain, partitioned, labelled, scale_lr, add_weight_decay, clipping. Oracles: the parts by hand, torch.nn.utils."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import tree
from purelm.optim import (
    adam,
    adamw,
    add_weight_decay,
    apply_updates,
    chain,
    clip,
    clip_by_global_norm,
    frozen,
    is_matrix,
    labelled,
    lion,
    partitioned,
    scale_lr,
    sgd,
)
from purelm.optim.combinators import PartitionedState


def model(seed):
    g = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(5, 3, generator=g),
        "layers": [{"w": torch.randn(3, 3, generator=g), "b": torch.randn(3, generator=g)} for _ in range(2)],
    }


def equal(a, b):
    assert tree.structure(a) == tree.structure(b)
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def test_apply_updates_adds():
    """Closed form; rounded once to the parameter's dtype, and None leaves the parameter."""
    params = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([256.0], dtype=torch.bfloat16), "c": torch.ones(1)}
    new = apply_updates(params, {"a": torch.tensor([0.5, -2.0]), "b": torch.tensor([3.0]), "c": None})
    assert new["a"].tolist() == [1.5, 0.0]
    assert new["b"].dtype == torch.bfloat16 and float(new["b"]) == 260.0  # 259 lies nearer to 260 than to 258
    assert new["c"] is params["c"]


def test_chain_is_composition():
    """Oracle: the two updates by hand."""
    params, grads = model(0), model(1)
    a, b = clip_by_global_norm(0.5), adamw()
    optimizer = chain(a, b)
    state = optimizer.init(params)
    updates, new = optimizer.update(grads, state, params, 0.1)
    clipped, _ = a.update(grads, (), params, 0.1)
    expected, expected_state = b.update(clipped, b.init(params), params, 0.1)
    assert equal(updates, expected) and equal(new[1], expected_state) and new[0] == ()
    with pytest.raises(ValueError, match="chain: state has 1 entries, the chain has 2 optimizers"):
        optimizer.update(grads, state[:1], params, 0.1)


def test_empty_chain_returns_the_gradients():
    params, grads = model(0), model(1)
    updates, state = chain().update(grads, chain().init(params), params, 0.1)
    assert equal(updates, grads) and state == ()


LINKS = [lambda: clip_by_global_norm(0.7), lambda: add_weight_decay(0.3), lambda: sgd(0.5), lion]


@given(st.lists(st.sampled_from(LINKS), min_size=3, max_size=3))
def test_chain_is_associative(makers):
    """Law: ((a b) c), (a (b c)) and (a b c) give the same updates, step after step."""
    a, b, c = (m() for m in makers)
    params = model(0)
    forms = [chain(chain(a, b), c), chain(a, chain(b, c)), chain(a, b, c)]
    states = [f.init(params) for f in forms]
    for i in range(2):
        results = [f.update(model(i + 1), s, params, 0.1) for f, s in zip(forms, states, strict=True)]
        states = [s for _, s in results]
        assert equal(results[0][0], results[1][0]) and equal(results[1][0], results[2][0])
        assert [x.tolist() for x in tree.leaves(states[0])] == [x.tolist() for x in tree.leaves(states[1])]


def test_partitioned_equals_its_parts():
    """Oracle: each part alone on its half of the tree, two steps."""
    params = model(0)
    yes, no = sgd(0.9), adamw()
    for predicate in (is_matrix, tree.map(lambda p: p.ndim >= 2, params)):
        optimizer = partitioned(predicate, yes, no)
        state = optimizer.init(params)
        p_yes, p_no = tree.partition(is_matrix, params)
        s_yes, s_no = yes.init(p_yes), no.init(p_no)
        for i in range(2):
            grads = model(i + 1)
            updates, state = optimizer.update(grads, state, params, 0.1)
            g_yes, g_no = tree.partition(is_matrix, grads)
            u_yes, s_yes = yes.update(g_yes, s_yes, p_yes, 0.1)
            u_no, s_no = no.update(g_no, s_no, p_no, 0.1)
            assert equal(updates, tree.combine(u_yes, u_no)) and equal(state, PartitionedState(s_yes, s_no))


def test_partitioned_chooses_by_params():
    """A predicate on values looks at parameters, not at gradients."""
    params, grads = {"a": torch.ones(2), "b": -torch.ones(2)}, {"a": -torch.ones(2), "b": torch.ones(2)}
    optimizer = partitioned(lambda path, p: bool((p > 0).all()), sgd(), lion())
    updates, state = optimizer.update(grads, optimizer.init(params), params, 0.5)
    assert state.yes.m == () and set(tree.paths(state.no)) == {"step", "m.b"}
    assert updates["a"].tolist() == [0.5, 0.5] and updates["b"].tolist() == [-0.5, -0.5]


def test_partitioned_nests():
    """Oracle: three optimizers, each on its leaf."""
    params, grads = model(0), model(1)
    optimizer = partitioned(lambda path, p: path == "embed", sgd(), partitioned(is_matrix, lion(), adam()))
    updates, _ = optimizer.update(grads, optimizer.init(params), params, 0.1)
    for path, part in [("embed", sgd()), ("layers.0.w", lion()), ("layers.1.b", adam())]:
        p, _ = tree.partition(lambda q, x, path=path: q == path, params)
        g, _ = tree.partition(lambda q, x, path=path: q == path, grads)
        expected = tree.leaves(part.update(g, part.init(p), p, 0.1)[0])
        assert torch.equal(dict(zip(tree.paths(updates), tree.leaves(updates), strict=True))[path], expected[0])


def test_partitioned_all_to_one_side():
    """A predicate that is always true is the optimizer itself."""
    params, grads = model(0), model(1)
    one = partitioned(lambda path, p: True, adamw(), sgd())
    expected, _ = adamw().update(grads, adamw().init(params), params, 0.1)
    assert equal(one.update(grads, one.init(params), params, 0.1)[0], expected)


def kind(path, p):
    return "embedding" if path == "embed" else "matrix" if p.ndim >= 2 else "vector"


def test_labelled_equals_nested_partitioned():
    """Oracle: `partitioned` in `partitioned`, two steps, with labels from a function and from a tree."""
    params = model(0)
    parts = {"embedding": sgd(0.9), "matrix": lion(), "vector": adam()}
    nested = partitioned(
        lambda path, p: path == "embed", parts["embedding"], partitioned(is_matrix, parts["matrix"], parts["vector"])
    )
    for label in (kind, tree.map_with_path(kind, params)):
        optimizer = labelled(label, parts)
        state, other = optimizer.init(params), nested.init(params)
        for i in range(2):
            updates, state = optimizer.update(model(i + 1), state, params, 0.1)
            expected, other = nested.update(model(i + 1), other, params, 0.1)
            assert equal(updates, expected)
            assert equal(state.states["embedding"], other.yes) and equal(state.states["vector"], other.no.no)


@given(st.lists(st.sampled_from("abc"), min_size=5, max_size=5))
def test_labelled_updates_each_leaf_by_its_own(names):
    """Law: the update of a leaf depends on its own label alone. Oracle: the optimizer of the label on all leaves."""
    params, grads = model(0), model(1)
    labels = tree.unflatten(tree.structure(params), names)
    parts = {"a": sgd(), "b": lion(), "c": adamw()}
    optimizer = labelled(labels, parts)
    updates, state = optimizer.update(grads, optimizer.init(params), params, 0.1)
    alone = {name: o.update(grads, o.init(params), params, 0.1)[0] for name, o in parts.items()}
    for name, u, *of in zip(names, tree.leaves(updates), *[tree.leaves(alone[name]) for name in "abc"], strict=True):
        assert torch.equal(u, of["abc".index(name)])
    assert all(int(state.states[name].step) == 1 for name in "abc")  # those without a leaf count too


def test_frozen_parameters_are_the_same_tensors():
    """Oracle: identity; and the optimizer of the others alone."""
    params, grads = model(0), model(1)
    optimizer = labelled(lambda path, p: path.split(".")[0], {"embed": frozen(), "layers": adamw()})
    updates, state = optimizer.update(grads, optimizer.init(params), params, 0.1)
    new = apply_updates(params, updates)
    assert new["embed"] is params["embed"] and tree.paths(state.states["embed"]) == []
    alone = {"layers": params["layers"]}
    expected, _ = adamw().update({"layers": grads["layers"]}, adamw().init(alone), alone, 0.1)
    assert equal(updates["layers"], expected["layers"])


def test_labelled_names_what_does_not_fit():
    params = model(0)
    with pytest.raises(ValueError, match=r"the label of 'layers.0.b' is 'vector'; optimizers has \['embedding', 'matr"):
        labelled(kind, {"embedding": sgd(), "matrix": lion()}).init(params)
    with pytest.raises(ValueError, match=r"labelled: optimizers\['a'\] is 0.1 \(float\)"):
        labelled(kind, {"a": 0.1})
    with pytest.raises(ValueError, match="the label 0 is a int"):
        labelled(kind, {0: sgd()})
    with pytest.raises(ValueError, match="structures differ"):
        labelled({"embed": "a"}, {"a": sgd()}).init(params)


@pytest.mark.parametrize("lr", [0.2, torch.tensor(0.2)])
def test_scale_lr(lr):
    """Oracle: the optimizer at the scaled lr."""
    params, grads = model(0), model(1)
    scaled, _ = scale_lr(adamw(), 0.5).update(grads, adamw().init(params), params, lr)
    expected, _ = adamw().update(grads, adamw().init(params), params, lr * 0.5)
    assert equal(scaled, expected)


def test_add_weight_decay():
    """Closed form g + c p where the mask chooses; dtype of the gradient kept, absent gradients stay absent."""
    params = {"w": torch.ones(2, 2), "b": torch.ones(2), "n": torch.ones(2, 2)}
    grads = {"w": torch.full((2, 2), 2.0, dtype=torch.bfloat16), "b": torch.ones(2), "n": None}
    optimizer = add_weight_decay(0.5, is_matrix)
    updates, state = optimizer.update(grads, optimizer.init(params), params, 0.1)
    assert updates["w"].dtype == torch.bfloat16 and torch.equal(updates["w"], torch.full((2, 2), 2.5).bfloat16())
    assert updates["b"] is grads["b"] and updates["n"] is None and state == ()


@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("scale", [1.0, 1e-7])  # the second: where eps = 1e-6 counts
def test_clip_equals_torch(max_norm, scale):
    """Oracle: torch.nn.utils.clip_grad_norm_, norm included; 2 ulp for another order of summation."""
    grads, max_norm = tree.map(lambda g: g * scale, model(1)), max_norm * scale
    leaves = [g.clone().requires_grad_() for g in tree.leaves(grads)]
    for x in leaves:
        x.grad = x.detach().clone()
    expected = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    before = [g.clone() for g in tree.leaves(grads)]
    clipped, norm = clip(grads, max_norm)
    torch.testing.assert_close(norm, expected, rtol=3e-7, atol=0)
    for a, b in zip(tree.leaves(clipped), leaves, strict=True):
        torch.testing.assert_close(a, b.grad, rtol=3e-7, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves(grads), strict=True))
    updates, state = clip_by_global_norm(max_norm).update(grads, (), grads, 0.1)
    assert equal(updates, clipped) and state == ()


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=0, max_size=8),
    st.floats(2.0**-10, 1e3, width=32),
)
def test_clip_laws(values, max_norm):
    """Laws: the norm is at most max_norm, small gradients are unchanged, clipping twice is clipping once."""
    grads = {"a": torch.tensor(values), "b": None}
    once, norm = clip(grads, max_norm)
    again, norm_after = clip(once, max_norm)
    assert float(norm_after) <= max_norm * (1 + 1e-6)
    if float(norm) < max_norm * (1 - 1e-3) - 1e-5:
        assert torch.equal(once["a"], grads["a"])
    # eps = 1e-6 beside the norm keeps the second factor within 1e-6 / max_norm of 1.
    torch.testing.assert_close(again["a"], once["a"], rtol=2e-6 + 2e-6 / max_norm, atol=0)
    assert once["b"] is None


def test_clip_keeps_dtypes_and_shows_bad_gradients():
    """bf16 stays bf16 with an fp32 norm and factor (oracle: clip in fp32); inf and nan are not hidden."""
    narrow = tree.cast(model(1), torch.bfloat16)
    exact, _ = clip(tree.cast(narrow, torch.float32), 1.0)
    assert equal(clip(narrow, 1.0)[0], tree.cast(exact, torch.bfloat16))
    clipped, norm = clip({"a": torch.full((4,), 256.0, dtype=torch.bfloat16)}, 1.0)
    assert clipped["a"].dtype == torch.bfloat16 and norm.dtype == torch.float32 and float(norm) == 512.0
    clipped, norm = clip({"a": torch.tensor([1.0, float("inf")])}, 1.0)
    assert not bool(tree.all_finite(clipped)) and not bool(torch.isfinite(norm))
    clipped, norm = clip({"a": torch.tensor([1.0, float("nan")])}, 1.0)
    assert bool(torch.isnan(clipped["a"]).all())
    with pytest.raises(ValueError, match="max_norm must be in"):
        clip_by_global_norm(-1.0)


def test_mask_and_tree_must_fit():
    params = model(0)
    with pytest.raises(ValueError, match="structures differ"):
        adamw(mask={"embed": True}).update(model(1), adamw().init(params), params, 0.1)
