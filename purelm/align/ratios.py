"""Log importance ratios of a policy to an older one, per token: what regions bound.

Each is `f(log_probs_BT, old_log_probs_BT, mask_BT, **options) -> (log_ratio_BT, aux)`, log w with 0 at masked
positions, in fp32 or wider. No gradient enters the old log-probabilities. Which policy is old is the caller's choice:
the trainer's own before its update, or the sampler's (then the weights of purelm.align.weights count it twice).

`log_clamp` bounds |log w|; beyond it w is constant, with gradient 0. exp(20) is 5e8: nothing a healthy run reaches.
verl and OpenRLHF clamp the token's at 20 too, verl GSPO's from above at 10, TRL none; None is without.

aux, over unmasked tokens: `ratio_mean` of exp(log w) and `log_ratio_largest` max |log w|, both before the clamp (a
trainer that logs clipped ratios alone hides a sampler gone astray, trl#5231), `clamped` the share beyond the clamp.

Legend: B sequences, T positions; lp = log_probs, lo = old_log_probs, m = mask, sg = stop-gradient.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from purelm.align.tokens import mean, ratio_of, row_count, row_sum, same_shape, share, unmasked

__all__ = ["Ratio", "none", "sequence", "sequence_product", "sequence_token", "token"]

Aux = dict[str, Tensor]
Ratio = Callable[..., tuple[Tensor, Aux]]
Tokens = Float[Tensor, "*b t"]


def token(
    log_probs_BT: Tokens, old_log_probs_BT: Tokens, mask_BT: Tensor, *, log_clamp: float | None = 20.0
) -> tuple[Tokens, Aux]:
    """log w_it = lp_it - lo_it: PPO's (arXiv:1707.06347) and GRPO's (arXiv:2402.03300).

    >>> mask = torch.tensor([[1, 1, 0]])
    >>> token(torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -2.0, float("nan")]]), mask)[0]
    tensor([[0.5000, 0.0000, 0.0000]])
    """
    return _clamped(_difference(log_probs_BT, old_log_probs_BT, mask_BT), mask_BT, log_clamp)


def sequence(
    log_probs_BT: Tokens, old_log_probs_BT: Tokens, mask_BT: Tensor, *, log_clamp: float | None = 20.0
) -> tuple[Tokens, Aux]:
    """log s_i = (1/T_i) sum_t m_it (lp_it - lo_it), at each token of i: GSPO's (arXiv:2507.18071 equation 7).

    The geometric mean of the tokens' ratios, whose spread does not grow with length. Its region is
    `clip(low=3e-4, high=4e-4)` (section 5.1 there), its aggregate `sequence_mean`. A token's gradient is 1/T_i of the
    row's, so that with `sequence_mean` the whole is (1/B) sum_i s_i A_i (1/T_i) sum_t d lp_it.
    """
    difference = _difference(log_probs_BT, old_log_probs_BT, mask_BT)
    return _clamped(row_sum(difference, mask_BT) / row_count(mask_BT, difference.dtype), mask_BT, log_clamp)


def sequence_token(
    log_probs_BT: Tokens, old_log_probs_BT: Tokens, mask_BT: Tensor, *, log_clamp: float | None = 20.0
) -> tuple[Tokens, Aux]:
    """log s_it = sg(log s_i) + lp_it - sg(lp_it): GSPO-token's (arXiv:2507.18071 equation 14).

    The value is `sequence`'s, the gradient the token's own. With one advantage a sequence and `sequence_mean` the
    gradient is GSPO's; advantages per token are possible too.
    """
    value, aux = sequence(log_probs_BT.detach(), old_log_probs_BT, mask_BT, log_clamp=log_clamp)
    own = unmasked(log_probs_BT, mask_BT)
    return value + (own - own.detach()), aux


def sequence_product(
    log_probs_BT: Tokens, old_log_probs_BT: Tokens, mask_BT: Tensor, *, log_clamp: float | None = 20.0
) -> tuple[Tokens, Aux]:
    """log W_i = sum_t m_it (lp_it - lo_it), at each token of i: the ratio of the whole sequences' probabilities.

    Unbiased, with a spread that grows with length (trl#4772: 0.012 a token is 3.3 after 100 tokens). Each of a row's
    tokens carries the whole row's loss: its aggregate is `sequence_mean`, which counts each row once.
    """
    return _clamped(row_sum(_difference(log_probs_BT, old_log_probs_BT, mask_BT), mask_BT), mask_BT, log_clamp)


def none(log_probs_BT: Tokens, old_log_probs_BT: Tokens | None, mask_BT: Tensor) -> tuple[Tokens, Aux]:
    """log w_it = lp_it - sg(lp_it): 0, with the gradient of lp. On-policy: old log-probabilities are not read.

    With it each region that clips has the gradient of `regions.reinforce`. It saves a forward pass where each batch of
    samples makes one update.
    """
    same_shape(mask_BT, log_probs=log_probs_BT)
    own = unmasked(log_probs_BT, mask_BT)
    return _clamped(own - own.detach(), mask_BT, None)


def _difference(log_probs_BT: Tokens, old_log_probs_BT: Tokens | None, mask_BT: Tensor) -> Tokens:
    if old_log_probs_BT is None:
        raise ValueError("this ratio needs old_log_probs, got None: give the sampler's, or those of a forward pass "
                         "before the update; on-policy take ratios.none")  # fmt: skip
    same_shape(mask_BT, log_probs=log_probs_BT, old_log_probs=old_log_probs_BT)
    return unmasked(log_probs_BT, mask_BT) - unmasked(old_log_probs_BT.detach(), mask_BT)


def _clamped(log_ratio_BT: Tokens, mask_BT: Tensor, log_clamp: float | None) -> tuple[Tokens, Aux]:
    bound = float("inf") if log_clamp is None else log_clamp
    if not bound > 0:
        raise ValueError(f"log_clamp must be above 0, or None for no clamp, got {log_clamp}")
    size = log_ratio_BT.detach().abs()
    aux = {
        "ratio_mean": mean(ratio_of(log_ratio_BT.detach()), mask_BT),
        "log_ratio_largest": size.amax() if size.numel() else size.sum(),
        "clamped": share(size > bound, mask_BT),
    }
    return log_ratio_BT if log_clamp is None else log_ratio_BT.clamp(-bound, bound), aux
