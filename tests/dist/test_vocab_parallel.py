"""Losses over a vocabulary that is divided over Gloo processes.

Oracle: the op of the same name in purelm.ops, in one process and with all rows.
"""

import inspect

import pytest
import torch

from purelm import random
from purelm.dist import conjugates, vocab_parallel
from purelm.dist.tensor_parallel import part_of
from purelm.dist.world import rank_of, size_of
from purelm.ops.linear_cross_entropy import linear_cross_entropy
from purelm.ops.log_probs import log_probs
from tests.dist.processes import run


def on_rank_cross_entropy(options):
    """Gradients of a weighted sum of tokens, and of weights; more tokens than chunks divide; large logits.

    Oracle: `purelm.ops.linear_cross_entropy` of the whole vocabulary, in one process.
    """
    N, D, V = 11, 6, 7
    hidden, whole = (30 * random.normal(random.key(i), s, dtype=torch.float64) for i, s in enumerate([(N, D), (V, D)]))
    targets = random.randint(random.key(3), (N,), 0, V)
    targets[:3] = options.get("ignore_index", targets[:3])
    weights = random.uniform(random.key(4), (N,), dtype=torch.float64)
    weights[2:5] = 0.0
    part = part_of(whole, rank_of(None), size_of(None))
    again = [x.clone().requires_grad_() for x in (hidden, whole, weights)]
    mine = [x.clone().requires_grad_() for x in (hidden, part, weights)]
    a, nll_a = linear_cross_entropy(*again[:2], targets, weights=again[2], **options)
    b, nll_b = vocab_parallel.linear_cross_entropy(
        conjugates.enter(mine[0]), mine[1], targets, V, weights=mine[2], **options
    )
    assert nll_b.requires_grad == nll_a.requires_grad  # by the weights alone
    torch.testing.assert_close((b, nll_b), (a, nll_a), rtol=1e-12, atol=0)
    dy = torch.cos(torch.arange(a.numel(), dtype=a.dtype)).view(a.shape)
    da, db = torch.autograd.grad(a, again, dy), torch.autograd.grad(b, mine, dy)
    expected = (da[0], part_of(da[1], rank_of(None), size_of(None)), da[2])
    torch.testing.assert_close(db, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none", "chunk": 4},
        {"chunk": 4, "softcap": 5.0, "z_loss": 0.3, "denominator": 3.5},
        {"reduction": "none", "softcap": 50.0, "z_loss": 1e-3},
        {"reduction": "mean"},
        {"reduction": "mean", "ignore_index": -100, "chunk": 4, "softcap": 5.0, "z_loss": 0.3},
        {"reduction": "none", "ignore_index": 6},
        {"reduction": "sum", "ignore_index": -100, "denominator": 3.5},
    ],
    ids=str,
)
def test_cross_entropy_over_a_divided_vocabulary(options):
    run(on_rank_cross_entropy, options)


def on_rank_cross_entropy_mean(dtype):
    """Without weights: the mean over all tokens, over those that are not ignored, and over none at all."""
    V = 7
    hidden, whole = (random.normal(random.key(i), s, dtype=dtype) for i, s in enumerate([(2, 5, 6), (V, 6)]))
    part = part_of(whole, rank_of(None), size_of(None))
    some = random.randint(random.key(3), (2, 5), 0, V)
    some[0, 1:4] = -100
    for targets, ignore_index in [(some.abs() % V, None), (some, -100), (torch.full_like(some, -100), -100)]:
        mine, again = (
            [x.clone().requires_grad_() for x in xs] for xs in ((hidden, part), (hidden, whole))
        )
        a, nll_a = linear_cross_entropy(*again, targets, reduction="mean", ignore_index=ignore_index, z_loss=0.1)
        b, nll_b = vocab_parallel.linear_cross_entropy(
            conjugates.enter(mine[0]), mine[1], targets, V, reduction="mean", ignore_index=ignore_index, z_loss=0.1
        )
        torch.testing.assert_close((b, nll_b), (a, nll_a))
        da, db = torch.autograd.grad(a, again), torch.autograd.grad(b, mine)
        part_of_da = part_of(da[1], rank_of(None), size_of(None))
        torch.testing.assert_close(db, (da[0], part_of_da), rtol=1e-5, atol=1e-6)
    assert b == 0 and not any(d.any() for d in db)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mean_cross_entropy_over_a_divided_vocabulary(dtype):
    run(on_rank_cross_entropy_mean, dtype)


def on_rank_cross_entropy_refused():
    """The reference refuses the same arguments; a bad target raises on both ranks, so neither is left waiting."""
    hidden, part = torch.zeros(3, 2), torch.zeros(4, 2)
    for targets, options, message in [
        ([1, 7, 2], {"ignore_index": -100}, "targets must be in 0..6 where weights are not 0, got 7"),
        ([1, -100, 2], {"reduction": "mean"}, "targets must be in 0..6 where weights are not 0, got -100"),
        ([1, 2, 3], {"reduction": "mean", "denominator": 3.0}, "denominator must be None with reduction"),
        ([1, 2, 3], {"reduction": "max"}, 'reduction must be "none", "sum" or "mean", got \'max\''),
    ]:
        with pytest.raises(ValueError, match=message):
            vocab_parallel.linear_cross_entropy(hidden, part, torch.tensor(targets), 7, **options)
        with pytest.raises((ValueError, RuntimeError)):
            linear_cross_entropy(hidden, torch.zeros(7, 2), torch.tensor(targets), **options)


def test_cross_entropy_refused():
    run(on_rank_cross_entropy_refused)


def test_vocab_parallel_has_the_arguments_of_the_reference():
    """So that it can stand for the op in any loss. Oracle: the reference's signature."""
    own, reference = (
        {name: p.default for name, p in inspect.signature(f).parameters.items() if p.kind is p.KEYWORD_ONLY}
        for f in (vocab_parallel.linear_cross_entropy, linear_cross_entropy)
    )
    assert own == reference


def on_rank_log_probs(options):
    """The same two functions of each token as in one process, and gradients of both."""
    N, D, V = 11, 6, 7
    hidden, whole = (random.normal(random.key(i), s, dtype=torch.float64) for i, s in enumerate([(N, D), (V, D)]))
    targets = random.randint(random.key(3), (N,), 0, V)
    targets[2] = -1
    part = part_of(whole, rank_of(None), size_of(None))
    again, mine = ([x.clone().requires_grad_() for x in xs] for xs in ((hidden, whole), (hidden, part)))
    a = log_probs(*again, targets, ignore_index=-1, **{k: x for k, x in options.items() if k != "chunk"})
    b = vocab_parallel.log_probs(conjugates.enter(mine[0]), mine[1], targets, V, ignore_index=-1, **options)
    torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-14)
    dy = [torch.cos(torch.arange(N, dtype=torch.float64) + i) for i in range(2)]
    da, db = torch.autograd.grad(a, again, dy), torch.autograd.grad(b, mine, dy)
    expected = (da[0], part_of(da[1], rank_of(None), size_of(None)))
    torch.testing.assert_close(db, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"chunk": 4}, {"softcap": 5.0, "temperature": 0.7, "chunk": 100}], ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_log_probs_over_a_divided_vocabulary(options, size):
    run(on_rank_log_probs, options, size=size)
