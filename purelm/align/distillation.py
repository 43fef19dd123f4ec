"""Learning from a teacher on responses of one's own: by log-probabilities of sampled tokens, or by whole distributions.

`opd` and `iw_opd` are regions: signature, aux and legend as in purelm.align.regions, with the teacher's
log-probabilities of the sampled tokens from the batch,

    region = from_batch(opd, teacher_log_probs_BT="teacher_log_probs")

Advantages are not read: the teacher's log-probability less the policy's stands in their place. Those of rewards may be
added: `regions` with advantages A + coefficient (lr - lp).detach() of tokens.

`divergence` takes logits of both. In self-distillation (SDPO, arXiv:2601.20802; SDFT, arXiv:2601.19897; OPSD) the
teacher is the policy, or a moving average of it, `controllers.mixed_reference(params, teacher, alpha=0.05)` after each
step, with a right answer or feedback in its prompt; the responses' positions of both are gathered by the caller. Where
responses are older than the policy, multiply by `weights.truncated(log_probs.detach(), old_log_probs, mask, cap=2.0)`.

Definitions as in TRL 1.16 (`divergence`, `iw_opd`) and prime-rl (`opd`), not from the papers themselves.

Legend: V vocabulary, lr = the teacher's log-probability, p and q = the student's and the teacher's distributions.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.align.tokens import mean, ratio_of, region_aux, same_shape, unmasked

__all__ = ["divergence", "iw_opd", "opd"]

Aux = dict[str, Tensor]
Tokens = Float[Tensor, "*b t"]


def opd(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor | None,
    mask_BT: Tensor,
    *,
    teacher_log_probs_BT: Tokens,
    low: float = 0.2,
) -> tuple[Tokens, Aux]:
    """l = -K sg(lr - lp) w, K = [pi - mu >= -low]: on-policy distillation, prime-rl's `ref_kl`.

    dl/dlp = -K (lr - lp) w: on-policy the gradient of KL(pi || teacher), which -(lr - lp) w estimates. A token is
    dropped once its probability has fallen by more than `low`. prime-rl adds 1e-3 (lp - lo)^2, 2e-3 `divergences.k2`
    to the old policy. aux: `teacher_gap`, the mean of lp - lr.
    """
    if not low >= 0:
        raise ValueError(f"low must be at least 0, got {low}")
    gap, log_w = _gap(log_probs_BT, log_ratio_BT, mask_BT, teacher_log_probs_BT)
    lp, w = unmasked(log_probs_BT.detach(), mask_BT), ratio_of(log_w)
    fallen = lp.exp() - (lp - log_w.detach()).clamp(max=0.0).exp() < -low
    aux = region_aux(w, fallen, torch.zeros_like(w), mask_BT) | {"teacher_gap": mean(gap, mask_BT)}
    return torch.where(fallen, 0.0, gap) * w, aux


def iw_opd(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor | None,
    mask_BT: Tensor,
    *,
    teacher_log_probs_BT: Tokens,
    gamma: float = 0.5,
    eps: float = 1e-8,
) -> tuple[Tokens, Aux]:
    """l = -sg(u a) lp, a = lr - lo, u_t = 1 + gamma (1 - sum_(k<t) |a_k| / sum_k |a_k|) (IW-OPD, arXiv:2606.22600).

    dl/dlp = -u a. The further teacher and student have drifted apart before a token, the less it counts: u falls from
    1 + gamma to 1. lo = lp - log w, the policy that sampled; with `ratios.none` the present one. Its aggregate in TRL
    is `token_mean`. eps: the least sum that divides. aux: `teacher_gap`, the mean of lo - lr.
    """
    if not (gamma >= 0 and eps > 0):
        raise ValueError(f"gamma must be at least 0 and eps above 0, got {gamma} and {eps}")
    gap, log_w = _gap(log_probs_BT, log_ratio_BT, mask_BT, teacher_log_probs_BT)
    a = -gap + log_w.detach()  # lr - lp + log w
    size = a.abs()
    u = 1 + gamma * (1 - (size.cumsum(-1) - size) / size.sum(-1, keepdim=True).clamp(min=eps))
    nothing = torch.zeros_like(size)
    aux = region_aux(ratio_of(log_w), nothing, nothing, mask_BT) | {"teacher_gap": mean(-a, mask_BT)}
    return -u * a * unmasked(log_probs_BT, mask_BT), aux


def divergence(
    logits: Float[Tensor, "*b t v"],
    teacher_logits: Float[Tensor, "*b t v"],
    mask_BT: Tensor,
    *,
    alpha: float = 0.5,
    top_k: int | None = 100,
    tail: bool = False,
) -> tuple[Tokens, Aux]:
    """alpha KL(q || m) + (1 - alpha) KL(p || m), m = (1 - alpha) p + alpha q: generalised Jensen-Shannon divergence.

    At the ends, where that is 0, the divergences that it becomes: alpha = 0 is KL(q || p), alpha = 1 is KL(p || q), as
    in GKD (arXiv:2306.13649). With respect to the student's logits, dl/dz = p (g - sum p g), g = (1 - alpha) log(p/m),
    log(p/q) for alpha = 1, and p - q for alpha = 0. No gradient enters the teacher.

    Args:
        top_k: the student's k largest logits alone, the teacher's at the same tokens; None: all of V.
        tail: with top_k, the rest of V counts as one more token; False: both distributions are normalised over the k
            (nan where the teacher excludes all of these).
    Returns:
        (loss of each token, 0 where masked; aux: `student_mass` and `teacher_mass`, the means of what the k hold).

    Both are (B, T, V): take the tokens that count first (`logits[mask]`) where that is too much. Half formats are
    computed in fp32.

    >>> z = torch.tensor([[[2.0, 0.0]]])
    >>> divergence(z, z.flip(-1), torch.ones(1, 1), alpha=1.0, top_k=None)[0]  # 2 tanh 1
    tensor([[1.5232]])
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in 0..1, got {alpha}")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
        raise ValueError(f"top_k must be an int of at least 1, or None for all, got {top_k!r}")
    for name, x in (("logits", logits), ("teacher_logits", teacher_logits)):
        if not x.is_floating_point() or x.ndim < 2 or x.shape[:-1] != mask_BT.shape:
            raise ValueError(f"{name} must be floating, of the mask's shape {tuple(mask_BT.shape)} and V, "
                             f"got {x.dtype} {tuple(x.shape)}")  # fmt: skip
    if logits.shape != teacher_logits.shape:
        raise ValueError(f"the teacher must have the student's {logits.shape[-1]} tokens, "
                         f"got {teacher_logits.shape[-1]}")  # fmt: skip
    every = mask_BT.unsqueeze(-1).expand(logits.shape)
    log_p = torch.log_softmax(unmasked(logits, every), -1)
    log_q = torch.log_softmax(unmasked(teacher_logits.detach(), every), -1)
    if top_k is None or top_k >= logits.shape[-1]:
        whole = torch.ones_like(log_p[..., 0])
        masses = (whole, whole)
    else:
        at = log_p.detach().topk(top_k, -1).indices
        rest = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, at, False)
        (log_p, p_mass), (log_q, q_mass) = (_top(x, at, rest, tail) for x in (log_p, log_q))
        masses = (p_mass, q_mass)
    aux = {name: mean(x, mask_BT) for name, x in zip(("student_mass", "teacher_mass"), masses, strict=True)}
    return unmasked(_between(log_p, log_q, alpha), mask_BT), aux


def _gap(lp_BT: Tensor, log_ratio_BT: Tensor, mask_BT: Tensor, teacher_BT: Tensor) -> tuple[Tensor, Tensor]:
    """lp - lr, detached, and log w; 0 where masked."""
    same_shape(mask_BT, log_probs=lp_BT, log_ratio=log_ratio_BT, teacher_log_probs=teacher_BT)
    gap = unmasked(lp_BT.detach(), mask_BT) - unmasked(teacher_BT.detach(), mask_BT)
    return gap, unmasked(log_ratio_BT, mask_BT)


def _top(log_p: Tensor, at: Tensor, rest: Tensor, tail: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities at these tokens, with the tail as one more or normalised; and their mass."""
    chosen = log_p.gather(-1, at)
    total = torch.logsumexp(chosen, -1, keepdim=True)
    if not tail:
        return chosen - total, total.exp().squeeze(-1)
    # Summed over the rest, not 1 - the sum of the k: that is rounding alone where the k hold nearly all.
    others = torch.where(rest, log_p, -torch.inf)
    empty = others.amax(-1, keepdim=True) == -torch.inf  # there logsumexp has no gradient
    others = torch.where(empty, -torch.inf, torch.logsumexp(torch.where(empty, 0.0, others), -1, keepdim=True))
    return torch.cat([chosen, others], -1), total.exp().squeeze(-1)


def _between(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    if alpha == 0.0:
        return _kl(log_q, log_p)
    if alpha == 1.0:
        return _kl(log_p, log_q)
    # Of a token that both exclude, logaddexp has no gradient.
    neither = (log_p == -torch.inf) & (log_q == -torch.inf)
    parts = (torch.where(neither, 0.0, x) + math.log(c) for x, c in ((log_p, 1 - alpha), (log_q, alpha)))
    log_m = torch.where(neither, -torch.inf, torch.logaddexp(*parts))
    return alpha * _kl(log_q, log_m) + (1 - alpha) * _kl(log_p, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p log(p / q); 0 log 0 is 0, with gradient 0."""
    none = log_p == -torch.inf
    log_p, log_q = (torch.where(none, 0.0, x) for x in (log_p, log_q))
    return torch.where(none, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)
