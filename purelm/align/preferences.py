"""Losses of preferences: of two answers to a prompt, one was chosen and one rejected.

    log_p_BT, _ = model.log_probs(params, batch)              # or logits.target_log_probs, of any model
    log_p_B = sequence_log_probs(log_p_BT, batch["weights"])  # sums over each answer
    losses_P, aux = dpo(log_p_chosen, log_p_rejected, ref_chosen, ref_rejected, beta=0.1)
    loss = losses_P.sum() / n_pairs                           # of the whole batch, in any microbatches

Every loss takes log-probabilities that were summed over the tokens of an answer, and gives the loss of each pair, to
minimise, and aux, detached values of each pair: chosen_reward and rejected_reward, the implicit rewards; margin, their
difference; accuracy, 1 where the chosen reward is the greater; policy_accuracy, 1 where the policy itself gives the
chosen answer the greater sum (CS336's measure). At equal values both are 0. Log-probabilities of the prompt cancel in
d, so sums over whole sequences serve as well where a loss is of d alone; means over tokens, and `kto`, need the
answers' own.

d_w = log pi(y_w|x) - log ref(y_w|x), d_l likewise, d = d_w - d_l, b = beta, s = sigmoid; n_w, n_l the tokens of the
answers. All is computed in fp32, or fp64 where a tensor is. No gradient reaches the reference. beta may be a tensor, of
one value or of one a pair. Legend: B sequences, T positions, P pairs (any shape).

Losses without a reference: `purelm.align.reference_free`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from purelm.align.answers import (
    Number,
    Scored,
    check_above_0,
    check_shapes,
    length_desensitized,
    scored,
    sequence_log_probs,
    token_mean,
    wide,
)

__all__ = [
    "Scored", "apo_down", "apo_zero", "cdpo", "dpo", "dpo_norm", "hinge", "ipo", "kto", "kto_kl", "length_desensitized",
    "reward_model", "robust_dpo", "sequence_log_probs",
]  # fmt: skip


def dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: Number = 0.1) -> Scored:
    """DPO: -log s(b d); arXiv:2305.18290, equation 7. dL/dlog pi(y_w|x) = -b s(-b d), and its negative for y_l.

    >>> at_start = torch.tensor([-3.0])
    >>> dpo(at_start, at_start, at_start, at_start)[0]  # log 2
    tensor([0.6931])
    """
    d_w, d_l, aux = _ratios(chosen, rejected, ref_chosen, ref_rejected, beta)
    return -F.logsigmoid(beta * (d_w - d_l)), aux


def cdpo(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
    *, beta: Number = 0.1, label_smoothing: float,
) -> Scored:  # fmt: skip
    """Conservative DPO: -(1 - e) log s(b d) - e log s(-b d), for labels that are wrong with probability e.

    E. Mitchell, "A note on DPO with noisy preferences" (2023). Its minimum is at s(b d) = 1 - e.
    """
    e = _smoothing(label_smoothing, "at most 0.5", 0 <= label_smoothing <= 0.5)
    d_w, d_l, aux = _ratios(chosen, rejected, ref_chosen, ref_rejected, beta)
    x = beta * (d_w - d_l)
    return -(1 - e) * F.logsigmoid(x) - e * F.logsigmoid(-x), aux


def robust_dpo(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
    *, beta: Number = 0.1, label_smoothing: float,
) -> Scored:  # fmt: skip
    """Robust DPO: [-(1 - e) log s(b d) + e log s(-b d)] / (1 - 2 e), e below 0.5; arXiv:2403.00409.

    Its mean over labels that are wrong with probability e is the `dpo` of the right ones.
    """
    e = _smoothing(label_smoothing, "below 0.5", 0 <= label_smoothing < 0.5)
    d_w, d_l, aux = _ratios(chosen, rejected, ref_chosen, ref_rejected, beta)
    x = beta * (d_w - d_l)
    return (e * F.logsigmoid(-x) - (1 - e) * F.logsigmoid(x)) / (1 - 2 * e), aux


def ipo(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
    *, beta: Number = 0.1, n_chosen: Tensor | None = None, n_rejected: Tensor | None = None,
) -> Scored:  # fmt: skip
    """IPO: (d - 1 / (2 b))^2, zero at d = 1 / (2 b); arXiv:2310.12036, equation 17.

    With n_chosen and n_rejected, d = d_w / n_w - d_l / n_l: the means over tokens, as in TRL; OpenRLHF has sums.
    """
    d_w, d_l, aux = _ratios(chosen, rejected, ref_chosen, ref_rejected, beta)
    if (n_chosen is None) != (n_rejected is None):
        raise ValueError("n_chosen and n_rejected: one is given; give both, or neither for sums")
    if n_chosen is not None and n_rejected is not None:
        d_w, d_l = token_mean(d_w, n_chosen), token_mean(d_l, n_rejected)
        aux = scored(beta * d_w, beta * d_l, chosen, rejected)
    return (d_w - d_l - 1 / (2 * beta)) ** 2, aux


def hinge(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: Number = 0.1) -> Scored:
    """max(0, 1 - b d): SLiC's loss (arXiv:2305.10425) of the implicit rewards. At b d = 1 its gradient is 0."""
    d_w, d_l, aux = _ratios(chosen, rejected, ref_chosen, ref_rejected, beta)
    return F.relu(1 - beta * (d_w - d_l)), aux


def dpo_norm(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
    *, n_chosen: Tensor, n_rejected: Tensor, beta: Number = 5.0,
) -> Scored:  # fmt: skip
    """Length-normalised DPO: -log s(b (d_w / n_w - d_l / n_l)); Tulu 3 (arXiv:2411.15124), Olmo 3 (arXiv:2512.13961).

    The rewards are b d_w / n_w and b d_l / n_l. beta: that of both, some fifty times that of sums.
    """
    d_w, d_l, _ = _ratios(chosen, rejected, ref_chosen, ref_rejected, beta)
    r_w, r_l = beta * token_mean(d_w, n_chosen), beta * token_mean(d_l, n_rejected)
    return -F.logsigmoid(r_w - r_l), scored(r_w, r_l, chosen, rejected)


def apo_zero(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: Number = 0.1
) -> Scored:
    """APO-zero: (1 - s(b d_w)) + s(b d_l): chosen answers up, rejected ones down; arXiv:2408.06266."""
    d_w, d_l, aux = _ratios(chosen, rejected, ref_chosen, ref_rejected, beta)
    return torch.sigmoid(-beta * d_w) + torch.sigmoid(beta * d_l), aux


def apo_down(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: Number = 0.1
) -> Scored:
    """APO-down: s(b d_w) + (1 - s(b d)): both answers down, the rejected one further; arXiv:2408.06266."""
    d_w, d_l, aux = _ratios(chosen, rejected, ref_chosen, ref_rejected, beta)
    return torch.sigmoid(beta * d_w) + torch.sigmoid(-beta * (d_w - d_l)), aux


def kto_kl(log_p: Tensor, log_ref: Tensor, *, denominator: Number | None = None) -> Float[Tensor, ""]:
    """max(0, mean of log pi(y'|x) - log ref(y'|x)) over prompts with answers y' to other prompts; without gradient.

    The estimate of KL(pi || ref) that `kto` takes (arXiv:2402.01306). Of one batch it needs all parts before the loss
    of any: a mean that is cut at 0 does not add up. denominator: how many there are, instead of those given.
    """
    check_shapes({"log_p": log_p, "log_ref": log_ref})
    total = (wide(log_p) - wide(log_ref)).detach().sum()
    n = log_p.numel() if denominator is None else denominator
    if not isinstance(n, Tensor) and not n > 0:
        raise ValueError(f"kto_kl: the mean of {n} answers; at least one is needed")
    return (total / n).clamp(min=0)


def kto(
    log_p: Tensor, log_ref: Tensor, desirable: Tensor, kl: Number,
    *, beta: Number = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> Scored:  # fmt: skip
    """KTO, of single answers y: w_d (1 - s(b (d - kl))) if desirable, else w_u (1 - s(b (kl - d))).

    arXiv:2402.01306, equation 8, without its constant. aux: reward, b d, of each answer. The sums are those of the
    answers alone, without the prompt's tokens. kl: from `kto_kl`, of the whole batch; no gradient goes into it.

    >>> at_start = torch.tensor([-3.0, -3.0])
    >>> kto(at_start, at_start, torch.tensor([True, False]), 0.0)[0]
    tensor([0.5000, 0.5000])
    """
    check_shapes({"log_p": log_p, "log_ref": log_ref, "desirable": desirable})
    check_above_0("beta", beta)
    d = wide(log_p) - wide(log_ref).detach()
    x = beta * (d - (kl.detach() if isinstance(kl, Tensor) else kl))
    is_good = desirable != 0
    losses = torch.where(is_good, desirable_weight * torch.sigmoid(-x), undesirable_weight * torch.sigmoid(x))
    return losses, {"reward": (beta * d).detach()}


def reward_model(chosen: Tensor, rejected: Tensor, margin: Number = 0.0) -> Scored:
    """-log s(r_w - r_l - margin) of a reward model's scores; arXiv:2203.02155, equation 1, and 2307.09288, equation 2.

    aux has no policy_accuracy. margin: how far apart the scores are to be, of all pairs or of each.
    """
    check_shapes({"chosen": chosen, "rejected": rejected})
    r_w, r_l = wide(chosen), wide(rejected)
    aux = scored(r_w, r_l, chosen, rejected)
    del aux["policy_accuracy"]
    return -F.logsigmoid(r_w - r_l - margin), aux


def _ratios(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: Number
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(d_w, d_l, aux with b d_w and b d_l)."""
    check_shapes({"chosen": chosen, "rejected": rejected, "ref_chosen": ref_chosen, "ref_rejected": ref_rejected})
    check_above_0("beta", beta)
    d_w = wide(chosen) - wide(ref_chosen).detach()
    d_l = wide(rejected) - wide(ref_rejected).detach()
    return d_w, d_l, scored(beta * d_w, beta * d_l, chosen, rejected)


def _smoothing(e: float, limit: str, allowed: bool) -> float:
    if not allowed:
        raise ValueError(f"label_smoothing must be at least 0 and {limit}, got {e}")
    return e
