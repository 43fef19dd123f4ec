"""Fully sharded modules on two Gloo processes; their training is in test_interop_modules.

Oracle: the same module in one process, on the whole batch.
"""

import time
import weakref
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import nn

from purelm.dist import fsdp_units, sharding
from purelm.dist.world import rank_of
from purelm.interop import fsdp
from tests.dist.modules import TOLERANCE, Linear, compare, compare_grads, data, loss_of, mine, model_of
from tests.dist.processes import run

FLOAT64 = TOLERANCE[torch.float64]


def on_rank_accumulation():
    oracle, model = model_of("tied"), fsdp(model_of("tied"))
    for steps in ((0, 1), (2,)):  # two backward passes and one, without zero_grad in between
        for step in steps:
            loss_of(oracle, data(step)).backward()
            loss_of(model, mine(data(step))).backward()
            assert len(model._under_way) == 2  # the last gradients are on their way, older messages are let go of
        model.finish_gradient_synchronization()
        compare_grads(model, oracle, FLOAT64)
    # Both forward passes first: two graphs at once.
    for one, batch in ((oracle, data), (model, lambda i: mine(data(i)))):
        (loss_of(one, batch(3)) + loss_of(one, batch(4))).backward()
    model.finish_gradient_synchronization()
    model.finish_gradient_synchronization()  # nothing is left
    compare_grads(model, oracle, FLOAT64)


def test_gradients_add_up():
    run(on_rank_accumulation)


def on_rank_kept():
    """What a rank holds: shapes, dtypes, and optimizer states of parts."""
    module = model_of("tied", torch.float32)
    names, before = [name for name, _ in module.named_parameters()], weakref.ref(module.embed.weight)
    model = fsdp(module, compute_dtype=torch.bfloat16)
    assert before() is None
    found = {name: (tuple(p.shape), p.dtype) for name, p in model.module.named_parameters()}
    assert list(found) == names and {dtype for _, dtype in found.values()} == {torch.float32}
    assert found["embed.weight"][0] == (7, 6)  # 13 rows
    assert found["blocks.0.up.weight"][0] == (5, 6) and found["blocks.0.down.weight"][0] == (3, 9)
    assert found["norm.weight"][0] == (6,) and found["scale"][0] == ()
    assert all(p.is_leaf and isinstance(p, nn.Parameter) for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model, mine(data(0))).backward()
    model.finish_gradient_synchronization()
    optimizer.step()
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())


def test_masters_and_states_are_parts():
    run(on_rank_kept)


def on_rank_full():
    module, oracle = model_of("tied"), model_of("tied")
    model = fsdp(module)
    full = model.gather_full_params()
    compare(full, oracle.state_dict(), {"rtol": 0, "atol": 0})
    assert list(full) == list(oracle.state_dict()) and full["head.weight"] is full["embed.weight"]
    assert not any(x.requires_grad for x in full.values())
    for x in full.values():
        x.zero_()
    compare(model.gather_full_params(), oracle.state_dict(), {"rtol": 0, "atol": 0})
    again = model_of("tied", seed=5)
    again.load_state_dict(model.gather_full_params())


@pytest.mark.parametrize("size", [1, 2])
def test_full_parameters_are_the_state_dict(size):
    on_rank_full() if size == 1 else run(on_rank_full)


def on_rank_mixed(kind, dtype, tolerance):
    oracle, model = model_of(kind, torch.float32), fsdp(model_of(kind, torch.float32), compute_dtype=dtype)
    sent, seen = [], []
    gather = sharding.all_gather_single

    def spy(out, x, *args, **kwargs):
        sent.append(x.dtype)
        return gather(out, x, *args, **kwargs)

    sharding.all_gather_single = spy
    model.module.embed.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    model.module.head.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    model.module.blocks[0].norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    optimizers = [torch.optim.SGD(one.parameters(), 0.1) for one in (oracle, model)]
    try:
        for step in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of(oracle, data(step)).backward()
            loss_of(model, mine(data(step))).backward()
            model.finish_gradient_synchronization()
            assert all(p.grad.dtype == p.dtype == torch.float32 for p in model.parameters())
            for optimizer in optimizers:
                optimizer.step()
    finally:
        sharding.all_gather_single = gather
    assert sent == [dtype] * 3 * (8 + 7)  # the embedding's backward needs no weights
    # The table in fp32 makes the sum fp32; head takes what comes in compute_dtype.
    assert seen == [dtype, torch.float32, dtype] * 3
    compare(model.gather_full_params(), oracle.state_dict(), tolerance)


# Parameters move by up to 1 in three steps; a rounding of 1 is 2^-12 in fp16 and 2^-9 in bf16. The course has 1e-4.
@pytest.mark.parametrize(
    ("kind", "dtype", "atol"),
    [("plain", torch.float16, 1e-4), ("tied", torch.float16, 2**-12), ("tied", torch.bfloat16, 2**-8)],
    ids=str,
)
def test_compute_dtype(kind, dtype, atol):
    run(on_rank_mixed, kind, dtype, {"rtol": 0, "atol": atol})


def test_compute_dtype_alone():
    """Oracle: the module in that dtype, whose operations are the same where all inputs are of it."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    low = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).bfloat16()
    low.load_state_dict(module.state_dict())
    model, x = fsdp(module, compute_dtype=torch.bfloat16), torch.randn(6, 4)
    out, expected = model(x), low(x.bfloat16())
    assert torch.equal(out, expected)
    out.float().square().sum().backward(), expected.float().square().sum().backward()
    model.finish_gradient_synchronization()
    for p, q in zip(module.parameters(), low.parameters(), strict=True):
        assert p.grad.dtype == torch.float32 and torch.equal(p.grad, q.grad.float())


@contextmanager
def watched(model):
    """events: what is gathered and scattered; alive: units that are whole or under way; most: of those at once."""
    alive, most, events = set(), [0], []
    start, drop, scatter = fsdp_units.Unit.start, fsdp_units.Unit.drop, fsdp_units.Schedule.scatter
    names = {id(p): name.removesuffix(".weight") for name, p in model.module.named_parameters()}

    def spy_start(self):
        before = self.pending is None and self.wholes is None
        start(self)
        if before:
            events.append(f"gather {names[id(self.parts[0])]}")
            alive.add(self)
            most[0] = max(most[0], len(alive))

    def spy_drop(self):
        drop(self)
        alive.discard(self)

    def spy_scatter(self, unit, *args, **kwargs):
        events.append(f"scatter {names[id(unit.parts[0])]}")
        return scatter(self, unit, *args, **kwargs)

    for one in model.modules():
        if isinstance(one, Linear):
            one.register_forward_pre_hook(lambda m, args: events.append(f"forward {names[id(m.weight)]}"))
    fsdp_units.Unit.start, fsdp_units.Unit.drop, fsdp_units.Schedule.scatter = spy_start, spy_drop, spy_scatter
    try:
        yield alive, most, events
    finally:
        fsdp_units.Unit.start, fsdp_units.Unit.drop, fsdp_units.Schedule.scatter = start, drop, scatter


def on_rank_messages(kind):
    """In two steps and an evaluation: most units at once, those left at the end, and events."""
    model, steps = fsdp(model_of(kind)), []
    with watched(model) as (alive, most, events):
        for i in range(3):
            most[0] = 0
            events.clear()
            with torch.set_grad_enabled(i < 2):
                loss = loss_of(model, mine(data(0)))
            if i < 2:
                loss.backward()
            steps.append((most[0], len(alive), list(events)))
            # In a call that is not through the root nothing is known of what comes next.
            x = torch.ones(2, 6, dtype=torch.float64)
            model.module.blocks[0].up(x)
            assert not alive
            model.finish_gradient_synchronization()
    return steps


UNITS = ["embed", *[f"blocks.{i}.{which}" for i in range(3) for which in ("up", "down")], "head"]


def of(what, events):
    return [event.removeprefix(what + " ") for event in events if event.startswith(what)]


@pytest.mark.parametrize("kind", ["plain", "frozen"])
def test_two_matrices_at_a_time_and_one_gather_each_way(kind):
    """The embedding's backward needs no weights, nor does that of a first frozen one."""
    steps, same = run(on_rank_messages, kind)
    assert steps == same
    (most, left, first), (most_then, left_then, second), (most_at_last, left_at_last, last) = steps
    assert (most, left) == (1, 0) and (most_then, left_then) == (2, 0) and (most_at_last, left_at_last) == (2, 0)
    cut = [u for u in UNITS[::-1] if kind == "plain" or u not in ("embed", "blocks.1.up")]
    # Nothing before the first block's own matrices needs a gradient where the embedding is frozen.
    for events in (first, second):
        assert of("gather", events) == UNITS + UNITS[:0:-1]
        assert of("scatter", events) == cut
    assert of("gather", last) == UNITS and not of("scatter", last)
    for here, after in pairwise(UNITS[1:]):  # the next one's are under way, not those after it
        at = second.index(f"forward {here}")
        assert at < second.index(f"gather {after}") < second.index(f"forward {after}")
    for before, here in pairwise(UNITS[1:]):
        if here in cut:
            assert len(second) - second[::-1].index(f"gather {before}") <= second.index(f"scatter {here}")


@pytest.mark.parametrize("kind", ["checkpoint", "checkpoint_reentrant"])
def test_what_a_checkpoint_runs_again_is_not_of_the_order(kind):
    (*_, (most, left, events)), _ = run(on_rank_messages, kind)
    assert (most, left, of("gather", events)) == (2, 0, UNITS)


def on_rank_dropped(kind):
    """Storages of whole matrices between forward and backward, and after it."""
    model, seen, whole_of = fsdp(model_of(kind)), [], sharding.whole_of

    def spy(parts, shape):
        x = whole_of(parts, shape)
        seen.append(weakref.ref(x.untyped_storage()))
        return x

    def alive():
        for _ in range(100):  # Gloo's thread lets go of a message some time after it has arrived
            if not any(x() is not None for x in seen):
                break
            time.sleep(0.01)
        return sum(x() is not None for x in seen)

    sharding.whole_of = spy
    try:
        counts = []
        for _ in range(2):
            seen.clear()
            loss = loss_of(model, mine(data(0)))
            counts.append((len(seen), alive()))
            loss.backward()
            counts.append((len(seen), alive()))
            model.finish_gradient_synchronization()
    finally:
        sharding.whole_of = whole_of
    return counts


@pytest.mark.parametrize("kind", ["plain", "tied", "frozen"])
def test_what_was_gathered_is_dropped(kind):
    counts, _ = run(on_rank_dropped, kind)
    assert counts == [(8, 0), (15, 0)] * 2


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = Linear(3, 3), Linear(3, 3), Linear(3, 3)

    def forward(self, x, letters):
        for letter in letters:
            x = getattr(self, letter)(x)
        return x


def on_rank_orders():
    torch.manual_seed(0)
    oracle, model = Turned(), fsdp(Turned())
    oracle.load_state_dict(model.gather_full_params())
    x, found, rank = torch.randn(4, 3), [], rank_of(None)
    with watched(model) as (alive, most, events):
        for letters in ("abc", "cba", "cba", "ca", "abba", "abba"):
            oracle(x, letters).square().mean().backward()
            alive.clear()  # of a graph that is gone
            events.clear()
            most[0] = 0
            model(x[2 * rank : 2 * rank + 2], letters).square().mean().backward()
            found.append((most[0], of("gather", events)))
            model.finish_gradient_synchronization()
            compare_grads(model, oracle, TOLERANCE[torch.float32])
    return found


def test_an_order_that_changes():
    """The order of the forward before is what is gathered ahead. The first layer's input needs no gradient."""
    found, same = run(on_rank_orders)
    assert found == same
    assert found[2] == (2, list("cbaab")) and found[5] == (2, list("abbaabb"))


class Parent(nn.Module):
    """A matrix of its own by two names, a frozen one, and a child that is called with keywords and is tied to it."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.linspace(-1, 1, 9).view(3, 3).double())
        self.same, self.child = self.matrix, Linear(3, 3)
        self.child.weight = self.matrix
        self.fixed = nn.Parameter(torch.eye(3).double() * 2, requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.some = nn.Parameter(torch.ones(3).double())
        self.steps = nn.Parameter(torch.arange(6).view(3, 2), requires_grad=False)

    def forward(self, x, *, original, alone=False):
        x = self.child(x=torch.tanh(x @ self.matrix @ self.fixed) @ self.same) + self.steps.sum()
        return x if original else x * self.some


def on_rank_parent():
    torch.manual_seed(0)
    oracle, module, calls = Parent(), Parent(), []
    model = fsdp(module)
    assert module.same is module.matrix is module.child.weight and module.matrix.shape == (2, 3)
    assert module.steps.shape == (3, 2)  # integers are no masters to be cut
    module.register_forward_hook(lambda *_: calls.append("parent"))
    module.child.register_forward_hook(lambda *_: calls.append("child"))
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rank = rank_of(None)
    for _ in range(2):
        # Rank 1 does not use `some`.
        total = oracle(x[:2], original=False).square().sum() + oracle(x[2:], original=True).square().sum()
        (total / 2).backward()
        model(x[2 * rank : 2 * rank + 2], original=rank == 1).square().sum().backward()
        model.finish_gradient_synchronization()
        compare_grads(model, oracle, FLOAT64)
        assert module.unused.grad is None and module.steps.grad is None
    assert calls == ["child", "parent"] * 2
    direct = x[:2].clone().requires_grad_()
    torch.testing.assert_close(module.child(direct), oracle.child(x[:2]), **FLOAT64)  # not through the root


def test_matrices_by_several_names_and_vectors_that_a_rank_does_not_use():
    run(on_rank_parent)


def on_rank_error():
    """An exception in forward leaves nothing behind."""
    oracle, model = model_of(), fsdp(model_of())
    for _ in range(2):
        with pytest.raises(IndexError):
            model(torch.tensor([[99]]))
    handle = model.module.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(data(0)[0])
    handle.remove()
    for p in model.parameters():
        p.grad = None
    loss_of(model, mine(data(0))).backward(), loss_of(oracle, data(0)).backward()
    model.finish_gradient_synchronization()
    compare_grads(model, oracle, FLOAT64)


def test_an_exception_in_forward():
    run(on_rank_error)


def test_modules_that_cannot_be_cut():
    listed = nn.Module()
    listed.rows = nn.ParameterList([torch.ones(2, 2)])
    with pytest.raises(ValueError, match=r"fsdp: rows \(ParameterList\) holds matrices, but has no forward"):
        fsdp(listed)
    mixed = nn.Bilinear(2, 2, 2, bias=False)
    mixed.other = nn.Parameter(torch.ones(2, 2).double())
    with pytest.raises(ValueError, match=r"the module \(Bilinear\) has matrices of 2 dtypes.*float32.*float64"):
        fsdp(mixed)
    assert mixed.weight.shape == (2, 2, 2) and "forward" not in vars(mixed)
    assert fsdp(nn.ParameterList([torch.ones(2)])).gather_full_params()["0"].shape == (2,)
