"""purelm.dist over NCCL, a GPU a rank if there are so many. Oracle: one process with the whole batch, in float64."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from purelm import random, tree
from purelm.dist import checkpoint, collectives, ddp, fsdp, tensor_parallel, zero
from purelm.dist.agreement import check_equal
from purelm.dist.sharding import shard
from purelm.dist.world import rank_of, size_of
from purelm.interop import ddp as ddp_module
from purelm.interop import fsdp as fsdp_module
from purelm.kernels import adamw as kernels
from purelm.models import transformer
from purelm.ops import REFERENCE
from purelm.optim import adamw, schedules
from purelm.train import MIXED, Precision, init_state, make_step, reducing
from purelm.transforms import jit, remat, value_and_grad
from tests.dist.models import CFG, TIED, assert_close, batch_of, params_of, sharded_model
from tests.dist.processes import RankError, run
from tests.dist.test_world import fails_in_the_middle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (make gpu-test)"),
]
FLOAT64 = Precision(torch.float64, torch.float64, torch.float64)
CUDA = torch.device("cuda")  # the current one: each rank sets its own
SMALL = transformer.Config(vocab_size=512, context_length=128, d_model=256, n_layers=3, n_heads=4, d_ff=512)


def here(values):
    return tree.to(values, CUDA)


def on_rank_collectives():
    """Closed forms, of messages that are larger than NCCL's own small ones."""
    rank, N = rank_of(None), size_of(None)
    x = here({"a": torch.arange(1 << 21, dtype=torch.float64) + rank, "b": torch.full((3,), 1.0 + rank)})
    total = collectives.all_reduce(x)
    assert torch.equal(total["a"], N * torch.arange(1 << 21, device=CUDA).double() + N * (N - 1) / 2)
    for strategy in ("per_leaf", "flat", "bucketed"):
        mean = ddp.all_reduce_mean(x, None, strategy)
        assert torch.equal(mean["b"], torch.full((3,), 1.0 + (N - 1) / 2, device=CUDA))
    assert torch.equal(collectives.broadcast(x)["b"], torch.ones(3, device=CUDA))


def test_collectives():
    run(on_rank_collectives, gpus=True)


def ways(way):
    """(model, strategy)"""
    if way == "fsdp":
        model = sharded_model(CFG, remat)
        return model, fsdp.strategy(model)
    if way in ("overlapped", "zero2"):  # small buckets: several under way
        strategy = (ddp if way == "overlapped" else zero).strategy(bucket_bytes=4096)
    elif way == "zero1":
        sharded = partial(zero.sharded, reduce=None)
        strategy = ddp.strategy(bucket_bytes=4096)._replace(optimizer=sharded)
    else:
        reduce = partial(ddp.all_reduce_mean, strategy=way, op="sum")
        strategy = reducing(reduce)._replace(prepare=ddp.with_global_denominator)
    return transformer.make(CFG, wrap_block=remat), strategy


def on_rank_trains(way):
    params, optimizer = here(params_of()), adamw(weight_decay=0.1)
    options = {"schedule": schedules.constant(1e-2), "precision": FLOAT64, "max_norm": 0.5}
    alone = make_step(partial(transformer.loss, cfg=CFG), optimizer, **options)
    expected = init_state(params, optimizer, FLOAT64)
    model, strategy = ways(way)
    microbatches = 2 if way in ("overlapped", "zero1", "zero2", "fsdp") else 1
    step = make_step(model.loss, optimizer, strategy=strategy, microbatches=microbatches, **options)
    state = init_state(params, optimizer, FLOAT64, strategy)
    for i in range(4):
        expected, theirs = alone(expected, here(batch_of(0, 1, step=i)))
        state, metrics = step(state, here(batch_of(rank_of(None), 2, step=i)))
        if way in ("overlapped", "zero1", "zero2", "fsdp"):
            torch.testing.assert_close(metrics["loss"], theirs["loss"], rtol=1e-9, atol=0)
    assert_close(strategy.unshard(state.params), expected.params, 1e-9, 1e-11)  # Adam divides small numbers
    check_equal(strategy.unshard(state.params))


@pytest.mark.parametrize("way", ["per_leaf", "flat", "bucketed", "overlapped", "zero1", "zero2", "fsdp"])
def test_training_is_that_of_one_process(way):
    run(on_rank_trains, way, gpus=True)


def on_rank_sharded_step():
    """Oracle: the kernel's step on the whole, to the bit; parameters and moments stay where they are."""
    params = here(transformer.init(random.key(0), SMALL))
    state, mine = kernels.adamw().init(params), zero.sharded(kernels.adamw()).init(params)
    whole, update = kernels.adamw_step(), zero.sharded_step(kernels.adamw_step(donate=True), donate=True)
    local = tree.map(torch.clone, params)
    at = [x.data_ptr() for x in tree.leaves((local, mine.m, mine.v))]
    for i in range(3):
        grads = here(transformer.init(random.key(1 + i), SMALL))
        params, state = whole(grads, state, params, 0.1)
        local, mine = update(shard(grads), mine, local, 0.1)
    assert [x.data_ptr() for x in tree.leaves((local, mine.m, mine.v))] == at
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(local), tree.leaves(params), strict=True))


def test_sharded_step_in_place():
    run(on_rank_sharded_step, gpus=True)


def on_rank_tensor_parallel(sequence_parallel):
    cfg = replace(CFG, vocab_size=20)
    layout = tensor_parallel.Layout(cfg.vocab_size, None, sequence_parallel)
    model = transformer.make(cfg, layout.ops(REFERENCE))
    strategy = tensor_parallel.strategy(model, layout)
    params = here(params_of(cfg))
    batch = here(batch_of(0, 1, cfg))

    def gradient(loss, p):
        p = tree.map(lambda x: x.detach().requires_grad_(), p)
        value, _ = loss(p, batch)
        grads = torch.autograd.grad(value, tree.leaves(p))
        return value.detach(), tree.unflatten(tree.flatten(p)[1], list(grads))

    value, grads = gradient(partial(transformer.loss, cfg=cfg), params)
    own, local = gradient(model.loss, strategy.shard(params))
    torch.testing.assert_close(own, value, rtol=1e-12, atol=0)
    assert_close(strategy.unshard(strategy.reduce(local)), grads, 1e-10, 1e-13)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence"])
def test_tensor_parallel_gradients(sequence_parallel):
    run(on_rank_tensor_parallel, sequence_parallel, gpus=True)


def on_rank_kernels(compiled):
    """bf16 by the kernels, sharded, against one process: rounding differs only where gradients are summed."""
    from purelm.kernels.fused import FUSED

    params = here(transformer.init(random.key(0), SMALL))
    x = random.randint(random.key(1), (8, SMALL.context_length + 1), 0, SMALL.vocab_size).to(CUDA)
    batch = {"tokens": x[:, :-1].contiguous(), "targets": x[:, 1:].contiguous()}
    mine = tree.map(lambda t: t.chunk(2)[rank_of(None)], batch)
    model = sharded_model(SMALL, (lambda f: jit(remat(f))) if compiled else remat, FUSED)
    optimizer, options = adamw(), {"schedule": schedules.constant(1e-3), "precision": MIXED}
    strategy = fsdp.strategy(model)
    step = make_step(model.loss, optimizer, strategy=strategy, **options)
    alone = make_step(partial(transformer.loss, cfg=SMALL, ops=FUSED), optimizer, **options)
    state, expected = init_state(params, optimizer, strategy=strategy), init_state(params, optimizer)
    for _ in range(5):
        state, metrics = step(state, mine)
        expected, theirs = alone(expected, batch)
    # bf16 has 8 bits: a loss of about 6 nats over 1,024 targets agrees much better than 2**-8
    torch.testing.assert_close(metrics["loss"], theirs["loss"], rtol=2e-3, atol=0)
    torch.testing.assert_close(metrics["grad_norm"], theirs["grad_norm"], rtol=2e-2, atol=0)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.compile)], ids=["eager", "compiled"])
def test_kernels_on_sharded_parameters(compiled):
    run(on_rank_kernels, compiled, gpus=True)


def on_rank_saves(folder):
    params = here(params_of())
    plan = fsdp.plan(params)
    local = plan.shard(params)

    def cut(path, x):
        return x.ndim > 1

    checkpoint.save(folder, 3, {"params": local}, like={"params": plan.like}, sharded=cut)
    found, _ = checkpoint.load(folder, {"params": plan.like}, sharded=cut, device=CUDA)
    assert_close(found["params"], local, 0, 0)


def test_checkpoints(tmp_path):
    """And one process reads what two wrote."""
    run(on_rank_saves, tmp_path, gpus=True)
    like = tree.map(lambda x: torch.empty_like(x, device="meta"), params_of())
    found, _ = checkpoint.load(tmp_path, {"params": like}, sharded=lambda path, x: x.ndim > 1)
    assert_close(found["params"], params_of(), 0, 0)


def on_rank_differs():
    ddp.all_reduce_mean({"w": torch.ones(2 + rank_of(None), device=CUDA)})


def test_a_rank_that_differs_raises_on_all():
    with pytest.raises(RankError) as error:
        run(on_rank_differs, gpus=True)
    assert sorted(error.value.errors) == [0, 1] and all("w" in text for text in error.value.errors.values())


def on_rank_module(kind):
    """A torch module of two layers, SGD, in float64."""
    torch.manual_seed(0)
    alone = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)).double().to(CUDA)
    theirs = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)).double().to(CUDA)
    theirs.load_state_dict(alone.state_dict())
    model = ddp_module(theirs) if kind == "ddp" else fsdp_module(theirs)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (alone, model)]
    x = random.normal(random.key(3), (8, 6), dtype=torch.float64).to(CUDA)
    for _ in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        alone(x).square().mean().backward()
        model(x.chunk(2)[rank_of(None)]).square().mean().backward()
        model.finish_gradient_synchronization()
        for optimizer in optimizers:
            optimizer.step()
    found = dict(model.module.named_parameters()) if kind == "ddp" else model.gather_full_params()
    assert_close({k: v.detach() for k, v in found.items()}, {k: v.detach() for k, v in alone.named_parameters()})


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_modules(kind):
    run(on_rank_module, kind, gpus=True)


def on_rank_tied():
    params = here(params_of(TIED))
    plan = fsdp.plan(params)
    batch = ddp.with_global_denominator(here(batch_of(rank_of(None), 2, TIED)))
    (value, _), grads = fsdp.differentiate(sharded_model(TIED).loss, plan)(plan.shard(params), batch)
    whole = value_and_grad(partial(transformer.loss, cfg=TIED), has_aux=True)
    (expected, _), theirs = whole(params, here(batch_of(0, 1, TIED)))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert_close(plan.unshard(grads), theirs, 1e-10, 1e-13)


def test_tied_embeddings():
    run(on_rank_tied, gpus=True)


def test_an_error_does_not_wait_for_messages_under_way(tmp_path):
    """As tests/dist/test_world has it: the communicators are aborted."""
    said = fails_in_the_middle(tmp_path, "cuda")
    assert "RuntimeError: in the middle" in said and "rank      : 1" in said
