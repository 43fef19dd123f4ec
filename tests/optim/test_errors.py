"""What an optimizer says of arguments that it cannot take. Oracle: the mistake, by its name."""

import pytest
import torch

from purelm import tree
from purelm.optim import (
    adam,
    adamw,
    add_weight_decay,
    apply_if_finite,
    chain,
    clip_by_global_norm,
    constant,
    labelled,
    lion,
    muon,
    partitioned,
    rmsprop,
    scale_lr,
    sgd,
    step_of,
)

PARAMS = {"w": torch.ones(2, 2)}
KINDS = {
    "adamw": (adamw(), "AdamWState"),
    "sgd": (sgd(0.9), "SGDState"),
    "lion": (lion(), "LionState"),
    "muon": (muon(), "MuonState"),
    "rmsprop": (rmsprop(), "RMSpropState"),
    "partitioned": (partitioned(lambda path, p: True, sgd(), adamw()), "PartitionedState"),
    "labelled": (labelled(lambda path, p: "a", {"a": sgd()}), "LabelledState"),
    "apply_if_finite": (apply_if_finite(sgd()), "ApplyIfFiniteState"),
}


def forms(optimizer):
    return [f for f in (optimizer.update, step_of(optimizer)) if f is not None]


@pytest.mark.parametrize("name", KINDS)
def test_the_state_of_another_optimizer(name):
    """Each state in each optimizer but its own, in both forms of the update; before anything is written."""
    optimizer, kind = KINDS[name]
    for other, (maker, found) in KINDS.items():
        if other == name:
            continue
        state = maker.init(PARAMS)
        for update in forms(optimizer):
            with pytest.raises(ValueError, match=f"{name}: state is of type {found}; {kind} is needed"):
                update(PARAMS, state, PARAMS, 0.1)
        assert all(not x.any() for x in tree.leaves(state)) and PARAMS["w"].eq(1).all()
    with pytest.raises(ValueError, match=f"{kind} is needed.*like="):
        optimizer.update(PARAMS, optimizer.init(PARAMS)._asdict(), PARAMS, 0.1)


@pytest.mark.parametrize("name", KINDS)
def test_no_parameters_and_no_learning_rate(name):
    optimizer, _ = KINDS[name]
    state = optimizer.init(PARAMS)
    for update in forms(optimizer):
        with pytest.raises(ValueError, match=f"{name}: params is None; update.* needs the parameters"):
            update(PARAMS, state, None, 0.1)
        for lr in (constant(0.1), None):
            with pytest.raises(ValueError, match=rf"{name}: lr is .* a number or a 0-d tensor .*schedule\(step\)"):
                update(PARAMS, state, PARAMS, lr)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adamw(1e-3), r"adamw: betas is 0.001 \(float\); a pair of numbers .* rate is no argument of adamw"),
        (lambda: adam(1e-3), "a pair of numbers is needed"),
        (lambda: lion(1e-4), "lion: betas is 0.0001 .* rate is no argument of lion"),
        (lambda: adamw((0.9, 0.95, 0.9)), "a pair of numbers"),
        (
            lambda: adamw().init({"net": [torch.ones(1), 3.0]}),
            r"init: params has a float at net\.1; tensors are needed",
        ),
        (lambda: sgd().init("params"), "init: params has a str at the root"),
        (lambda: adamw([0.9, 1.0]), r"betas\[1\] must be in \[0.0, 1.0\), got 1.0"),
        (lambda: chain([sgd(), adamw()]), r"chain: argument 0 is a list; give the .* one by one: chain\(a, b\)"),
        (lambda: chain((sgd(), adamw())), "chain: argument 0 is a tuple"),
        (lambda: chain(sgd(), 0.1), r"chain: argument 1 is 0.1 \(float\); a pair Optimizer"),
        (lambda: chain(sgd), "chain: argument 0 is <function sgd"),
        (lambda: partitioned(lambda path, p: True, sgd(), None), "partitioned: no is None; a pair Optimizer"),
        (lambda: scale_lr(0.5, sgd()), "scale_lr: optimizer is 0.5"),
        (
            lambda: scale_lr(sgd(), 0.5).update(PARAMS, sgd().init(PARAMS), PARAMS, constant(1.0)),
            "scale_lr: lr is <fun",
        ),
        (
            lambda: chain(sgd(), sgd()).update(PARAMS, sgd().init(PARAMS), PARAMS, 0.1),
            "chain: state is of type SGDState",
        ),
        (lambda: apply_if_finite(torch.optim.SGD([torch.ones(1)], 0.1)), "apply_if_finite: optimizer is SGD"),
    ],
)
def test_arguments_of_makers(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_has_the_two_functions_is_an_optimizer():
    """Any pair will do: the check asks for init and update, not for a class."""

    class Own:
        init, update = sgd()

    for optimizer in (chain(clip_by_global_norm(1.0), Own), chain(add_weight_decay(0.1), chain())):
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, 0.1)
