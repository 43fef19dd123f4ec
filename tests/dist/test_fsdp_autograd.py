"""dist.fsdp as a piece of ordinary autograd, in uses that a training step does not have. Oracle: one process."""

import gc
import weakref
from functools import partial

import pytest
import torch

from purelm import tree
from purelm.dist import fsdp
from purelm.dist.ddp import with_global_denominator
from purelm.dist.sharding import part_of
from purelm.dist.world import rank_of, size_of
from purelm.models import transformer
from purelm.optim import schedules, sgd
from purelm.train import Precision, init_state, make_step
from purelm.transforms import value_and_grad
from tests.dist.models import CFG, assert_close, batch_of, params_of, sharded_model
from tests.dist.processes import run


def one_process(penalty=0.0):
    batch = batch_of(0, 1)
    batch["denominator"] = batch["weights"].sum()

    def loss(params, batch):
        value, metrics = transformer.loss(params, batch, CFG)
        return value + penalty * sum(x.square().sum() for x in tree.leaves(params) if x.ndim > 1), metrics

    return value_and_grad(loss, has_aux=True)(params_of(), batch)[1]


def on_rank_uses(use):
    """Autograd reads gradients wherever it adds, multiplies, casts or copies them: all have arrived by then."""
    plan = fsdp.plan(params_of())
    local, batch = plan.shard(params_of()), batch_of(rank_of(None), size_of(None))
    loss = sharded_model().loss
    if use == "step":
        precision, strategy = Precision(torch.float64, torch.float32, torch.float64), fsdp.strategy(sharded_model())
        step = make_step(loss, sgd(), schedules.constant(1.0), precision=precision, strategy=strategy)
        state, _ = step(init_state(params_of(), sgd(), precision, strategy), batch)
        found = tree.map(torch.sub, local, state.params)
        # fp32 has 7 digits, of parameters of size 1
        return assert_close(found, plan.shard(one_process()), 1e-4, 1e-6)
    batch = with_global_denominator(batch)
    if use == "scaled":

        def scaled(p, b):
            return plan.bound(loss)(tree.map(lambda x: 2.0 * (0.5 * x), p), b)

        _, found = value_and_grad(scaled, has_aux=True)(local, batch)
    elif use == "penalty":  # of parts: their sum over ranks is that of the whole

        def with_penalty(p, b):
            value, metrics = plan.bound(loss)(p, b)
            return value + 0.5 * sum(x.square().sum() for x in tree.leaves(p) if x.ndim > 1), metrics

        _, found = value_and_grad(with_penalty, has_aux=True)(local, batch)
    else:
        loss = fsdp.evaluate(loss, plan)
        leaves = tree.map(lambda x: x.requires_grad_(), local)
        for _ in range(2 if use == "backward twice" else 1):
            loss(leaves, batch)[0].backward()
        found = tree.map(lambda x: x.grad / (2 if use == "backward twice" else 1), leaves)
    assert_close(found, plan.shard(one_process(0.5 if use == "penalty" else 0.0)), 1e-11)


@pytest.mark.parametrize("use", ["step", "scaled", "penalty", "backward", "backward twice"])
def test_gradients_are_not_read_before_they_arrive(use):
    run(on_rank_uses, use)


MATRIX = torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6)
VECTOR = torch.linspace(0, 1, 6, dtype=torch.float64)


def on_rank_shared(n_announced):
    """tanh(W tanh(W x)), the block of W used twice, in a plan that knows of it n times."""
    params = {"w": MATRIX[:, :5].clone(), "v": VECTOR[:5].clone()}
    plan = fsdp.plan(params)

    def loss(local):
        bound = plan.bind(local, [{"w": local["w"]}] * n_announced)
        block = bound.gathered(lambda p, x: torch.tanh(p["w"] @ x))
        w = {"w": bound.params["w"]}
        return block(w, block(w, bound.params["v"])).sum()

    _, expected = value_and_grad(lambda p: torch.tanh(p["w"] @ torch.tanh(p["w"] @ p["v"])).sum())(params)
    _, found = value_and_grad(loss)(plan.shard(params))
    # Each rank's is the whole loss: sums over ranks are N times the gradient.
    N = size_of(None)
    assert_close(found, plan.shard(tree.map(lambda g: N * g, expected)))


@pytest.mark.parametrize("n_announced", [0, 1, 2, 3])
def test_a_block_that_is_used_twice(n_announced):
    run(on_rank_shared, n_announced)


def on_rank_twice(of):
    """The derivative of a penalty on gradients, of the block's input or of its parameters."""
    params = {"w": MATRIX[:, :5].clone(), "v": VECTOR[:5].clone()}
    plan, x = fsdp.plan(params), VECTOR[1:].clone().requires_grad_()

    def penalty(p, forward):
        p = tree.map(lambda x: x.clone().requires_grad_(), p)
        inputs = [x] if of == "input" else [p[of]]
        (g,) = torch.autograd.grad(forward(p), inputs, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [p["w"], p["v"]])

    def forward(p):
        return (torch.tanh(p["w"] @ x) * p["v"].sin()).sum()

    def sharded(p):
        bound = plan.bind(p, [{"w": p["w"]}])
        h = bound.gathered(lambda q, x: torch.tanh(q["w"] @ x))({"w": bound.params["w"]}, x)
        return (h * bound.params["v"].sin()).sum()

    expected, found = penalty(params, forward), penalty(plan.shard(params), sharded)
    # Losses are summed over ranks, and so are penalties. Each rank's loss is the whole one: a gradient of a parameter
    # is N times that of one process, and its square N^2 times. Of w each rank has a part, of v all of it.
    N, rank = size_of(None), rank_of(None)
    scale = {"input": N, "w": N**2, "v": N**3}[of]
    assert_close(list(found), [part_of(scale * expected[0], rank, N), scale * expected[1]])


@pytest.mark.parametrize("of", ["input", "w", "v"])
def test_gradients_of_gradients(of):
    """Those of activations, and those of sharded and of replicated parameters."""
    run(on_rank_twice, of)


def on_rank_forward_mode(how):
    """jvp along a direction, and the same through torch.func.grad; oracle: one process, whole parameters."""
    params = {"w": MATRIX[:, :5].clone(), "v": VECTOR[:5].clone()}
    direction = tree.map(torch.cos, params)
    plan, x, N = fsdp.plan(params), VECTOR[1:].clone(), size_of(None)

    @fsdp.gathered
    def block(q, x):
        return torch.tanh(q["w"] @ x)

    def loss(p):
        return (block({"w": p["w"]}, x) * p["v"].sin()).sum() + p["w"].sum()  # outside of a block, too

    local, tangent = plan.shard(params), plan.shard(direction)
    bound = plan.bound(loss)
    if how == "jvp":
        value, found = torch.func.jvp(bound, (local,), (tangent,))
        expected_value, expected = torch.func.jvp(loss, (params,), (direction,))
        torch.testing.assert_close(value, expected_value)
        torch.testing.assert_close(found, expected)
    elif how == "grad":
        expected = tree.map(lambda g: N * g, torch.func.grad(loss)(params))
        assert_close(torch.func.grad(bound)(local), plan.shard(expected))
    else:  # a Hessian-vector product: forward over reverse
        _, found = torch.func.jvp(torch.func.grad(bound), (local,), (tangent,))
        _, expected = torch.func.jvp(torch.func.grad(loss), (params,), (direction,))
        assert_close(found, plan.shard(tree.map(lambda h: N * h, expected)))


@pytest.mark.parametrize("how", ["jvp", "grad", "hvp"])
def test_transforms_of_torch_func(how):
    run(on_rank_forward_mode, how)


def on_rank_leaks(how):
    """The graph of an evaluation of which no backward pass is made holds the unit, and it its gathered parameters."""
    params = {"w": MATRIX.clone(), "v": VECTOR.clone()}
    plan = fsdp.plan(params)
    local = tree.map(lambda x: x.requires_grad_(), plan.shard(params))
    bound = plan.bind(local, [{"w": local["w"]}])
    act = {"tanh": torch.tanh, "softmax": partial(torch.softmax, dim=0), "relu": torch.relu}[how]
    out = bound.gathered(lambda p, x: act(p["w"] @ x))({"w": bound.params["w"]}, bound.params["v"])
    unit, schedule = weakref.ref(bound.units[0]), weakref.ref(bound.schedule)
    del bound
    gc.collect()
    assert unit() is not None and schedule() is not None  # the graph has them
    del out
    gc.collect()
    assert unit() is None and schedule() is None


@pytest.mark.parametrize("how", ["tanh", "softmax", "relu"])
def test_a_forward_pass_without_backward_leaves_nothing(how):
    run(on_rank_leaks, how)


def on_rank_kinds(compute):
    """Integers stay whole and as they are; each floating leaf has its own dtype, or `compute`."""
    params = {
        "ids": torch.arange(300, 312).view(4, 3),
        "narrow": MATRIX.float(),
        "wide": MATRIX + 1e-12,  # lost in fp32
        "v": VECTOR,
    }
    plan = fsdp.plan(params, compute=compute)
    seen = {}

    def loss(local):
        bound = plan.bind(local, [local])

        def f(p):
            seen.update(p)
            return sum((x.double() ** 2).sum() for x in tree.leaves(p) if x.is_floating_point())

        return bound.gathered(f)(bound.params)

    _, grads = value_and_grad(loss)(plan.shard(params))
    assert torch.equal(seen["ids"], params["ids"]) and grads["ids"] is None
    for name in ("narrow", "wide"):
        given = params[name].to(compute or params[name].dtype)
        assert seen[name].dtype == given.dtype and torch.equal(seen[name], given)
        expected = part_of(2 * size_of(None) * given.to(params[name].dtype), rank_of(None), size_of(None))
        # bf16 has 8 bits; else sums of two equal numbers are exact
        torch.testing.assert_close(grads[name], expected, rtol=0 if compute is None else 2e-2, atol=0)
    whole = plan.unshard(grads)
    assert whole["ids"] is None and {k: x.shape for k, x in whole.items() if k != "ids"} == {
        k: x.shape for k, x in params.items() if k != "ids"
    }
    torch.testing.assert_close(part_of(whole["wide"], rank_of(None), size_of(None)), grads["wide"], rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_kinds_of_leaves(compute, size):
    run(on_rank_kinds, compute, size=size) if size > 1 else on_rank_kinds(compute)
