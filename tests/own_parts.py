"""A mixer, a feed-forward layer and a norm that are none of the library's, as a user would write them.

Differential attention (Ye et al. 2024, arXiv:2410.05258, equations 1 to 3): of two maps of attention one is taken from
the other, times a learned lambda.
"""

import math
from typing import NamedTuple

import torch

from purelm.models.feed_forward import gated
from purelm.models.leaves import Cut, Draw, Fill, Leaf
from purelm.models.mixers import Cost, Mixer
from purelm.models.mixers.attention import KV, reads
from purelm.models.norms import Norm
from purelm.models.transformer import Config

LAMBDA_INIT = 0.8


class Differential(NamedTuple):
    d_model: int
    n_heads: int
    head_dim: int  # of either map; values have the same
    window: None = None


def leaves(c):
    H, K, D, part = c.n_heads, c.head_dim, c.d_model, "differential"

    def rows(n):
        return Leaf((n, D), "matrix", part, cut=Cut(0, H, "n_heads"), place="sublayer")

    names = ("q1", "k1", "q2", "k2")
    small = {f"lambda_{name}": Leaf((K,), "norm", part, Draw(0.1), place="sublayer") for name in names}
    return {
        "q.weight": rows(2 * H * K),
        "k.weight": rows(2 * H * K),
        "v.weight": rows(H * K),
        **small,
        "norm.weight": Leaf((K,), "norm", part, Fill(1.0), place="sublayer"),
        "out.weight": Leaf((D, H * K), "matrix", part, cut=Cut(1, H, "n_heads"), place="sublayer", residual=True),
    }


def project(c, params, x, ctx, ops):
    h = ops.enter(x)
    q, k = (ops.linear(h, params[name]["weight"]).unflatten(-1, (-1, c.head_dim)) for name in ("q", "k"))
    if ctx.cos is not None:
        q, k = (ops.rope(y, ctx.cos, ctx.sin, "half") for y in (q, k))
    return q, k, ops.linear(h, params["v"]["weight"]).unflatten(-1, (-1, c.head_dim))


def mixed(c, params, q, k, v, ops, **options):
    """Heads 2 i and 2 i + 1 of q and k are the two maps of head i."""
    one, other = (ops.attention(q[:, :, i::2], k[:, :, i::2], v, **options) for i in (0, 1))
    dots = [(params[f"lambda_q{i}"] * params[f"lambda_k{i}"]).sum().exp() for i in (1, 2)]
    o = one - (dots[0] - dots[1] + LAMBDA_INIT) * other
    o = (1 - LAMBDA_INIT) * ops.rms_norm(o, params["norm"]["weight"], 1e-5)
    return ops.linear_out(o.flatten(2), params["out"]["weight"])


def apply(c, params, x, ctx, ops):
    q, k, v = project(c, params, x, ctx, ops)
    return mixed(c, params, q, k, v, ops, causal=True, segment_ids=ctx.segment_ids)


def init_state(c, batch, n_slots, dtype, device):
    return KV(*[torch.zeros(batch, n_slots, n * c.n_heads, c.head_dim, dtype=dtype, device=device) for n in (2, 1)])


def apply_cached(c, params, x, ctx, ops, state, read):
    q, *new = project(c, params, x, ctx, ops)
    slots = read.slots
    state = KV(*[slots.write(x, y.to(x.dtype)) for x, y in zip(state, new, strict=True)])
    k, v = (read.take(x).to(q.dtype) for x in state)
    return mixed(c, params, q, k, v, ops, causal=not slots.one, segment_ids=read.segment_ids), state


def cost(c, batch, length, *, bytes_per_element=4, flash=False, skip_masked=False):
    width = c.n_heads * c.head_dim
    products = 2 * batch * length * c.d_model * width
    pairs = batch * length**2
    return Cost({"differential": 6 * products + 6 * pairs * width}, {"differential": 0}, 3 * batch * length * width)


def differential(d_model, n_heads, head_dim):
    return Mixer(Differential(d_model, n_heads, head_dim), leaves, apply, init_state, reads, apply_cached, cost)


def centred(eps=1e-5):
    """x minus its mean, times a weight: no division at all."""
    return Norm(
        eps,
        lambda eps, width: {"weight": Leaf((width,), "norm", "norms", Fill(1.0))},
        lambda eps, params, x, ops: (x - x.mean(-1, keepdim=True)) / math.sqrt(x.shape[-1] * eps) * params["weight"],
    )


def config(**changes):
    """Two of three layers differential attention, ReLU-gated feed-forward layers."""
    fields = dict(
        vocab_size=19, context_length=8, d_model=12, n_layers=3, n_heads=2, d_ff=20,
        mixer=(differential(12, 2, 6), "attention", differential(12, 2, 6)), ffn=gated(torch.relu),
    )  # fmt: skip
    return Config(**{**fields, **changes})
