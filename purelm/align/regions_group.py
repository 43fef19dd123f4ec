"""Trust regions in which a token's loss depends on the other responses to its prompt.

Signature, aux and legend as in purelm.align.regions. Rows of one prompt lie one after the other, `group_size` of them:
a microbatch holds whole groups.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from purelm.align.tokens import log_ratio_and_advantages, ratio_of, region_aux, row_count, share, unmasked

__all__ = ["real"]

Aux = dict[str, Tensor]
Tokens = Float[Tensor, "*b t"]


def real(
    log_probs_BT: Tokens,
    log_ratio_BT: Tokens,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    group_size: int,
    tau: float = 0.5,
) -> tuple[Tokens, Aux]:
    """log(1 + sum_(+) exp(-s_i / tau)) + log(1 + sum_(-) exp(s_j / tau)) of the group, s_i = (1/T_i) sum_t log w_it.

    REAL (arXiv:2602.05630): rewards as labels, + where A > 0, of a classifier whose logits are the responses' mean log
    ratios. A group without both labels has loss 0, as in ms-swift, whose tau is the default; rows without tokens have
    no label. dL/ds = -(1/tau) p_i of a right response and (1/tau) p_j of a wrong one, where p are the softmax of the
    group's right (wrong) terms and of the 1: below 1/tau, however unlikely a token has become.

    Every token of a row has its group's loss, so that `sequence_mean` over all rows is the mean over groups. Read from
    ms-swift's documents and code, not from the paper itself. aux: `separated`, the share of tokens whose row has
    s > 0 and the label +, or s < 0 and the label -.
    """
    if not 0 < tau < float("inf"):
        raise ValueError(f"tau must be above 0 and finite, got {tau}")
    n_rows = mask_BT.shape[:-1].numel()
    if not isinstance(group_size, int) or group_size < 1 or n_rows % group_size:
        raise ValueError(f"group_size must divide the number of sequences, {n_rows}, got {group_size}")
    log_w, adv = log_ratio_and_advantages(log_probs_BT, log_ratio_BT, advantages, mask_BT)
    grouped = (-1, group_size)
    on_PG = (mask_BT != 0).any(-1).reshape(grouped)
    # Advantages of tokens are one label by their sum; of equal ones that is the label of each.
    plus_PG = (adv.sum(-1) > 0).reshape(grouped)
    s_B1 = log_w.sum(-1, keepdim=True) / row_count(mask_BT, log_w.dtype)
    s_PG = s_B1.reshape(grouped) / tau
    right_PG, wrong_PG = on_PG & plus_PG, on_PG & ~plus_PG
    loss_P1 = _softplus_of_sum(-s_PG, right_PG) + _softplus_of_sum(s_PG, wrong_PG)
    loss_P1 = torch.where(right_PG.any(-1, keepdim=True) & wrong_PG.any(-1, keepdim=True), loss_P1, 0.0)
    # A row without tokens adds 0 to a mean over rows, and the others of its group stand in for it.
    counted_P1 = on_PG.to(s_PG.dtype).sum(-1, keepdim=True).clamp(min=1.0)
    loss_B1 = (loss_P1 * group_size / counted_P1).expand(on_PG.shape).reshape(s_B1.shape)
    nothing = torch.zeros_like(log_w)
    agrees_BT = (s_B1.detach() * torch.where(adv.sum(-1, keepdim=True) > 0, 1.0, -1.0) > 0).expand_as(log_w)
    aux = region_aux(ratio_of(log_w), nothing, nothing, mask_BT) | {"separated": share(agrees_BT, mask_BT)}
    return unmasked(loss_B1.expand_as(log_w), mask_BT), aux


def _softplus_of_sum(x_PG: Tensor, chosen_PG: Tensor) -> Tensor:
    """log(1 + sum of exp(x) over the chosen), (P, 1)."""
    terms = torch.where(chosen_PG, x_PG, -torch.inf)
    return torch.logsumexp(torch.cat([terms, torch.zeros_like(terms[:, :1])], -1), -1, keepdim=True)
