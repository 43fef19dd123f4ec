"""Wrappers of blocks are made once. Oracles: counts of calls, dynamo's own count of graphs, the unwrapped model."""

import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch

from purelm import random
from purelm.models import transformer
from purelm.models.regional import MOST, Block, made_once
from purelm.ops import REFERENCE
from purelm.transforms import jit, remat, value_and_grad

CFG = transformer.Config(vocab_size=11, context_length=8, d_model=8, n_layers=3, n_heads=2, window=(4, None))
TOKENS = torch.arange(12).view(2, 6) % 11
BATCH = {"tokens": TOKENS, "targets": TOKENS}


def params_of(cfg=CFG):
    return transformer.init(random.key(0), cfg)


def test_a_wrapper_is_made_once_for_each_kind_of_block():
    """Two kinds here: with a window and without."""
    made = []

    def wrap(f):
        made.append(f)
        return f

    for _ in range(3):
        transformer.loss(params_of(), BATCH, replace(CFG), wrap_block=wrap)  # another object, an equal configuration
    assert len(made) == 2 and {f.window for f in made} == {CFG.window_of(i) for i in range(3)}
    doubled = REFERENCE._replace(silu=lambda x: 2 * x)
    transformer.loss(params_of(), BATCH, CFG, ops=doubled, wrap_block=wrap)
    assert len(made) == 4 and made[-1].ops is doubled
    other = []
    transformer.loss(params_of(), BATCH, CFG, wrap_block=lambda f: other.append(f) or f)
    assert len(other) == 2


def test_block_is_the_block():
    from purelm.models.layers import attend_all, block, context

    params, x = params_of()["layers"][0], torch.linspace(-1, 1, 96).view(2, 6, 8)
    ctx = context(torch.arange(6), None, CFG, length=6, dtype=x.dtype)
    for window in (None, 2):
        expected = block(params, x, ctx, cfg=CFG, ops=REFERENCE, attend=attend_all(CFG, REFERENCE, window))
        assert torch.equal(Block(CFG, REFERENCE, window)(params, x, ctx), expected)


def test_equal_blocks_hash_alike_and_so_does_one_without_fields():
    """Torch 2.11's dynamo hashes a block whose __init__ has not run; equality is the dataclass's."""
    one, other = Block(CFG, REFERENCE, 2), Block(replace(CFG), REFERENCE, 2)
    assert one == other and hash(one) == hash(other) and one != Block(CFG, REFERENCE, None)
    assert hash(Block.__new__(Block)) == hash(Block.__new__(Block))


def test_what_is_kept_goes_with_its_maker():
    class Result:
        pass

    def maker():
        pass

    result = weakref.ref(made_once(maker, 1, Result))
    assert result() is made_once(maker, 1, Result)
    del maker
    gc.collect()
    assert result() is None


def test_the_oldest_goes_when_there_are_too_many():
    def maker():
        pass

    first = made_once(maker, 0, object)
    for i in range(1, MOST):
        made_once(maker, i, object)
    assert made_once(maker, 0, object) is first  # used again: now the newest
    second = made_once(maker, 1, object)
    made_once(maker, MOST, object)
    assert made_once(maker, 0, object) is first and made_once(maker, 1, object) is second
    kept = made_once(maker, 2, object)
    assert made_once(maker, 2, object) is kept


class Unhashable:
    __hash__ = None

    def __call__(self, f):
        return f


def test_makers_that_cannot_be_looked_up():
    for maker, key in ((Unhashable(), 0), (Unhashable, ([],))):
        first = made_once(maker, key, object)
        assert made_once(maker, key, object) is not first
    value, _ = transformer.loss(params_of(), BATCH, CFG, wrap_block=Unhashable())
    assert torch.equal(value, transformer.loss(params_of(), BATCH, CFG)[0])


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # asked by dynamo
@pytest.mark.parametrize(
    "around",
    [
        partial(jit, backend="aot_eager"),
        lambda f: jit(remat(f), backend="aot_eager"),
        partial(torch.compile, backend="aot_eager"),
        pytest.param(jit, marks=pytest.mark.slow),  # what inductor makes of a block, of either kind
    ],
)
def test_blocks_are_compiled_once(around):
    """Three evaluations of loss and gradients: as many graphs as the first one made, and the values of no wrapper."""
    expected, grads = value_and_grad(lambda p: transformer.loss(p, BATCH, CFG)[0])(params_of())
    graphs = []
    for _ in range(3):
        value, found = value_and_grad(lambda p: transformer.loss(p, BATCH, CFG, wrap_block=around)[0])(params_of())
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["layers"][0], grads["layers"][0], rtol=1e-4, atol=1e-6)
    assert graphs[0] == graphs[1] == graphs[2]
