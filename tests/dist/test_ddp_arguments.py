"""dist.ddp with arguments of many kinds, and errors inside of the loss. Oracle: value_and_grad and accumulate."""

import gc

import pytest
import torch

from purelm import tree
from purelm.dist.ddp import overlapped_value_and_grad
from purelm.dist.world import size_of
from purelm.transforms import accumulate, value_and_grad
from tests.dist.models import assert_close
from tests.dist.processes import run

PARAMS = {"w": torch.arange(1.0, 4.0, dtype=torch.float64), "n": torch.tensor([1, 2, 3]), "s": 2.0, "b": torch.ones(())}


def loss(params, batch, scale=1.0):
    """Additive over rows; an integer tensor, a number, a parameter that is not used, an argument by name."""
    rows = batch["x"] * params["n"] * params["w"]
    return scale * params["s"] * rows.square().sum(), {"rows": len(batch["x"])}


def on_rank_arguments(microbatches):
    batch = {"x": torch.arange(12.0, dtype=torch.float64).view(4, 3)}

    def scaled(params, batch):
        return loss(params, batch, scale=5.0)

    one = value_and_grad(scaled, has_aux=True)
    one = accumulate(one, microbatches) if microbatches > 1 else one
    both = overlapped_value_and_grad(loss, has_aux=True, microbatches=microbatches, op="sum", bucket_bytes=1)
    (value, aux), grads = one(PARAMS, batch)
    assert float(value) != 0.0 and aux == {"rows": 4}
    for _ in range(2):  # the second time by buckets
        (mine, my_aux), found = both(PARAMS, batch, scale=5.0)
        assert torch.equal(mine, value) and my_aux == aux
        assert found["n"] is None and found["s"] is None
        assert_close(found, tree.map(lambda g: size_of(None) * g, grads))


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_leaves_that_are_no_tensors_and_arguments_by_name(microbatches, size):
    run(on_rank_arguments, microbatches, size=size) if size > 1 else on_rank_arguments(microbatches)


def on_rank_errors(stage):
    """Tensors that are alive after each of some evaluations that fail, and the next good one."""
    params = {"w": torch.ones(5, dtype=torch.float64), "v": torch.ones(3, dtype=torch.float64)}
    fails = False

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            if fails:
                raise KeyError("in backward")
            return g

    def f(params):
        if fails and stage == "forward":
            raise KeyError("in forward")
        return (params["w"].sum() * Fails.apply(params["v"]).sum()).square()

    both = overlapped_value_and_grad(f, bucket_bytes=1, op="sum")
    expected = both(params)
    both(params)
    alive = []
    for _ in range(4):
        fails = True
        with pytest.raises(KeyError):
            both(params)
        fails = False
        gc.collect()
        alive.append(sum(isinstance(x, torch.Tensor) for x in gc.get_objects()))
    assert len(set(alive[1:])) == 1, alive
    assert_close(both(params)[1], expected[1])


def test_an_error_in_forward_leaves_nothing():
    run(on_rank_errors, "forward")


def test_an_error_in_backward_leaves_nothing():
    run(on_rank_errors, "backward")
