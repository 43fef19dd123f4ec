"""torch's optimizer classes on two Gloo processes.

Oracle: torch.optim itself, on the same gradients, in one process.
"""

import io

import numpy as np
import pytest
import torch

from purelm import interop, tree
from purelm.dist import zero
from purelm.dist.world import rank_of
from purelm.optim import adamw, sgd
from tests.dist.models import equal
from tests.dist.processes import RankError, run


class Tied(torch.nn.Module):
    """A small network: tied weights, a frozen layer, a parameter that is never used."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.first, self.frozen = torch.nn.Linear(5, 7), torch.nn.Linear(7, 7)
        self.middle, self.last = torch.nn.Linear(7, 7, bias=False), torch.nn.Linear(7, 7)
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.last.weight = self.middle.weight
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.last(torch.tanh(self.middle(torch.tanh(self.frozen(torch.relu(self.first(x)))))))


def inputs(step):
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(step))


def trained(model, optimizer, steps, scheduler=None):
    for step in steps:
        optimizer.zero_grad()
        (model(inputs(step).to(model.unused.dtype)) ** 2).mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [p.detach().clone() for p in model.parameters()]


def assert_same(found, wanted):
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x.detach().numpy(), y.detach().numpy())  # the course's test: rtol 1e-7, atol 0
        assert torch.equal(x, y)


def groups_of(model):
    first, *rest = [p for p in model.parameters() if p is not model.unused]
    return [{"params": [first], "lr": 0.05}, {"params": rest, "weight_decay": 0.0}, {"params": [model.unused]}]


CLASSES = {
    "adamw": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
}


def on_rank_course(name, grouped):
    """Ten steps, equal to the last bit, also after a group is added; the state is that of torch, shared out."""
    cls, options = CLASSES[name]
    one, many = Tied(), Tied()
    make = groups_of if grouped else lambda model: model.parameters()
    plain = cls(make(one), **options)
    sharded = interop.sharded_optimizer(make(many), cls, **options)
    assert isinstance(sharded, torch.optim.Optimizer)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 3, gamma=0.5) for o in (plain, sharded)]
    assert_same(trained(many, sharded, range(10), schedulers[1]), trained(one, plain, range(10), schedulers[0]))
    extra = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    for optimizer, p in zip((plain, sharded), extra, strict=True):
        optimizer.add_param_group({"params": p, "lr": 0.01})
        for _ in range(3):
            optimizer.zero_grad()
            loss = optimizer.step(lambda p=p: (p**3).sum().backward() or 5.0)
            assert loss == 5.0
    assert_same(extra[:1], extra[1:])
    whole, wanted = interop.whole_state_dict(sharded), plain.state_dict()
    assert equal(whole["state"], wanted["state"])
    assert whole["param_groups"] == wanted["param_groups"]
    return sorted(sharded.state_dict()["state"]), len(wanted["state"])


@pytest.mark.parametrize("grouped", [False, True], ids=["one_group", "groups"])
@pytest.mark.parametrize("name", CLASSES)
def test_sharded_torch_optimizers(name, grouped):
    (first, n), (second, _) = run(on_rank_course, name, grouped)
    assert sorted(first + second) == sorted({*first, *second}) and len(first + second) == n
    assert first and second  # shared out, nothing twice


def on_rank_loads():
    """Continued from a state dict of this rank, of all ranks, and of torch: each as if nothing had happened."""
    cls, options = CLASSES["adamw"]
    one, many = Tied(), Tied()
    plain, sharded = cls(one.parameters(), **options), interop.sharded_optimizer(many.parameters(), cls, **options)
    trained(one, plain, range(3))
    trained(many, sharded, range(3))
    weights = {k: v.clone() for k, v in one.state_dict().items()}
    saved = [sharded.state_dict(), interop.whole_state_dict(sharded), plain.state_dict()]
    saved = [torch.load(_saved(s), weights_only=True) for s in saved]
    expected = trained(one, plain, range(3, 6))
    for state in saved:
        again = Tied()
        again.load_state_dict(weights)
        optimizer = interop.sharded_optimizer(again.parameters(), cls, lr=7.0)
        optimizer.load_state_dict(state)
        assert_same(trained(again, optimizer, range(3, 6)), expected)
        assert tree.n_params(optimizer.state_dict()["state"]) < tree.n_params(plain.state_dict()["state"])
    alone = cls(Tied().parameters(), lr=7.0)
    alone.load_state_dict(saved[1])  # the whole one is torch's own


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_sharded_torch_state_dicts():
    run(on_rank_loads)


def on_rank_balance():
    params = [torch.nn.Parameter(torch.ones(5, 2)) for _ in range(4)]
    optimizer = interop.sharded_optimizer([{"params": [p]} for p in params], torch.optim.SGD, lr=0.1, momentum=0.9)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return tree.n_params(optimizer.state_dict()["state"])


def test_sharded_torch_state_is_shared_out_over_groups():
    assert run(on_rank_balance) == [20, 20]


def on_rank_other_parameters():
    size = 3 + rank_of(None)
    interop.sharded_optimizer([torch.zeros(2), torch.zeros(size)], torch.optim.SGD, lr=0.1)


def test_other_parameters_on_a_rank():
    with pytest.raises(RankError) as error:
        run(on_rank_other_parameters)
    message = "ValueError: parameter group 0: ranks differ at 1: (3,) float32 on rank 0; (4,) float32 on rank 1"
    assert error.value.errors == {0: message, 1: message}


def test_sharded_torch_optimizer_alone():
    one, many = Tied(), Tied()
    cls, options = CLASSES["adamw"]
    plain, sharded = cls(one.parameters(), **options), interop.sharded_optimizer(many.parameters(), cls, **options)
    assert_same(trained(many, sharded, range(3)), trained(one, plain, range(3)))
    found, wanted = interop.whole_state_dict(sharded), plain.state_dict()
    assert equal(found["state"], wanted["state"]) and found["param_groups"] == wanted["param_groups"]


def torch_pair(model):
    return interop.TorchOptimizer(model.named_parameters(), adamw(weight_decay=0.1), lr=0.1)


def on_rank_composed():
    """TorchOptimizer over sharded(adamw) on halves of a batch, against torch.optim.AdamW on the whole of it."""
    one, many = Tied().double(), Tied().double()
    plain = torch.optim.AdamW(one.parameters(), lr=0.1, weight_decay=0.1)
    composed = interop.TorchOptimizer(many.named_parameters(), zero.sharded(adamw(weight_decay=0.1)), lr=0.1)
    for step in range(5):
        x = inputs(step).double()
        for model, optimizer, part in ((one, plain, x), (many, composed, x.chunk(2)[rank_of(None)])):
            optimizer.zero_grad()
            (model(part) ** 2).mean().backward()
            optimizer.step()
    for p, q in zip(many.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    return tree.n_params(composed.trees)


def test_torch_optimizer_over_sharded():
    sizes = run(on_rank_composed)
    n = sum(p.numel() for p in Tied().parameters())
    assert sizes[0] == sizes[1] <= n + 50  # half of 2 n, rows rounded up


def test_torch_optimizer_is_torch_adamw():
    """To rounding over ten steps with a scheduler, tied and frozen parameters; bit for bit from a saved state."""
    one, two = Tied().double(), Tied().double()
    plain, ours = torch.optim.AdamW(one.parameters(), lr=0.1, weight_decay=0.1), torch_pair(two)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (plain, ours)]
    found = trained(two, ours, range(10), schedulers[1])
    wanted = trained(one, plain, range(10), schedulers[0])
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    three = Tied().double()
    three.load_state_dict(two.state_dict())
    again = torch_pair(three)
    again.load_state_dict(torch.load(_saved(ours.state_dict()), weights_only=True))
    assert again.param_groups[0]["lr"] == ours.param_groups[0]["lr"] != 0.1
    assert_same(trained(three, again, range(3)), trained(two, ours, range(3)))


def test_torch_optimizer_groups_masks_and_closures():
    """Each group has its lr, its own state and norm; masks see names; a closure has gradients."""
    w, b, other = (torch.nn.Parameter(torch.full(s, 2.0)) for s in ((2, 2), (2,), (3,)))
    decaying = adamw(weight_decay=0.5, mask=lambda path, p: path == "net.w")
    groups = [{"params": [("net.w", w), ("net.b", b)]}, {"params": [("x", other)], "lr": 0.0}]
    optimizer = interop.TorchOptimizer(groups, decaying, lr=0.5)
    optimizer.add_param_group({"params": [("y", torch.nn.Parameter(torch.ones(1)))], "lr": 1.0})
    assert len(optimizer.trees) == 3 and set(optimizer.state_dict()["state"]) == {0, 1, 2, 3}
    loss = optimizer.step(lambda: [sum((p * 0).sum() for p in (w, b, other)).backward(), 3.5][1])
    assert loss == 3.5
    assert w.tolist() == [[1.5, 1.5], [1.5, 1.5]] and b.tolist() == [2.0, 2.0] and other.tolist() == [2.0] * 3
    plain = interop.TorchOptimizer([w, b], sgd())
    plain.zero_grad()
    before = w.detach().clone()
    plain.step()  # no gradients: nothing changes
    assert torch.equal(w, before)
    with pytest.raises(ValueError, match=r"groups of \[2, 1, 1\] parameters, this optimizer of \[2\]"):
        plain.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"parameter 0 has \['exp_avg', 'exp_avg_sq', 'step'\], this .*\['step'\]"):
        plain.load_state_dict(interop.TorchOptimizer([w, b], adamw()).state_dict())
    larger = [torch.nn.Parameter(torch.zeros(3))]
    momentum = interop.TorchOptimizer([torch.nn.Parameter(torch.zeros(2))], sgd(0.9))
    with pytest.raises(ValueError, match=r"momentum_buffer of parameter 0 has shape \(2,\), this optimizer has \(3,\)"):
        interop.TorchOptimizer(larger, sgd(0.9)).load_state_dict(momentum.state_dict())
