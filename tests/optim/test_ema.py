"""Averages of parameters. Oracles: sums written out in fp64, torch.optim.swa_utils, the laws of a mean."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from purelm import tree
from purelm.optim import ema


def values(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(3, 2, generator=g).to(dtype), "frozen": None, "layers": [torch.randn((), generator=g)]}


def averaged(sequence, decays, **options):
    state = ema.init(sequence[0], **options)
    for p, d in zip(sequence[1:], decays, strict=True):
        state = ema.update(state, p, d)
    return state


@given(st.lists(st.floats(0.0, 1.0, exclude_max=True), min_size=1, max_size=5), st.booleans())
def test_equals_the_weighted_mean(decays, debias):
    """Oracle: sum_i w_i p_i / sum_i w_i in fp64, w_i = (1 - d_i) times all later d; p_0 has the rest, or none."""
    sequence = [values(i, torch.float64) for i in range(len(decays) + 1)]
    weights = [0.0 if debias else math.prod(decays)]
    weights += [(1 - d) * math.prod(decays[i + 1 :]) for i, d in enumerate(decays)]
    state = averaged(sequence, decays, debias=debias)
    found = ema.value(state)["w"]
    expected = sum(w * p["w"] for w, p in zip(weights, sequence, strict=True)) / sum(weights)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert int(state.step) == len(decays)
    if not debias:
        assert float(state.weight) == 1.0 and torch.equal(found, state.average["w"])


def test_equals_torch():
    """Oracle: torch.optim.swa_utils, whose first call copies the parameters; to rounding of fp32."""
    model = torch.nn.Linear(3, 2)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)
    ours = ema.init(dict(model.named_parameters()))
    for i in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.sin(torch.arange(p.numel()).view_as(p) + i)
            theirs.update_parameters(model)
            ours = ema.update(ours, dict(model.named_parameters()), 0.9)
    for path, x in ema.value(ours).items():
        torch.testing.assert_close(x, dict(theirs.module.named_parameters())[path].detach(), rtol=1e-6, atol=1e-7)


def test_debiased_is_adams_correction():
    """Closed form 1 - d^t; constant parameters are their own average from the first update on."""
    p = {"w": torch.full((2,), 3.0)}
    state = ema.init(p, debias=True)
    assert bool(ema.value(state)["w"].isnan().all())
    for t in range(1, 6):
        state = ema.update(state, p, 0.9)
        assert float(state.weight) == pytest.approx(1 - 0.9**t, rel=1e-12)
        torch.testing.assert_close(ema.value(state)["w"], p["w"], rtol=2e-7, atol=0)


def test_parameters_in_bf16_are_averaged_in_fp32():
    """A decay of 0.999 would move a bf16 average nowhere. Oracle: the same values in fp64."""
    p = {"w": torch.ones(2, dtype=torch.bfloat16), "frozen": None}
    state = ema.init(tree.zeros_like(p))
    for _ in range(10):
        state = ema.update(state, p, torch.tensor(0.999, dtype=torch.float64))
    assert state.average["w"].dtype == torch.float32 and state.average["frozen"] is None
    torch.testing.assert_close(state.average["w"], torch.full((2,), 1 - 0.999**10), rtol=1e-6, atol=0)
    assert ema.value(state, like=p)["w"].dtype == torch.bfloat16 and ema.value(state)["w"].dtype == torch.float32
    assert ema.init(p, dtype=torch.float64).average["w"].dtype == torch.float64
    assert ema.init({"w": torch.ones(1, dtype=torch.float64)}).average["w"].dtype == torch.float64


def test_nothing_is_changed_or_shared():
    """Oracle: copies; and addresses: the state lies in memory of its own, so that a step may be given the old one."""
    p, q = values(0), values(1)
    kept = tree.map(torch.clone, (p, q))
    first = ema.init(p)
    before = tree.map(torch.clone, first)
    second = ema.update(first, q, 0.5)
    value = ema.value(second, like=p)
    for x, y in zip(tree.leaves((kept, before)), tree.leaves(((p, q), first)), strict=True):
        assert torch.equal(x, y)
    at = [x.data_ptr() for x in tree.leaves((p, q, first, second, value))]
    assert len(set(at)) == len(at)
    assert tree.structure(second) == tree.structure(first)


def test_what_is_not_floating_is_the_latest():
    state = ema.init({"n": torch.tensor(1)}, debias=True)
    assert ema.value(state)["n"].item() == 1
    assert ema.value(ema.update(state, {"n": torch.tensor(5)}, 0.5))["n"].item() == 5


def test_empty_trees_and_other_forms():
    assert ema.value(ema.update(ema.init({}), {}, 0.5)) == {}
    with pytest.raises(ValueError, match="structures differ at frozen: None against leaf"):
        ema.update(ema.init({"frozen": torch.ones(1)}), {"frozen": None}, 0.5)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1.0"):
        ema.update(ema.init({}), {}, 1.0)


def test_gradients_flow():
    """Closed form: the derivative of the average by the newest parameters is 1 - d."""
    state = ema.init({"w": torch.ones(3)})
    g = torch.func.grad(lambda p: ema.value(ema.update(state, p, 0.75))["w"].sum())({"w": torch.zeros(3)})
    assert g["w"].tolist() == [0.25] * 3
