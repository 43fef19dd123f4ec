"""Softcaps, scales, temperatures and coefficients that would give a plausible result of nothing: refused everywhere."""

import math

import pytest
import torch

from purelm.dist import vocab_parallel
from purelm.kernels import cross_entropy as kernel_ce
from purelm.kernels import linear_cross_entropy as kernel_lce
from purelm.kernels.flash_attention import bidirectional_flash_attention, flash_attention, flash_attention_reference
from purelm.kernels.rms_norm import add_rms_norm
from purelm.kernels.rms_norm import rms_norm as kernel_rms_norm
from purelm.ops.attention import attention
from purelm.ops.cross_entropy import cross_entropy, mean_cross_entropy
from purelm.ops.layer_norm import layer_norm
from purelm.ops.linear_cross_entropy import linear_cross_entropy
from purelm.ops.log_probs import log_probs
from purelm.ops.rms_norm import rms_norm
from purelm.ops.rope import RopeScaling, frequencies
from purelm.ops.sdpa import sdpa_attention
from purelm.ops.softcap import soft_cap

LOGITS, TARGETS = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.arange(5)
HIDDEN, ROWS, QKV = LOGITS[:, :3], LOGITS.T[:, :3].contiguous(), LOGITS[None, :4, :6].reshape(1, 4, 2, 3)
LINEAR = {
    "ops.linear_cross_entropy": lambda **kw: linear_cross_entropy(HIDDEN, ROWS, TARGETS, **kw),
    "kernels.linear_cross_entropy": lambda **kw: kernel_lce.linear_cross_entropy(HIDDEN, ROWS, TARGETS, **kw),
    "kernels.value_and_grad": lambda **kw: kernel_lce.linear_cross_entropy_value_and_grad(HIDDEN, ROWS, TARGETS, **kw),
    "dist.vocab_parallel": lambda **kw: vocab_parallel.linear_cross_entropy(HIDDEN, ROWS, TARGETS, 7, **kw),
}
LOSSES = {
    **LINEAR,
    "ops.mean_cross_entropy": lambda **kw: mean_cross_entropy(LOGITS, TARGETS, **kw),
    "ops.cross_entropy": lambda **kw: cross_entropy(LOGITS, TARGETS, **kw),
    "kernels.cross_entropy": lambda **kw: kernel_ce.cross_entropy(LOGITS, TARGETS, **kw),
}
LOG_PROBS = {
    "kernels.log_probs_and_entropy": lambda **kw: kernel_lce.log_probs_and_entropy(HIDDEN, ROWS, TARGETS, **kw),
    "ops.log_probs": lambda **kw: log_probs(HIDDEN, ROWS, TARGETS, **kw),
}
ATTENTION = {
    "ops.attention": lambda **kw: attention(QKV, QKV, QKV, **kw),
    "flash_attention": lambda **kw: flash_attention(QKV, QKV, QKV, **kw),
    "flash_attention_reference": lambda **kw: flash_attention_reference(QKV, QKV, QKV, **kw),
    "bidirectional": lambda **kw: bidirectional_flash_attention(QKV, QKV, QKV, **kw),
}
NORMS = {
    "ops.rms_norm": lambda **kw: rms_norm(LOGITS, **kw),
    "ops.layer_norm": lambda **kw: layer_norm(LOGITS, **kw),
    "kernels.rms_norm": lambda **kw: kernel_rms_norm(LOGITS, **kw),
    "kernels.add_rms_norm": lambda **kw: add_rms_norm(LOGITS, LOGITS, **kw),
}
ENTRIES = [
    ("softcap", {**LOSSES, **LOG_PROBS, **ATTENTION, "soft_cap": lambda softcap: soft_cap(LOGITS, softcap)}, 2.0),
    ("scale", {**ATTENTION, "sdpa": lambda **kw: sdpa_attention(QKV, QKV, QKV, **kw)}, 2.0),
    ("temperature", LOG_PROBS, 2.0),
    ("z_loss", LOSSES, 0.5),
    ("eps", NORMS, 0.0),
    ("theta", {"frequencies": lambda theta: frequencies(4, theta)}, 2.0),
    ("factor", {"RopeScaling": lambda factor: RopeScaling("linear", factor)}, 2.0),
    ("attention_factor", {"RopeScaling": lambda **kw: RopeScaling("yarn", 2.0, 8, **kw)}, 2.0),
]


@pytest.mark.parametrize(
    ("name", "call", "right"),
    [pytest.param(name, f, right, id=f"{name}-{who}") for name, calls, right in ENTRIES for who, f in calls.items()],
)
def test_scales_that_mean_nothing_are_refused(name, call, right):
    """Oracle: the definition. c tanh(s / c) at c = 0 is 0 / 0, and even in c; softmax at scale 0 looks at nothing."""
    call(**{name: right})
    for bad in [0.0] * (right > 0 and name != "z_loss") + [-1.0, math.nan] + [math.inf] * (name != "eps"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            call(**{name: bad})
