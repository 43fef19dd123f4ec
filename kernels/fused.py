"""FUSED: the bundle of ops with the kernels of this package in place of the references.

    from purelm.kernels.fused import FUSED
    loss, metrics = transformer.loss(params, batch, cfg, ops=FUSED)

Attention and the loss are always kernels. Norms, rotations and gates are kernels in eager code only: in torch.compile
they are the references, which inductor fuses with the operations around them; it cannot fuse anything with a kernel.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from purelm.kernels.decode_attention import decode_attention_
from purelm.kernels.flash_attention import flash_attention
from purelm.kernels.linear_cross_entropy import linear_cross_entropy, log_probs_and_entropy
from purelm.kernels.rms_norm import add_rms_norm, rms_norm
from purelm.kernels.rope import rope
from purelm.kernels.swiglu import swiglu
from purelm.ops import REFERENCE, protocols

__all__ = ["FUSED", "unless_compiling"]

Op = TypeVar("Op", bound=Callable[..., Any])


def unless_compiling(kernel: Op, reference: Op) -> Op:
    """`reference` while torch.compile traces, else `kernel`."""

    @wraps(kernel)
    def op(*args: Any, **kwargs: Any) -> Any:
        return reference(*args, **kwargs) if torch.compiler.is_compiling() else kernel(*args, **kwargs)

    op.__module__, op.__name__, op.__qualname__ = __name__, f"eager_{kernel.__name__}", f"eager_{kernel.__name__}"
    return cast(Op, op)


# Names of this module, so that a bundle that holds them can be pickled.
eager_rms_norm: protocols.RMSNorm = unless_compiling(rms_norm, REFERENCE.rms_norm)
eager_add_rms_norm: protocols.AddRMSNorm = unless_compiling(add_rms_norm, REFERENCE.add_rms_norm)
eager_rope: protocols.Rope = unless_compiling(rope, REFERENCE.rope)
eager_swiglu: protocols.Gate = unless_compiling(swiglu, REFERENCE.swiglu)
FUSED = REFERENCE._replace(
    attention=flash_attention,
    decode_attention_=decode_attention_,
    linear_cross_entropy=linear_cross_entropy,
    log_probs=log_probs_and_entropy,
    rms_norm=eager_rms_norm,
    add_rms_norm=eager_add_rms_norm,
    rope=eager_rope,
    swiglu=eager_swiglu,
)
