"""TorchOptimizer's state in torch's form, its param groups, and what it refuses.

Oracle: torch.optim's own optimizers, which save and load the same state, and go on from it.
"""

import copy
import io
import pickle

import pytest
import torch

from purelm import interop, tree
from purelm.interop.torch_state import from_torch, to_torch
from purelm.optim import (
    adamw,
    apply_if_finite,
    chain,
    clip_by_global_norm,
    is_matrix,
    labelled,
    lion,
    muon,
    muon_adamw,
    partitioned,
    sgd,
)

PAIRS = {
    "adamw": (
        lambda: adamw(weight_decay=0.1),
        lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.1),
        {"exp_avg", "exp_avg_sq", "step"},
    ),
    "adamw after clipping": (
        lambda: chain(clip_by_global_norm(1e9), adamw(weight_decay=0.1)),
        lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.1),
        {"exp_avg", "exp_avg_sq", "step"},
    ),
    "sgd": (
        lambda: sgd(0.9),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        {"momentum_buffer", "step"},
    ),
    "muon": (
        lambda: muon(iteration_dtype=torch.bfloat16),
        lambda params: torch.optim.Muon(params, lr=0.1),
        {"momentum_buffer", "step"},
    ),
}
pairs = pytest.mark.parametrize("name", PAIRS)
named = pytest.mark.parametrize("by_name", [True, False])


def model():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.Tanh(), torch.nn.Linear(3, 2, bias=False))
    net.register_parameter("unused", torch.nn.Parameter(torch.ones(2, 2)))
    return net.double()


def train(net, optimizer, steps):
    for i in steps:
        optimizer.zero_grad()
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        net(x).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def wrapped(net, optimizer, by_name):
    return interop.TorchOptimizer(net.named_parameters() if by_name else net.parameters(), optimizer, lr=0.1)


def stored(state):
    """As torch.save and torch.load(weights_only=True) give it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def close(found, wanted):
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@named
@pairs
def test_the_state_is_torchs_and_each_goes_on_from_the_others(name, by_name):
    make, theirs, names = PAIRS[name]
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if name != "muon" else {"rtol": 2e-2, "atol": 2e-2}  # its bf16 iteration
    nets = [model() for _ in range(4)]
    ours, plain = wrapped(nets[0], make(), by_name), theirs(nets[1].parameters())
    train(nets[0], ours, range(3))
    train(nets[1], plain, range(3))
    ours_state, plain_state = stored(ours.state_dict()), stored(plain.state_dict())
    assert list(ours_state["state"]) == [0, 1, 2] and all(set(s) == names for s in ours_state["state"].values())
    for number, one in plain_state["state"].items():
        for key, x in one.items():
            found = ours_state["state"][number][key]
            assert found.dtype == x.dtype and found.shape == x.shape
            torch.testing.assert_close(found, x, **tolerance)
    # From torch's state into ours, and from ours into torch's (whose groups keep their own options).
    here, there = wrapped(nets[2], make(), by_name), theirs(nets[3].parameters())
    nets[2].load_state_dict(nets[1].state_dict())
    nets[3].load_state_dict(nets[0].state_dict())
    here.load_state_dict(plain_state)
    there.load_state_dict({**ours_state, "param_groups": there.state_dict()["param_groups"]})
    assert set(here.param_groups[0]) <= {"params", "param_names", "lr"}
    for found, wanted in (
        (train(nets[2], here, (3, 4)), train(nets[1], plain, (3, 4))),
        (train(nets[3], there, (3, 4)), train(nets[0], ours, (3, 4))),
    ):
        for x, y in zip(found, wanted, strict=True):
            torch.testing.assert_close(x, y, **tolerance)


OPTIMIZERS = {
    "lion": lion(),
    "muon_adamw": muon_adamw(iteration_dtype=torch.float32),
    "partitioned": partitioned(is_matrix, sgd(0.9), adamw()),
    "labelled": labelled(lambda path, p: str(p.shape[0] > 2), {"True": lion(), "False": adamw()}),
    "apply_if_finite": apply_if_finite(adamw()),
    "no state": clip_by_global_norm(1.0),
}


@named
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_load_state_dict_is_the_inverse_of_state_dict(name, by_name):
    """Law, for states without a counterpart in torch: to the last bit, shared counters included."""
    net = model()
    optimizer = wrapped(net, OPTIMIZERS[name], by_name)
    train(net, optimizer, range(2))
    again = wrapped(copy.deepcopy(net), OPTIMIZERS[name], by_name)
    again.load_state_dict(stored(optimizer.state_dict()))
    assert tree.structure(again.trees) == tree.structure(optimizer.trees)
    for x, y in zip(tree.leaves(again.trees), tree.leaves(optimizer.trees), strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype
    copied = copy.deepcopy(net)
    third = wrapped(copied, OPTIMIZERS[name], by_name)
    third.load_state_dict(optimizer.state_dict())
    for x, y in zip(train(copied, third, (2, 3)), train(net, optimizer, (2, 3)), strict=True):
        assert torch.equal(x, y)


def test_names_that_would_be_equal_are_paths():
    params = {"w": torch.ones(2, 2), "b": torch.ones(2)}
    two = partitioned(is_matrix, sgd(0.9), adamw())
    names = [set(one) for one in to_torch(two.init(params), params).values()]
    assert names == [
        {"momentum_buffer", "yes.step", "no.step"},
        {"exp_avg", "exp_avg_sq", "yes.step", "no.step"},
    ]
    assert list(to_torch(two.init([params["w"]]), [params["w"]], start=5)) == [5]


def test_each_parameter_has_a_counter_of_its_own():
    """torch adds to its counters in place: a shared one would be added to for each parameter."""
    params = [torch.ones(2), torch.ones(3)]
    state = to_torch(adamw().init(params), params)
    state[0]["step"] += 1
    assert state[1]["step"].item() == 0 and state[0]["step"].dtype == torch.float32
    state[0]["step"] -= 1
    back = from_torch(state, adamw().init(params), params, [0, 1])
    state[1]["exp_avg"].fill_(7.0)
    assert back.m[1].eq(0).all()  # nothing is shared with what was loaded


def test_what_load_state_dict_refuses_changes_nothing():
    net = model()
    optimizer = wrapped(net, adamw(), True)
    train(net, optimizer, range(2))
    before, groups = optimizer.trees, copy.deepcopy(optimizer.state_dict()["param_groups"])
    good = optimizer.state_dict()

    def changed(number, **entries):
        state = {**good["state"], number: {**good["state"][number], **entries}}
        return {**good, "state": {n: {k: x for k, x in s.items() if x is not None} for n, s in state.items()}}

    cases = {
        r"parameter 1 has \['exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'step'\], this optimizer needs": changed(
            1, max_exp_avg_sq=torch.ones(2)
        ),
        r"parameter 2 has \['exp_avg', 'step'\]": changed(2, exp_avg_sq=None),
        r"exp_avg of parameter 0 has shape \(3,\), this optimizer has": changed(0, exp_avg=torch.ones(3)),
        r"step is 9 of parameter 1, 2 of others; a group has one for all": changed(1, step=torch.tensor(9.0)),
        r"groups of \[1\] parameters, this optimizer of \[3\]": {**good, "param_groups": [{"lr": 9.0, "params": [0]}]},
    }
    for message, state in cases.items():
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
    assert optimizer.trees is before and optimizer.state_dict()["param_groups"] == groups


def test_options_of_groups_are_refused_by_name():
    """They used to be ignored: a weight_decay of 0 in a group did nothing."""
    w, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(ValueError, match=r"param group 1 has weight_decay=0\.0; groups have params and lr.*mask="):
        interop.TorchOptimizer([{"params": [w]}, {"params": [b], "weight_decay": 0.0}], adamw())
    optimizer = interop.TorchOptimizer([w], adamw(), lr=0.1)
    with pytest.raises(ValueError, match=r"param group 1 has betas=\(0\.5, 0\.9\)"):
        optimizer.add_param_group({"params": [b], "betas": (0.5, 0.9)})
    assert len(optimizer.param_groups) == 1 == len(optimizer.trees)
    optimizer.add_param_group({"params": [b], "lr": 0.0, "initial_lr": 0.5})
    assert optimizer.param_groups[1]["lr"] == 0.0


def test_schedulers_keep_their_values_in_groups():
    """Oracle: torch.optim.AdamW under the same scheduler, saved and loaded."""
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    ours, theirs = interop.TorchOptimizer([p], adamw(), lr=0.1), torch.optim.AdamW([q], lr=0.1)
    options = {"max_lr": 0.2, "total_steps": 9, "cycle_momentum": False}
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, **options) for o in (ours, theirs)]
    for optimizer, scheduler in zip((ours, theirs), schedulers, strict=True):
        for _ in range(3):
            optimizer.step()
            scheduler.step()
    again = interop.TorchOptimizer([p], adamw())
    again.load_state_dict(ours.state_dict())
    for name in ("lr", "initial_lr", "max_lr", "min_lr"):
        assert again.param_groups[0][name] == ours.param_groups[0][name] == theirs.param_groups[0][name]


@pytest.mark.parametrize("given", [torch.optim.AdamW, torch.optim.AdamW([torch.ones(1)]), torch.optim.Muon])
def test_an_optimizer_of_torch_is_refused(given):
    with pytest.raises(ValueError, match=r"TorchOptimizer: optimizer is torch\.optim\..*, which is torch's already"):
        interop.TorchOptimizer([torch.ones(1)], given)
    with pytest.raises(ValueError, match="TorchOptimizer: optimizer is 'adamw'"):
        interop.TorchOptimizer([torch.ones(1)], "adamw")


def test_copies_of_sharded_optimizers_share_the_group():
    """A process group is no value: copies have it in common, and a pickle is refused by name."""
    optimizer = interop.sharded_optimizer([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1)
    optimizer.group = group = object()
    assert copy.deepcopy(optimizer).group is group and copy.copy(optimizer).group is group
    with pytest.raises(ValueError, match="process group cannot be pickled; save whole_state_dict"):
        pickle.dumps(optimizer)
    optimizer.group = None
    assert pickle.loads(pickle.dumps(optimizer)).group is None
