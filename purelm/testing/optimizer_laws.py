"""What holds for optimizers as plain functions: most laws of `check_optimizer`.

Those that transform the update (vmap, compile, derivatives) are in `optimizer_transforms`.
"""

import copy
import io
from typing import Any

import torch

from purelm import tree
from purelm.optim.base import Optimizer, apply_updates
from purelm.optim.clip import clip, clip_by_global_norm
from purelm.optim.combinators import chain
from purelm.optim.finite import apply_if_finite
from purelm.testing.laws import assert_trees_close, assert_trees_equal, require, unchanged
from purelm.testing.optimizer_case import (
    Case,
    any_change,
    halves,
    holding_out,
    of_function,
    owner,
    packed,
    require_apart,
    require_fit,
    require_same_kinds,
)
from purelm.tree import Tree

__all__ = [
    "absent",
    "chained",
    "descends",
    "dtypes",
    "empty",
    "frozen",
    "lr_kinds",
    "lr_zero",
    "pure",
    "resumable",
    "structure",
]

DESCENT_STEPS = 300
# The first update against that in fp64, relative to its norm: a dozen roundings of the format. A bias correction that
# is computed in bf16 (1 - 0.999 is 0 there) is off by more than any of these.
PRECISION = {torch.bfloat16: 0.06, torch.float16: 0.01, torch.float32: 1e-4, torch.float64: 1e-9}
EMPTY: tuple[Tree, ...] = ({}, [], {"frozen": None}, {"layers": [], "x": ({}, None)})


def pure(c: Case) -> None:
    """No argument is written to, results lie in memory of their own, and the same bits come twice."""
    with of_function("init"), unchanged(c.params):
        state = c.optimizer.init(c.params)
    require_apart({"the first state": state}, {"params": c.params})
    assert_trees_equal(c.optimizer.init(c.params), state, "two states of init with the same params")
    for i, old in enumerate((state, c.begun())):
        args = {"grads": c.drawn(i + 1), "state": old, "params": c.params, "lr": c.rate()}
        with of_function("update"), unchanged(args):
            results = c.optimizer.update(*args.values())
        require_apart(dict(zip(("updates", "the new state"), results, strict=True)), args)
        again = c.optimizer.update(*args.values())
        for name, a, b in zip(("updates", "new states"), again, results, strict=True):
            assert_trees_equal(a, b, f"{name} of two calls with the same arguments")


def structure(c: Case) -> None:
    """Updates fit params; state is tensors, of the same kinds after every step."""
    state, params = c.optimizer.init(c.params), c.params
    for i in range(3):
        updates, new = c.optimizer.update(c.drawn(i), state, params, c.rate())
        require_fit(updates, params)
        require_same_kinds(new, state, i + 1)
        state, params = new, apply_updates(params, updates)


def frozen(c: Case) -> None:
    """Oracle: a tree that has the other parameters alone, at the same paths."""
    for held in halves(c.params):
        keep = holding_out(c.params, held)
        alone = packed(keep)
        states = [c.optimizer.init(keep), c.optimizer.init(alone)]
        for i in range(2):
            grads = holding_out(c.drawn(i), held)
            (updates, states[0]), (expected, states[1]) = (
                c.optimizer.update(g, state, p, c.lr)
                for g, state, p in ((grads, states[0], keep), (packed(grads), states[1], alone))
            )
            for name, a, b in (("updates", updates, expected), ("the state", *states)):
                found, right = (dict(zip(tree.paths(t), tree.leaves(t), strict=True)) for t in (a, b))
                more, less = sorted({*found} - {*right}), sorted({*right} - {*found})
                require(not more, f"{name} has {', '.join(more[:3])}, of parameters that are None")
                require(not less, f"{name} lacks {', '.join(less[:3])} where other parameters are None")
                assert_trees_equal(found, right, f"{name} beside parameters that are None and without these")
            after = tree.structure(apply_updates(keep, updates))
            require(after == tree.structure(keep), f"new parameters have structure {after}, those that are None apart")


def absent(c: Case) -> None:
    """Oracle: the old values, and the old leaves of the state under the paths of the parameters."""
    state = c.begun()
    everything = set(tree.paths(c.params))
    for held in (*halves(c.params), everything):
        updates, new = c.optimizer.update(holding_out(c.drawn(1), held), state, c.params, c.lr)
        found, right = tree.structure(new), tree.structure(state)
        require(found == right, f"the state has structure {found} after a step with absent gradients, {right} before")
        moved = False
        after = tree.leaves(apply_updates(c.params, updates))
        for path, p, q in zip(tree.paths(c.params), tree.leaves(c.params), after, strict=True):
            if path in held:
                require(torch.equal(p, q), f"{path} moved although its gradient is None")
            else:
                moved = moved or not torch.equal(p, q)
        require(moved or held == everything, "no parameter moved where the gradients of others are None")
        for path, a, b in zip(tree.paths(state), tree.leaves(state), tree.leaves(new), strict=True):
            # Where no gradient is there, the moments need not be found by their paths.
            a_moment = tree.is_floating(a) and a.ndim > 0 if held == everything else owner(path, everything) in held
            require(not a_moment or torch.equal(a, b), f"the state changed at {path} although the gradient is None")


def empty(c: Case) -> None:
    """Closed form: nothing plus nothing."""
    for t in EMPTY:
        state = c.optimizer.init(t)
        updates, new = c.optimizer.update(t, state, t, c.rate())
        for name, found in (("updates", updates), ("new parameters", apply_updates(t, updates))):
            require(tree.structure(found) == tree.structure(t), f"{name} of params {t} are {found}")
        require(tree.structure(new) == tree.structure(state), f"the state of params {t} is {new} after a step")


def lr_zero(c: Case) -> None:
    """Closed form: p + 0 = p. Counters of the state are those of a step with lr."""
    for dtype in c.dtypes:
        params = tree.cast(c.params, dtype)
        for state in (c.optimizer.init(params), c.begun(params)):
            grads = c.drawn(1, params)
            _, expected = c.optimizer.update(grads, state, params, c.lr)
            for zero in (0.0, c.rate(0.0)):
                updates, new = c.optimizer.update(grads, state, params, zero)
                assert_trees_equal(apply_updates(params, updates), params, f"{dtype} parameters after and before lr 0")
                olds, rights, news = (tree.leaves(t) for t in (state, expected, new))
                for path, right, found in zip(tree.paths(state), rights, news, strict=True):
                    if not tree.is_floating(right):
                        require(
                            torch.equal(right, found), f"the state at {path} after lr 0 is not that after lr {c.lr}"
                        )
                goes_on = [any_change(olds, some) for some in (rights, news)]
                require(goes_on[1] or not goes_on[0], "the state stands still at lr 0")


def lr_kinds(c: Case) -> None:
    """Oracle: each other."""
    state, grads = c.begun(), c.drawn(1)
    number, exact, rounded, other = (
        c.optimizer.update(grads, state, c.params, lr)[0]
        for lr in (c.lr, c.rate(dtype=torch.float64), c.rate(), 2 * c.lr)
    )
    assert_trees_equal(exact, number, "updates with lr as an fp64 tensor and as a number")
    pairs = zip(tree.paths(number), *map(tree.leaves, (number, rounded, other)), strict=True)
    largest = max(float(p.abs().max()) for p in tree.leaves(c.params) if p.numel())
    for path, a, b, twice in pairs:
        eps = torch.finfo(a.dtype).eps
        # lr is off by half an eps of fp32; a difference of new and old parameters by some of theirs.
        what = f"updates at {path} with lr as an fp32 tensor and as a number"
        assert_trees_close(b, a, what, rtol=16 * eps, atol=4 * eps * largest)
        require(not a.numel() or not torch.equal(a, twice), f"the update at {path} is the same for lr and 2 lr")


def descends(c: Case) -> None:
    """Closed form: |w - w*|^2 / 2 has the gradient w - w*, and its minimum at w* (near it, where weights decay)."""
    form = tree.map(lambda p: p if p.dtype == torch.float64 else p.float(), c.params)
    start = tree.map(lambda x: x / 4, c.drawn(0, form))
    # No element starts near its target, where a quarter of the distance is less than decay or noise makes.
    target = tree.map(lambda p, x: p + torch.sign(x) * (1 + x.abs()) / 4, start, c.drawn(1, form))
    params, state, left = start, c.optimizer.init(start), start
    for i in range(DESCENT_STEPS):
        grads = tree.map(lambda p, t: p - t, params, target)
        updates, state = c.optimizer.update(grads, state, params, c.lr * (1 - i / DESCENT_STEPS))
        params = apply_updates(params, updates)
        left = updates
    columns, _ = tree.flatten_up_to(start, target, params, left)
    moving = [(path, *row) for path, *row in zip(tree.paths(start), *columns, strict=True) if row[3] is not None]
    require(any(row[1].numel() for row in moving), "no parameter has an update")
    for path, p, t, found, _ in moving:
        first, last = (float((x - t).double().square().sum()) for x in (p, found))
        require(
            last <= first / 4,  # false for nan
            f"|w - w*|^2 at {path} went from {first:.3g} to {last:.3g} in {DESCENT_STEPS} steps, lr falling from "
            f"{c.lr:g} to 0; less than a quarter must be left (does lr suit the optimizer?)",
        )


def dtypes(c: Case) -> None:
    """Oracle: the first update of the same values in fp64; of fp64 ones, whether it sees the last bits of lr."""
    for dtype in c.dtypes:
        params, grads = tree.cast(c.params, dtype), tree.cast(c.drawn(0), dtype)
        state = c.optimizer.init(params)
        updates, new = c.optimizer.update(grads, state, params, c.lr)
        require_same_kinds(new, state, 1)
        require_same_kinds(c.optimizer.update(grads, new, params, c.lr)[1], new, 2)
        if dtype == torch.float64:
            more, _ = c.optimizer.update(grads, state, params, c.lr * (1 + 2**-40))
            for path, a, b in zip(tree.paths(updates), tree.leaves(updates), tree.leaves(more), strict=True):
                seen = not a.numel() or not torch.equal(a, b)
                require(
                    seen, f"the update of fp64 parameters at {path} is less precise than fp64: lr (1 + 2^-40) is lr"
                )
            continue
        wide, wide_grads = tree.cast(params, torch.float64), tree.cast(grads, torch.float64)
        right, _ = c.optimizer.update(wide_grads, c.optimizer.init(wide), wide, c.lr)
        (ps, us, rs), _ = tree.flatten_up_to(params, updates, right)
        for path, p, u, r in zip(tree.paths(params), ps, us, rs, strict=True):
            if u is None or r is None:
                require(u is r, f"the update at {path} is None for one of {dtype} and fp64, and not for the other")
                continue
            norm, size, off = (float(x.double().norm()) for x in (r, p, u.double() - r))
            allowed = PRECISION.get(dtype, 0.06) * norm + 4 * torch.finfo(torch.float32).eps * size
            require(off <= allowed, f"the {dtype} update at {path} is {off / (norm or 1.0):.2g} of its norm off fp64's")


def chained(c: Case) -> None:
    """Oracle: the optimizer itself, with the gradients that the function before it returns."""
    nothing = Optimizer(lambda params: (), lambda grads, state, params, lr: (grads, state))
    grads = c.drawn(1)
    limit = float(tree.global_norm(grads)) / 2
    for what, before, given in (
        ("chain(a function that changes nothing, optimizer)", nothing, grads),
        ("chain(clip_by_global_norm, optimizer)", clip_by_global_norm(limit), clip(grads, limit)[0]),
    ):
        updates, state = chain(before, c.optimizer).update(grads, ((), c.begun()), c.params, c.lr)
        expected = c.optimizer.update(given, c.begun(), c.params, c.lr)
        assert_trees_equal((updates, state[1]), expected, f"results of {what} and of the optimizer alone")
    careful = apply_if_finite(c.optimizer)
    state = careful.init(c.params)._replace(inner=c.begun())
    updates, new = careful.update(grads, state, c.params, c.lr)
    expected = c.optimizer.update(grads, c.begun(), c.params, c.lr)
    assert_trees_equal((updates, new.inner), expected, "results of apply_if_finite(optimizer) and of the optimizer")
    bad = tree.map(lambda g: torch.full_like(g, float("nan")), grads)
    updates, new = careful.update(bad, state, c.params, c.lr)
    after = (apply_updates(c.params, updates), new.inner)
    assert_trees_equal(after, (c.params, state.inner), "parameters and state after and before a step that is left out")


def resumable(c: Case) -> None:
    """Oracle: the run that was not interrupted."""

    def steps(params: Tree, state: Any, numbers: range) -> tuple[Tree, Any]:
        for i in numbers:
            updates, state = c.optimizer.update(c.drawn(i), state, params, c.lr)
            params = apply_updates(params, updates)
        return params, state

    half = steps(c.params, c.optimizer.init(c.params), range(2))
    whole = steps(*half, range(2, 4))
    assert_trees_equal(
        steps(*copy.deepcopy(half), range(2, 4)), whole, "a run from copies, and that from the originals,"
    )
    leaves, form = tree.flatten(half)
    file = io.BytesIO()
    torch.save(leaves, file)
    file.seek(0)
    params, state = tree.unflatten(form, torch.load(file, weights_only=True))
    assert_trees_equal(steps(params, state, range(2, 4)), whole, "a run from saved tensors, and an unbroken one,")
