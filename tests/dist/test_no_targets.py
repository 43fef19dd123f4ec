"""Batches of which some ranks, or all, have no targets. Oracle: one process with the whole batch; a loss of 0."""

from functools import partial

import pytest
import torch

from purelm import interop, tree
from purelm.dist import fsdp, tensor_parallel, zero
from purelm.dist.ddp import differentiate, with_global_denominator
from purelm.dist.world import rank_of
from purelm.kernels.fused import FUSED
from purelm.models import transformer
from purelm.optim import adamw, chain, clip_by_global_norm, schedules
from purelm.train import FULL, init_state, make_step, with_denominator
from tests.dist.models import CFG, assert_close, batch_of, params_of
from tests.dist.processes import RankError, run

F64 = FULL._replace(param=torch.float64, compute=torch.float64, reduce=torch.float64)
SCHEDULE = schedules.constant(1e-2)


def clipped(norm=tree.global_norm):
    return chain(clip_by_global_norm(0.1, norm=norm), adamw(weight_decay=0.0))


def batch(rank, size, empty):
    """The last `empty` of two halves have weights 0 and targets that are no index."""
    whole = batch_of(0, 1)
    n = len(whole["weights"])
    whole["weights"][:3] = 0.5
    for half in range(2 - empty, 2):
        rows = slice(half * n // 2, (half + 1) * n // 2)
        whole["weights"][rows], whole["targets"][rows] = 0.0, -100
    return {k: v.chunk(size)[rank] for k, v in whole.items()}


def on_rank_step(way, empty, ops):
    params, rank = params_of(), rank_of(None)
    loss = partial(transformer.loss, cfg=CFG, ops=FUSED if ops == "fused" else transformer.REFERENCE, chunk=5)
    alone, expected = make_step(loss, clipped(), SCHEDULE, precision=F64)(
        init_state(params, clipped(), F64), batch(0, 1, empty)
    )
    options = {"prepare": with_global_denominator, "differentiate": differentiate, "precision": F64}
    optimizer, unshard, local = clipped(), lambda x: x, params
    if way == "microbatches":
        options["differentiate"] = partial(differentiate, microbatches=2)
    elif way == "zero":
        optimizer = zero.sharded(clipped(zero.global_norm()), reduce=None)
    elif way == "parts":
        optimizer = zero.sharded(clipped(zero.global_norm()), reduce="parts")
        options |= {"differentiate": partial(differentiate, parts=True), "norm": zero.global_norm()}
    elif way == "owners":
        optimizer = zero.whole_tensors(clipped(zero.global_norm()), reduce=None)
    elif way == "fsdp":
        plan = fsdp.plan(params)
        optimizer, local, unshard = clipped(plan.norm), plan.shard(params), plan.unshard
        loss = partial(fsdp.transformer_loss, cfg=CFG, plan=plan, chunk=5, ops=loss.keywords["ops"])
        options |= {"differentiate": fsdp.differentiate, "norm": plan.norm}
    state, metrics = make_step(loss, optimizer, SCHEDULE, **options)(
        init_state(local, optimizer, F64), batch(rank, 2, empty)
    )
    assert bool(tree.all_finite(state)) and (float(metrics["loss"]) == 0.0) == (empty == 2)
    for name, x in expected.items():
        torch.testing.assert_close(metrics[name], x, rtol=1e-9, atol=1e-12)
    assert_close(unshard(state.params), alone.params, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("way", "ops"),
    [
        ("ddp", "reference"), ("ddp", "fused"), ("microbatches", "fused"), ("zero", "reference"),
        ("parts", "reference"), ("owners", "reference"), ("fsdp", "reference"), ("fsdp", "fused"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("empty", [1, 2])
def test_ranks_without_targets(way, empty, ops):
    """One rank: the step of one process with the whole batch. Both: loss 0, and parameters as they were."""
    run(on_rank_step, way, empty, ops)


def on_rank_local_denominator(way, give):
    """Losses over each rank's own number of targets, which a sum over ranks would double."""
    loss = partial(transformer.loss, cfg=CFG)
    options, local = {"differentiate": differentiate}, params_of()
    if way == "fsdp":
        plan = fsdp.plan(local)
        loss, local = partial(fsdp.transformer_loss, cfg=CFG, plan=plan), plan.shard(local)
        options = {"differentiate": fsdp.differentiate, "norm": plan.norm}
    mine = batch_of(rank_of(None), 2)
    if give == "a number":  # of all ranks, by some other way
        mine = {**mine, "denominator": torch.tensor(7.0, dtype=torch.float64)}
    if give == "nothing":
        options["prepare"] = lambda x: x
    if give == "directly":
        return options["differentiate"](loss)(local, with_denominator(mine))
    make_step(loss, clipped(options.get("norm", tree.global_norm)), SCHEDULE, precision=F64, **options)(
        init_state(local, clipped(), F64), mine
    )


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("give", ["default", "nothing", "directly"])
def test_a_denominator_of_one_rank_is_refused(way, give):
    """On all ranks, before any message; one that the caller put there is the caller's."""
    with pytest.raises(RankError) as error:
        run(on_rank_local_denominator, way, give)
    assert len(error.value.errors) == 2
    assert all("ValueError" in text and "with_global_denominator" in text for text in error.value.errors.values())
    run(on_rank_local_denominator, way, "a number")


def on_rank_clip(way):
    params, mine = params_of(), batch_of(rank_of(None), 2)
    loss, optimizer, local = partial(transformer.loss, cfg=CFG), clipped(), params
    options = {"prepare": with_global_denominator, "differentiate": differentiate}
    if way in ("fsdp", "fsdp without norm"):
        plan = fsdp.plan(params)
        loss, local = partial(fsdp.transformer_loss, cfg=CFG, plan=plan), plan.shard(params)
        options["differentiate"] = fsdp.differentiate
        if way == "fsdp":
            options["norm"] = plan.norm
    elif way == "sharded":
        optimizer = zero.sharded(optimizer, reduce=None)
    elif way == "owners":
        optimizer = zero.whole_tensors(optimizer, reduce=None)
    else:
        optimizer = zero.sharded(optimizer, reduce="parts")
        options["differentiate"] = partial(differentiate, parts=True)
        if way == "parts":
            options["norm"] = zero.global_norm()
    make_step(loss, optimizer, SCHEDULE, precision=F64, **options)(init_state(local, optimizer, F64), mine)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("fsdp", "clips by a norm of the gradients that each process holds"),
        ("sharded", "zero.sharded: the optimizer clips by a norm"),
        ("owners", "zero.whole_tensors: the optimizer clips by a norm"),
        ("parts", "zero.sharded: the optimizer clips by a norm"),
        ("fsdp without norm", "each process has a part of the gradients, and grad_norm would be of that alone"),
        ("parts without norm", "each process has a part of the gradients, and grad_norm would be of that alone"),
    ],
)
def test_a_norm_of_one_rank_is_refused(way, message):
    """Ranks would step by different factors. At the first step, on all ranks, so that the processes work on."""
    with pytest.raises(RankError, match=message) as error:
        run(on_rank_clip, way)
    assert len(error.value.errors) == 2


def on_rank_torch_optimizer(max_norm):
    torch.manual_seed(0)
    model = interop.fsdp(torch.nn.Linear(3, 4))
    optimizer = adamw() if max_norm is None else chain(clip_by_global_norm(max_norm), adamw())
    wrapped = interop.TorchOptimizer(model.parameters(), optimizer)
    model(torch.ones(2, 3)).square().sum().backward()
    model.finish_gradient_synchronization()
    wrapped.step()


def test_a_torch_optimizer_that_clips_parts_of_a_module_is_refused():
    run(on_rank_torch_optimizer, None)
    with pytest.raises(RankError, match=r"TorchOptimizer.step: the optimizer clips by a norm") as error:
        run(on_rank_torch_optimizer, 0.1)
    assert len(error.value.errors) == 2


def on_rank_tensor_parallel(norm):
    plan = tensor_parallel.Plan(CFG)
    local, options = plan.shard(params_of()), {"norm": plan.global_norm} if norm else {}
    step = make_step(plan.loss, clipped(options.get("norm", tree.global_norm)), SCHEDULE, reduce=plan.reduce, **options)
    step(init_state(local, clipped(), F64), batch_of(0, 1))


def test_a_norm_of_one_rank_of_tensor_parallelism_is_refused():
    run(on_rank_tensor_parallel, True)
    with pytest.raises(RankError, match="each process has a part of the gradients") as error:
        run(on_rank_tensor_parallel, False)
    assert len(error.value.errors) == 2
