"""Whole models with FUSED on a GPU. Oracle: REFERENCE in float64; eager for compiled."""

import pytest
import torch

from purelm import random, tree
from purelm.kernels.fused import FUSED
from purelm.models import transformer
from purelm.ops import REFERENCE
from purelm.optim import adamw, schedules
from purelm.train import MIXED, init_state, make_step
from purelm.transforms import jit, remat, value_and_grad

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (make gpu-test)"),
    pytest.mark.filterwarnings("ignore"),  # sizes that were never tuned; dynamo's own
]
CFG = transformer.Config(vocab_size=1003, context_length=256, d_model=256, n_layers=3, n_heads=4, n_kv_heads=2)


def batch():
    x = random.randint(random.key(1), (4, 257), 0, 1003).cuda()
    return {"tokens": x[:, :-1].contiguous(), "targets": x[:, 1:].contiguous()}


def gradients(params, ops, **options):
    return value_and_grad(lambda p: transformer.loss(p, batch(), CFG, ops=ops, **options), has_aux=True)(params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"wrap_block": remat}], ids=["plain", "remat"])
def test_loss_and_gradients(dtype, options):
    """err(FUSED, fp64) <= 2 err(REFERENCE in the same dtype, fp64) + roundings."""
    params = transformer.init(random.key(0, device="cuda"), CFG)
    (exact, _), exact_grads = gradients(tree.cast(params, torch.float64), REFERENCE)
    low = tree.cast(params, dtype)
    (same, _), same_grads = gradients(low, REFERENCE)
    (mine, _), grads = gradients(low, FUSED, **options)
    eps = torch.finfo(dtype).eps
    assert abs(float(mine) - float(exact)) <= 2 * abs(float(same) - float(exact)) + 4 * eps * float(exact)
    for path, x, y, z in zip(tree.paths(grads), *map(tree.leaves, (grads, same_grads, exact_grads)), strict=True):
        found, allowed = float((x.double() - z).norm()), float((y.double() - z).norm())
        assert found <= 2 * allowed + 4 * eps * float(z.norm()), path


@pytest.mark.parametrize("wrap", [None, remat], ids=["plain", "remat"])
def test_compiled_training_is_eager_training(wrap):
    """Three steps in bf16 with fp32 masters: losses agree to bf16's rounding, and parameters move alike."""
    options = {} if wrap is None else {"wrap_block": wrap}
    optimizer = adamw()
    step = make_step(
        lambda p, b: transformer.loss(p, b, CFG, ops=FUSED, **options),
        optimizer,
        schedules.constant(1e-3),
        precision=MIXED,
    )
    params = transformer.init(random.key(0, device="cuda"), CFG)
    states = [init_state(tree.map(torch.clone, params), optimizer) for _ in range(2)]
    losses = []
    for f, state in zip((step, jit(step, donate=0)), states, strict=True):
        out = []
        for _ in range(3):
            state, metrics = f(state, batch())
            out.append(float(metrics["loss"]))
        losses.append(out)
    assert losses[0] == pytest.approx(losses[1], rel=5e-3) and losses[0][2] < losses[0][0]


def test_a_training_run_gives_the_same_bits_twice():
    optimizer = adamw()
    step = make_step(
        lambda p, b: transformer.loss(p, b, CFG, ops=FUSED), optimizer, schedules.constant(1e-3), precision=MIXED
    )
    ends = []
    for _ in range(2):
        state = init_state(transformer.init(random.key(0, device="cuda"), CFG), optimizer)
        for _ in range(3):
            state, _ = step(state, batch())
        ends.append(state.params)
    # torch's own embedding backward sorts its indices: it adds in one order.
    for x, y in zip(*map(tree.leaves, ends), strict=True):
        assert torch.equal(x, y)


def test_second_derivatives_name_the_bundle_that_has_them():
    """FUSED refuses, by name; REFERENCE has them."""
    params = transformer.init(random.key(0, device="cuda"), CFG)
    leaves, form = tree.flatten(params)
    leaves = [x.detach().requires_grad_() for x in leaves]

    def norm_of_gradient(ops):
        loss, _ = transformer.loss(tree.unflatten(form, leaves), batch(), CFG, ops=ops)
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    with pytest.raises(RuntimeError, match="double backward is not supported on a GPU: use ops=REFERENCE"):
        norm_of_gradient(FUSED)
    assert all(bool(g.isfinite().all()) for g in norm_of_gradient(REFERENCE))
