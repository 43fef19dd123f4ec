"""Batches of which some ranks, or all, have no targets. Oracle: one process with the whole batch; a loss of 0."""

from functools import partial

import pytest
import torch

from purelm import interop, tree
from purelm.dist import ddp, fsdp, tensor_parallel, zero
from purelm.dist.world import rank_of
from purelm.kernels.fused import FUSED
from purelm.models import transformer
from purelm.ops import REFERENCE
from purelm.optim import adamw, chain, clip_by_global_norm, schedules
from purelm.train import FULL, init_state, make_step, with_denominator
from tests.dist.models import CFG, assert_close, batch_of, params_of, sharded_model
from tests.dist.processes import RankError, run

F64 = FULL._replace(param=torch.float64, compute=torch.float64, reduce=torch.float64)


OPTIONS = {"schedule": schedules.constant(1e-2), "precision": F64}
PLAIN = adamw(weight_decay=0.0)


def made(way, ops=REFERENCE):
    """(model, strategy) of a way to train."""
    if way == "fsdp":
        model = sharded_model(CFG, ops=ops)
        return model, fsdp.strategy(model)
    strategies = {
        "microbatches": ddp.strategy,
        "zero": lambda: ddp.strategy()._replace(optimizer=partial(zero.sharded, reduce=None)),
        "parts": zero.strategy,
        "owners": partial(zero.strategy, whole=True),
    }
    return transformer.make(CFG, ops), strategies.get(way, ddp.strategy)()


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
    params, rank, chosen = params_of(), rank_of(None), FUSED if ops == "fused" else REFERENCE
    model, strategy = made(way, chosen)
    options = {**OPTIONS, "max_norm": 0.1}
    alone, expected = make_step(partial(transformer.make(CFG, chosen).loss, chunk=5), PLAIN, **options)(
        init_state(params, PLAIN, F64), batch(0, 1, empty)
    )
    options |= {"strategy": strategy, "microbatches": 2 if way == "microbatches" else 1}
    state, metrics = make_step(partial(model.loss, chunk=5), PLAIN, **options)(
        init_state(params, PLAIN, F64, strategy), batch(rank, 2, empty)
    )
    assert bool(tree.all_finite(state)) and (float(metrics["loss"]) == 0.0) == (empty == 2)
    for name, x in expected.items():
        torch.testing.assert_close(metrics[name], x, rtol=1e-7, atol=1e-12)  # norms are fp32
    assert_close(strategy.unshard(state.params), alone.params, rtol=1e-9, atol=1e-12)


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
    model, strategy = made(way)
    state = init_state(params_of(), PLAIN, F64, strategy)
    mine = batch_of(rank_of(None), 2)
    if give == "a number":  # of all ranks, by some other way
        mine = {**mine, "denominator": torch.tensor(7.0, dtype=torch.float64)}
    if give == "default":
        strategy = strategy._replace(prepare=with_denominator)
    if give == "nothing":
        strategy = strategy._replace(prepare=lambda x: x)
    if give == "directly":
        return strategy.differentiate(model.loss)(state.params, with_denominator(mine))
    make_step(model.loss, PLAIN, strategy=strategy, **OPTIONS)(state, mine)


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
    model, strategy = made(way.split()[0])
    optimizer = chain(clip_by_global_norm(0.1), PLAIN)
    state = init_state(params_of(), optimizer, F64, strategy)
    if way.endswith("without norm"):
        optimizer, strategy = PLAIN, strategy._replace(norm=tree.global_norm)
        state = init_state(params_of(), optimizer, F64, strategy)
    make_step(model.loss, optimizer, strategy=strategy, **OPTIONS)(state, batch_of(rank_of(None), 2))


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("fsdp", "make_step: the optimizer clips by a norm of the gradients that each process holds"),
        ("zero", "zero.sharded: the optimizer clips by a norm"),
        ("owners", "zero.whole_tensors: the optimizer clips by a norm"),
        ("parts", "make_step: the optimizer clips by a norm"),
        ("fsdp without norm", "a part of the gradients, and grad_norm would be the norm of that part"),
        ("parts without norm", "a part of the gradients, and grad_norm would be the norm of that part"),
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
    layout = tensor_parallel.Layout(CFG.vocab_size)
    model = transformer.make(CFG, layout.ops(REFERENCE))
    strategy = tensor_parallel.strategy(model, layout)
    if not norm:
        strategy = strategy._replace(norm=tree.global_norm)
    step = make_step(model.loss, PLAIN, strategy=strategy, max_norm=0.1, **OPTIONS)
    step(init_state(params_of(), PLAIN, F64, strategy), batch_of(0, 1))


def test_a_norm_of_one_rank_of_tensor_parallelism_is_refused():
    run(on_rank_tensor_parallel, True)
    with pytest.raises(RankError, match="each process has a part of the gradients") as error:
        run(on_rank_tensor_parallel, False)
    assert len(error.value.errors) == 2
