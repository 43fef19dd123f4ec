"""Transforms: torch.autograd, torch.func and the plain call as oracles; donation measured and abused."""

import copy
import subprocess
import sys
import warnings
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import random, tree
from purelm.transforms import accumulate, grad, in_stages, jit, remat, save_matmuls, value_and_grad


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


# jit ----------------------------------------------------------------------------------------------------------------


@pytest.mark.compile
def test_a_train_step_equals_eager_and_compiles_once():
    """Oracle: the eager step, in float64 (1e-10: Adam divides by the root of a moment, which magnifies rounding).

    Two graphs: loss with its gradient, and the update. None on steps two and three.
    """
    from torch._dynamo import config
    from torch._dynamo.utils import counters

    state, batch = init_state(mlp_params(random.key(0))), mlp_batch(random.key(1))
    plain = clone(state)
    step = jit(train_step, donate=0)
    counters.clear()
    with config.patch(error_on_recompile=True):
        for _ in range(3):
            state, metrics = step(state, batch)
            plain, expected = train_step(plain, batch)
    close((state, metrics), (plain, expected), rtol=1e-10, atol=1e-12)
    assert type(state) is State and type(metrics) is dict and state.step.item() == 3
    if torch.__version__ >= "2.13":
        assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.compile
def test_donated_storage_receives_the_results():
    """The results lie where the arguments lay, in new tensor objects; the batch is as before."""
    state, batch = init_state(mlp_params(random.key(0))), mlp_batch(random.key(1))
    kept = clone(batch)
    old, places = tree.leaves(state), [x.data_ptr() for x in tree.leaves(state)]
    step = jit(train_step, donate=0)
    new, _ = step(state, batch)
    assert [x.data_ptr() for x in tree.leaves(new)] == places
    assert all(type(x) is torch.Tensor and not x._is_view() for x in tree.leaves(new))
    assert not {id(x) for x in tree.leaves(new)} & {id(x) for x in old}
    assert equal(batch, kept)
    third, _ = step(new, batch)
    assert [x.data_ptr() for x in tree.leaves(third)] == places


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1,
        lambda x: x.shape,
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: x.item(),
        lambda x: x[0],
        torch.sum,
        lambda x: torch.ones(2) * x,
        lambda x: x.data,
        lambda x: x.dtype,
        lambda x: x.clone(),
        len,
        bool,
        lambda x: x.add_(1),
        lambda x: x.untyped_storage(),
        lambda x: tree.map(torch.clone, {"x": x}),
        copy.deepcopy,
        torch.nn.functional.relu,
        lambda x: torch.stack([x]),
        jit(lambda y: y + 1, donate=0, backend="eager"),
    ],
)
@pytest.mark.compile
def test_any_use_of_a_donated_tensor_raises(use):
    x = torch.ones(2)
    jit(lambda x: x * 2, donate=0, backend="eager")(x)
    with pytest.raises(RuntimeError, match=r"this tensor was donated to jit\(<lambda>\)"):
        use(x)
    assert repr(x) == str(x) == f"{x}" == "<donated to jit(<lambda>)>" and "donated" in repr({"x": x})


# Each of these functions returns results that lie in donated memory, are permuted, or are donated tensors themselves.
ALIASING = {
    "swap": lambda s: {"a": s["b"], "b": s["a"]},
    "rotate": lambda s: {"a": s["b"], "b": s["c"], "c": s["a"]},
    "pass on": lambda s: {"a": s["a"], "b": s["b"] + s["a"]},
    "all passed on": dict,
    "transpose": lambda s: {"a": s["a"].T, "b": s["b"].flip(0)},
    "shifted": lambda s: {"a": torch.roll(s["a"], 1, 0), "b": torch.cat([s["b"][1:], s["b"][:1]])},
    "view beside": lambda s: ({"a": s["a"] + 1, "b": s["b"] * 2}, s["a"][0], s["b"].view(-1)),
    "old beside": lambda s: ({"a": s["a"] + 1, "b": s["b"] * 2}, [s["a"], s["b"]]),
    "doubled": lambda s: ({"a": s["a"], "b": s["a"]}, s["a"]),
    "expanded": lambda s: {"a": s["a"][:1].expand(3, 3), "b": s["b"][:, :1].expand(3, 3)},
    "noop views": lambda s: {"a": s["b"].view(3, 3), "b": s["a"].detach()},
    "previous": lambda s: {"a": s["a"] * 2, "b": s["a"].clone()},
    "no change": lambda s: {"a": s["b"] * 1, "b": s["a"][:] + 0},
    "cross": lambda s: {"a": s["a"] + s["b"], "b": s["a"] - s["b"]},
    "product": lambda s: {"a": s["a"] @ s["b"], "b": s["b"] @ s["a"]},
    "metrics first": lambda s: (s["a"].sum(), {"b": s["b"] + 1, "a": s["a"] * s["b"]}),
    "numbers": lambda s: ({"a": s["a"] * 2, "b": s["b"]}, 3, "text", None, [True]),
}


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_results_that_alias_donated_memory_are_right(backend):
    """Oracle: the plain call on copies. One function for all cases, so that inductor compiles once."""
    n = {name: 3 if name == "rotate" else 2 for name in ALIASING}
    start = {
        name: {k: random.normal(random.fold_in(random.key(i), j), (3, 3)) for j, k in enumerate("abc"[: n[name]])}
        for i, name in enumerate(ALIASING)
    }
    kept = clone(start)

    def all_of_them(state):
        return {name: f(state[name]) for name, f in ALIASING.items()}

    expected = all_of_them(kept)
    result = jit(all_of_them, donate=0, backend=backend)(start)
    assert tree.structure(result) == tree.structure(expected)
    for path, x, y in zip(tree.paths(result), tree.leaves(result), tree.leaves(expected), strict=True):
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=path)  # inductor orders sums otherwise
        else:
            assert x == y, path
    # No two results share memory, whatever f did.
    places = [x.untyped_storage().data_ptr() for x in tree.leaves(result) if isinstance(x, torch.Tensor)]
    assert len(set(places)) == len(places)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["swap", "transpose", "view beside", "doubled", "noop views", "previous"])
def test_one_aliasing_case_alone(name):
    """As above, with a graph of its own, which AOTAutograd may treat otherwise (no operation but the copies)."""
    start = {k: random.normal(random.key(ord(k)), (3, 3)) for k in "ab"}
    expected = clone(ALIASING[name](clone(start)))
    result = jit(ALIASING[name], donate=0)(start)
    assert equal(result, expected)


@pytest.mark.compile
def test_several_donated_arguments_and_keywords():
    """Oracle: the plain call; the second positional argument is not donated and stays."""

    def f(a, b, c, *, d):
        return c + b, {"x": a["x"] * d["d"]}

    a, b, c, d = {"x": torch.ones(2)}, torch.full((3,), 5.0), torch.zeros(3), {"d": torch.tensor(4.0)}
    place = c.data_ptr()
    new_c, new_a = jit(f, donate=(2, 0), backend="eager")(a, b, c, d=d)
    assert new_c.tolist() == [5.0] * 3 and new_a["x"].tolist() == [4.0, 4.0] and new_c.data_ptr() == place
    assert b.tolist() == [5.0] * 3 and d["d"].item() == 4.0
    assert "donated" in repr(a["x"]) and "donated" in repr(c)


def raises_and_keeps(error, message, call, *trees):
    kept = clone(trees)
    with pytest.raises(error, match=message):
        call(*trees)
    assert equal(kept, trees)


@pytest.mark.compile
def test_errors_leave_all_arguments_intact():
    def run(f, donate=0):
        return jit(f, donate, backend="eager")

    x, y = torch.ones(2), torch.ones(3)
    unmatched = "match no result.*0.w.1 \\(3,\\) torch.float32$"
    raises_and_keeps(ValueError, unmatched, run(lambda s: {"w": [s["w"][0] + 1, 0.0]}), {"w": [x, y]})
    raises_and_keeps(ValueError, "match no result", run(lambda s: s.bfloat16()), x)
    raises_and_keeps(ValueError, "match no result", run(lambda s: s[:1]), x)
    raises_and_keeps(ValueError, "arguments 0.a and 0.b share memory", run(dict), {"a": x, "b": x})
    raises_and_keeps(ValueError, "arguments 0.a and 0.b share memory", run(dict), {"a": x, "b": x.view(1, 2)})
    raises_and_keeps(ValueError, "arguments 0 and 1 share memory", run(lambda a, b: a + b), x, x)
    raises_and_keeps(ValueError, "arguments 0 and 1.b share memory", run(lambda a, b: a), x, {"b": x[1:]})
    raises_and_keeps(ValueError, "arguments 0 and 1 share memory", run(lambda a, b: b, donate=1), x, x)
    raises_and_keeps(ValueError, "1 positional", run(lambda a: a, donate=1), x)
    raises_and_keeps(ValueError, "requires grad", run(lambda a: a), torch.ones(2, requires_grad=True))
    with pytest.raises(ValueError, match="donate is"):
        jit(lambda a: a, donate=(0, 0))
    with pytest.raises(ValueError, match="donate is"):
        jit(lambda a: a, donate=-1)

    def broken(state):
        if state["w"][0] is not None:
            raise KeyError("mine")

    raises_and_keeps(KeyError, "mine", run(broken), {"w": [x]})


@pytest.mark.compile
def test_parts_of_one_buffer_may_be_donated():
    """Oracle: the plain call; unravel gives views of one vector, which lie side by side."""
    vector, unravel = tree.ravel({"a": torch.ones(2, 2), "b": torch.full((3,), 2.0), "empty": torch.zeros(0)})
    parts = unravel(vector)
    result = jit(lambda t: tree.map(lambda x: x + 1, t), donate=0, backend="eager")(parts)
    assert vector.tolist() == [2.0] * 4 + [3.0] * 3  # the storage was donated, not this tensor
    assert equal(result, unravel(vector)) and result["empty"].shape == (0,)


@pytest.mark.compile
def test_without_donation_jit_is_a_differentiable_compiled_function():
    """Oracle: the eager function and its autograd."""
    f = jit(lambda x, scale: (x**2 * scale).sum())
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    f(x, torch.tensor(3.0)).backward()
    assert x.grad.tolist() == [6.0, 12.0]
    assert f(x, torch.tensor(1.0)).item() == 5.0


@pytest.mark.compile
def test_jit_inside_jit_donates_nothing():
    """jax's rule: the outer compilation owns the buffers."""
    inner = jit(lambda x: x + 1, donate=0)

    def outer(x):
        y = inner(x)
        return x * y

    x = torch.tensor([2.0, 3.0])
    assert jit(outer, backend="eager")(x).tolist() == [6.0, 12.0]
    assert x.tolist() == [2.0, 3.0]


@pytest.mark.compile
def test_functions_given_to_jit_do_not_share_a_cache():
    """Dynamo compiles one code object at most 8 times, then runs it uncompiled: each jit has its own."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    for i in range(12):
        f = jit(lambda x, i=i: x * (i + 2), donate=0, backend=counter, dynamic=None)
        assert f(torch.ones(i + 1)).tolist() == [i + 2.0] * (i + 1)
    assert counter.frame_count == 12


@pytest.mark.compile
def test_calls_deep_inside_a_step_keep_one_last_graph():
    """The gradient may be taken in a helper, over microbatches of a rematerialised loss. Oracle: the plain step."""

    def gradient(params, batch):
        return accumulate(value_and_grad(remat(mlp_loss), has_aux=True), 3)(params, batch)

    def step(state, batch):
        def helper(p):
            (value, metrics), grads = gradient(p, batch)
            return value, metrics, grads

        _, metrics, grads = helper(state["p"])
        return {"p": tree.map(lambda p, g: p - 0.1 * g, state["p"], grads)}, metrics

    params, batch = mlp_params(random.key(0)), mlp_batch(random.key(1))
    (value, metrics), grads = value_and_grad_of_mlp(params, batch)
    expected = tree.map(lambda p, g: p - 0.1 * g, params, grads)
    state, found = jit(step, donate=0)({"p": params}, batch)
    close(state["p"], expected, rtol=1e-12, atol=1e-14)
    close(found, metrics, rtol=1e-12, atol=0)
    assert value.item() == pytest.approx(found["loss"].item(), rel=1e-12)


@pytest.mark.compile
def test_stages_are_compiled_one_by_one():
    """Oracle: the stages called in turn; a stage marked as disabled stays plain Python."""
    seen = []

    def gradients(state, batch):
        return value_and_grad(lambda p: (p * batch).sum())(state)[1]

    @torch.compiler.disable
    def plain(state, grads):
        seen.append(torch.compiler.is_compiling())
        return grads * 2

    def update(state, grads):
        return state - grads, grads.sum()

    f = in_stages(gradients, plain, update)
    x, batch = torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])
    expected = f(x, batch)
    place = x.data_ptr()
    result = jit(f, donate=0, backend="eager")(x, batch)
    assert equal(result, expected) and result[0].data_ptr() == place and "donated" in repr(x)
    assert seen == [False, False]
    assert equal(in_stages(lambda s, b: s + b)(batch, batch), batch * 2)
    with pytest.raises(ValueError, match="at least one"):
        in_stages()


PEAK = """
import resource, sys, torch
from purelm import tree
from purelm.transforms import jit, value_and_grad
torch.set_num_threads(1)
n, width, donate = 12, 1024, bool(int(sys.argv[1]))  # 12 matrices of 4 MiB

def loss(params, x):
    for w in params:
        x = torch.tanh(x @ w)
    return (x * x).sum()

gradient = value_and_grad(loss)

def step(state, x):
    value, grads = gradient(state["p"], x)
    m = tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["m"], grads)
    v = tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, state["v"], grads)
    p = tree.map(lambda p, m, v: p - 0.01 * m / (v.sqrt() + 1e-8), state["p"], m, v)
    return {"p": p, "m": m, "v": v}, value

state = {k: [torch.full((width, width), 1e-3) for _ in range(n)] for k in "pmv"}
x = torch.ones(2, width)
f = jit(step, donate=0 if donate else ())
for _ in range(2):
    state, _ = f(state, x)

def memory(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) * 1024

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # peak := now
before = memory("VmRSS")
state, _ = f(state, x)
print((memory("VmHWM") - before) / tree.n_bytes(state["p"]))
"""


@pytest.mark.compile
def test_one_copy_of_the_state_is_held():
    """Peak resident memory of a step beyond the state that stands before it, in units of the parameters (48 MiB).

    With donation the gradients, 1. Without, the new parameters and two moments as well: 3.5 measured, since gradients
    go while the update is made.
    """
    peaks = []
    for donate in (0, 1):
        out = subprocess.run([sys.executable, "-c", PEAK, str(donate)], capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        peaks.append(float(out.stdout))
    without, with_donation = peaks
    assert without > 3 and with_donation < (1.4 if torch.__version__ >= "2.13" else 4.6), peaks


# remat --------------------------------------------------------------------------------------------------------------


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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value_and_grad(mlp_loss).__doc__ == mlp_loss.__doc__
        assert jit(train_step, donate=0).__name__ == "train_step"
