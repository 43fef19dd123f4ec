"""What holds for every optimizer: purity, absent leaves, dtypes, lr 0, convergence, equality with torch.optim."""

import copy
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
    sgd,
)
from purelm.testing import strategies as plm

EVERY = {
    "sgd": sgd(),
    "momentum": sgd(0.9, 0.1, nesterov=True),
    "adam": adam(),
    "adamw": adamw(weight_decay=0.1),
    "course": adamw(weight_decay=0.1, eps_placement="uncorrected", decay_order="after"),
    "lion": lion(weight_decay=0.1),
    "muon_adamw": muon_adamw(),
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


@every
def test_update_is_pure(optimizer):
    """Oracle: copies of all arguments made before the call, compared to the last bit; and the same result again."""
    params, grads = model(0), model(1)
    _, state = optimizer.update(grads, optimizer.init(params), params, 0.1)
    lr = torch.tensor(0.1)
    before = copy.deepcopy((grads, state, params, lr))
    updates, new = optimizer.update(grads, state, params, lr)
    for a, b in zip(tree.leaves(before), tree.leaves((grads, state, params, lr)), strict=True):
        assert torch.equal(a, b)
    again = optimizer.update(grads, state, params, lr)
    for a, b in zip(tree.leaves((updates, new)), tree.leaves(again), strict=True):
        assert torch.equal(a, b)
    old_storage = {x.data_ptr() for x in tree.leaves((grads, state, params)) if x.numel()}
    assert not old_storage & {x.data_ptr() for x in tree.leaves((updates, new)) if x.numel()}
    assert tree.structure(new) == tree.structure(state)
    assert tree.structure(updates) == tree.structure(params)


@every
def test_frozen_leaves(optimizer):
    """Oracle: the update of the remaining leaves alone. None in params and grads alike stays None everywhere."""
    params, grads = model(0), model(1)
    keep, _ = tree.partition(lambda path, p: "layers.0" not in path, params)
    keep_grads, _ = tree.partition(lambda path, p: "layers.0" not in path, grads)
    small = {"token_embeddings": keep["token_embeddings"], "layers": [keep["layers"][1]], "extra": keep["extra"]}
    small_grads = {
        "token_embeddings": keep_grads["token_embeddings"],
        "layers": [keep_grads["layers"][1]],
        "extra": keep_grads["extra"],
    }
    updates, state = optimizer.update(keep_grads, optimizer.init(keep), keep, 0.1)
    expected, _ = optimizer.update(small_grads, optimizer.init(small), small, 0.1)
    assert updates["layers"][0] == {"attn": {"q_proj": {"weight": None}}, "ln1": {"weight": None}}
    for a, b in zip(tree.leaves(updates), tree.leaves(expected), strict=True):
        assert torch.equal(a, b)
    new = apply_updates(keep, updates)
    assert new["layers"][0] == updates["layers"][0]
    assert tree.structure(new) == tree.structure(keep)
    assert all(".layers.0." not in path for path in tree.paths(state))


@every
def test_absent_gradient(optimizer):
    """Oracle: torch.optim's rule: a parameter without gradient keeps its value and its moments, decay included."""
    params, grads = model(0), model(1)
    _, state = optimizer.update(grads, optimizer.init(params), params, 0.1)
    grads["layers"][0]["attn"]["q_proj"]["weight"] = None
    updates, new = optimizer.update(grads, state, params, 0.1)
    assert updates["layers"][0]["attn"]["q_proj"]["weight"] is None
    moved = apply_updates(params, updates)
    assert torch.equal(moved["layers"][0]["attn"]["q_proj"]["weight"], params["layers"][0]["attn"]["q_proj"]["weight"])
    assert not torch.equal(moved["layers"][1]["ln1"]["weight"], params["layers"][1]["ln1"]["weight"])
    assert tree.structure(new) == tree.structure(state)
    pairs = zip(tree.paths(state), tree.leaves(state), tree.leaves(new), strict=True)
    assert all(torch.equal(a, b) for path, a, b in pairs if "layers.0.attn" in path)


@every
@pytest.mark.parametrize("empty", [{}, [], {"frozen": None}, {"layers": [], "x": ({}, None)}], ids=repr)
def test_empty_trees(optimizer, empty):
    """A tree without leaves is updated to itself."""
    updates, state = optimizer.update(empty, optimizer.init(empty), empty, torch.tensor(0.1))
    assert updates == empty and apply_updates(empty, updates) == empty
    assert all(x.ndim == 0 for x in tree.leaves(state))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_lr_zero_changes_nothing(optimizer, dtype):
    """Closed form: p + 0 = p, to the last bit, while the state goes on."""
    params, grads = model(0, dtype), model(1, dtype)
    state = optimizer.init(params)
    updates, new = optimizer.update(grads, state, params, torch.tensor(0.0))
    for p, q in zip(tree.leaves(params), tree.leaves(apply_updates(params, updates)), strict=True):
        assert torch.equal(p, q) and p.dtype == q.dtype
    steps = [int(x) for path, x in zip(tree.paths(new), tree.leaves(new), strict=True) if path.endswith("step")]
    assert steps and set(steps) == {1}


@every
def test_lr_as_number_and_as_tensor(optimizer):
    """Oracle: each other. A float and an fp64 tensor of it are the same; the fp32 one differs by its rounding."""
    params, grads = model(0), model(1)
    state = optimizer.init(params)
    a, _ = optimizer.update(grads, state, params, 0.1)
    b, _ = optimizer.update(grads, state, params, torch.tensor(0.1, dtype=torch.float64))
    c, _ = optimizer.update(grads, state, params, torch.tensor(0.1))
    for x, y, z in zip(tree.leaves(a), tree.leaves(b), tree.leaves(c), strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=2e-6, atol=2e-7)


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
    state = optimizer.init(model(0, torch.bfloat16))
    for x in tree.leaves(state):
        assert torch.equal(x, torch.zeros_like(x))
        assert (x.dtype == torch.int64 and x.ndim == 0) or x.dtype == torch.float32


VMAPPED = {
    "sgd": sgd(),
    "nesterov": EVERY["momentum"],
    "adamw": adamw(weight_decay=0.1),
    "lion": lion(),
    "muon": muon(iteration_dtype=torch.float32),
}


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap_over_models(name):
    """Oracle: a loop. An ensemble with one lr each is vmap over everything (torch.vmap itself takes no None leaf)."""
    optimizer = VMAPPED[name]
    several = [(model(10 + i), model(20 + i), 0.1 * (i + 1)) for i in range(3)]
    if name == "muon":
        several = [(p["layers"][0]["attn"], g["layers"][0]["attn"], lr) for p, g, lr in several]
    expected = [optimizer.update(g, optimizer.init(p), p, torch.tensor(lr)) for p, g, lr in several]

    stack = lambda trees: tree.map(lambda *xs: torch.stack(xs), *trees)  # noqa: E731
    params, grads = stack([p for p, _, _ in several]), stack([g for _, g, _ in several])
    state = stack([optimizer.init(p) for p, _, _ in several])
    lrs = torch.tensor([lr for _, _, lr in several])
    updates, new = torch.vmap(optimizer.update)(grads, state, params, lrs)
    for i, (u, s) in enumerate(expected):
        for a, b in zip(tree.leaves((updates, new)), tree.leaves((u, s)), strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-5, atol=1e-5)  # muon: sums in another order, five times


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
