"""Losses of preferences that need no reference: SimPO, ORPO, CPO.

Arguments and results are those of `purelm.align.preferences`; the implicit rewards are of the policy alone.
a = log pi(y|x) / n, the mean over an answer's tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from purelm.align.answers import Number, Scored, check_above_0, check_shapes, scored, token_mean, wide

__all__ = ["cpo", "log1mexp", "orpo", "simpo"]


def simpo(
    chosen: Tensor, rejected: Tensor, *, n_chosen: Tensor, n_rejected: Tensor, beta: Number = 2.0, gamma: Number = 0.5
) -> Scored:
    """SimPO: -log s(b (a_w - a_l) - gamma); arXiv:2405.14734, equation 6. The rewards are b a_w and b a_l.

    gamma is in units of rewards; open-instruct gives gamma / beta.
    """
    a_w, a_l = _means(chosen, rejected, n_chosen, n_rejected, beta)
    return -F.logsigmoid(beta * (a_w - a_l) - gamma), scored(beta * a_w, beta * a_l, chosen, rejected)


def orpo(chosen: Tensor, rejected: Tensor, *, n_chosen: Tensor, n_rejected: Tensor, beta: Number = 0.1) -> Scored:
    """ORPO: -a_w - b log s(log odds(a_w) - log odds(a_l)), log odds(a) = a - log(1 - e^a).

    arXiv:2403.07691, equation 6; b is its lambda. The rewards are b a_w and b a_l. The odds of a certain answer are
    infinite: there e^a is taken as 1 - eps of the number format, with gradient 0 through the odds.
    """
    a_w, a_l = _means(chosen, rejected, n_chosen, n_rejected, beta)
    return -a_w - beta * F.logsigmoid(_log_odds(a_w) - _log_odds(a_l)), scored(beta * a_w, beta * a_l, chosen, rejected)


def cpo(
    chosen: Tensor, rejected: Tensor, *, beta: Number = 0.1, alpha: Number = 1.0, n_chosen: Tensor | None = None
) -> Scored:
    """CPO: -log s(b (log pi(y_w|x) - log pi(y_l|x))) - alpha log pi(y_w|x); arXiv:2401.08417.

    With n_chosen the second term is alpha a_w, the mean over tokens. The rewards are b log pi.
    """
    check_shapes({"chosen": chosen, "rejected": rejected})
    check_above_0("beta", beta)
    w, l = wide(chosen), wide(rejected)
    nll = -w if n_chosen is None else -token_mean(w, n_chosen)
    return -F.logsigmoid(beta * (w - l)) + alpha * nll, scored(beta * w, beta * l, chosen, rejected)


def log1mexp(a: Tensor) -> Tensor:
    """log(1 - e^a) for a < 0, to full precision: log(-expm1(a)) above -log 2, else log1p(-e^a) (Maechler 2012).

    -inf at 0, nan above it.

    >>> log1mexp(torch.tensor([-1e-30, -0.6931472, -50.0]))
    tensor([-6.9078e+01, -6.9315e-01, -1.9287e-22])
    """
    near = a > -math.log(2)
    # Each branch sees arguments of its own range alone, so that no nan of the other's gradient comes through.
    return torch.where(
        near, torch.log(-torch.expm1(torch.where(near, a, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, a)))
    )


def _log_odds(a: Tensor) -> Tensor:
    a = a.clamp(max=-torch.finfo(a.dtype).eps)
    return a - log1mexp(a)


def _means(
    chosen: Tensor, rejected: Tensor, n_chosen: Tensor, n_rejected: Tensor, beta: Number
) -> tuple[Tensor, Tensor]:
    check_shapes({"chosen": chosen, "rejected": rejected})
    check_above_0("beta", beta)
    return token_mean(wide(chosen), n_chosen), token_mean(wide(rejected), n_rejected)
