"""The laws of optimizers, pairs (init, update) as `purelm.optim.base` describes them: yours and the library's alike.

check_optimizer(Optimizer(init, update))
check_optimizer(mine, params, lr=0.02, laws=without(OPTIMIZER_LAWS, "compile"))
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from purelm import random, tree
from purelm.optim.base import Optimizer, step_of
from purelm.testing import optimizer_laws, optimizer_transforms
from purelm.testing.laws import Law, run_laws
from purelm.testing.optimizer_case import Case
from purelm.tree import Tree

__all__ = ["OPTIMIZER_LAWS", "check_optimizer"]

OPTIMIZER_LAWS: dict[str, Law] = {
    "pure": optimizer_laws.pure,
    "structure": optimizer_laws.structure,
    "frozen": optimizer_laws.frozen,
    "absent": optimizer_laws.absent,
    "empty": optimizer_laws.empty,
    "lr_zero": optimizer_laws.lr_zero,
    "lr_kinds": optimizer_laws.lr_kinds,
    "descends": optimizer_laws.descends,
    "dtypes": optimizer_laws.dtypes,
    "chain": optimizer_laws.chained,
    "resumable": optimizer_laws.resumable,
    "vmap": optimizer_transforms.vmapped,
    "compile": optimizer_transforms.compiled,
    "step_": optimizer_transforms.step_,
    "differentiable": optimizer_transforms.differentiable,
}

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def check_optimizer(
    optimizer: Optimizer,
    params: Tree = None,
    *,
    lr: float = 0.1,
    laws: Iterable[str] | None = None,
    smooth: bool = True,
    dtypes: Sequence[torch.dtype] = DTYPES,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    seed: int = 0,
) -> None:
    """LawError, naming each law that fails, unless the optimizer keeps the contract of `purelm.optim.base`.

    The laws (OPTIMIZER_LAWS has their names):

        pure            init and update write to no argument, draw from no global generator and give the same bits
                        twice; results share no memory with arguments
        structure       updates have the structure and shapes of params; the state is tensors alone, and keeps its
                        structure, shapes, dtypes and devices, so that a compiled step is compiled once
        frozen          None in params and grads alike: no update and no state, and the others are updated as if it
                        were not there
        absent          None in grads alone: that parameter keeps its value and its moments in that step
        empty           a tree without tensors is updated to itself
        lr_zero         parameters keep all bits, while the state goes on
        lr_kinds        lr as a number and as a 0-d fp64 tensor give the same bits, as an fp32 tensor the same to
                        rounding; another lr gives another update
        descends        |w - w*|^2 of each parameter falls to less than a quarter in 300 steps, lr falling to 0
        dtypes          the update of bf16 and fp32 parameters is that in fp64 to rounding, fp64 ones are computed in
                        fp64, and the state keeps its dtypes
        chain           after a function that changes nothing, or one that clips, the optimizer does what it does with
                        that function's result; within `apply_if_finite` a step with nan changes nothing
        resumable       a state that was copied, or saved and loaded leaf by leaf, goes on with the same bits
        vmap            an ensemble with one lr each is a loop over its members
        compile         one graph, eager's numbers, and no second compilation for another lr
        step_           the second form of the update (`optim.with_step`) is the first one to rounding, in place
        differentiable  d new params / d lr is that of differences in fp64, and so is that by the gradients if smooth

    An optimizer that leaves a parameter alone says so by the update None, as `optim.frozen` does: an update of zeros
    fails `descends`. One that holds a tree of the form of params, such as a mask of bools, cannot pass `frozen` and
    `empty`; one that holds a predicate can.

    Args:
        params: on any device. None: a small tree with names of a Transformer: vectors, matrices and a stack of
            matrices, one of them transposed and one empty. `muon` takes 2 or more dimensions alone: give it such.
        lr: one that suits the optimizer, large enough for a distance of 1 in 300 steps if it falls to 0.
        laws: names of those to run; None is all, but step_ only where there is a second form.
        smooth: whether the update has a derivative by the gradients that differences show. Lion's sign has none, nor
            has an orthogonalisation in fp32.
        dtypes: of parameters, for lr_zero and dtypes.
        rtol, atol: of vmap, compile and step_, where sums may run in another order.
        seed: of gradients and whatever else is drawn.

    ValueError for arguments that cannot be checked, and with which nothing would be compared.

    >>> from purelm.optim import sgd
    >>> check_optimizer(sgd(0.9), laws=["pure", "structure", "absent"])
    """
    _check_arguments(optimizer, lr, dtypes, rtol, atol, seed)
    names: Any = laws if laws is None or isinstance(laws, str) else tuple(laws)
    if step_of(optimizer) is None:
        if names is None:
            names = tuple(name for name in OPTIMIZER_LAWS if name != "step_")
        elif "step_" in names and not isinstance(names, str):
            raise ValueError("check_optimizer: laws has step_, but the update has no second form (optim.with_step)")
    tried = _own_params(seed) if params is None else _checked(params, names)
    case = Case(optimizer, tried, float(lr), bool(smooth), tuple(dtypes), rtol, atol, seed)
    run_laws("check_optimizer", OPTIMIZER_LAWS, names, case)


def _own_params(seed: int) -> Tree:
    """Values, names and shapes as a Transformer may have them; fp32 on the CPU."""
    keys = iter(random.split(random.fold_in(random.key(seed), 1), 8))
    draw = lambda *shape: random.normal(next(keys), shape, dtype=torch.float32)  # noqa: E731
    return {
        "token_embeddings": {"weight": draw(9, 4)},
        "layers": [{"attn": {"q_proj": {"weight": draw(4, 6).mT}}, "ln1": {"weight": draw(4)}} for _ in range(2)],
        "experts": draw(2, 3, 4),
        "extra": (draw(1, 1), draw(0, 3)),
    }


def _checked(params: Tree, laws: tuple[str, ...] | None) -> Tree:
    for path, p in zip(tree.paths(params), tree.leaves(params), strict=True):
        if not tree.is_floating(p):
            kind = f"{p.dtype}" if isinstance(p, Tensor) else type(p).__name__
            raise ValueError(f"check_optimizer: params must be floating tensors, got {kind} at {path or 'the root'}")
    filled = sum(bool(p.numel()) for p in tree.leaves(params))
    if not filled:
        raise ValueError("check_optimizer: params has no element, so nothing would be compared")
    several = [name for name in ("frozen", "absent") if laws is None or name in laws]
    if filled < 2 and several:
        raise ValueError(
            f"check_optimizer: params has one tensor with elements; {' and '.join(several)} needs two or more (laws= "
            "leaves it out)"
        )
    return tree.map(lambda p: p.detach(), params)


def _check_arguments(
    optimizer: Any, lr: Any, dtypes: Sequence[torch.dtype], rtol: float, atol: float, seed: Any
) -> None:
    if not callable(getattr(optimizer, "init", None)) or not callable(getattr(optimizer, "update", None)):
        raise ValueError(f"check_optimizer: optimizer must be an Optimizer(init, update), got {optimizer!r:.60}")
    if isinstance(lr, Tensor) or callable(lr) or not 0.0 < lr < float("inf"):
        raise ValueError(f"check_optimizer: lr must be a number above 0, got {lr!r:.60}")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not value >= 0.0:
            raise ValueError(f"check_optimizer: {name} must be at least 0, got {value}")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"check_optimizer: seed must be an integer of at least 0, got {seed!r}")
    wrong = [d for d in dtypes if not isinstance(d, torch.dtype) or not d.is_floating_point]
    if wrong or not dtypes:
        raise ValueError(f"check_optimizer: dtypes must be floating dtypes, got {wrong or 'none'}")
