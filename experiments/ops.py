"""The bundles of ops that programs offer, by name."""

from typing import Literal

from purelm.ops import REFERENCE, Ops
from purelm.ops.sdpa import sdpa_attention

__all__ = ["SDPA", "OpsName", "ops_named"]

# sdpa: PyTorch's attention, and what torch.compile makes of the rest; fused: the kernels of purelm.kernels (for GPUs; a
# CPU runs their references); reference: all written out.
OpsName = Literal["sdpa", "fused", "reference"]
SDPA = REFERENCE._replace(attention=sdpa_attention)


def ops_named(name: OpsName) -> Ops:
    """The bundle; the kernels are imported only if they are asked for."""
    if name == "fused":
        from purelm.kernels.fused import FUSED

        return FUSED
    return {"sdpa": SDPA, "reference": REFERENCE}[name]
