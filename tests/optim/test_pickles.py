"""Optimizers through pickle and copy. Oracle: the original's own updates, to the last bit."""

import copy
import pickle

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
    frozen,
    is_matrix,
    labelled,
    lion,
    muon,
    muon_adamw,
    partitioned,
    rmsprop,
    scale_lr,
    sgd,
    step_of,
)


def kind(path, p):
    return "matrix" if p.ndim > 1 else "vector"


EVERY = {
    "adamw": adamw((0.8, 0.9), 1e-6, 0.2, mask=is_matrix, eps_root=1e-9, decay_order="after", dtype=torch.float64),
    "adam": adam((0.5, 0.6), eps_placement="uncorrected"),
    "sgd": sgd(0.9, 0.1, nesterov=True, mask={"w": False, "b": True}),
    "lion": lion((0.5, 0.6), 0.1, dtype=torch.bfloat16),
    "rmsprop": rmsprop(0.8, 1e-6, 0.1, momentum=0.5, centered=True, mask={"w": False, "b": True}),
    "muon": chain(scale_lr(muon(0.5, n_steps=2, iteration_dtype=torch.float32, update_scale="match_rms"), 0.1)),
    "muon_adamw": muon_adamw(iteration_dtype=torch.float32, adamw_lr_scale=0.5),
    "partitioned": partitioned(is_matrix, sgd(0.5), adamw()),
    "labelled": labelled(kind, {"matrix": sgd(0.9), "vector": frozen()}),
    "finite": apply_if_finite(chain(add_weight_decay(0.3), clip_by_global_norm(0.5), adam()), 3),
}


@pytest.mark.parametrize("name", EVERY)
def test_a_pickled_optimizer_is_the_same(name):
    optimizer = EVERY[name]
    again = pickle.loads(pickle.dumps(optimizer))
    assert copy.deepcopy(optimizer) is optimizer is copy.copy(optimizer)
    params = {"w": torch.linspace(-1, 1, 6).view(2, 3)} | ({} if name == "muon" else {"b": torch.ones(3)})
    state, other = optimizer.init(params), again.init(params)
    for _ in range(2):
        updates, state = optimizer.update(params, state, params, 0.1)
        found, other = again.update(params, other, params, 0.1)
        assert tree.structure((updates, state)) == tree.structure((found, other))
        for x, y in zip(tree.leaves((updates, state)), tree.leaves((found, other)), strict=True):
            assert torch.equal(x, y) and x.dtype == y.dtype
    assert (step_of(optimizer) is None) == (step_of(again) is None)


def test_what_has_no_name_cannot_be_pickled():
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(adamw(mask=lambda path, p: True))
