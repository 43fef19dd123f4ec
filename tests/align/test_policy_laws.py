"""Ratios, regions, weights, divergences and aggregates under torch.func and compile. Oracles: loops, torch.autograd."""

from functools import partial

import pytest
import torch

from purelm.align import aggregation, divergences, ratios, weights
from purelm.testing import check_op
from tests.align.policy_cases import CASES, OF_BATCH, T, batch, composed, poisoned

# No slope and no second derivatives: a stop-gradient is no derivative of the value.
LAWS = ("pure", "modes", "upstream", "func_grad", "vmap", "per_sample", "jvp", "jacrev", "checkpoint", "strides")
AGGREGATES = {
    "sequence_mean": aggregation.sequence_mean,
    "dropped": partial(aggregation.sequence_mean, count_empty=False),
    "token_mean": aggregation.token_mean,
    "group_token_mean": partial(aggregation.group_token_mean, group_size=2),
    "constant": partial(aggregation.constant, length=20),
    "sequence_sum": aggregation.sequence_sum,
    "length_weighted": aggregation.length_weighted,
    "sum_norm": partial(aggregation.sum_norm, length=20),
}
DIVERGENCES = [getattr(divergences, name) for name in divergences.__all__]
RATIOS = [getattr(ratios, name) for name in ratios.__all__ if name != "Ratio"]
WEIGHTS = [
    *(getattr(weights, n) for n in weights.__all__ if n not in {"Weight", "product", "off_policy_sequence_mask"}),
    partial(weights.product, of=(weights.truncated, weights.veto, weights.masked)),
]


def name_of(f):
    return getattr(f, "__name__", "product")


@pytest.mark.parametrize("name", CASES)
def test_regions(name):
    lp, lo, adv, mask = batch(1)
    check_op(lambda lp: composed(name)(lp, lo, adv, mask), (lp,), laws=LAWS)


@pytest.mark.parametrize("ratio", RATIOS)
def test_ratios(ratio):
    lp, lo, _, mask = batch(1)
    check_op(lambda lp: ratio(lp, lo, mask)[0], (lp,), laws=LAWS)


@pytest.mark.parametrize("estimate", DIVERGENCES)
def test_divergences(estimate):
    lp, lo, _, mask = batch(1)
    check_op(lambda lp: estimate(lp, lo, mask), (lp,), laws=LAWS)


@pytest.mark.parametrize("name", AGGREGATES)
def test_aggregates(name):
    """Linear in the loss: all laws."""
    lp, _, _, mask = batch(1)
    laws = (*LAWS, "slope", "double_backward", "hessian_product")
    check_op(lambda loss: AGGREGATES[name](loss.sin(), mask), (lp,), laws=laws)


@pytest.mark.compile
def test_compiled():
    """All regions, each with its ratio, metrics and an aggregate, as one graph: a program's compiled step has one."""
    lp, lo, adv, mask = batch(1)

    def losses(lp):
        found = []
        for ratio, region, _ in CASES.values():
            value, aux = region(lp, ratio(lp, lo, mask)[0], adv, mask)
            found.append(aggregation.token_mean(value, mask) + 0 * sum(aux.values()))
        return torch.stack(found)

    check_op(losses, (lp,), laws=["compile"])


def stacked(n=3):
    """n batches, with nan where masked."""
    batches = [batch(seed, per_token=True) for seed in range(n)]
    rows = [(*(poisoned(x, b.mask) for x in b[:3]), b.mask) for b in batches]
    return [torch.stack(x) for x in zip(*rows, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_vmap_of_all_arguments_and_of_gradients(name):
    """Masks, advantages and log-probabilities batched at once; vmap(grad): a gradient for each batch."""
    data = stacked()
    f = lambda *x: composed(name)(*x).sum()  # noqa: E731
    grads, values = [], []
    for lp, lo, adv, mask in zip(*data, strict=True):
        values.append(f(lp.requires_grad_(), lo, adv, mask))
        grads += torch.autograd.grad(values[-1], lp)
    torch.testing.assert_close(torch.vmap(torch.func.grad(f))(*data), torch.stack(grads))
    torch.testing.assert_close(torch.vmap(f)(*data), torch.stack(values))


@pytest.mark.parametrize("name", [name for name in CASES if name not in OF_BATCH])
def test_a_sequence_is_an_example(name):
    """vmap over sequences, arguments of shape (T,): the batch's own rows. Per-sequence gradients need this."""
    lp, lo, adv, mask = batch(2)
    per_row = torch.vmap(composed(name))(lp, lo, adv[:, :1], mask)
    assert per_row.shape[-1] == T
    torch.testing.assert_close(per_row, composed(name)(lp, lo, adv, mask))


@pytest.mark.parametrize("weight", WEIGHTS, ids=name_of)
def test_weights_under_vmap_and_grad(weight):
    """Batched as in a loop; no gradient at all, in reverse and in forward mode."""
    lp, lo, _, mask = stacked()
    f = lambda *x: weight(*x)[0]  # noqa: E731
    looped = torch.stack([f(*x) for x in zip(lp, lo, mask, strict=True)])
    torch.testing.assert_close(torch.vmap(f)(lp, lo, mask), looped)
    tangent = torch.func.jvp(lambda a, b: f(a, b, mask[0]), (lp[0], lo[0]), (torch.ones_like(lp[0]),) * 2)[1]
    assert not tangent.any()
    a, b = lp[0].clone().requires_grad_(), lo[0].clone().requires_grad_()
    value, aux = weight(a, b, mask[0])
    assert not value.requires_grad and not any(x.requires_grad for x in aux.values())


@pytest.mark.parametrize("name", AGGREGATES)
def test_aggregates_under_vmap(name):
    lp, _, _, mask = stacked()
    f = AGGREGATES[name]
    torch.testing.assert_close(torch.vmap(f)(lp, mask), torch.stack([f(*x) for x in zip(lp, mask, strict=True)]))
