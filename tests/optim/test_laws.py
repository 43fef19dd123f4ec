"""What holds for every optimizer: purelm.testing's laws, the first state, convergence, equality with torch.optim."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import tree
from purelm.optim import (
    adam,
    adamw,
    apply_if_finite,
    apply_updates,
    chain,
    clip_by_global_norm,
    is_matrix,
    labelled,
    lion,
    muon,
    muon_adamw,
    rmsprop,
    sgd,
)
from purelm.testing import OPTIMIZER_LAWS, check_optimizer, without
from purelm.testing import strategies as plm

EVERY = {
    "sgd": sgd(),
    "momentum": sgd(0.9, 0.1, nesterov=True),
    "adam": adam(),
    "adamw": adamw(weight_decay=0.1),
    "course": adamw(weight_decay=0.1, eps_placement="uncorrected", decay_order="after"),
    "lion": lion(weight_decay=0.1),
    "rmsprop": rmsprop(),
    "rmsprop, all": rmsprop(0.9, 1e-6, 0.1, momentum=0.5, centered=True),
    "muon_adamw": muon_adamw(iteration_dtype=torch.float32),  # vmap and a loop sum in another order
    "chain": chain(clip_by_global_norm(1.0), adamw()),
    "labelled": labelled(lambda path, p: str(is_matrix(path, p)), {"True": sgd(0.9), "False": lion()}),
    "apply_if_finite": apply_if_finite(adamw(weight_decay=0.1)),
}
every = pytest.mark.parametrize("optimizer", EVERY.values(), ids=EVERY.keys())


def model(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A small tree with the names and shapes of a Transformer, non-contiguous and 0-size leaves among them."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    return {
        "token_embeddings": {"weight": draw(9, 4)},
        "layers": [{"attn": {"q_proj": {"weight": draw(4, 6).mT}}, "ln1": {"weight": draw(4)}} for _ in range(2)],
        "extra": (draw(1, 1), draw(0, 3)),
    }


# Signs and an orthogonalisation in fp32 have no derivative by gradients that differences show.
NOT_SMOOTH = ("lion", "muon_adamw", "labelled")
# test_compile and test_in_place have these, with inductor.
ELSEWHERE = ("compile", "step_")


@pytest.mark.parametrize("name", EVERY)
def test_laws(name):
    """Oracles: those of each law. The seed is another one than that of tests of the laws themselves."""
    laws = without(OPTIMIZER_LAWS, *ELSEWHERE)
    check_optimizer(EVERY[name], laws=laws, smooth=name not in NOT_SMOOTH, seed=1)


def test_laws_of_muon():
    """It takes matrices alone, and is smooth where it iterates in fp64."""
    params = {
        "q_proj": model(0)["layers"][0]["attn"]["q_proj"],
        "stack": model(1)["token_embeddings"]["weight"].view(3, 3, 4),
    }
    laws = without(OPTIMIZER_LAWS, *ELSEWHERE)
    check_optimizer(muon(iteration_dtype=torch.float64), params, laws=laws)


@every
def test_a_parameter_without_gradient_has_no_update(optimizer):
    """None, for which nothing is added, and not zeros."""
    params, grads = model(0), model(1)
    grads["layers"][0]["attn"]["q_proj"]["weight"] = None
    updates, _ = optimizer.update(grads, optimizer.init(params), params, 0.1)
    assert updates["layers"][0]["attn"]["q_proj"]["weight"] is None


@every
def test_minimises_a_quadratic(optimizer):
    """Closed form: f(w) = |w - w*|^2 / 2 has its minimum at w* (w* / 1.1 under decay 0.1); lr falls linearly to 0."""
    target, params = model(7), model(0)
    state = optimizer.init(params)
    for i in range(400):
        grads = tree.map(lambda p, t: p - t, params, target)
        updates, state = optimizer.update(grads, state, params, 0.2 * (1 - i / 400))
        params = apply_updates(params, updates)
    distance = tree.global_norm(tree.map(lambda p, t: p - t, params, target))
    assert float(distance) < 0.12 * float(tree.global_norm(target))


@every
def test_moments_are_zero_at_first_and_step_is_one_0d_int64(optimizer):
    params = model(0, torch.bfloat16)
    state = optimizer.init(params)
    for x in tree.leaves(state):
        assert torch.equal(x, torch.zeros_like(x))
        assert (x.dtype == torch.int64 and x.ndim == 0) or x.dtype == torch.float32
    _, new = optimizer.update(params, state, params, torch.tensor(0.0))
    steps = [int(x) for path, x in zip(tree.paths(new), tree.leaves(new), strict=True) if path.endswith("step")]
    assert steps and set(steps) == {1}
    assert all(x.ndim == 0 for x in tree.leaves(optimizer.init({"layers": [], "x": ({}, None)})))


def test_update_is_differentiable():
    """Oracle: d/dlr of p - lr g is -g (sgd); gradcheck for adamw."""
    g, p = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    optimizer = sgd()
    apply_updates(p, optimizer.update(g, optimizer.init(p), p, lr)[0]).sum().backward()
    torch.testing.assert_close(lr.grad, -g.sum())

    optimizer = adamw(weight_decay=0.1)

    def f(g: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
        return apply_updates(p, optimizer.update(g, optimizer.init(p), p, lr)[0])

    assert torch.autograd.gradcheck(f, (g.requires_grad_(), lr))


shapes = st.lists(plm.shapes(), min_size=1, max_size=4)
PEERS = {
    "sgd": (lambda: sgd(0.9, 0.05, nesterov=True), lambda p: torch.optim.SGD(p, 0.1, 0.9, 0, 0.05, True)),
    "adam": (adam, lambda p: torch.optim.Adam(p, 0.1)),
    "adamw": (lambda: adamw((0.8, 0.9), 1e-6, 0.2), lambda p: torch.optim.AdamW(p, 0.1, (0.8, 0.9), 1e-6, 0.2)),
}


@pytest.mark.parametrize("name", PEERS)
@given(shapes=shapes, seed=st.integers(0, 1000), log_scale=st.floats(-8, 8), n=st.integers(1, 4))
def test_equals_torch_on_random_trees(name, shapes, seed, log_scale, n):
    """Oracle: torch.optim in fp64, on trees of any shapes, with gradients of any size."""
    make, peer = PEERS[name]
    g = torch.Generator().manual_seed(seed)
    draw = lambda: [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]  # noqa: E731
    params = draw()
    theirs = [p.clone().requires_grad_() for p in params]
    optimizer, torch_optimizer = make(), peer(theirs)
    state = optimizer.init(params)
    for _ in range(n):
        grads = [x * 10**log_scale for x in draw()]
        for p, x in zip(theirs, grads, strict=True):
            p.grad = x.clone()
        torch_optimizer.step()
        updates, state = optimizer.update(grads, state, params, 0.1)
        params = apply_updates(params, updates)
    for a, b in zip(params, theirs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-11, atol=1e-12)


def test_mismatched_trees_are_named():
    """ValueError with the path, not a wrong update."""
    params = {"w": torch.ones(2), "b": torch.ones(2)}
    optimizer = adamw()
    with pytest.raises(ValueError, match="structures differ at the root"):
        optimizer.update({"w": torch.ones(2)}, optimizer.init(params), params, 0.1)
    with pytest.raises(ValueError, match="structures differ"):
        apply_updates(params, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"muon: parameter 'b' has shape \(2,\); it takes 2 or more dimensions"):
        muon().init(params)
