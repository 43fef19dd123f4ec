"""INVARIANT: ops with which a token's log-probability is the same number, to the last bit, sampled and trained on.

    model = transformer.make(cfg, INVARIANT)
    out = generate(model, params, prompts, key, max_new_tokens=50, draw=draw_)
    log_p, _ = model.log_probs(params, batch)          # equal to out.logprobs at the tokens of out

On a GPU in eager code. Products and attention take one order of summation for all shapes, norms and gates are by rows,
and a row of logits is summed by one kernel on both sides. Decoding takes attention's own kernel up to a row's last key
(`invariant_decode`), and not the faster one of `FUSED`, which sums in another order. Gradients are the libraries' and
are not batch-invariant: what is equal is what the losses see. On a CPU all of these are the references, and promise
nothing.
"""

from purelm.kernels.fused import FUSED
from purelm.kernels.invariant_attention import invariant_attention
from purelm.kernels.invariant_decode import invariant_decode_attention_
from purelm.kernels.invariant_linear import invariant_linear
from purelm.kernels.invariant_log_probs import invariant_log_probs

__all__ = ["INVARIANT"]

INVARIANT = FUSED._replace(
    linear=invariant_linear,
    linear_out=invariant_linear,
    unembed=invariant_linear,
    attention=invariant_attention,
    log_probs=invariant_log_probs,
    decode_attention_=invariant_decode_attention_,
)
