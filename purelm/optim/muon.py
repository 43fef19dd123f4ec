"""Muon: momentum, orthogonalised, for the hidden matrices of a network; and the usual pairing with AdamW.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon, 2024):

    m <- mu m + (1 - mu) g,  o = orthogonalize((1 - mu) g + mu m)  (Nesterov; else of m)
    p <- p - lr (scale o + wd p)

With m as a running mean, as torch.optim.Muon has it; the post's m is 1 / (1 - mu) times ours, which `orthogonalize`
divides away. scale for a weight (rows, columns) = (out, in): "original" sqrt(max(1, rows / columns)), the post's;
"match_rms" 0.2 sqrt(max(rows, columns)), which gives updates the size of AdamW's, so that both can share lr and wd
(Liu et al., "Muon is scalable for LLM training", 2502.16982, equation 4).
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from purelm import tree
from purelm.devices import multiplies_natively
from purelm.optim.adamw import adamw
from purelm.optim.base import (
    Mask,
    Optimizer,
    Tree,
    compute_dtype,
    first_step,
    is_matrix,
    made_by,
    moments_like,
    per_dtype,
    scalar,
    settle,
    unzip,
    with_step,
)
from purelm.optim.checks import check_choice, check_range, check_update
from purelm.optim.combinators import partitioned, scale_lr
from purelm.optim.in_place import rates

__all__ = ["QUINTIC", "MuonState", "hidden_matrix", "muon", "muon_adamw", "orthogonalize"]

# a x + b x^3 + c x^5, chosen in the post for its slope at zero: five steps bring singular values from about 0.003
# upwards to 0.7 .. 1.2, not to 1 exactly, which does training no harm.
QUINTIC = (3.4445, -4.7750, 2.0315)


class MuonState(NamedTuple):
    """State of `muon`."""

    step: Tensor  # 0-d int64: updates done so far
    m: Tree  # running mean of g, in the dtype of the moments


def orthogonalize(
    x: Tensor,
    n_steps: int = 5,
    *,
    coefficients: tuple[float, float, float] = QUINTIC,
    dtype: torch.dtype | None = None,
    eps: float = 1e-7,
) -> Tensor:
    """Nearly U V^T for x = U S V^T: a Newton-Schulz iteration on the singular values, s <- a s + b s^3 + c s^5.

    Starts from x / max(||x||_F, eps), whose singular values are at most 1. Leading dims of x are a stack of matrices.
    The iteration runs, and the result is, in `dtype`; None is bf16 where the device of x multiplies it natively
    (`purelm.devices.multiplies_natively`), else fp32: in scalar loops five steps take 30 times as long.

    >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> orthogonalize(x, 30, coefficients=(1.5, -0.5, 0.0), dtype=torch.float32)  # the cubic converges to U V^T
    tensor([[1., 0.],
            [0., 1.]])
    """
    if x.ndim < 2:
        raise ValueError(f"orthogonalize: x must have 2 or more dimensions, got shape {tuple(x.shape)}")
    a, b, c = coefficients
    if dtype is None:
        dtype = torch.bfloat16 if multiplies_natively(torch.bfloat16, x.device) else torch.float32
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).to(dtype)  # the Gram matrix of the shorter side is the smaller one
    y = y / torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(n_steps):
        gram = y @ y.mT
        y = _add_product(y, _add_product(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y


def muon(
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    *,
    nesterov: bool = True,
    update_scale: Literal["original", "match_rms"] = "original",
    n_steps: int = 5,
    coefficients: tuple[float, float, float] = QUINTIC,
    eps: float = 1e-7,
    mask: Mask = None,
    iteration_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> Optimizer:
    """Muon as a pair of functions; formula at the top of this file, defaults those of torch.optim.Muon.

    Every parameter must have 2 or more dimensions; leading ones are a stack of matrices. Embeddings, the output head,
    norms and biases belong to another optimizer: see `muon_adamw`, `partitioned`.

    Args:
        update_scale: "original" or "match_rms"; formulas at the top of this file.
        n_steps, coefficients, eps, iteration_dtype: of `orthogonalize`.
        mask: which parameters decay: predicate (path, param) -> bool, or a tree of bools; None is all.
        dtype: of the momentum; None is fp32, and fp64 for fp64 parameters.

    >>> optimizer = muon()
    >>> params = {"w": torch.eye(2)}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params, 0.1)
    """
    check_range("momentum", momentum, 0.0, 1.0)
    check_range("weight_decay", weight_decay, 0.0, float("inf"))
    check_choice("update_scale", update_scale, ("original", "match_rms"))

    def init(params: Tree) -> MuonState:
        tree.map_with_path(_require_matrix, params)
        return MuonState(first_step(params), moments_like(params, dtype))

    def update(grads: Tree, state: MuonState, params: Tree, lr: Tensor | float) -> tuple[Tree, MuonState]:
        check_update("muon", MuonState, grads, state, params, lr)
        neg_lr = per_dtype(lambda d: settle(-scalar(lr, state.step), d))

        def leaf(rate: float, p: Tensor, g: Tensor | None, m: Tensor) -> tuple:
            if g is None:
                return None, m
            wide = compute_dtype(p)
            g_ = g.to(wide)
            m_ = torch.lerp(m.to(wide), g_, 1 - momentum)
            d = torch.lerp(g_, m_, momentum) if nesterov else m_
            o = orthogonalize(d, n_steps, coefficients=coefficients, dtype=iteration_dtype, eps=eps)
            o = o.to(wide) * _scale(p, update_scale)
            if rate:
                o = o + rate * p.to(wide)
            return o * neg_lr(wide), m_.to(m.dtype)

        updates, m = unzip(2, leaf, params, grads, state.m, weight_decay=weight_decay, mask=mask)
        return updates, MuonState(state.step + 1, m)

    def step_(grads: Tree, state: MuonState, params: Tree, lr: Tensor | float) -> tuple[Tree, MuonState]:
        """Matrices of one shape are iterated as a stack: fewer and larger products."""
        check_update("muon", MuonState, grads, state, params, lr)
        neg_lr = per_dtype(lambda d: -scalar(lr, state.step).to(d))
        (ps, gs, ms), _ = tree.flatten_up_to(params, grads, state.m)
        decay = [rate for rate, g in zip(rates(params, weight_decay, mask), gs, strict=True) if g is not None]
        some = [(p, g, m) for p, g, m in zip(ps, gs, ms, strict=True) if g is not None]
        with torch.no_grad():
            directions = []
            for p, g, m in some:
                wide = compute_dtype(p)
                m_ = torch.lerp(m.to(wide), g.to(wide), 1 - momentum)
                directions.append(torch.lerp(g.to(wide), m_, momentum) if nesterov else m_)
                m.copy_(m_)
            for group in _stacks(directions):
                stack = torch.stack([directions[i] for i in group])
                stack = orthogonalize(stack, n_steps, coefficients=coefficients, dtype=iteration_dtype, eps=eps)
                for i, o in zip(group, stack.unbind(), strict=True):
                    p, wide = some[i][0], compute_dtype(some[i][0])
                    o = o.to(wide) * _scale(p, update_scale)
                    if decay[i]:
                        o = o + decay[i] * p.to(wide)
                    p.copy_((p + o * neg_lr(wide)).to(p.dtype))
        state.step.add_(1)
        return params, state

    return made_by(
        Optimizer(init, with_step(update, step_)),
        muon,
        momentum,
        weight_decay,
        nesterov=nesterov,
        update_scale=update_scale,
        n_steps=n_steps,
        coefficients=coefficients,
        eps=eps,
        mask=mask,
        iteration_dtype=iteration_dtype,
        dtype=dtype,
    )


def muon_adamw(
    *,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    mask: Mask = is_matrix,
    update_scale: Literal["original", "match_rms"] = "match_rms",
    muon_lr_scale: float = 1.0,
    adamw_lr_scale: float = 1.0,
    predicate: Mask = None,
    iteration_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> Optimizer:
    """Muon for the hidden matrices, AdamW for the rest: `partitioned(hidden_matrix, muon(...), adamw(...))`.

    Args:
        predicate: which parameters are Muon's; None is `hidden_matrix`.
        mask: which parameters decay, of either part.
        update_scale: with "match_rms" both parts can share one lr; with "original" give Muon about 20 to 100 times
            AdamW's (muon_lr_scale).
        muon_lr_scale, adamw_lr_scale: each part's factor on lr.
    """
    hidden = muon(
        momentum,
        weight_decay,
        update_scale=update_scale,
        mask=mask,
        iteration_dtype=iteration_dtype,
        dtype=dtype,
    )
    rest = adamw(betas, eps, weight_decay, mask=mask, dtype=dtype)
    return partitioned(
        hidden_matrix if predicate is None else predicate,
        scale_lr(hidden, muon_lr_scale),
        scale_lr(rest, adamw_lr_scale),
    )


# Parts of the names that embeddings and output heads have in the models that people import: GPT-2 (wte, wpe), Llama
# (embed_tokens, lm_head, output), GPT-NeoX (embed_in, embed_out), nanoGPT, timm (head), BERT (classifier, score).
NOT_HIDDEN = ("embed", "wte", "wpe", "lm_head", "head", "output", "classifier", "score")


def hidden_matrix(path: str, leaf: Tensor) -> bool:
    """Muon's part of a foreign model: every matrix but what is called as embeddings and output heads usually are.

    A guess from the names (`NOT_HIDDEN`, as whole names or, for "embed", as part of one). Where a leaf table says what
    a leaf is, `of_kind(model.leaves, "matrix")` of purelm.models.leaves is no guess.

    >>> w = torch.zeros(2, 2)
    >>> [hidden_matrix(path, w) for path in ("layers.0.ffn.w1.weight", "transformer.wte.weight", "embed_tokens.weight")]
    [True, False, False]
    """
    names = path.split(".")
    return leaf.ndim >= 2 and "embed" not in path and not any(name in NOT_HIDDEN for name in names)


def _add_product(x: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """beta x + alpha left @ right, of stacks too; rounded once, which matters in bf16."""
    if x.ndim == 2:
        return torch.addmm(x, left, right, beta=beta, alpha=alpha)
    stacked = [t.flatten(0, -3) for t in (x, left, right)]
    return torch.baddbmm(*stacked, beta=beta, alpha=alpha).reshape(x.shape)


STACK_BYTES = 2**28  # of the directions in one stack, which is held once more in the format of the iteration


def _stacks(xs: list[Tensor]) -> list[list[int]]:
    """Numbers of the tensors that one iteration takes together: equal shape, dtype and device, and not too many."""
    groups: dict[Any, list[list[int]]] = {}
    for i, x in enumerate(xs):
        found = groups.setdefault((x.shape, x.dtype, x.device), [[]])
        if found[-1] and (len(found[-1]) + 1) * x.nbytes > STACK_BYTES:
            found.append([])
        found[-1].append(i)
    return [group for found in groups.values() for group in found]


def _scale(p: Tensor, update_scale: str) -> float:
    rows, columns = p.shape[-2:]
    if update_scale == "original":
        return math.sqrt(max(1.0, rows / max(columns, 1)))
    return 0.2 * math.sqrt(max(rows, columns))


def _require_matrix(path: str, leaf: Tensor) -> None:
    if leaf.ndim < 2:
        raise ValueError(
            f"muon: parameter {path!r} has shape {tuple(leaf.shape)}; it takes 2 or more dimensions "
            "(give the rest to another optimizer: muon_adamw, partitioned)"
        )
