"""AdamW over a whole tree in one launch, for steps that are not compiled.

The formulas, in the order of purelm.optim.adamw, for each element of each leaf, in fp32, at step t with gradient g:

    m' = m + (1 - b1) (g - m),   v' = b2 v + (1 - b2) g^2
    eps "outside":      d = lr / (1 - b1^t) m' / (sqrt(v' / (1 - b2^t) + eps_root) + eps)
    eps "uncorrected":  d = lr sqrt(1 - b2^t) / (1 - b1^t) m' / (sqrt(v' + eps_root) + eps)
    update = -d, and with decay  (p (1 - lr wd) - d) - p  ("before")  or  (p - d) (1 - lr wd) - p  ("after")

Memory traffic: p, g, m and v are read once, and update, m' and v' written once: 28 bytes an element in fp32. The
reference in eager mode passes over them about 15 times. `apply_updates` takes 12 bytes more; `adamw_step` includes it,
and takes 28 in all. Inside torch.compile both are the reference, which inductor fuses with the ops around it (28 bytes,
too), and which under jit writes to donated storage.

CUDA graphs: the kernel finds its leaves by a table of addresses, which a call copies from the host's memory, and a call
that is captured writes by kernels that have them as arguments: a replay finds them in the graph.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from purelm import tree
from purelm.optim.adamw import AdamWState
from purelm.optim.adamw import adamw as reference
from purelm.optim.base import Mask, Optimizer, Tree, apply_updates, chosen_by, compute_dtype, scalar, with_step
from purelm.transforms.donation import check_memory, consume, donated_type_of

__all__ = ["adamw", "adamw_step"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernel; the reference has float64, too


def adamw(
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    *,
    mask: Mask = None,
    eps_placement: Literal["outside", "uncorrected"] = "outside",
    eps_root: float = 0.0,
    decay_order: Literal["before", "after"] = "before",
    dtype: torch.dtype | None = None,
) -> Optimizer:
    """`purelm.optim.adamw.adamw`, with its arguments, state and results, by one launch for each set of dtypes.

    Leaves whose length is no multiple of 16, or whose address is not aligned to 16 bytes, take a launch of their own.

    Results agree with the reference's to the last bit or two of fp32 (on a CPU bit for bit). They are new contiguous
    tensors; only a training step under `jit(donate=0)` writes them over its state, by the same launch. On a GPU
    parameters, gradients and moments may be fp32, bf16 or fp16, and anything else is a ValueError. The update has no
    derivative and no vmap rule: for meta-gradients and ensembles take the reference.

    >>> optimizer = adamw(weight_decay=0.1)
    >>> params = {"w": torch.ones(2)}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params, torch.tensor(0.5))
    >>> updates["w"]
    tensor([-0.5500, -0.5500])
    """
    init, run = _fused(betas, eps, weight_decay, mask, eps_placement, eps_root, decay_order, dtype)

    def update(grads: Tree, state: AdamWState, params: Tree, lr: Tensor | float) -> tuple[Tree, AdamWState]:
        return run(grads, state, params, lr, False)

    def step_(grads: Tree, state: AdamWState, params: Tree, lr: Tensor | float) -> tuple[Tree, AdamWState]:
        leaves = tree.flatten_up_to(params, grads, state.m, state.v)
        params, new = run(grads, state, params, lr, True, leaves)
        return params, new._replace(step=state.step.copy_(new.step))

    return Optimizer(init, with_step(update, step_))


def adamw_step(
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    *,
    mask: Mask = None,
    eps_placement: Literal["outside", "uncorrected"] = "outside",
    eps_root: float = 0.0,
    decay_order: Literal["before", "after"] = "before",
    dtype: torch.dtype | None = None,
    donate: bool = False,
) -> Callable[[Tree, AdamWState, Tree, Tensor | float], tuple[Tree, AdamWState]]:
    """The function (grads, state, params, lr) -> (params', state'): `adamw`'s update and `apply_updates` in one launch.

    Equal to these two bit for bit, with less memory traffic. The state is that of `adamw(...).init(params)`.

    donate: params', m' and v' are written over params, m and v, whose tensors are empty afterwards, as under
    `jit(donate=)`: parameters and state are held once and not twice. ValueError if they share memory or require grad.
    Without effect inside torch.compile: there use `jit(donate=)`.

    >>> params = {"w": torch.ones(2)}
    >>> step = adamw_step(weight_decay=0.1)
    >>> step(params, adamw(weight_decay=0.1).init(params), params, torch.tensor(0.5))[0]["w"]
    tensor([0.4500, 0.4500])
    """
    _, run = _fused(betas, eps, weight_decay, mask, eps_placement, eps_root, decay_order, dtype)
    donated = donated_type_of("adamw_step")

    def step(grads: Tree, state: AdamWState, params: Tree, lr: Tensor | float) -> tuple[Tree, AdamWState]:
        if not donate or torch.compiler.is_compiling():
            return run(grads, state, params, lr, True)
        leaves = tree.flatten_up_to(params, grads, state.m, state.v)
        (ps, gs, ms, vs), _ = leaves
        old = ps + ms + vs
        args = grads, (params, state.m, state.v), state.step
        check_memory("adamw_step", old, args, {}, (1,), [*gs, state.step])
        out = run(grads, state, params, lr, True, leaves)
        consume(old, donated)
        return out

    return step


def _fused(
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    mask: Mask,
    eps_placement: Literal["outside", "uncorrected"],
    eps_root: float,
    decay_order: Literal["before", "after"],
    dtype: torch.dtype | None,
) -> tuple[Callable[[Tree], AdamWState], Callable[..., tuple[Tree, AdamWState]]]:
    """(init, run), where run(grads, state, params, lr, apply) gives updates, or with apply new parameters.

    donated (an argument of run): the leaves as `tree.flatten_up_to` gives them, if results are written over them.
    """
    b1, b2 = betas
    plain = reference(
        betas,
        eps,
        weight_decay,
        mask=mask,
        eps_placement=eps_placement,
        eps_root=eps_root,
        decay_order=decay_order,
        dtype=dtype,
    )
    outside, before = eps_placement == "outside", decay_order == "before"

    def init(params: Tree) -> AdamWState:
        state = plain.init(params)
        return state._replace(m=tree.map(_contiguous, state.m), v=tree.map(_contiguous, state.v))

    def scalars(step: Tensor, lr: Tensor | float) -> Tensor:
        """(neg_step_size, root_scale, root_shift, keep, lose) of the reference, in fp64."""
        t, lr_ = scalar(step, step), scalar(lr, step)
        correction2 = 1 - b2**t
        step_size, root_scale = lr_ / (1 - b1**t), torch.sqrt(correction2)
        if not outside:
            step_size, correction2 = step_size * root_scale, torch.ones_like(correction2)
        decay = lr_ * weight_decay
        return torch.stack((-step_size, root_scale, eps_root * correction2, 1 - decay, decay))

    def run(
        grads: Tree, state: AdamWState, params: Tree, lr: Tensor | float, apply: bool, donated: Any = None
    ) -> tuple[Tree, AdamWState]:
        if torch.compiler.is_compiling():
            updates, state = plain.update(grads, state, params, lr)
            return apply_updates(params, updates) if apply else updates, state
        (ps, gs, ms, vs), treedef = donated or tree.flatten_up_to(params, grads, state.m, state.v)
        chosen = [True] * len(ps) if mask is None else tree.leaves(chosen_by(mask, params))
        step = state.step + 1
        at = [i for i, g in enumerate(gs) if g is not None]
        if at:
            flags = 1 - b1, b2, 1 - b2, eps, eps_root != 0.0, outside, before, apply
            some = [[column[i] for i in at] for column in (ps, gs, ms, vs)]
            decays = [bool(weight_decay) and chosen[i] for i in at]
            found = (_step_in_place if donated else _step)(*some, scalars(step, lr), decays, *flags)
        first: list[Tensor | None] = list(ps) if apply else [None] * len(ps)
        for k, i in enumerate(at):
            first[i], ms[i], vs[i] = found[k], found[len(at) + k], found[2 * len(at) + k]
        if donated:  # leaves without a gradient are passed on as they are
            for i in set(range(len(ps))).difference(at):
                first[i], ms[i], vs[i] = ps[i].data, ms[i].data, vs[i].data
        first, m, v = (tree.unflatten(treedef, column) for column in (first, ms, vs))
        return first, AdamWState(step, m, v)

    return init, run


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


@torch.library.custom_op("purelm::adamw_step", mutates_args=(), device_types="cuda")
def _step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    scalars: Tensor,
    decays: Sequence[bool],
    one_minus_b1: float,
    b2: float,
    one_minus_b2: float,
    eps: float,
    has_root: bool,
    outside: bool,
    before: bool,
    apply: bool,
) -> list[Tensor]:
    """Updates (new parameters with `apply`), then new m, then new v, a tensor for each leaf; scalars as in `_fused`."""
    from purelm.kernels import adamw_triton

    _check(params, grads, m, v)
    hyper = one_minus_b1, b2, one_minus_b2, eps, has_root, outside, before, apply
    return adamw_triton.step(params, grads, m, v, scalars, decays, *hyper)


def _step_in_place(params: list[Tensor], grads: list[Tensor], m: list[Tensor], v: list[Tensor], *rest: Any) -> Any:
    """`_step` with `apply`, written over params, m and v. Eager only."""
    to = [x.data for x in (*params, *m, *v)]  # the results: they keep the memory when the donated tensors are emptied
    if params[0].device.type == "cuda" and all(x.is_contiguous() for x in to):
        from purelm.kernels import adamw_triton

        _check(params, grads, m, v)
        adamw_triton.step(params, grads, m, v, *rest, in_place=True)
        return to
    for x, new in zip(to, _step(params, grads, m, v, *rest), strict=True):
        x.copy_(new)
    return to


def _check(params: Sequence[Tensor], grads: Sequence[Tensor], m: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    """ValueError for what the kernel cannot do."""
    for name, tensors in (("params", params), ("grads", grads), ("m", m), ("v", v)):
        for dtype in {x.dtype for x in tensors}.difference(DTYPES):
            raise ValueError(
                f"adamw: {name} must be float32, bfloat16 or float16 on a GPU, got {dtype}: use the reference, "
                "purelm.optim.adamw"
            )


@_step.register_kernel("cpu")
def _(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    scalars: Tensor,
    decays: Sequence[bool],
    one_minus_b1: float,
    b2: float,
    one_minus_b2: float,
    eps: float,
    has_root: bool,
    outside: bool,
    before: bool,
    apply: bool,
) -> list[Tensor]:
    results: list[tuple[Tensor, ...]] = []
    for p, g, m0, v0, decay in zip(params, grads, m, v, decays, strict=True):
        wide = compute_dtype(p)
        neg_step_size, root_scale, root_shift, keep, lose = scalars.to(wide).unbind()
        p_, g_ = p.to(wide), g.to(wide)
        m_ = torch.lerp(m0.to(wide), g_, one_minus_b1)
        v_ = torch.addcmul(v0.to(wide) * b2, g_, g_, value=one_minus_b2)
        root = torch.sqrt(v_ + root_shift if has_root else v_)
        u = m_ * neg_step_size / ((root / root_scale if outside else root) + eps)
        if decay:
            whole = p_ if before else p_ + u
            whole = whole * keep if outside else whole - lose * whole
            u = (whole + u if before else whole) - p_
        first = (p + u).to(p.dtype) if apply else u
        results.append((first.contiguous(), m_.to(m0.dtype).contiguous(), v_.to(v0.dtype).contiguous()))
    return [x for column in zip(*results, strict=True) for x in column]


@_step.register_fake
def _(
    params: Sequence[Tensor], grads: Sequence[Tensor], m: Sequence[Tensor], v: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    apply = rest[-1]
    first = [p.new_empty(p.shape, dtype=p.dtype if apply else compute_dtype(p)) for p in params]
    return [*first, *[x.new_empty(x.shape) for x in m], *[x.new_empty(x.shape) for x in v]]
