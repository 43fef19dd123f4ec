"""purelm's grad inside of torch.func: per-sample gradients, Hessians, gradients of gradients; trees with None in them.

Oracles: torch.func on the list of floating leaves, which has neither None nor integers; a loop over samples; closed
forms. float64, so 1e-12 is rounding.
"""

import pytest
import torch
from torch.func import grad as func_grad
from torch.func import hessian, jacrev, jvp, vjp, vmap

from purelm import random, tree
from purelm.transforms import accumulate, grad, value_and_grad

# torch's own: its tables of forward-mode formulas use what it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


def make(seed=0):
    """(parameters with a missing bias, an integer and an unused leaf; inputs (5, 3); targets (5,))."""
    k1, k2, k3, k4 = random.split(random.key(seed), 4)
    params = {
        "a": {"w": random.normal(k1, (3, 4), torch.float64), "b": None},
        "out": [random.normal(k2, (4,), torch.float64), torch.tensor(3)],
        "unused": torch.ones(2, dtype=torch.float64),
    }
    return params, random.normal(k3, (5, 3), torch.float64), random.normal(k4, (5,), torch.float64)


def loss(params, x, y):
    """A scalar that uses the integer leaf too, of one example or many."""
    w, n = params["out"]
    return ((torch.tanh(x @ params["a"]["w"]) @ w - y) ** 2).sum() * n


def floating(params):
    """(list of floating leaves, the function that puts others in their places)."""
    y, n = tree.partition(lambda path, x: tree.is_floating(x), params)
    leaves, form = tree.flatten(y)
    return leaves, lambda xs: tree.combine(tree.unflatten(form, list(xs)), n)


def close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_per_sample_gradients():
    """Oracle: a loop; of the same trees, None where there is no gradient."""
    params, x, y = make()
    forms = []

    def one(x, y):
        grads = grad(loss)(params, x, y)
        forms.append(tree.structure(grads))
        assert grads["a"]["b"] is None and grads["out"][1] is None
        return tree.leaves(grads)

    rows = vmap(one)(x, y)
    for i in range(5):
        close([r[i] for r in rows], tree.leaves(grad(loss)(params, x[i], y[i])))
    assert forms == [tree.structure(grad(loss)(params, x, y))]


def test_per_sample_gradients_with_parameters_of_each_sample():
    """Oracle: a loop. Parameters are mapped too, and a has_aux carries tensors and what is none."""
    params, x, y = make()
    leaves, put = floating(params)
    many = [torch.stack([leaf + i for i in range(5)]) for leaf in leaves]

    def one(leaves, x, y):
        def f(p):
            value = loss(p, x, y)
            return value, {"twice": 2 * value, "name": "n", "none": None}

        (value, aux), grads = value_and_grad(f, has_aux=True)(put(leaves))
        assert aux["name"] == "n" and aux["none"] is None
        return value, aux["twice"], tree.leaves(grads)

    value, twice, grads = vmap(one)(many, x, y)
    for i in range(5):
        expected, of = value_and_grad(loss)(put([m[i] for m in many]), x[i], y[i])
        close([value[i], twice[i], *(g[i] for g in grads)], [expected, 2 * expected, *tree.leaves(of)])


def test_hessian_vector_product():
    """Oracle: torch.func's own jvp of grad on the list of leaves."""
    params, x, y = make()
    leaves, put = floating(params)
    direction = [torch.randn_like(v) for v in leaves]

    def mine(*xs):
        return tree.leaves(grad(loss)(put(xs), x, y))

    def theirs(*xs):
        return func_grad(lambda xs: loss(put(xs), x, y))(list(xs))

    for a, b in zip(jvp(mine, tuple(leaves), tuple(direction)), jvp(theirs, tuple(leaves), tuple(direction)),
                    strict=True):  # fmt: skip
        close(a, b)
    _, pull = vjp(mine, *leaves)  # reverse over reverse gives the same product
    close(pull(direction), jvp(theirs, tuple(leaves), tuple(direction))[1])


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching")
def test_jacobian_of_the_gradient_is_the_hessian():
    """Oracle: torch.func.hessian."""
    params, x, y = make()
    leaves, put = floating(params)
    mine = jacrev(lambda xs: tree.leaves(grad(loss)(put(xs), x, y)))(leaves)
    theirs = hessian(lambda xs: loss(put(xs), x, y))(leaves)
    for a, b in zip(mine, theirs, strict=True):
        close(a, b)


def test_gradient_through_an_inner_step():
    """Oracle: torch.func alone, and the closed form for one number: (w - 0.1 2 w s)^2, d/ds = -0.4 w^2 (1 - 0.2 s)."""
    params, x, y = make()
    leaves, put = floating(params)

    def after(inner, rate):
        moved = [w - rate * g for w, g in zip(leaves, inner(leaves), strict=True)]
        return loss(put(moved), x, y)

    rate = torch.tensor(0.01, dtype=torch.float64)
    mine = func_grad(lambda r: after(lambda xs: tree.leaves(grad(loss)(put(xs), x, y)), r))(rate)
    theirs = func_grad(lambda r: after(func_grad(lambda xs: loss(put(xs), x, y)), r))(rate)
    close([mine], [theirs])

    w = torch.tensor(3.0, dtype=torch.float64)

    def outer(s):
        return (w - 0.1 * grad(lambda w: s * w**2)(w)) ** 2

    s = torch.tensor(2.0, dtype=torch.float64)
    close([func_grad(outer)(s)], [-0.4 * w**2 * (1 - 0.2 * s)])


def test_inside_another_of_its_own_under_torch_func():
    """Oracle: the third derivative of x^4, 24 x: torch.func outermost, two of ours inside."""
    x = torch.tensor(2.0, dtype=torch.float64)
    third = func_grad(grad(grad(lambda x: x**4)))
    close([third(x)], [24 * x])
    close([vmap(third)(x.repeat(3))], [(24 * x).repeat(3)])
    with pytest.raises(ValueError, match=r"make the outer derivative torch.func.grad's"):
        grad(grad(lambda x: x**4))(x)


def test_the_contract_is_the_same_as_outside():
    """Oracle: the call outside of vmap: zeros where unused, several arguments, a tensor in two places, kwargs."""
    w = torch.tensor([2.0, 5.0], dtype=torch.float64)

    def f(x, p, *, scale):
        return (x * p["a"] * p["b"] ** 2).sum() * scale, "aux"

    def call(x):
        (value, aux), (dp, dx) = value_and_grad(f, argnums=(1, 0), has_aux=True)(x, {"a": w, "b": w, "c": w}, scale=3.0)
        assert aux == "aux"
        return value, dp, dx

    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    rows = vmap(call)(x)
    for i in range(2):
        close(tree.leaves(tree.map(lambda r, i=i: r[i], rows)), tree.leaves(call(x[i])))
    constant = vmap(grad(lambda x: torch.tensor(4.0)))(x)
    assert torch.equal(constant, torch.zeros_like(x))
    whole = vmap(accumulate(value_and_grad(lambda p, b: (p * b).sum()), 2), in_dims=(0, None))(x, x.T)
    close(whole, vmap(value_and_grad(lambda p, b: (p * b).sum()), in_dims=(0, None))(x, x.T))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (value_and_grad(lambda p: p * 2), r"returned shape \(2,\)"),
        (value_and_grad(lambda p: p.sum(), has_aux=True), r"\(value, aux\)"),
        (value_and_grad(lambda p: p.sum(), watch=lambda xs: lambda: xs), "watch must be None inside of a torch.func"),
        (lambda x: grad(lambda p: p.sum())({"n": None}), "no floating tensor"),
    ],
)
def test_errors_inside_of_vmap(call, message):
    with pytest.raises(ValueError, match=message):
        vmap(call)(torch.ones(3, 2))


def test_holes_of_a_partition_are_absent_and_torch_func_does_not_take_them():
    """Oracle: the whole tree's gradient. torch.func itself says NoneType: the reason for leaves in the docs."""
    params, x, y = make()
    trained, fixed = tree.partition(lambda path, x: path.startswith("out") and tree.is_floating(x), params)

    def f(t):
        return loss(tree.combine(t, fixed), x, y)

    grads = grad(f)(trained)
    assert tree.structure(grads) == tree.structure(trained)
    close(tree.leaves(grads), [grad(loss)(params, x, y)["out"][0]])
    with pytest.raises(ValueError, match="NoneType"):
        func_grad(f)(trained)
    leaves, form = tree.flatten(trained)
    close(func_grad(lambda xs: f(tree.unflatten(form, xs)))(leaves), tree.leaves(grads))
