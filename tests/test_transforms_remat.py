"""remat: the plain function as the oracle, saved bytes and operators counted."""

import pytest
import torch

from purelm import random, tree
from purelm.transforms import remat, save_matmuls, value_and_grad
from tests.test_transforms import clone, equal


def saved_bytes(f, *args):
    """Bytes that f keeps for its backward pass, its arguments aside."""
    own = {x.untyped_storage().data_ptr() for x in tree.leaves(args)}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaves = tree.map(lambda x: x.requires_grad_(), clone(args))
    own |= {x.untyped_storage().data_ptr() for x in tree.leaves(leaves)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = f(*leaves)
    return sum(size for place, size in kept.items() if place not in own), out


def deep_block(w, x):
    for _ in range(4):
        x = torch.tanh(x @ w) * 1.1
    return x


def block_args():
    w, x = random.normal(random.key(0), (16, 16), torch.float64), random.normal(random.key(1), (32, 16), torch.float64)
    return w / 4, x


@pytest.mark.parametrize("policy", [None, save_matmuls, lambda op: op == torch.ops.aten.tanh.default])
def test_remat_has_the_same_value_and_gradients(policy):
    """Oracle: the plain function, exactly: the same operations run again."""
    args = block_args()
    f = value_and_grad(lambda w, x: deep_block(w, x).sum(), argnums=(0, 1))
    again = remat(deep_block, policy)
    g = value_and_grad(lambda w, x: again(w, x).sum(), argnums=(0, 1))
    (v1, g1), (v2, g2) = f(*args), g(*args)
    assert torch.equal(v1, v2) and equal(g1, g2)


def test_remat_saves_less():
    """Saved bytes: nothing but the arguments; with a policy the products (32 x 16 doubles each); without, all."""
    args = block_args()
    one = 32 * 16 * 8
    plain, _ = saved_bytes(deep_block, *args)
    assert saved_bytes(remat(deep_block), *args)[0] == 0
    assert plain >= 7 * one
    # Two blocks in a row: the argument of the second is what is kept of the first.
    two = remat(deep_block)
    assert saved_bytes(lambda w, x: two(w, two(w, x)), *args)[0] == one


def test_policy_is_asked_for_each_operator():
    """Oracle: a count of how often tanh and mm run, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[func] = counts.get(func, 0) + 1
            return func(*args, **(kwargs or {}))

    def run(policy):
        counts.clear()
        with Count():
            value_and_grad(lambda w, x: remat(deep_block, policy)(w, x).sum(), argnums=(0, 1))(*block_args())
        return counts[torch.ops.aten.mm.default], counts[torch.ops.aten.tanh.default]

    counts = {}
    backward_products = 8
    assert run(None) == (4 + 4 + backward_products, 4 + 4)
    assert run(save_matmuls) == (4 + backward_products, 4 + 4)
    assert run(lambda op: op == torch.ops.aten.tanh.default)[1] == 4


def test_remat_takes_trees_keywords_and_returns_trees():
    def f(params, x, *, scale):
        return {"y": torch.tanh(x @ params["w"]) * scale, "n": 3}

    params, x = {"w": torch.ones(2, 2)}, torch.ones(1, 2)
    out = remat(f)(params, x, scale=2.0)
    assert torch.equal(out["y"], f(params, x, scale=2.0)["y"]) and out["n"] == 3


def test_remat_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    value_and_grad(lambda w, x: remat(deep_block)(w, x).sum())(*block_args())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.compile
@pytest.mark.parametrize("policy", [None, save_matmuls])
def test_compiled_remat_saves_less(policy):
    """Oracle: eager values; what a compiled graph hands from forward to backward, counted by hooks."""
    args = block_args()

    def stack(wrap):
        block = wrap(deep_block)
        return torch.compile(lambda w, x: block(w, block(w, x)))

    plain, expected = saved_bytes(stack(lambda f: f), *args)
    less, value = saved_bytes(stack(lambda f: remat(f, policy)), *args)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)
    assert less < plain
