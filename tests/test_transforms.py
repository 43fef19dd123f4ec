"""Transforms: torch.autograd, torch.func and the plain call as oracles. Here too is the toy problem of their tests."""

import warnings
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import random, tree
from purelm.transforms import accumulate, grad, jit, value_and_grad


class Moments(NamedTuple):
    m: object
    v: object


class State(NamedTuple):
    params: object
    opt: Moments
    step: torch.Tensor


def mlp_params(key, width=8, layers=2, dtype=torch.float64):
    keys = random.split(key, layers)
    return {
        "layers": [{"w": random.normal(k, (width, width), dtype) / width**0.5, "b": torch.zeros(width, dtype=dtype)}
                   for k in keys],
        "out": {"w": torch.full((width,), 0.5, dtype=dtype)},
    }  # fmt: skip


def mlp_loss(params, batch):
    """Sum of weighted squares over the batch's denominator, like the losses of language models."""
    x = batch["x"]
    for layer in params["layers"]:
        x = torch.tanh(x @ layer["w"] + layer["b"])
    error = x @ params["out"]["w"] - batch["y"]
    total = (error**2).sum() / batch["denominator"]
    return total, {"loss": total, "count": torch.tensor(float(len(error)))}


def mlp_batch(key, n=12, width=8, dtype=torch.float64):
    k1, k2 = random.split(key)
    return {
        "x": random.normal(k1, (n, width), dtype),
        "y": random.normal(k2, (n,), dtype),
        "denominator": torch.tensor(float(n), dtype=dtype),
    }


def init_state(params):
    zeros = tree.zeros_like(params)
    return State(params, Moments(zeros, tree.map(torch.clone, zeros)), torch.zeros((), dtype=torch.int64))


def train_step(state, batch):
    """Adam by hand: state of a NamedTuple with dicts, as every train step has."""
    (_, metrics), grads = value_and_grad_of_mlp(state.params, batch)
    step = state.step + 1
    m = tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.opt.m, grads)
    v = tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, state.opt.v, grads)
    params = tree.map(
        lambda p, m, v: p - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8), state.params, m, v
    )
    return State(params, Moments(m, v), step), {**metrics, "norm": tree.global_norm(grads)}


value_and_grad_of_mlp = value_and_grad(mlp_loss, has_aux=True)


def close(a, b, **tolerance):
    assert tree.structure(a) == tree.structure(b)
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def clone(t):
    return tree.map(torch.clone, t)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


# value_and_grad ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 3))
def test_gradients_equal_torch_func(seed, width, layers):
    """Oracle: torch.func.grad_and_value of the same function, in float64."""
    params = mlp_params(random.key(seed), width, layers)
    batch = mlp_batch(random.key(seed + 1), 3, width)
    (value, aux), grads = value_and_grad_of_mlp(params, batch)
    expected, (value_f, aux_f) = torch.func.grad_and_value(mlp_loss, has_aux=True)(params, batch)
    close(grads, expected, rtol=1e-12, atol=1e-14)
    close({"v": value, **aux}, {"v": value_f, **aux_f}, rtol=1e-12, atol=0)
    close(grad(mlp_loss, has_aux=True)(params, batch), (grads, aux), rtol=0, atol=0)


def test_gradcheck():
    """Oracle: finite differences."""
    params, batch = mlp_params(random.key(0), 3), mlp_batch(random.key(1), 4, 3)
    vector, unravel = tree.ravel(params)
    gradient = tree.ravel(grad(lambda p: mlp_loss(p, batch)[0])(params))[0]
    for i in range(len(vector)):
        e = torch.zeros_like(vector)
        e[i] = 1e-6
        slope = (mlp_loss(unravel(vector + e), batch)[0] - mlp_loss(unravel(vector - e), batch)[0]) / 2e-6
        assert abs(slope - gradient[i]) < 1e-8


def test_nothing_is_attached_and_arguments_stay_as_they_are():
    """Own requires_grad and .grad of the arguments untouched; value, aux and gradients have no graph."""
    a, b = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 4.0])
    a.grad = torch.tensor([7.0, 7.0])
    seen = {}

    def f(p, scale):
        seen["leaves"] = p
        return (p["a"] * p["b"]).sum() * scale, {"product": p["a"] * p["b"], "n": 2}

    (value, aux), grads = value_and_grad(f, has_aux=True)({"a": a, "b": b}, scale=2.0)
    assert value.item() == 22.0 and aux["product"].tolist() == [3.0, 8.0] and aux["n"] == 2
    assert grads["a"].tolist() == [6.0, 8.0] and grads["b"].tolist() == [2.0, 4.0]
    assert not any(x.requires_grad for x in (value, aux["product"], grads["a"], grads["b"], b))
    assert a.requires_grad and a.is_leaf and a.grad.tolist() == [7.0, 7.0] and b.grad is None
    assert seen["leaves"]["a"] is not a and seen["leaves"]["a"].data_ptr() == a.data_ptr()


def test_works_without_grad_mode():
    with torch.no_grad():
        value, gradient = value_and_grad(lambda x: (x**2).sum())(torch.tensor([3.0]))
        assert not torch.is_grad_enabled()
    assert value.item() == 9.0 and gradient.item() == 6.0


def test_leaves_without_influence_get_zeros_and_integers_none():
    params = {"used": torch.ones(2), "unused": torch.ones(3, 2), "step": torch.tensor(3), "none": None, "n": 5}
    value, grads = value_and_grad(lambda p: p["used"].sum() * p["n"])(params)
    assert value.item() == 10.0 and grads["used"].tolist() == [5.0, 5.0]
    assert torch.equal(grads["unused"], torch.zeros(3, 2))
    assert grads["step"] is None and grads["none"] is None and grads["n"] is None
    value, grads = value_and_grad(lambda p: torch.tensor(4.0))({"a": torch.ones(2)})
    assert value.item() == 4.0 and grads["a"].tolist() == [0.0, 0.0]


def test_several_arguments():
    """Oracle: products in closed form; the gradients come in the order of argnums."""

    def f(x, y, z):
        return (x * y["y"]).sum() + z.sum() * 3

    args = (torch.tensor([1.0, 2.0]), {"y": torch.tensor([5.0, 6.0])}, torch.tensor([1.0]))
    value, (gz, gx) = value_and_grad(f, argnums=(2, 0))(*args)
    assert value.item() == 20.0 and gz.tolist() == [3.0] and gx.tolist() == [5.0, 6.0]
    _, gy = value_and_grad(f, argnums=1)(*args)
    assert gy["y"].tolist() == [1.0, 2.0]
    _, (only,) = value_and_grad(f, argnums=(1,))(*args)
    assert only["y"].tolist() == [1.0, 2.0]


def test_a_tensor_in_two_places_has_two_gradients():
    """jax's meaning: places are independent arguments. Summing them is the caller's choice."""
    w = torch.tensor([2.0])
    grads = grad(lambda p: (p["a"] * p["b"] ** 2).sum())({"a": w, "b": w})
    assert grads["a"].tolist() == [4.0] and grads["b"].tolist() == [8.0]


def test_gradients_keep_each_leafs_dtype():
    params = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2, dtype=torch.float64)}
    grads = grad(lambda p: (p["a"].double() * p["b"]).sum())(params)
    assert grads["a"].dtype == torch.bfloat16 and grads["b"].dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (value_and_grad(lambda p: p * 2), r"returned shape \(2,\)"),
        (value_and_grad(lambda p: p.sum().long()), "torch.int64"),
        (value_and_grad(lambda p: 3.0), "returned <class 'float'>"),
        (value_and_grad(lambda p: (p.sum(), {})), "returned <class 'tuple'>"),
        (value_and_grad(lambda p: p.sum(), has_aux=True), r"\(value, aux\)"),
        (lambda x: value_and_grad(lambda p: p.sum())(x.long()), "argument 0 has no floating tensor"),
        (lambda x: value_and_grad(lambda p: p.sum())({}), "argument 0 has no floating tensor"),
        (lambda x: value_and_grad(lambda p, q: p.sum(), argnums=(0, 1))(x, x.long()), "argument 1 has no floating"),
        (value_and_grad(lambda p: p.sum(), argnums=1), "but 1 positional"),
        (lambda x: value_and_grad(lambda p: p.sum(), argnums=-1), "argnums is -1"),
        (lambda x: value_and_grad(lambda p: p.sum(), argnums=(0, 0)), r"argnums is \(0, 0\)"),
        (lambda x: value_and_grad(lambda p: p.sum(), argnums=()), r"argnums is \(\)"),
        (lambda x: value_and_grad(lambda p: p.sum())(x.requires_grad_() * 2), "cut off"),
        (grad(lambda x: grad(lambda p: (p**3).sum())(x).sum()), "cut off"),
        (grad(lambda x: grad(lambda p: (p**3).sum())(x * 1).sum()), "cut off"),
    ],
)
def test_value_and_grad_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2))


def test_per_sample_gradients_are_torch_func_on_the_same_loss():
    """Oracle: a loop of value_and_grad over single examples."""
    params, batch = mlp_params(random.key(0)), mlp_batch(random.key(1), 5)

    def one(params, x, y):
        return mlp_loss(params, {"x": x[None], "y": y[None], "denominator": 1.0})[0]

    rows = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(params, batch["x"], batch["y"])
    for i in range(5):
        close(tree.map(lambda g, i=i: g[i], rows), grad(one)(params, batch["x"][i], batch["y"][i]), rtol=1e-12, atol=0)


@pytest.mark.compile
def test_gradient_of_a_compiled_function_and_inside_one():
    """Oracle: eager mode, in float64 (1e-12: inductor orders sums otherwise)."""
    params, batch = mlp_params(random.key(0)), mlp_batch(random.key(1))
    expected = value_and_grad_of_mlp(params, batch)
    close(value_and_grad(torch.compile(mlp_loss), has_aux=True)(params, batch), expected, rtol=1e-12, atol=1e-14)
    close(value_and_grad(jit(mlp_loss), has_aux=True)(params, batch), expected, rtol=1e-12, atol=1e-14)

    @torch.compile
    def outer(params, batch):
        scaled = tree.map(lambda p: p * 1.0, params)
        # Built inside, over a closure of what is being compiled.
        value, grads = value_and_grad(lambda p: mlp_loss(p, batch)[0])(scaled)
        return value + 1, tree.map(lambda g: g * 2, grads)

    value, grads = outer(params, batch)
    close((value, grads), (expected[0][0] + 1, tree.map(lambda g: g * 2, expected[1])), rtol=1e-12, atol=1e-14)


# accumulate ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 50), st.integers(1, 4), st.integers(1, 3))
def test_accumulated_equals_whole_batch(seed, n_microbatches, size):
    """Oracle: the plain call, in float64 to 1e-12: any split gives the full-batch result."""
    params = mlp_params(random.key(seed), 3)
    batch = mlp_batch(random.key(seed + 1), n_microbatches * size, 3)
    expected = value_and_grad_of_mlp(params, batch)
    found = accumulate(value_and_grad_of_mlp, n_microbatches)(params, batch)
    close(found, expected, rtol=1e-12, atol=1e-14)
    plain = accumulate(value_and_grad(lambda p, b: mlp_loss(p, b)[0]), n_microbatches)(params, batch)
    close(plain, (expected[0][0], expected[1]), rtol=1e-12, atol=1e-14)


def test_parts_are_consecutive_and_scalars_whole():
    seen = []
    batch = {"x": torch.arange(6), "y": [torch.arange(12).reshape(6, 2)], "denominator": torch.tensor(6.0)}
    kept = clone(batch)

    def f(params, part):
        seen.append(part)
        return {"n": torch.tensor(len(part["x"])), "none": None}

    assert accumulate(f, 3)(None, batch)["n"].item() == 6
    assert [p["x"].tolist() for p in seen] == [[0, 1], [2, 3], [4, 5]]
    assert seen[1]["y"][0].tolist() == [[4, 5], [6, 7]] and all(p["denominator"] is batch["denominator"] for p in seen)
    assert equal(batch, kept)


def test_results_of_f_are_not_changed():
    """A result that f returns twice, or keeps, is not added into."""
    kept = torch.ones(2)
    total = accumulate(lambda p, b: kept, 4)(None, {"x": torch.zeros(4)})
    assert total.tolist() == [4.0, 4.0] and kept.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("batch", "n", "message"),
    [
        ({"x": torch.zeros(5), "y": torch.zeros(5)}, 2, "{'x': 5, 'y': 5}; .* n_microbatches 2"),
        ({"x": torch.zeros(4), "y": torch.zeros(2)}, 2, "{'x': 4, 'y': 2}"),
        ({"x": torch.tensor(1.0)}, 2, "{}"),
        ({"x": torch.zeros(4)}, 0, "n_microbatches is 0"),
        ({"x": torch.zeros(4)}, 2.0, "n_microbatches is 2.0"),
    ],
)
def test_accumulate_errors(batch, n, message):
    with pytest.raises(ValueError, match=message):
        accumulate(lambda p, b: b["x"].sum(), n)(None, batch)


def test_accumulate_refuses_changing_results():
    with pytest.raises(ValueError, match="differ in structure"):
        accumulate(lambda p, b: {"a": b["x"].sum()} if b["x"][0] else b["x"].sum(), 2)(None, {"x": torch.arange(2)})


def test_transforms_keep_names_and_warn_of_nothing():
    """Wrapped functions are documented as what they wrap."""
    torch.compile(mlp_loss)  # torch's own warnings, on importing its compiler
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value_and_grad(mlp_loss).__doc__ == mlp_loss.__doc__
        assert jit(train_step, donate=0).__name__ == "train_step"


@pytest.mark.parametrize("of", [value_and_grad, grad])
def test_no_gradients_under_inference_mode(of):
    """Oracle: the gradient 2 w. It was zeros there, silently: a step that only decays. no_grad is no obstacle."""
    w = torch.tensor([1.0, 2.0])
    call = of(lambda x: (x**2).sum())
    with torch.inference_mode(), pytest.raises(ValueError, match=r"under torch.inference_mode\(\) there are"):
        call(w)
    with torch.no_grad():
        found = call(w)
    assert torch.equal(found[1] if of is value_and_grad else found, 2 * w)
