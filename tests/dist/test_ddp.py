"""Data parallelism on two Gloo processes. Oracle: one process with the whole batch, float64 to 1e-12."""

from functools import partial

import pytest
import torch

from purelm import tree
from purelm.dist import ddp, messages, zero, zero_state
from purelm.dist.agreement import check_equal
from purelm.dist.collectives import all_reduce
from purelm.dist.ddp import all_reduce_mean, overlapped_value_and_grad, with_global_denominator
from purelm.dist.sharding import shard
from purelm.dist.world import rank_of, size_of
from purelm.models import transformer
from purelm.optim import adamw, schedules
from purelm.train import ALONE, Precision, init_state, make_step, reducing
from purelm.transforms import accumulate, jit, remat, value_and_grad
from tests.dist.models import CFG, TIED, assert_close, batch_of, params_of
from tests.dist.processes import RankError, run

FLOAT64 = Precision(torch.float64, torch.float64, torch.float64)


def loss(params, batch, cfg=CFG, **options):
    return transformer.loss(params, batch, cfg, **options)


def whole(cfg=CFG, step=0, **options):
    """Loss, metrics and gradients of one process."""
    batch = batch_of(0, 1, cfg, step=step)
    batch["denominator"] = batch["weights"].sum()
    return value_and_grad(partial(loss, cfg=cfg, **options), has_aux=True)(params_of(cfg), batch)


def on_rank_strategies(strategy, bucket_bytes, wire):
    rank = rank_of(None)
    grads = {"a": torch.randn(7, 3, dtype=torch.float64) + rank, "b": [torch.ones(2) * rank, None, torch.ones(())]}
    grads["c"] = torch.full((3, 2), float(rank + 1), dtype=torch.bfloat16).T
    kept = tree.map(torch.clone, grads)
    got = all_reduce_mean(grads, strategy=strategy, bucket_bytes=bucket_bytes, wire=wire)
    expected = tree.map(lambda x: all_reduce(x, op="mean"), grads)
    assert_close(got, expected, *((1e-12, 1e-13) if wire is None else (1e-2, 1e-2)))
    assert_close(grads, kept, 0, 0)
    assert all(x.dtype == y.dtype for x, y in zip(tree.leaves(got), tree.leaves(grads), strict=True))
    total = all_reduce_mean(grads, strategy=strategy, op="sum")
    assert_close(total, tree.map(all_reduce, grads))
    check_equal(got)


@pytest.mark.parametrize("wire", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("strategy", "n"), [("per_leaf", 1), ("flat", 1), ("bucketed", 1), ("bucketed", 60), ("bucketed", 1 << 30)]
)
def test_strategies_are_the_mean(strategy, n, wire):
    """Oracle: the mean of each leaf by itself."""
    run(on_rank_strategies, strategy, n, wire)


@pytest.mark.parametrize("limit", [0, 1, 50, 100, 10**9, float("inf")])
def test_every_leaf_is_in_one_bucket(limit):
    """Oracle: counting."""
    kinds = [(3, 32), (9, 32), (0, 32), (2, 64), (30, 64), (1, 32)]
    leaves = [torch.zeros(n, dtype=torch.float32 if bits == 32 else torch.float64) for n, bits in kinds]
    buckets = messages.cut(leaves, limit, [5, 4, 3, 2, 1, 0])
    assert sorted(i for b in buckets for i in b) == list(range(6)) and all(buckets)
    assert all(len({leaves[i].dtype for i in b}) == 1 for b in buckets)
    assert all(len(b) == 1 or sum(leaves[i].nbytes for i in b[:-1]) < limit for b in buckets)
    unfilled = [b for b in buckets if sum(leaves[i].nbytes for i in b) < limit]
    assert len({leaves[b[0]].dtype for b in unfilled}) == len(unfilled)  # the last one of its dtype at most
    if limit == float("inf"):
        assert len(buckets) == 2
    if limit == 0:
        assert len([b for b in buckets if any(leaves[i].numel() for i in b)]) == 5


def on_rank_gradients(cfg, microbatches, bucket_bytes, wrap):
    """Summed gradients of losses over a global denominator, with hooks: those of one process."""
    wrap_block = {"plain": transformer.identity, "remat": remat, "compiled": partial(jit, backend="aot_eager")}[wrap]
    gradient = ddp.differentiate(
        partial(loss, cfg=cfg, wrap_block=wrap_block), microbatches=microbatches, bucket_bytes=bucket_bytes
    )
    batch = with_global_denominator(batch_of(rank_of(None), size_of(None), cfg))
    params = params_of(cfg)
    kept = tree.map(torch.clone, params)
    (expected, theirs), whole_grads = whole(cfg)
    for _ in range(2):  # the first call sends all at the end, the second one as it comes
        (value, metrics), grads = gradient(params, batch)
        assert_close(grads, whole_grads)
        assert_close(params, kept, 0, 0)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for name in theirs:
        torch.testing.assert_close(metrics[name], theirs[name], rtol=1e-6, atol=0)  # counts are fp32
    assert int(metrics["non_finite_rank"]) == -1
    check_equal(grads)


@pytest.mark.parametrize("bucket_bytes", [1, 2000, 1 << 30])
@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize("cfg", [CFG, TIED], ids=["plain", "tied"])
@pytest.mark.parametrize("wrap", ["plain", "remat"])
def test_overlapped_gradients_are_those_of_the_whole_batch(cfg, microbatches, bucket_bytes, wrap):
    run(on_rank_gradients, cfg, microbatches, bucket_bytes, wrap)


@pytest.mark.compile
def test_overlapped_gradients_of_compiled_blocks():
    run(on_rank_gradients, CFG, 2, 2000, "compiled")


def on_rank_order(bucket_bytes):
    """When each bucket was sent: how many leaves' gradients had come."""
    sent, arrived = [], []
    one = ddp.send_bucket
    ddp.send_bucket = lambda tensors, **rest: sent.append(len(arrived)) or one(tensors, **rest)

    def counting(params, batch):
        for x in tree.leaves(params):
            x.register_hook(lambda g: arrived.append(g.shape))
        return loss(params, batch)

    gradient = overlapped_value_and_grad(counting, has_aux=True, bucket_bytes=bucket_bytes)
    out = []
    try:
        for _ in range(3):
            sent.clear()
            arrived.clear()
            _, grads = gradient(params_of(), batch_of(0, 2))
            out.append((list(sent), len(arrived)))
    finally:
        ddp.send_bucket = one
    assert_close(grads, value_and_grad(loss, has_aux=True)(params_of(), batch_of(0, 2))[1])
    return out


def test_buckets_are_sent_while_backward_runs():
    """Each leaf by itself is sent as it arrives, from the second call on; one great bucket goes at the end."""
    (first, second, third), other = run(on_rank_order, 1)
    n = len(tree.leaves(params_of()))
    assert [first, second, third] == other
    assert first == ([n] * n, n) and second == third == (list(range(1, n + 1)), n)
    for sent, n in run(on_rank_order, 1 << 30)[0]:
        assert sent == [n]


class _Tick(torch.autograd.Function):
    """Identity; backward leaves a note."""

    @staticmethod
    def forward(ctx, x, events):
        ctx.events = events
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        ctx.events.append("block")
        return g, None


def on_rank_interleaved(inside):
    events = []
    one = ddp.send_bucket
    ddp.send_bucket = lambda *args, **rest: events.append("message") or one(*args, **rest)

    def ticking(f):
        return lambda layer, x, ctx: _Tick.apply(f(layer, x, ctx), events)

    def mixed(params, batch):
        return loss(tree.cast(params, torch.float32) if inside else params, batch, wrap_block=ticking)

    options = {"has_aux": True, "bucket_bytes": 1000, "compute": None if inside else torch.float32}
    gradient = overlapped_value_and_grad(mixed, **options)
    try:
        for _ in range(2):
            events.clear()
            gradient(params_of(), batch_of(0, 2))
    finally:
        ddp.send_bucket = one
    return events


def test_a_cast_before_the_first_block_holds_all_messages_back():
    """Autograd runs first what was made last. With `compute`, messages go between the blocks."""
    late, early = run(on_rank_interleaved, True)[0], run(on_rank_interleaved, False)[0]
    assert late.count("block") == early.count("block") == 3
    assert late[:3] == ["block"] * 3 and late.count("message") > 6
    first, second, third = (i for i, event in enumerate(early) if event == "block")
    assert second - first > 1 and third - second > 1


def on_rank_compute(microbatches, group_of_one):
    """Masters fp64, maths fp32. Oracle: the cast inside of the loss, gradients of parts added in fp64."""
    params, batch = params_of(), with_global_denominator(batch_of(rank_of(None), 2))
    seen = []

    def watching(params, batch):
        seen.append({x.dtype for x in tree.leaves(params)})
        return loss(params, batch)

    def cast_inside(params, batch):
        return loss(tree.cast(params, torch.float32), batch)

    groups = [torch.distributed.new_group([r]) for r in range(2)]
    group = groups[rank_of(None)] if group_of_one else None
    gradient = overlapped_value_and_grad(
        watching, group, has_aux=True, op="sum", microbatches=microbatches, bucket_bytes=2000, compute=torch.float32
    )
    plain = value_and_grad(cast_inside, has_aux=True)
    (value, _), mine = (accumulate(plain, microbatches) if microbatches > 1 else plain)(params, batch)
    expected = mine if group_of_one else tree.map(lambda g: all_reduce(g, check=False), mine)
    for _ in range(2):
        (found, _), grads = gradient(params, batch)
        assert torch.equal(found, value)
        assert all(g.dtype == torch.float64 for g in tree.leaves(grads))
        assert_close(grads, expected, 1e-14, 1e-16)
    assert all(dtypes == {torch.float32} for dtypes in seen)


@pytest.mark.parametrize("group_of_one", [False, True], ids=["two", "one"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_compute_is_a_cast_inside_of_the_loss(microbatches, group_of_one):
    run(on_rank_compute, microbatches, group_of_one)


def on_rank_copies():
    """Bytes of gradients that leaves still hold when backward is over, beside the messages."""
    held = []
    finish = ddp._Reducer.finish

    def noted(self, limit):
        held.append(sum(x.grad.nbytes for x in self.inputs if x.grad is not None))
        out = finish(self, limit)
        assert all(x.grad is None for x in self.inputs)
        return out

    ddp._Reducer.finish = noted
    try:
        gradient = overlapped_value_and_grad(loss, has_aux=True)
        for _ in range(2):
            gradient(params_of(), batch_of(0, 2))
    finally:
        ddp._Reducer.finish = finish
    return held


def test_gradients_under_way_are_held_once():
    """The first call sends at its end; then what was sent is in its message alone."""
    assert run(on_rank_copies) == [[tree.n_bytes(params_of()), 0]] * 2


def on_rank_hooks():
    """How many hooks there are in each call."""
    counts = []
    one = torch.Tensor.register_post_accumulate_grad_hook
    torch.Tensor.register_post_accumulate_grad_hook = lambda x, hook: counts.append(1) or one(x, hook)
    found = []
    try:
        gradient = overlapped_value_and_grad(loss, has_aux=True)
        for _ in range(2):
            gradient(params_of(), batch_of(0, 2))
            found.append(len(counts))
            counts.clear()
    finally:
        torch.Tensor.register_post_accumulate_grad_hook = one
    return found


def test_a_hook_a_bucket():
    """Python in backward holds launches up: a hook for each leaf to learn the order, then one for each message."""
    assert run(on_rank_hooks) == [[len(tree.leaves(params_of())), 1]] * 2


def test_default_size_of_buckets():
    """Oracle: the rule, of meta tensors."""
    assert messages.default_bucket_bytes([torch.empty(1000, device="meta")]) == 25 << 20
    assert messages.default_bucket_bytes([torch.empty(1 << 30, device="meta")] * 2) == 1 << 27


def uneven(params, batch):
    """Rank 0 uses a, rank 1 uses b, both use c twice; d is used by none, e is no parameter."""
    which = params["a"] if rank_of(None) == 0 else params["b"]
    return (which * batch).sum() + (params["c"] * params["c"]).sum() * (rank_of(None) + 1)


def on_rank_uneven(bucket_bytes, op):
    params = {k: torch.arange(3.0, dtype=torch.float64) + i for i, k in enumerate("abcd")} | {"e": torch.arange(2)}
    batch = torch.full((3,), 2.0 + rank_of(None), dtype=torch.float64)
    gradient = overlapped_value_and_grad(uneven, bucket_bytes=bucket_bytes, op=op)
    n = 2 if op == "mean" else 1
    one = torch.ones(3, dtype=torch.float64)
    expected = {"a": 2 * one / n, "b": 3 * one / n, "c": 6 * params["c"] / n, "d": 0 * one, "e": None}
    for _ in range(2):
        value, grads = gradient(params, batch)
        assert_close(grads, expected)
        assert float(value) == float(uneven(params, batch))


@pytest.mark.parametrize("op", ["mean", "sum"])
@pytest.mark.parametrize("bucket_bytes", [1, 48, 10**6])
def test_ranks_that_use_different_parameters(bucket_bytes, op):
    """Oracle: by hand."""
    run(on_rank_uneven, bucket_bytes, op)


def on_rank_parts(microbatches, bucket_bytes, op, compute):
    """Oracle: the parts of whole gradients, which the same function gives without `parts`."""
    rank, N = rank_of(None), size_of(None)
    batch = with_global_denominator(batch_of(rank, N))
    params = {**params_of(), "number": torch.tensor(2.0, dtype=torch.float64)}

    def scaled(params, batch):
        number, model = params["number"], {k: v for k, v in params.items() if k != "number"}
        value, metrics = loss(model, batch)
        return value * number, metrics

    options = {"microbatches": microbatches, "bucket_bytes": bucket_bytes, "op": op, "compute": compute}
    make = partial(overlapped_value_and_grad, scaled, has_aux=True, **options)
    (value, _), whole = make()(params, batch)
    sending = make(parts=True)
    one, ddp.send_bucket = ddp.send_bucket, None  # no all_reduce
    try:
        for _ in range(2):
            (found, _), mine = sending(params, batch)
            assert torch.equal(found, value)
            assert tree.map(lambda x: x.shape, mine) == tree.map(lambda x: x.shape, shard(whole))
            assert_close(mine, shard(whole), 1e-12, 1e-15)
    finally:
        ddp.send_bucket = one


@pytest.mark.parametrize("op", ["mean", "sum"])
@pytest.mark.parametrize("compute", [None, torch.float32], ids=str)
@pytest.mark.parametrize(("microbatches", "bucket_bytes", "size"), [(1, 1, 2), (2, 2000, 3), (1, None, 2)])
def test_parts_of_gradients(microbatches, bucket_bytes, size, op, compute):
    run(on_rank_parts, microbatches, bucket_bytes, op, compute, size=size)


OPTIONS = {"schedule": schedules.constant(1e-2), "precision": FLOAT64, "max_norm": 0.5}


def trained(strategy, batches, n=5, **options):
    optimizer = adamw(weight_decay=0.1)
    step = make_step(loss, optimizer, strategy=strategy, **OPTIONS, **options)
    state = init_state(params_of(), optimizer, FLOAT64, strategy)
    rows = []
    for i in range(n):
        state, metrics = step(state, batches(i))
        rows.append(metrics)
    return state, rows


def on_rank_training(how):
    rank, N = rank_of(None), size_of(None)
    summed = reducing(partial(all_reduce_mean, op="sum"))._replace(prepare=with_global_denominator)
    strategy = {
        "reduce": summed,
        "overlapped": ddp.strategy(),
        "microbatches": ddp.strategy(bucket_bytes=500),
        "parts": zero.strategy(bucket_bytes=500),
        "whole": zero.strategy(whole=True),
    }[how]
    microbatches = 2 if how == "microbatches" else 1
    state, rows = trained(strategy, lambda i: batch_of(rank, N, step=i), microbatches=microbatches)
    expected, theirs = trained(ALONE, lambda i: batch_of(0, 1, step=i))
    if how == "parts":
        state = state._replace(opt_state=zero_state.gather_state(state.opt_state, expected.opt_state))
    if how == "whole":
        state, expected = state.params, expected.params
    assert_close(state, expected, 1e-10, 1e-12)  # AdamW divides by roots of small numbers
    check_equal(state)
    for a, b in zip(rows, theirs, strict=True):
        torch.testing.assert_close(a["grad_norm"], b["grad_norm"], rtol=1e-9, atol=0)
        if how != "reduce":  # whose metrics are of this rank
            torch.testing.assert_close(a["loss"], b["loss"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("how", ["reduce", "overlapped", "microbatches", "parts", "whole"])
def test_training_is_that_of_one_process(how):
    run(on_rank_training, how)


def on_rank_compiled():
    """jit compiles what is left: the update, in donated memory."""
    rank, optimizer = rank_of(None), adamw()
    step = make_step(loss, optimizer, strategy=ddp.strategy(), **OPTIONS)
    step, plain = jit(step, donate=0, backend="aot_eager"), make_step(loss, optimizer, **OPTIONS)
    state, other = (init_state(params_of(), optimizer, precision=FLOAT64) for _ in range(2))
    for i in range(3):
        state, _ = step(state, batch_of(rank, 2, step=i))
        other, _ = plain(other, batch_of(0, 1, step=i))
    assert_close(state, other, 1e-10, 1e-12)


def on_rank_begins():
    """Whatever a rank has, all begin with what rank 0 has."""
    mine = tree.map(lambda x: x + rank_of(None), params_of())
    for strategy in (ddp.strategy(), zero.strategy()):
        assert_close(init_state(mine, adamw(), FLOAT64, strategy).params, params_of(), 0, 0)


def test_ranks_begin_alike():
    run(on_rank_begins)


def on_rank_mean():
    """A loss that is a mean over each rank's batch: summed over ranks it would be twice as large."""

    def mean(params, batch):
        return loss(params, {k: v for k, v in batch.items() if k != "denominator"})

    state = init_state(params_of(), adamw(), FLOAT64, ddp.strategy())
    make_step(mean, adamw(), strategy=ddp.strategy(), **OPTIONS)(state, batch_of(rank_of(None), 2))


def test_a_mean_is_refused():
    with pytest.raises(RankError, match=r"does not divide by batch.*denominator") as error:
        run(on_rank_mean)
    assert sorted(error.value.errors) == [0, 1]


@pytest.mark.compile
def test_compiled_step():
    run(on_rank_compiled)


def on_rank_other_shape(how):
    params = {"layers": [{"w": torch.ones(3, 2 + rank_of(None))}]}
    if how == "overlapped":
        overlapped_value_and_grad(lambda p, b: p["layers"][0]["w"].sum())(params, None)
    else:
        all_reduce_mean(params, strategy=how)


@pytest.mark.parametrize("how", ["overlapped", "flat", "bucketed"])
def test_a_rank_with_another_shape_is_an_error_on_all(how):
    with pytest.raises(RankError) as error:
        run(on_rank_other_shape, how)
    assert sorted(error.value.errors) == [0, 1]
    for message in error.value.errors.values():
        assert "ranks differ at layers.0.w: (3, 2) float32 on rank 0; (3, 3) float32 on rank 1" in message


def on_rank_nan(bad):
    batch = with_global_denominator(batch_of(rank_of(None), 2))
    params = params_of()
    if rank_of(None) == bad:
        params["ln_final"]["weight"] = params["ln_final"]["weight"] * float("nan")
    (value, metrics), _ = ddp.differentiate(loss)(params, batch)
    return bool(value.isnan()), int(metrics["non_finite_rank"])


@pytest.mark.parametrize("bad", [0, 1])
def test_a_nan_is_reported_with_its_rank(bad):
    assert run(on_rank_nan, bad) == [(True, bad)] * 2


def test_alone():
    """Oracle: value_and_grad."""
    batch = with_global_denominator(batch_of(0, 1))
    assert float(batch["denominator"]) == float(batch["weights"].sum())
    (value, _), grads = ddp.differentiate(loss, microbatches=2)(params_of(), batch)
    (expected, _), theirs = whole()
    assert_close(grads, theirs)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert all_reduce_mean(grads) is grads
    with pytest.raises(ValueError, match="strategy must be"):
        all_reduce_mean(grads, strategy="tree")
    with pytest.raises(ValueError, match="bucket_bytes must be"):
        overlapped_value_and_grad(loss, bucket_bytes=0)
    with pytest.raises(ValueError, match="several microbatches need argnums 0"):
        overlapped_value_and_grad(loss, argnums=1, microbatches=2)
