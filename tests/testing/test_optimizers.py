"""check_optimizer. Oracles: optimizers with one known fault each; right ones, the library's and one from elsewhere.

The mutants are momentum written out with plain functions, so that each is one visible change of it.
"""

import re
from typing import NamedTuple

import optree
import pytest
import torch

from purelm import tree
from purelm.kernels.adamw import adamw as adamw_kernel
from purelm.optim import Optimizer, adamw, frozen, is_matrix, labelled, lion, muon, muon_adamw, sgd, with_step
from purelm.testing import LawError, without
from purelm.testing.laws import draw_like
from purelm.testing.optimizers import OPTIMIZER_LAWS, check_optimizer

pytestmark = pytest.mark.compile

# Small, since most mutants are compiled; one leaf of one element, one of none, one transposed.
SMALL = {
    "w": torch.linspace(-1, 1, 6).view(2, 3).T,
    "list": [torch.ones(1, 1), torch.zeros(0, 2), None],
    "b": -torch.ones(4),
}
NO_COMPILER = without(OPTIMIZER_LAWS, "compile", "step_")


class State(NamedTuple):
    t: torch.Tensor
    m: dict


def init(params):
    return State(torch.zeros((), dtype=torch.int64), tree.map(torch.zeros_like, params))


def momentum(
    begin=lambda params: params,
    moment=lambda m, g: 0.9 * m + g,
    rate=lambda lr, t: lr,
    update=lambda m, lr, p: -lr * m,
    missing=lambda m: (None, m),
    count=lambda t: t + 1,
    init=init,
):
    """m <- 0.9 m + g, p <- p - lr m; a mutant replaces one of the functions."""

    def update_all(grads, state, params, lr):
        params = begin(params)
        t = count(state.t)
        lr = rate(lr, t)

        def leaf(p, g, m):
            if g is None:
                return missing(m)
            m = moment(m, g)
            return update(m, lr, p), m

        pairs = tree.map(leaf, params, grads, state.m)
        first, second = (tree.map(lambda p, pair, i=i: pair[i], params, pairs) for i in (0, 1))
        return first, State(t, second)

    return Optimizer(init, update_all)


def changed(**fault):
    """momentum, changed by a function of its update: (optimizer's update, grads, state, params, lr) -> result."""
    (how,) = fault.values()
    right = momentum()
    return Optimizer(right.init, lambda grads, state, params, lr: how(right.update, grads, state, params, lr))


def clips_in_place(update, grads, state, params, lr):
    for g in tree.leaves(grads):
        with torch.no_grad():  # no gradient is as large: the same bits
            g.mul_((1e6 / (g.square().sum() + 1e-6)).clamp(max=1.0))
    return update(grads, state, params, lr)


def draws(update, grads, state, params, lr):
    torch.rand(1)
    return update(grads, state, params, lr)


def keeps_gradients(update, grads, state, params, lr):
    updates, new = update(grads, state, params, lr)
    return updates, State(new.t, tree.map(lambda m, g: m if g is None else g, new.m, grads))


def squeezes(m, lr, p):
    return (-lr * m).squeeze() if p.numel() == 1 else -lr * m


def entries(update, grads, state, params, lr):
    n = len(optree.tree_leaves(params, none_is_leaf=True))
    updates, state = update(grads, state, params, lr)
    return tree.map(lambda u: u * (6 / (n + 2)), updates), state


def needs_a_leaf(update, grads, state, params, lr):
    device = tree.leaves(params)[0].device
    return update(grads, state, params, lr if isinstance(lr, float) else lr.to(device))


def refuses_nan(update, grads, state, params, lr):
    for g in tree.leaves(grads):
        if not traced(g) and g.isnan().any():
            raise ValueError("a gradient is nan")
    return update(grads, state, params, lr)


def traced(x):
    return torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(x)


def remembers():
    """Moments count only in states that this optimizer has made itself."""
    known = {}

    def register(state):
        if not traced(state.t):
            known[id(state.t)] = state.t
        return state

    right = momentum()

    def update(grads, state, params, lr):
        if not traced(state.t) and known.get(id(state.t)) is not state.t:
            state = state._replace(m=tree.map(torch.zeros_like, state.m))
        updates, new = right.update(grads, state, params, lr)
        return updates, register(new)

    return Optimizer(lambda params: register(init(params)), update)


def counts_calls():
    calls = [0]

    def count(update, grads, state, params, lr):
        calls[0] += 1
        return update(grads, state, params, lr)

    return changed(how=count)


def in_python(lr, t):
    """A warm-up that asks the step for its number."""
    return lr * (1 - 0.5 ** (int(t) if not torch.compiler.is_compiling() else t))


def second(how):
    right = momentum()

    def update(grads, state, params, lr):
        return right.update(grads, state, params, lr)

    def step_(grads, state, params, lr):
        updates, new = update(grads, state, params, lr)
        moved = tree.map(lambda p, u: p if u is None else p + u, params, updates)
        return how(params, state, moved, new)

    return Optimizer(right.init, with_step(update, step_))


def write(old, new):
    for a, b in zip(tree.leaves(old), tree.leaves(new), strict=True):
        a.copy_(b)
    return old


def right_step(params, state, moved, new):
    return write(params, moved), write(state, new)


def coarse_beta(m, g):
    """1 - 0.999 in the gradient's own format: 0 in bf16, and what is divided by it inf."""
    lost = 1 - torch.tensor(0.999, dtype=g.dtype, device=g.device)
    return 0.9 * m + g * (lost / 0.001)


# law -> name of the fault -> (optimizer, what the error says)
MUTANTS = {
    "pure": {
        "clips in place": (changed(how=clips_in_place), r"update: argument grads.b was written to"),
        "draws": (changed(how=draws), r"update: torch's global generator was used"),
        "keeps gradients": (changed(how=keeps_gradients), r"the new state.m.b shares memory with grads.b"),
    },
    "structure": {
        "squeezed": (
            momentum(update=squeezes),
            r"the update at list.0 is \(\) torch.float32 on cpu, the parameter \(1, 1\)",
        ),
    },
    "frozen": {
        "counts None": (changed(how=entries), r"updates beside parameters that are None and without these differ at"),
    },
    "absent": {
        "decays": (
            momentum(missing=lambda m: (None, 0.9 * m)),
            r"the state changed at m.b although the gradient is None",
        ),
        "moves on": (momentum(missing=lambda m: (-0.1 * m, m)), r"b moved although its gradient is None"),
    },
    "empty": {"needs a leaf": (changed(how=needs_a_leaf), "raised IndexError: list index out of range")},
    "lr_zero": {
        "decays": (
            momentum(update=lambda m, lr, p: -lr * m - 1e-4 * p),
            r"parameters after and before lr 0 differ at b",
        ),
    },
    "lr_kinds": {
        "another rate": (
            momentum(rate=lambda lr, t: lr / 2 if isinstance(lr, torch.Tensor) else lr),
            r"updates with lr as an fp64 tensor and as a number differ at b",
        ),
    },
    "descends": {
        "sign": (
            momentum(update=lambda m, lr, p: lr * m),
            r"\|w - w\*\|\^2 at b went from .* to .* in 300 steps, lr fall",
        ),
        "grows": (
            momentum(moment=lambda m, g: 1.2 * m + g),
            r"\|w - w\*\|\^2 at b went from .* to (inf|nan|.*e\+.*) in 300",
        ),
    },
    "dtypes": {
        "moments change": (
            momentum(moment=lambda m, g: 0.9 * m + g.to(torch.promote_types(g.dtype, torch.float32))),
            "step 1 changes the state at m.b: .* torch.bfloat16 on cpu becomes .* torch.float32",
        ),
        "beta in bf16": (momentum(moment=coarse_beta), "the torch.bfloat16 update at b is .* of its norm off fp64's"),
    },
    "chain": {"refuses nan": (changed(how=refuses_nan), "raised ValueError: a gradient is nan")},
    "resumable": {"remembers": (remembers(), "a run from copies, and that from the originals, differ at 0.b")},
    "vmap": {"asks the step": (momentum(rate=in_python), r"raised RuntimeError: .*\.item\(\)")},
    "compile": {"counts calls": (counts_calls(), "step 2, with another lr, is compiled again: ")},
    "step_": {
        "new memory": (
            second(lambda params, state, moved, new: (moved, write(state, new))),
            "step_ returns a new tensor at 0.b, and not the memory of the old one",
        ),
        "no state": (
            second(lambda params, state, moved, new: (write(params, moved), state)),
            "parameters and state after step 1, by step_ and by update, at 1.t, differ",
        ),
    },
    "differentiable": {
        "detached": (
            momentum(rate=lambda lr, t: lr.detach() if isinstance(lr, torch.Tensor) else lr),
            "autograd finds no path from new parameters to lr$",
        ),
        "stopped": (
            momentum(moment=lambda m, g: 0.9 * m + g.detach()),
            r"autograd finds no path from new parameters to the gradients \(smooth=False leaves this out\)",
        ),
    },
}


def test_every_law_has_a_mutant():
    assert {*MUTANTS} == {*OPTIMIZER_LAWS}


@pytest.mark.parametrize(("law", "fault"), [(law, fault) for law, faults in MUTANTS.items() for fault in faults])
def test_a_mutant_fails_its_law_alone(law, fault):
    optimizer, message = MUTANTS[law][fault]
    with pytest.raises(LawError) as error:
        check_optimizer(optimizer, SMALL)
    assert list(error.value.failures) == [law]
    assert re.search(message, str(error.value)), str(error.value)


def test_a_number_in_the_state_breaks_all_that_takes_tensors():
    right = momentum()

    def update(grads, state, params, lr):
        updates, (_, m) = right.update(grads, State(torch.tensor(0), state.m), params, lr)
        return updates, State(state.t + 1, m)

    with pytest.raises(LawError, match=r"structure: the state has a int at t; with anything but tensors") as error:
        check_optimizer(Optimizer(lambda params: State(0, init(params).m), update), SMALL, laws=NO_COMPILER)
    assert "chain" in error.value.failures  # apply_if_finite chooses between tensors


def test_hidden_state_is_found():
    """Twice the same arguments, two results."""
    steps = [0]

    def hidden(lr, t):
        steps[0] += 1
        return lr / steps[0]

    with pytest.raises(LawError, match="pure: updates of two calls with the same arguments differ at b"):
        check_optimizer(momentum(rate=hidden), SMALL, laws=["pure"])


def test_right_ones_pass_every_law():
    check_optimizer(momentum(), SMALL)
    check_optimizer(second(right_step), SMALL)
    check_optimizer(momentum())


def plain_adam():
    """Adam as one may find it: nested dicts walked by hand, state a dict, moments of the parameters' form."""
    b1, b2, eps = 0.9, 0.95, 1e-8

    def zeros(t):
        if isinstance(t, dict):
            return {k: zeros(x) for k, x in t.items()}
        return None if t is None else torch.zeros(t.shape, dtype=torch.promote_types(t.dtype, torch.float32))

    def walk(p, g, m, v, lr, c1, c2):
        if isinstance(p, dict):
            rows = {k: walk(p[k], g[k], m[k], v[k], lr, c1, c2) for k in p}
            return tuple({k: row[i] for k, row in rows.items()} for i in range(3))
        if p is None or g is None:
            return None, m, v
        g = g.to(m.dtype)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        return -(lr / c1).to(m.dtype) * m / ((v / c2.to(m.dtype)).sqrt() + eps), m, v

    def init(params):
        return {"t": torch.zeros((), dtype=torch.int64), "m": zeros(params), "v": zeros(params)}

    def update(grads, state, params, lr):
        t = state["t"] + 1
        c1, c2 = (1 - torch.full_like(t, 1, dtype=torch.float64) * b**t for b in (b1, b2))
        updates, m, v = walk(params, grads, state["m"], state["v"], lr, c1, c2)
        return updates, {"t": t, "m": m, "v": v}

    return Optimizer(init, update)


def test_one_from_elsewhere_passes():
    """It walks dicts alone, so lists are not for it, nor is the law of empty trees, one of which is a list."""
    params = {
        "embed": {"w": torch.linspace(-1, 1, 20).view(5, 4)},
        "norm": torch.ones(4),
        "out": torch.linspace(0, 2, 8).view(4, 2).mT,
        "none": torch.zeros(0),
    }
    check_optimizer(plain_adam(), params, laws=without(OPTIMIZER_LAWS, "empty", "step_"))


def test_zeros_in_place_of_none():
    """A parameter that has an update, but stands still, breaks all laws that look for the effect of lr."""
    still = momentum(update=lambda m, lr, p: -lr * m * float(p.ndim > 1))
    with pytest.raises(LawError, match=r"descends: \|w - w\*\|\^2 at b went from (.*) to \1 in") as error:
        check_optimizer(still, SMALL, laws=NO_COMPILER)
    assert [*error.value.failures] == ["lr_kinds", "descends", "dtypes"]


def flat(missing):
    """Moments in a list, in the order of the leaves: no path of the state has a parameter's name."""

    def init(params):
        return [torch.zeros_like(p) for p in tree.leaves(params)]

    def update(grads, state, params, lr):
        (_, gs), form = tree.flatten_up_to(params, grads)
        new = [missing(m) if g is None else 0.9 * m + g for m, g in zip(state, gs, strict=True)]
        return tree.unflatten(form, [None if g is None else -lr * m for m, g in zip(new, gs, strict=True)]), new

    return Optimizer(init, update)


def test_moments_without_names():
    """They are known to be moments where all gradients are absent."""
    check_optimizer(flat(lambda m: m), SMALL, laws=NO_COMPILER)
    with pytest.raises(LawError, match="absent: the state changed at 0 although the gradient is None") as error:
        check_optimizer(flat(lambda m: 0.9 * m), SMALL, laws=NO_COMPILER)
    assert [*error.value.failures] == ["absent"]


def test_the_kernel_passes():
    """On a CPU it is one custom op over the reference, which has neither a rule for vmap nor a derivative."""
    optimizer = adamw_kernel(weight_decay=0.1, mask=lambda path, p: p.ndim > 1)
    check_optimizer(optimizer, laws=without(OPTIMIZER_LAWS, "vmap", "differentiable"))


def test_muon_passes_on_matrices():
    shapes = {"w": torch.zeros(4, 6).mT, "b": {"u": torch.zeros(3, 3), "stack": torch.zeros(2, 3, 4)}}
    params = draw_like(shapes)
    optimizer = muon(iteration_dtype=torch.float32)
    check_optimizer(optimizer, params, smooth=False)
    with pytest.raises(LawError, match=r"pure: raised ValueError: muon: parameter 'extra.0' has|takes 2 or more dim"):
        check_optimizer(optimizer, laws=["pure"])


def test_the_second_form_of_the_library_passes(monkeypatch):
    """Compiled by aot_eager, to be quick: test_in_place has inductor."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="aot_eager", **options))
    of_matrices = muon_adamw(iteration_dtype=torch.float32, predicate=is_matrix)  # one of them is empty
    for optimizer in (sgd(0.9, 0.1, nesterov=True), adamw(weight_decay=0.1), lion(weight_decay=0.1), of_matrices):
        check_optimizer(optimizer, laws=["step_"])


def test_signs_have_no_derivative_by_gradients():
    check_optimizer(lion(), smooth=False, laws=["differentiable"])
    with pytest.raises(LawError, match=r"new parameters do not depend on the gradients, by differences \(smooth=False"):
        check_optimizer(lion(), laws=["differentiable"])


def test_parts_that_do_not_move_say_so():
    """frozen() gives None, which `descends` takes for an intention; if nothing moves there is nothing to check."""
    part = labelled(lambda path, p: "held" if path == "b" else "free", {"free": sgd(), "held": frozen()})
    check_optimizer(part, SMALL, laws=NO_COMPILER)
    with pytest.raises(LawError, match="descends: no parameter has an update"):
        check_optimizer(frozen(), SMALL, laws=["descends"])


def test_params_keep_dtype_and_are_not_written_to():
    params = tree.cast(SMALL, torch.bfloat16)
    before = [x.clone() for x in tree.leaves(params)]
    check_optimizer(adamw(), params, laws=NO_COMPILER, dtypes=[torch.bfloat16], seed=3)
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves(params), strict=True))


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((adamw,), {}, r"optimizer must be an Optimizer\(init, update\), got <function adamw"),
        ((sgd(), {"n": torch.tensor([1])}), {}, "params must be floating tensors, got torch.int64 at n"),
        ((sgd(), {"n": 1.0}), {}, "params must be floating tensors, got float at n"),
        ((sgd(), {"w": torch.zeros(0), "x": None}), {}, "params has no element, so nothing would be compared"),
        ((sgd(), torch.ones(3)), {}, r"one tensor with elements; frozen and absent needs two or more"),
        ((sgd(), torch.ones(3)), {"laws": ["absent"]}, r"one tensor with elements; absent needs two or more"),
        ((sgd(),), {"lr": 0.0}, "lr must be a number above 0, got 0.0"),
        ((sgd(),), {"lr": torch.tensor(0.1)}, "lr must be a number above 0, got tensor"),
        ((sgd(),), {"dtypes": []}, "dtypes must be floating dtypes, got none"),
        ((sgd(),), {"dtypes": [torch.int64]}, r"dtypes must be floating dtypes, got \[torch.int64\]"),
        ((sgd(),), {"rtol": -1.0}, "rtol must be at least 0, got -1.0"),
        ((sgd(),), {"atol": float("nan")}, "atol must be at least 0, got nan"),
        ((sgd(),), {"seed": 0.5}, "seed must be an integer of at least 0, got 0.5"),
        ((momentum(),), {"laws": ["step_"]}, "laws has step_, but the update has no second form"),
        ((sgd(),), {"laws": ["fast"]}, "laws must be some of pure, structure, .*; got fast"),
        ((sgd(),), {"laws": "pure"}, "got the string 'pure'"),
    ],
)
def test_arguments_that_cannot_be_checked(args, options, message):
    with pytest.raises(ValueError, match=message):
        check_optimizer(*args, **options)


def test_one_tensor_without_the_laws_that_need_two():
    check_optimizer(sgd(), torch.ones(3), laws=without(NO_COMPILER, "frozen", "absent"))
