"""Copies and pickles of what wraps something: they work as the original does, or are refused by name."""

import copy
import pickle

import pytest
import torch
from torch import nn

from purelm import random, tree
from purelm.dist import fsdp as sharded
from purelm.dist import tensor_parallel
from purelm.interop import TorchOptimizer, ddp, fsdp, sharded_optimizer
from purelm.kernels.fused import FUSED
from purelm.models import transformer
from purelm.ops import REFERENCE
from purelm.optim import adamw, chain, clip_by_global_norm, schedules
from purelm.train import init_state, make_step
from purelm.transforms import accumulate, cuda_graph, grad, jit, remat, value_and_grad

CFG = transformer.Config(vocab_size=8, context_length=4, d_model=4, n_layers=1, n_heads=2)
PARAMS = transformer.init(random.key(0), CFG)


def pickled(x):
    return pickle.loads(pickle.dumps(x))


EVERY = pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])


@EVERY
def test_a_donated_tensor_says_that_it_was_given_away(copied):
    w = torch.ones(3)
    jit(lambda x: x * 2, donate=0, backend="eager")(w)
    with pytest.raises(RuntimeError, match="this tensor was donated to jit"):
        copied(w)


LAYOUT = tensor_parallel.Layout(CFG.vocab_size)


@EVERY
@pytest.mark.parametrize(
    "value",
    [CFG, REFERENCE, FUSED, LAYOUT, sharded.plan(PARAMS), tree.structure(PARAMS), random.key(3)],
    ids=["config", "reference", "fused", "tensor_parallel", "fsdp", "structure", "key"],
)
def test_values_are_equal_to_their_copies(copied, value):
    """Oracle: ==, and for a plan what it does."""
    other = copied(value)
    if isinstance(value, sharded.Plan):
        assert tree.leaves(other.shard(PARAMS))[0].equal(tree.leaves(value.shard(PARAMS))[0])
    else:
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value


def loss(params):
    return (params["w"] ** 2).sum()


def loss_of_batch(params, batch):
    return loss(params)


WRAPPERS = {
    "value_and_grad": value_and_grad(loss),
    "grad": grad(loss),
    "jit": jit(loss, backend="eager"),
    "cuda_graph": cuda_graph(loss),
    "remat": remat(loss),
    "accumulate": accumulate(loss_of_batch, 1),
    "step": make_step(lambda params, batch: (loss(params), {}), adamw(), schedules.constant(1e-3)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_functions_are_their_own_copies_and_are_not_pickled(name):
    """Python's rule for functions. A wrapper has the name of what it wraps, and must not come back as that."""
    wrapper = WRAPPERS[name]
    assert copy.copy(wrapper) == wrapper and copy.deepcopy(wrapper) == wrapper
    with pytest.raises((pickle.PicklingError, AttributeError), match=r"(?i)can't (pickle|get) .*(loss|local)"):
        pickle.dumps(wrapper)


def test_states_come_back():
    optimizer = chain(clip_by_global_norm(1.0), adamw())
    state = init_state(PARAMS, optimizer)
    for copied in (copy.deepcopy, pickled):
        other = copied(state)
        assert type(other) is type(state) and tree.structure(other) == tree.structure(state)
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(other), tree.leaves(state), strict=True))


def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))


@pytest.mark.parametrize("make", [ddp, fsdp])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_modules_have_the_gradients_of_their_copies(make, copied):
    """Oracle: the original; a copy shares no gradient with it."""
    original = make(module())
    other = copied(original)
    for model in (other, original):
        model(torch.ones(1, 3)).square().sum().backward()
        model.finish_gradient_synchronization()
        if model is other:
            assert all(p.grad is None for p in original.parameters())
    for a, b in zip(other.parameters(), original.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad) and a is not b


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
@pytest.mark.parametrize("kind", ["TorchOptimizer", "sharded_optimizer"])
def test_optimizers_step_as_their_copies_do(kind, copied):
    """Oracle: the original's own step. torch.optim's copies leave a subclass's attributes behind."""
    model = module()
    if kind == "TorchOptimizer":
        original = TorchOptimizer(model.named_parameters(), adamw(), lr=0.1)
    else:
        original = sharded_optimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
    model(torch.ones(1, 3)).square().sum().backward()
    original.step()
    other = copied(original)
    results = []
    for optimizer in (other, original):
        before = [p.detach().clone() for p in model.parameters()]
        for p, g in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True):
            p.grad = g.grad.clone()
        optimizer.step()
        results.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])
        if copied is copy.copy:  # the same parameters, of which each has its own idea of the state
            for p, x in zip(model.parameters(), before, strict=True):
                p.data.copy_(x)
            break
    if len(results) == 2:
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    else:
        assert not torch.equal(results[0][0], before[0])
