"""The bundles of ops that programs offer, by name."""

from collections.abc import Callable
from typing import Any, Literal

import torch

from purelm import tree
from purelm.models.config import Config
from purelm.models.joined import join_weights
from purelm.ops import REFERENCE, Ops, few_rows
from purelm.ops.sdpa import sdpa_attention

__all__ = [
    "SDPA",
    "OpsName",
    "evaluating_ops",
    "generation_options",
    "ops_for_generation",
    "ops_named",
    "sampling_weights",
    "weights_for_generation",
]

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


def ops_for_generation(cfg: Config, device: torch.device) -> Ops:
    """Ops for decoding: on a GPU the kernels; on a CPU those for evaluating, and products of few rows on all cores."""
    if device.type == "cuda":
        return ops_named("fused")
    return evaluating_ops(cfg)._replace(linear=few_rows.linear, linear_out=few_rows.linear, unembed=few_rows.linear)


def generation_options(device: torch.device) -> dict[str, Any]:
    """Keywords of `generate`: on a GPU the step is a CUDA graph, kept for further calls, and draws by one kernel."""
    if device.type != "cuda":
        return {}
    from purelm.generate import on_graph, reused
    from purelm.kernels.draw import draw_

    return {"wrap_step": reused(on_graph), "draw": draw_}


def weights_for_generation(params: Any, device: torch.device) -> Any:
    """The parameters: on a GPU with joined projections, for which a copy is held while they are made."""
    return join_weights(params) if device.type == "cuda" else params


def sampling_weights(device: torch.device) -> Callable[[Any], Any]:
    """A function from parameters in training to equal ones that are sampled from.

    On a GPU they are a copy with joined projections that lies in the same memory at every call, which writes over the
    last one's: a recorded step reads parameters where they are.
    """
    if device.type != "cuda":
        return lambda params: params
    kept: list[Any] = []

    def copied(params: Any) -> Any:
        with torch.no_grad():
            if not kept:
                kept.append(join_weights(tree.map(torch.clone, params)))
            else:
                tree.map(lambda x, y: x.copy_(y), kept[0], params)
        return kept[0]

    return copied
