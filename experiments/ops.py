"""The bundles of ops that programs offer, by name."""

from typing import Literal

from purelm.ops import REFERENCE, Ops
from purelm.ops.sdpa import sdpa_attention

__all__ = ["SDPA", "OpsName", "ops_named"]

# sdpa: PyTorch's attention, everything else in torch primitives; fused: the kernels of purelm.kernels (on a CPU their
# references); reference: everything in torch primitives, attention too.
OpsName = Literal["sdpa", "fused", "reference"]
SDPA = REFERENCE._replace(attention=sdpa_attention)


def ops_named(name: OpsName) -> Ops:
    """The bundle of this name; kernels are imported only if it has them."""
    if name == "fused":
        from purelm.kernels.fused import FUSED

        return FUSED
    return {"sdpa": SDPA, "reference": REFERENCE}[name]
