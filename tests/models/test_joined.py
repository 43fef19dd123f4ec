"""Projections of one input as one product. Oracles: the same model with weights apart; addresses."""

import pytest
import torch

from purelm import random, tree
from purelm.models import transformer
from purelm.models.joined import join_weights, side_by_side
from purelm.models.linear import apply_linears
from purelm.ops import REFERENCE

CFG = transformer.Config(
    vocab_size=31, context_length=16, d_model=12, n_layers=2, n_heads=3, n_kv_heads=1, biases="qkv"
)


def counted(ops):
    shapes = []

    def linear(x, weight, bias=None):
        shapes.append(tuple(weight.shape))
        return ops.linear(x, weight, bias)

    return ops._replace(linear=linear), shapes


def test_the_same_tree_and_the_same_logits():
    """Values bit for bit; logits to fp64's rounding, since one product may add in another order."""
    params = transformer.init(random.key(0), CFG, dtype=torch.float64)
    params = tree.map(lambda x: x + 0.1, params)  # biases that are not 0
    joined = join_weights(params)
    assert tree.paths(joined) == tree.paths(params)
    for x, y in zip(tree.leaves(joined), tree.leaves(params), strict=True):
        assert torch.equal(x, y)
    tokens = torch.arange(10).reshape(2, 5)
    ops, shapes = counted(REFERENCE)
    model = transformer.make(CFG, ops)
    with torch.no_grad():
        want = model.apply(params, tokens)
        apart = shapes.copy()
        shapes.clear()
        torch.testing.assert_close(model.apply(joined, tokens), want, rtol=1e-12, atol=1e-12)
    width = 12 + 2 * 4
    assert (width, 12) in shapes and (width, 12) not in apart and len(shapes) < len(apart)


def test_gradients_go_to_each_weight():
    """Exact: with gradients recorded, weights are multiplied by one at a time, as if they were apart."""
    params = transformer.init(random.key(0), CFG, dtype=torch.float64)
    batch = {"tokens": torch.arange(10).reshape(2, 5), "targets": torch.arange(1, 11).reshape(2, 5)}
    model = transformer.make(CFG)

    def grads(params):
        leaves = tree.map(lambda x: x.detach().requires_grad_(), params)
        loss, _ = model.loss(leaves, batch)
        return torch.autograd.grad(loss, tree.leaves(leaves))

    for x, y in zip(grads(join_weights(params)), grads(params), strict=True):
        assert torch.equal(x, y)


def test_a_change_of_one_tree_is_not_one_of_the_other():
    params = transformer.init(random.key(0), CFG)
    joined = join_weights(params)
    weight = params["layers"][0]["attn"]["q_proj"]["weight"]
    with torch.no_grad():
        weight.add_(1.0)
    assert not torch.equal(joined["layers"][0]["attn"]["q_proj"]["weight"], weight)


def test_side_by_side():
    """Views in order are one; anything else is none."""
    whole = torch.arange(24.0).reshape(6, 4)
    a, b, c = whole.split([1, 2, 3])
    assert torch.equal(side_by_side([a, b, c]), whole)
    assert side_by_side([a, b, c]).data_ptr() == whole.data_ptr()
    assert torch.equal(side_by_side([b, c]), whole[1:])
    for apart in ([a, c], [b, a], [a, b.clone()], [a, whole[1:3, :2]], [whole.mT, whole.mT], [a, b.double()]):
        assert side_by_side(apart) is None
    assert torch.func.vmap(lambda x: x * (1.0 if side_by_side([a, b]) is None else 0.0))(torch.ones(2)).sum() == 2


def test_weights_that_do_not_go_together_stay_apart():
    """Widths, dtypes, and siblings of which one is missing."""
    a, b = torch.ones(2, 3), torch.ones(2, 4)
    for tree_ in (
        {"w1": {"weight": a}, "w3": {"weight": b}},
        {"w1": {"weight": a}, "w3": {"weight": a.double()}},
        {"w1": {"weight": a}},
        {"w1": a, "w3": a},
    ):
        for x, y in zip(tree.leaves(join_weights(tree_)), tree.leaves(tree_), strict=True):
            assert x is y


@pytest.mark.parametrize("bias", [False, True])
def test_apply_linears(bias):
    """Oracle: x W^T + b of each."""
    x = torch.randn(3, 4, dtype=torch.float64)
    layers = {
        name: {"weight": torch.randn(n, 4, dtype=torch.float64)} | ({"bias": torch.randn(n).double()} if bias else {})
        for name, n in (("w1", 2), ("w3", 5))
    }
    layers = join_weights(layers)
    with torch.no_grad():
        got = apply_linears([layers["w1"], layers["w3"]], x, REFERENCE)
    for y, layer in zip(got, layers.values(), strict=True):
        torch.testing.assert_close(y, x @ layer["weight"].mT + layer.get("bias", 0.0), rtol=1e-12, atol=1e-12)
