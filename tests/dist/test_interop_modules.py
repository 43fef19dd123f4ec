"""Modules as functions, and data parallel modules on two Gloo processes; both kinds of parallel module in training.

Oracle: the same module in one process, on the whole batch, with torch.optim.
"""

import weakref
from functools import partial

import pytest
import torch
from torch import nn

from purelm.dist.agreement import check_equal
from purelm.dist.world import rank_of
from purelm.interop import ddp, fsdp, functional
from purelm.transforms import jit, value_and_grad
from tests.dist.modules import KINDS, TOLERANCE, compare, compare_grads, data, loss_of, mine, model_of, whole
from tests.dist.processes import run

CLASSES = {"ddp": ddp, "fsdp": fsdp}


def on_rank_training(which, kind, dtype, optimizer, n_steps, options):
    # Rank 1 begins elsewhere: rank 0's values count.
    oracle = model_of(kind, dtype)
    module = model_of(kind, dtype, seed=rank_of(None))
    model = CLASSES[which](module, **options)
    assert model.module is module
    compare(whole(model), oracle.state_dict(), {"rtol": 0, "atol": 0})
    ours, theirs = optimizer(model.parameters()), optimizer(oracle.parameters())
    for step in range(n_steps):
        ours.zero_grad(), theirs.zero_grad()
        loss_of(oracle, data(step)).backward()
        loss_of(model, mine(data(step))).backward()
        model.finish_gradient_synchronization()
        compare_grads(model, oracle, TOLERANCE[dtype])
        check_equal([p.grad for p in model.parameters() if which == "ddp" or p.ndim < 2])
        ours.step(), theirs.step()
    compare(whole(model), oracle.state_dict(), TOLERANCE[dtype])
    if kind == "tied":
        assert module.head.weight is module.embed.weight
    if kind == "frozen":
        assert not torch.equal(module.blocks[0].up.weight, module.blocks[1].up.weight)
        state = model_of(kind, dtype).state_dict()
        for name in ("blocks.1.up.weight", "blocks.2.norm.weight", "embed.weight"):
            assert torch.equal(whole(model)[name], state[name])
    with torch.no_grad():  # evaluation, whose order of modules is learned and used like the others
        torch.testing.assert_close(model(data(9)[0]), oracle(data(9)[0]), **TOLERANCE[dtype])


def on_rank_deterministic(*args):
    """With torch's deterministic algorithms, which also fill with nan what is not written to."""
    torch.use_deterministic_algorithms(True)
    try:
        on_rank_training(*args)
    finally:
        torch.use_deterministic_algorithms(False)


sgd = partial(torch.optim.SGD, lr=0.1)
adamw = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["ddp", "fsdp"])
def test_training_is_that_of_one_process(which, kind, dtype):
    run(on_rank_deterministic, which, kind, dtype, sgd, 5 if which == "ddp" else 3, {})


@pytest.mark.parametrize("which", ["ddp", "fsdp"])
def test_training_with_adamw(which):
    run(on_rank_training, which, "tied", torch.float64, adamw, 3, {})


@pytest.mark.parametrize("bucket_bytes", [1, 500])
def test_buckets(bucket_bytes):
    run(on_rank_training, "ddp", "tied", torch.float64, sgd, 2, {"bucket_bytes": bucket_bytes})


def test_on_four_ranks():
    """Some ranks' parts of 6 rows are filled up, as are those of 13 and of 9."""
    run(on_rank_training, "fsdp", "tied", torch.float64, sgd, 2, {}, size=4)


def on_rank_of_a_pair():
    """Two pairs of ranks, each with a model of its own kind and data of its own."""
    rank, pairs = rank_of(None), [torch.distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    pair, kind = pairs[rank // 2], KINDS[rank // 2]
    for which in CLASSES.values():
        oracle, model = model_of(kind, seed=rank // 2 * 2), which(model_of(kind, seed=rank), pair)
        optimizers = sgd(oracle.parameters()), sgd(model.parameters())
        ids = data(rank // 2)
        loss_of(oracle, ids).backward(), loss_of(model, ids.chunk(2, 1)[rank % 2]).backward()
        model.finish_gradient_synchronization()
        for optimizer in optimizers:
            optimizer.step()
        compare(whole(model), oracle.state_dict(), TOLERANCE[torch.float64])
    for group in pairs:
        torch.distributed.destroy_process_group(group)


def test_groups():
    run(on_rank_of_a_pair, size=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["ddp", "fsdp"])
def test_alone(which, kind):
    """Oracle: the same module, to the last bit: the same operations run."""
    on_rank_training(which, kind, torch.float64, sgd, 2, {})
    model, oracle = CLASSES[which](model_of(kind)), model_of(kind)
    loss_of(model, data(0)).backward(), loss_of(oracle, data(0)).backward()
    model.finish_gradient_synchronization()
    compare_grads(model, oracle, {"rtol": 0, "atol": 0})


# functional. Oracle: the module itself.


@pytest.mark.parametrize("kind", ["plain", "tied", "frozen"])
def test_functional_has_the_values_and_gradients_of_the_module(kind):
    module, (x, y) = model_of(kind), data(0)
    params, apply = functional(module)
    assert list(params) == [name for name, _ in module.named_parameters()]
    assert not any(p.requires_grad for p in params.values())
    kept = {name: p.clone() for name, p in params.items()}

    def loss(params):
        return nn.functional.cross_entropy(apply(params, x).flatten(0, 1), y.flatten())

    value, grads = value_and_grad(loss)(params)
    again = torch.func.grad(loss)(params)
    for p in module.parameters():
        p.requires_grad_(True)
    expected = loss_of(module, (x, y))
    expected.backward()
    assert torch.equal(value, expected.detach())
    compare(grads, {name: p.grad for name, p in module.named_parameters()}, TOLERANCE[torch.float64])
    compare(again, grads, TOLERANCE[torch.float64])
    per_row = torch.func.vmap(apply, (None, 0))(params, x)
    torch.testing.assert_close(per_row, module(x).detach(), **TOLERANCE[torch.float64])
    with torch.no_grad():  # neither shares memory with the other
        for p in module.parameters():
            p.zero_()
    compare(params, kept, {"rtol": 0, "atol": 0})
    assert torch.equal(loss(params), value)


@pytest.mark.compile
def test_functional_compiled():
    module, (x, _) = model_of("tied"), data(0)
    params, apply = functional(module)
    out = jit(apply, backend="aot_eager")(params, x)
    torch.testing.assert_close(out, module(x).detach(), **TOLERANCE[torch.float64])


def test_functional_drops_what_forward_writes():
    """BatchNorm writes means, variances and a count."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(1.0))
    module[2].eval()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    before = {name: v.clone() for name, v in module.state_dict().items()}
    params, apply = functional(module)
    first, second = apply(params, x), apply(params, x)
    assert torch.equal(first, second) and not torch.equal(first, torch.zeros_like(first))
    compare(module.state_dict(), before, {"rtol": 0, "atol": 0})
    expected = module(x)  # which writes
    assert torch.equal(first, expected) and int(module[1].num_batches_tracked) == 1
    module.eval()
    assert torch.equal(apply(params, x), first)  # in the mode, and with the buffers, of then
    running, apply_now = functional(module)
    assert torch.equal(apply_now(running, x), module(x)) and not torch.equal(module(x), first)


class Counting(nn.Module):
    """Reads what it writes, in place and by another tensor."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("count", torch.tensor(1.0), persistent=False)
        self.register_buffer("last", torch.tensor(1.0))

    def forward(self, x):
        self.count += 1
        self.last = self.last + x
        return self.w * self.count + self.last


def test_functional_is_pure():
    params, apply = functional(Counting())
    assert [float(apply(params, torch.tensor(10.0))) for _ in range(2)] == [2.0 * 2 + 11] * 2


def test_functional_lets_go_of_the_module():
    module = model_of("tied")
    left = weakref.ref(module.embed.weight)
    params, apply = functional(module)
    expected = module(data(0)[0]).detach()
    del module
    assert left() is None and torch.equal(apply(params, data(0)[0]), expected)


def test_functional_with_other_names():
    params, apply = functional(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"params lacks \['bias'\] and has unknown \['b'\]"):
        apply({"weight": params["weight"], "b": params["bias"]}, torch.ones(1, 2))


# ddp.


class Switch(nn.Module):
    """Uses the parameters whose letters it is told."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.full((3,), 1.0 + i)) for i in range(3))
        self.register_buffer("count", torch.tensor(3 + rank_of(None)))
        self.register_buffer("mask", torch.tensor([rank_of(None) == 0, True]))

    def forward(self, letters, x):
        return sum((getattr(self, letter) * x).sum() for letter in letters)


def on_rank_unused():
    model, rank = ddp(Switch(), bucket_bytes=1), rank_of(None)
    assert int(model.module.count) == 3 and model.module.mask.tolist() == [True, True]
    model("ab" if rank == 0 else "b", x=torch.tensor(2.0 + rank)).backward()
    model.finish_gradient_synchronization()
    a, b, c = model.module.a, model.module.b, model.module.c
    assert a.grad.tolist() == [1.0] * 3  # (2 + 0) / 2
    assert b.grad.tolist() == [2.5] * 3
    assert c.grad is None  # so no weight decay moves it, as in one process
    model("c", x=torch.tensor(1.0)).backward()  # added to what is there
    model.finish_gradient_synchronization()
    assert a.grad.tolist() == [1.0] * 3 and b.grad.tolist() == [2.5] * 3 and c.grad.tolist() == [1.0] * 3


@pytest.mark.parametrize("n", [1, 2])
def test_ddp_unused_parameters(n):
    """Oracle: arithmetic. Twice in the same processes, which must not be left in the middle of a message."""
    for _ in range(n):
        run(on_rank_unused)


def on_rank_no_sync():
    oracle, model = model_of(), ddp(model_of())
    for step in range(4):
        loss_of(oracle, data(step)).backward()
    with model.no_sync():
        loss_of(model, mine(data(0))).backward()
        with model.no_sync():
            loss_of(model, mine(data(1))).backward()
        loss_of(model, mine(data(2))).backward()
        assert not model._means.under_way
    loss_of(model, mine(data(3))).backward()
    assert model._means.under_way
    model.finish_gradient_synchronization()
    compare_grads(model, oracle, TOLERANCE[torch.float64])
    with pytest.raises(RuntimeError, match="no_sync"):
        loss_of(model, mine(data(0))).backward()
        loss_of(model, mine(data(1))).backward()
    model.finish_gradient_synchronization()


def test_ddp_accumulates_under_no_sync():
    run(on_rank_no_sync)


def on_rank_overlap(reverse):
    """Names of the parameters that have been sent at the moments when gradients arrive."""
    torch.manual_seed(0)
    module = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(4)])
    model, seen = ddp(module, bucket_bytes=128, wire=torch.bfloat16), []
    for i, p in enumerate(module.parameters()):
        p.register_post_accumulate_grad_hook(lambda p, i=i: seen.append((i, len(model._means.under_way))))
    x = torch.ones(2, 4)
    for layer in reversed(module) if reverse else module:
        x = layer(x)
    x.sum().backward()
    assert all(p.grad is None for p in module.parameters())  # held once, by the message
    model.finish_gradient_synchronization()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    return seen, [p.grad for p in module.parameters()]


def test_ddp_sends_while_backward_runs():
    """Two 64-byte matrices a bucket. Where gradients come the other way round, the order of buckets is the same."""
    (seen, grads), (same, others) = run(on_rank_overlap, False)
    assert seen == same == [(3, 0), (2, 1), (1, 1), (0, 2)]
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))
    (seen, _), (same, _) = run(on_rank_overlap, True)
    assert seen == same == [(0, 0), (1, 0), (2, 0), (3, 2)]


def on_rank_wire():
    model, exact = ddp(model_of(), wire=torch.bfloat16), model_of()
    loss_of(model, mine(data(0))).backward(), loss_of(exact, data(0)).backward()
    model.finish_gradient_synchronization()
    compare_grads(model, exact, {"rtol": 2**-7, "atol": 2**-9})  # three roundings of 2^-9 of what may cancel
    assert all(torch.equal(p.grad, p.grad.bfloat16().double()) for p in model.parameters())


def test_ddp_gradients_travel_in_wire():
    run(on_rank_wire)


def on_rank_wrong(which):
    rank = rank_of(None)
    with pytest.raises(ValueError, match=r"module: ranks differ at 0.weight: \(2, 3\) float32 on rank 0; \(2, 4\)"):
        CLASSES[which](nn.Sequential(nn.Linear(3 + rank, 2)))
    with pytest.raises(ValueError, match=r"requires_grad: ranks differ at bias: True on rank 0; False on rank 1"):
        module = nn.Linear(2, 2)
        module.bias.requires_grad_(rank == 0)
        CLASSES[which](module)
    with pytest.raises(ValueError, match="bucket_bytes must be at least 1, got 0"):
        ddp(nn.Linear(2, 2), bucket_bytes=0)


@pytest.mark.parametrize("which", ["ddp", "fsdp"])
def test_wrong_arguments(which):
    run(on_rank_wrong, which)
