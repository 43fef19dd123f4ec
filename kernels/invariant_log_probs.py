"""Log-probabilities of targets, with the bits that `draw_` notes when it samples them.

    log p = (x_t - m) / T - log sum_v exp((x_v - m) / T)        x = cap(h W^T), m its maximum, sums in fp64

`draw_` and this op sum a row of logits by the same kernel code in the same order, and form them by the same
batch-invariant product. The backward pass is the reference's, which forms the logits again.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from purelm.kernels.cross_entropy import check_targets
from purelm.kernels.invariant_linear import invariant_linear
from purelm.ops.log_probs import log_probs as reference
from purelm.ops.softcap import check_positive, check_softcap, soft_cap

__all__ = ["invariant_log_probs"]

LOGITS_BYTES = 512 << 20  # of logits that are held at a time, where no chunk is given


def invariant_log_probs(
    hidden: Float[Tensor, "*batch d"],
    unembedding_VD: Float[Tensor, "v d"],
    targets: Int[Tensor, "*batch"],
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    ignore_index: int | None = None,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """`purelm.ops.log_probs.log_probs`, which it is on a CPU: (log p of the target, entropy) of each token; nats, fp32.

    On a GPU a log-probability has the same bits in every batch, those that `purelm.kernels.draw.draw_` noted of the
    same logits at this temperature; entropies do not. Differentiable once there, in reverse mode.

    Args:
        chunk: tokens whose logits are held at a time; None: as many as take 512 MiB.
    Raises ValueError as the reference does, and on a GPU as `invariant_linear` does.
    """
    if not hidden.is_cuda:
        return reference(
            hidden, unembedding_VD, targets, softcap=softcap, temperature=temperature, chunk=chunk,
            ignore_index=ignore_index,
        )  # fmt: skip
    check_softcap(softcap)
    check_positive("temperature", temperature)
    check_targets(targets, None, hidden.shape[:-1], hidden.device)
    V = unembedding_VD.shape[0]
    n = chunk or max(LOGITS_BYTES // (V * hidden.element_size()), 1)
    log_p, entropy = _InvariantLogProbs.apply(
        hidden.reshape(-1, hidden.shape[-1]), unembedding_VD, targets.reshape(-1), softcap, temperature, n, ignore_index
    )
    return log_p.reshape(targets.shape), entropy.reshape(targets.shape)


class _InvariantLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, softcap: float | None, temperature: float, chunk: int,
        ignore_index: int | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        from purelm.kernels.log_prob_rows_triton import log_probs

        dead_N = torch.zeros_like(targets_N, dtype=torch.bool) if ignore_index is None else targets_N == ignore_index
        found, entropies = [], []
        for h, t, dead in zip(*(x.split(chunk) for x in (h_ND, targets_N, dead_N)), strict=True):
            logits = soft_cap(invariant_linear(h, w_VD), softcap)
            found.append(torch.where(dead, 0.0, log_probs(logits, torch.where(dead, 0, t), temperature)))
            log_p = torch.log_softmax(logits.float() / temperature, -1)
            entropies.append(torch.where(dead, 0.0, -(log_p.exp() * log_p).sum(-1)))
        empty = h_ND.new_zeros(0, dtype=torch.float32)
        return (torch.cat(found) if found else empty), (torch.cat(entropies) if entropies else empty.clone())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        h, w, targets, *ctx.numbers = inputs
        ctx.save_for_backward(h, w, targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        softcap, temperature, chunk, ignore_index = ctx.numbers
        h, w, targets = ctx.saved_tensors
        with torch.enable_grad():
            h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
            out = reference(
                h, w, targets, softcap=softcap, temperature=temperature, chunk=chunk, ignore_index=ignore_index
            )
            dh, dw = torch.autograd.grad(out, (h, w), grads)
        return dh, dw, None, None, None, None, None
