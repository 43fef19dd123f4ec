"""Fully sharded parameters on two Gloo processes. Oracle: one process with whole parameters and the whole batch."""

import gc
import weakref
from functools import partial

import pytest
import torch

from purelm import tree
from purelm.dist import fsdp, fsdp_units, sharding
from purelm.dist.agreement import check_equal
from purelm.dist.ddp import with_global_denominator
from purelm.dist.world import rank_of, size_of
from purelm.models import transformer
from purelm.optim import adamw, schedules
from purelm.train import ALONE, Precision, init_state, make_step
from purelm.transforms import jit, remat, save_matmuls, value_and_grad
from tests.dist.models import CFG, TIED, assert_close, batch_of, params_of, sharded_model
from tests.dist.processes import RankError, run

FLOAT64 = Precision(torch.float64, torch.float64, torch.float64)
WRAPS = {
    "plain": transformer.identity,
    "remat": remat,
    "selective": partial(remat, policy=save_matmuls),
    "compiled": partial(jit, backend="aot_eager"),
}


def whole(cfg, step=0, dtype=torch.float64):
    batch = batch_of(0, 1, cfg, step=step, dtype=dtype)
    batch["denominator"] = batch["weights"].sum()
    return value_and_grad(partial(transformer.loss, cfg=cfg), has_aux=True)(params_of(cfg, dtype), batch)


def my_batch(cfg=CFG, step=0, dtype=torch.float64):
    return with_global_denominator(batch_of(rank_of(None), size_of(None), cfg, step=step, dtype=dtype))


def on_rank_gradients(cfg, microbatches, wrap, all_cut):
    params = params_of(cfg)
    plan = fsdp.plan(params, **({"replicated": lambda path, x: False} if all_cut else {}))
    local = plan.shard(params)
    kept = tree.map(torch.clone, local)
    loss = sharded_model(cfg, WRAPS[wrap]).loss
    differentiated = fsdp.differentiate(loss, plan, microbatches=microbatches)
    (value, metrics), grads = differentiated(local, my_batch(cfg))
    (expected, theirs), whole_grads = whole(cfg)
    assert_close(grads, plan.shard(whole_grads))
    assert_close(plan.unshard(grads), whole_grads)
    assert_close(local, kept, 0, 0)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for name in theirs:
        torch.testing.assert_close(metrics[name], theirs[name], rtol=1e-6, atol=0)
    torch.testing.assert_close(plan.norm(grads), tree.global_norm(whole_grads), rtol=1e-12, atol=0)
    n_whole = sum(x.numel() for x in tree.leaves(params) if x.ndim > 1)
    n_local = sum(x.numel() for x in tree.leaves(local) if x.ndim > 1)
    assert n_local <= n_whole / 2 + 20 * 12  # a row is filled up where axis 0 is odd


@pytest.mark.parametrize("all_cut", [False, True], ids=["norms_replicated", "all_cut"])
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("wrap", ["plain", "remat", "selective"])
@pytest.mark.parametrize("cfg", [CFG, TIED], ids=["plain", "tied"])
def test_gradients_are_parts_of_the_whole_ones(cfg, microbatches, wrap, all_cut):
    run(on_rank_gradients, cfg, microbatches, wrap, all_cut)


@pytest.mark.compile
def test_compiled_blocks():
    run(on_rank_gradients, CFG, 1, "compiled", False)


def on_rank_messages(wrap):
    """Units whole or under way at once, and what is gathered and scattered."""
    alive, most, gathers, scatters, events = set(), [], [], [], []
    Unit, Schedule = fsdp_units.Unit, fsdp_units.Schedule
    start, drop, scatter = Unit.start, Unit.drop, Schedule.scatter

    def spy_start(self):
        before = self.pending is None and self.wholes is None
        start(self)
        if before:
            gathers.append(self.number)
            events.append(f"gather {self.number}")
            alive.add(self.number)
            most.append(len(alive))

    def spy_drop(self):
        drop(self)
        alive.discard(self.number)

    Unit.start, Unit.drop = spy_start, spy_drop

    def spy_scatter(self, unit, *args, **kwargs):
        scatters.append(unit.number)
        events.append(f"scatter {unit.number}")
        return scatter(self, unit, *args, **kwargs)

    Schedule.scatter = spy_scatter
    try:
        plan = fsdp.plan(params_of())
        fsdp.differentiate(sharded_model(CFG, WRAPS[wrap]).loss, plan)(plan.shard(params_of()), my_batch())
    finally:
        Unit.start, Unit.drop, Schedule.scatter = start, drop, scatter
    return gathers, scatters, max(most), len(alive), events


@pytest.mark.parametrize("wrap", ["plain", "remat"])
def test_two_units_at_a_time_and_one_gather_each_way(wrap):
    """Embedding 0, blocks 1 to 3, head 4; the embedding's backward needs no weights."""
    first, second = run(on_rank_messages, wrap)
    assert first == second
    *counts, events = first
    assert counts == [[0, 1, 2, 3, 4, 4, 3, 2, 1], [4, 3, 2, 1, 0], 2, 0]
    for n in (4, 3, 2):  # the block before is under way while this one's backward runs
        assert len(events) - events[::-1].index(f"gather {n - 1}") <= events.index(f"scatter {n}")


def on_rank_sent():
    """How many messages of gradients are held, each time that one more is on its way."""
    sent, held = [], []
    one = fsdp_units.scatter_sums

    def spy(*args):
        sent.append(one(*args))
        held.append(sum(message._work is not None for message in sent))
        return sent[-1]

    fsdp_units.scatter_sums = spy
    try:
        plan = fsdp.plan(params_of())
        fsdp.differentiate(sharded_model().loss, plan)(plan.shard(params_of()), my_batch())
    finally:
        fsdp_units.scatter_sums = one
    return held, sum(message._work is not None for message in sent)


def test_two_messages_of_gradients_at_a_time():
    """Head, blocks and embedding: five."""
    assert run(on_rank_sent) == [([1, 2, 2, 2, 2], 0)] * 2


def on_rank_saved():
    """Nothing whole is alive between forward and backward: no storage of the size of a whole matrix."""
    plan = fsdp.plan(params_of())
    local = tree.map(lambda x: x.requires_grad_(), plan.shard(params_of()))
    seen = []
    one = sharding.whole_of

    def spy(parts, shape):
        x = one(parts, shape)
        seen.append(__import__("weakref").ref(x.untyped_storage()))
        return x

    sharding.whole_of = spy
    try:
        value, _ = fsdp.evaluate(sharded_model(CFG, remat).loss, plan)(local, my_batch())
        between = [r() is not None for r in seen]
        value.backward()
    finally:
        sharding.whole_of = one
    return len(seen), sum(between), sum(r() is not None for r in seen)


def test_what_was_gathered_is_dropped():
    (n_between, alive, after), _ = run(on_rank_saved)
    assert n_between > 20 and alive == 0 and after == 0


def on_rank_let_go(wrap):
    """Bounds and units that are alive when an evaluation is over, without the garbage collector."""
    alive = []
    kinds = {cls: cls.__init__ for cls in (fsdp.Bound, fsdp_units.Unit)}
    for cls, init in kinds.items():
        cls.__init__ = lambda self, *args, init=init: init(self, *args) or alive.append(weakref.ref(self))
    plan = fsdp.plan(params_of())
    loss = sharded_model(CFG, WRAPS[wrap]).loss
    gc.disable()
    try:
        fsdp.differentiate(loss, plan)(plan.shard(params_of()), my_batch())
        counts = [len(alive), sum(ref() is not None for ref in alive)]
        with torch.no_grad():
            fsdp.evaluate(loss, plan)(plan.shard(params_of()), my_batch())
        return [*counts, len(alive), sum(ref() is not None for ref in alive)]
    finally:
        gc.enable()
        for cls, init in kinds.items():
            cls.__init__ = init


@pytest.mark.parametrize("wrap", ["plain", "remat"])
def test_parameters_are_let_go_with_the_graph(wrap):
    """One evaluation has a Bound and five units."""
    assert run(on_rank_let_go, wrap) == [[6, 0, 12, 0]] * 2


def trained(strategy, params, step, batches, optimizer, n=4):
    state = init_state(params, optimizer, FLOAT64, strategy)
    rows = []
    for i in range(n):
        state, metrics = step(state, batches(i))
        rows.append(metrics)
    return state, rows


def on_rank_training(compiled):
    params, optimizer = params_of(), adamw(weight_decay=0.1)
    model = sharded_model(CFG, remat)
    strategy = fsdp.strategy(model)
    options = {"max_norm": 0.5, "precision": FLOAT64, "schedule": schedules.constant(1e-2), "optimizer": optimizer}
    step = make_step(model.loss, strategy=strategy, microbatches=2, **options)
    if compiled:
        step = jit(step, donate=0, backend="aot_eager")
    alone = make_step(partial(transformer.loss, cfg=CFG), **options)
    state, rows = trained(strategy, params, step, lambda i: batch_of(rank_of(None), 2, step=i), optimizer)
    expected, theirs = trained(ALONE, params, alone, lambda i: batch_of(0, 1, step=i), optimizer)
    assert_close(strategy.unshard(state.params), expected.params, 1e-10, 1e-12)
    assert_close(strategy.unshard(state.opt_state.v), expected.opt_state.v, 1e-10, 1e-14)
    for a, b in zip(rows, theirs, strict=True):
        torch.testing.assert_close(a["loss"], b["loss"], rtol=1e-9, atol=0)
        torch.testing.assert_close(a["grad_norm"], b["grad_norm"], rtol=1e-7, atol=0)  # an fp32 sum
    replicated = tree.map(lambda x, r: x if r else None, state.params, fsdp.plan(params).replicated)
    check_equal(replicated)


def test_training_is_that_of_one_process():
    run(on_rank_training, False)


@pytest.mark.compile
def test_training_with_a_compiled_update():
    run(on_rank_training, True)


def on_rank_mixed():
    """bf16 on the wire and in the maths, fp32 masters and gradients."""
    params = params_of(dtype=torch.float32)
    plan = fsdp.plan(params, compute=torch.bfloat16)
    loss = sharded_model().loss
    (value, _), grads = fsdp.differentiate(loss, plan)(plan.shard(params), my_batch(dtype=torch.float32))
    (expected, _), exact = whole(CFG)
    assert all(g.dtype == torch.float32 for g in tree.leaves(grads))
    torch.testing.assert_close(value.double(), expected, rtol=1e-2, atol=0)
    for g, e in zip(tree.leaves(plan.unshard(grads)), tree.leaves(exact), strict=True):
        assert float((g - e).norm()) <= 0.05 * float(e.norm()) + 1e-3  # some roundings of 2^-8
    low = fsdp.plan(params, compute=torch.bfloat16, reduce=torch.bfloat16)
    _, rounded = fsdp.differentiate(loss, low)(low.shard(params), my_batch(dtype=torch.float32))
    for g, e in zip(tree.leaves(rounded), tree.leaves(grads), strict=True):
        torch.testing.assert_close(g, e, rtol=2e-2, atol=1e-3)


def test_compute_and_wire_in_bf16():
    run(on_rank_mixed)


def on_rank_wrong():
    params = params_of()
    plan = fsdp.plan(params)
    loss = fsdp.evaluate(sharded_model().loss, plan)
    with pytest.raises(ValueError, match=r"layers.0.attn.k_proj.weight has shape \(12, 12\), the plan's is \(6, 12\)"):
        loss(params, my_batch())
    with pytest.raises(ValueError, match="the batch has no denominator"):
        loss(plan.shard(params), batch_of(0, 2))


def test_wrong_arguments():
    run(on_rank_wrong)


@pytest.mark.parametrize("cfg", [CFG, TIED], ids=["plain", "tied"])
def test_alone(cfg):
    """Oracle: transformer.loss."""
    params = params_of(cfg)
    plan = fsdp.plan(params, replicated=lambda path, x: False)
    local = plan.shard(params)
    batch = with_global_denominator(batch_of(0, 1, cfg))
    (value, _), grads = fsdp.differentiate(sharded_model(cfg).loss, plan)(local, batch)
    (expected, _), theirs = whole(cfg)
    assert_close(plan.unshard(grads), theirs)
    assert_close(plan.unshard(local), params, 0, 0)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def on_rank_differs(what):
    params = {"layers": [{"w": torch.ones(3, 2 + (what == "shape" and rank_of(None)))}]}
    if what == "structure" and rank_of(None):
        params["head"] = torch.ones(2, 2)
    options = {"compute": torch.bfloat16 if what == "compute" and rank_of(None) else None}
    options |= {"replicated": lambda path, x: what == "replicated" and rank_of(None) == 1}
    fsdp.plan(params, **options)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("shape", "at layers.0.w: (3, 2) float32 on rank 0; (3, 3) float32 on rank 1"),
        ("structure", "at head: no such leaf on rank 0; (2, 2) float32 on rank 1"),
        ("compute", "at compute: no such leaf on rank 0; torch.bfloat16 on rank 1"),
        ("replicated", "at replicated.layers.0.w: False on rank 0; True on rank 1"),
    ],
)
def test_a_rank_that_differs_is_an_error_on_all(what, said):
    with pytest.raises(RankError) as error:
        run(on_rank_differs, what)
    assert sorted(error.value.errors) == [0, 1]
    assert all(f"fsdp.plan: ranks differ {said}" in message for message in error.value.errors.values())


def on_rank_nan(rows, microbatches):
    """rows: rank -> the row whose weights are nan; of four, the first two are in the first of two microbatches."""
    batch = batch_of(rank_of(None), 2)
    batch["denominator"] = torch.tensor(7.0, dtype=torch.float64)
    if rank_of(None) in rows:
        batch["weights"] = batch["weights"].clone()
        batch["weights"][rows[rank_of(None)]] = torch.nan
    plan = fsdp.plan(params_of())
    differentiated = fsdp.differentiate(sharded_model().loss, plan, microbatches=microbatches)
    (value, metrics), _ = differentiated(plan.shard(params_of()), batch)
    assert metrics["non_finite_rank"].dtype == torch.int64
    return bool(value.isnan()), int(metrics["non_finite_rank"])


@pytest.mark.parametrize(
    ("rows", "microbatches", "first"),
    [({}, 2, -1), ({1: 3}, 1, 1), ({0: 3}, 2, 0), ({1: 3}, 2, 1), ({0: 0, 1: 3}, 2, 0), ({0: 3, 1: 0}, 2, 1)],
)
def test_a_nan_is_reported_with_its_rank(rows, microbatches, first):
    assert run(on_rank_nan, rows, microbatches) == [(bool(rows), first)] * 2
