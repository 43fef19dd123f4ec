"""The bundles of ops that programs offer, by name."""

from typing import Literal

from purelm.models.config import Config
from purelm.ops import REFERENCE, Ops, few_rows
from purelm.ops.sdpa import sdpa_attention

__all__ = ["SDPA", "OpsName", "evaluating_ops", "ops_for_generation", "ops_named"]

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


def evaluating_ops(cfg: Config) -> Ops:
    """PyTorch's attention where the model has no softcap."""
    return REFERENCE if cfg.attention_softcap is not None else SDPA


def ops_for_generation(cfg: Config) -> Ops:
    """Ops for decoding: those for evaluating, and products of few rows on all cores."""
    return evaluating_ops(cfg)._replace(linear=few_rows.linear, linear_out=few_rows.linear, unembed=few_rows.linear)
