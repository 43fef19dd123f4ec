"""A token for each row, and all that is noted of it, in one kernel in place of some forty.

    out = generate(model, params, prompts, key, max_new_tokens=50, draw=draw_)

Legend: B rows, V vocabulary.

    w_i = exp((x_i - max x) / temperature)
    token = the first t with w_0 + .. + w_t > u sum_i w_i                   sums in fp64

A program has a row: it reads its logits once for maximum and sums, and again up to the token. Rows of 32,000 logits
stay in the L2 cache meanwhile.
"""

from typing import Any

import torch
from torch import Tensor

from purelm.generate.rows import Rows
from purelm.generate.rows import draw as reference
from purelm.generate.sampling import Sampling
from purelm.generate.stops import Stop

__all__ = ["draw_"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WRITTEN = ("token", "n", "is_open", "stopped", "bad", "tokens", "logprobs", "model_logprobs")


def draw_(logits_BV: Tensor, rows: Rows, sampling: Sampling, stop: Stop, stops_V: Tensor) -> Rows:
    """`purelm.generate.rows.draw` in the memory of `rows`, by a kernel where only a temperature changes the logits.

    On a CPU, with top_k, top_p or min_p, while stop ids are forbidden, and for logits in fp64, it is that function,
    which writes nothing. The two may differ where a random number lies within rounding of the border of two tokens.
    """
    filtered = sampling.top_k is not None or sampling.top_p is not None or sampling.min_p is not None
    early = bool(stop.min_new_tokens and stop.ids)
    if filtered or early or not logits_BV.is_cuda or logits_BV.dtype not in DTYPES:
        return reference(logits_BV, rows, sampling, stop, stops_V)
    _op(
        logits_BV, rows.uniforms_BN, stops_V, rows.limit_B, rows.token_B, rows.n_B, rows.open_B, rows.stopped_B,
        rows.bad_B, rows.tokens_BN, rows.logprobs_BN, rows.model_logprobs_BN, sampling.temperature,
    )  # fmt: skip
    return rows


@torch.library.custom_op("purelm::draw", mutates_args=WRITTEN, device_types="cuda")
def _op(
    logits: Tensor, uniforms: Tensor, stops: Tensor, limit: Tensor, token: Tensor, n: Tensor, is_open: Tensor,
    stopped: Tensor, bad: Tensor, tokens: Tensor, logprobs: Tensor, model_logprobs: Tensor, temperature: float,
) -> None:  # fmt: skip
    from purelm.kernels import draw_triton as kernels

    rows = Rows(token, n, limit, is_open, stopped, bad, uniforms, tokens, logprobs, model_logprobs)
    kernels.draw_(logits, rows, temperature, stops)


@_op.register_fake
def _(*args: Any) -> None:
    return None
