"""What parallel training costs a rank: bytes sent in a step, time of compute and of communication, and memory.

Plain arithmetic as in `accounting`. A step has a forward and a backward phase. In each, compute takes c B and
communication d + t B seconds for a batch of B on a rank; d is for parameters and gradients, and t B for activations,
which only tensor parallelism sends. If the two overlap perfectly, the phase takes the longer of them.

Bytes are those that one rank sends in a ring: n (N - 1)/N for an all_gather or a reduce_scatter of n bytes, twice that
for an all_reduce. So `bandwidth` is the bus bandwidth of nccl-tests: bytes/s that one rank sends.

    scheme   forward phase                    backward phase                                elements sent, N -> infinity
    ddp                                       all_reduce of gradients                       2 P
    zero1    all_gather of updated parameters reduce_scatter of gradients                   2 P
    fsdp     all_gather of parameters         all_gather again, reduce_scatter of gradients 3 P
    tensor   2 all_reduces of (B, T, D) for each block, and as many backward; with sequence parallelism each is a
             reduce_scatter and an all_gather, which together send as many bytes

Sources: ZeRO (1910.02054), sections 5 and 7; Megatron-LM (1909.08053), section 3, and its sequence parallelism
(2205.05198), section 4.2; "How to Scale Your Model" (Austin et al., 2025), part 5; CS336, assignment 2.

Neglected: messages of the embedding and the head under tensor parallelism, gradients of norms, latency.
Legend: N ranks, B batch of a rank in sequences, T positions, D d_model, L layers, P parameters.
"""

import math
from typing import Any, Literal, NamedTuple

from purelm import accounting
from purelm.models.config import Config

__all__ = [
    "Phase",
    "communication_bytes",
    "critical_tokens",
    "max_tensor_ranks",
    "phases",
    "rank_bytes",
    "smallest_batch",
    "table",
]

Scheme = Literal["ddp", "zero1", "fsdp"]
_SCHEMES = ("ddp", "zero1", "fsdp")


class Phase(NamedTuple):
    """Seconds of the forward or the backward phase on one rank."""

    compute: float
    communication: float


def communication_bytes(
    cfg: Config,
    batch_size: int = 1,
    length: int | None = None,
    *,
    scheme: Scheme = "ddp",
    n_data: int = 1,
    n_tensor: int = 1,
    param_bytes: int = 4,
    grad_bytes: int = 4,
    hidden_bytes: int = 2,
) -> dict[str, float]:
    """Bytes that one of n_data * n_tensor ranks sends in a step, by phase and part.

    Args:
        batch_size: sequences of one group of n_tensor ranks, which compute on the same data.
        length: positions of a sequence; context_length when None.
        scheme: how parameters are held by the n_data groups of ranks with different data.
        n_tensor: ranks over which each matrix is cut. A rank sends, by the scheme, 1/n_tensor of the matrices, and the
            norms whole.
        param_bytes, grad_bytes, hidden_bytes: bytes of one element as it is sent (2 if cast to bf16 first) of
            parameters, gradients and activations.

    >>> cfg = Config(vocab_size=10_000, context_length=512, d_model=2560, n_layers=32, n_heads=32, d_ff=10_240)
    >>> communication_bytes(cfg, n_data=2)["backward_gradients"] / 1e9
    13.627...
    """
    _check(scheme, n_data, n_tensor)
    parts = accounting.params(cfg)
    P = (sum(parts.values()) - parts["norms"]) / n_tensor + parts["norms"]
    T = cfg.context_length if length is None else length
    gathered, reduced = _sent(param_bytes * P, n_data), _sent(grad_bytes * P, n_data)
    hidden = 2 * cfg.n_layers * 2 * _sent(batch_size * T * cfg.d_model * hidden_bytes, n_tensor)
    return {
        "forward_gather": 0.0 if scheme == "ddp" else gathered,
        "forward_tensor": hidden,
        "backward_gather": gathered if scheme == "fsdp" else 0.0,
        "backward_gradients": reduced * (2 if scheme == "ddp" else 1),
        "backward_tensor": hidden,
    }


def phases(
    cfg: Config,
    batch_size: int = 1,
    length: int | None = None,
    *,
    peak: float,
    bandwidth: float,
    tensor_bandwidth: float | None = None,
    **layout: Any,
) -> dict[str, Phase]:
    """Seconds of compute and of communication in the phases "forward" and "backward".

    Args:
        peak: FLOP/s that a rank reaches.
        bandwidth: bytes/s that a rank sends to ranks with other data.
        tensor_bandwidth: bytes/s that a rank sends within its group of n_tensor ranks; `bandwidth` when None.
        layout: keywords of `communication_bytes`.
    """
    sent = communication_bytes(cfg, batch_size, length, **layout)
    forward = sum(accounting.forward_flops(cfg, batch_size, length).values()) / layout.get("n_tensor", 1) / peak
    across = bandwidth if tensor_bandwidth is None else tensor_bandwidth
    seconds = {name: size / (across if name.endswith("tensor") else bandwidth) for name, size in sent.items()}
    return {
        phase: Phase(compute, sum(s for name, s in seconds.items() if name.startswith(phase)))
        for phase, compute in (("forward", forward), ("backward", 2 * forward))
    }


def smallest_batch(cfg: Config, length: int | None = None, **kinds: Any) -> int | None:
    """The smallest batch of a rank (sequences) at which compute takes at least as long as communication in both phases.

    B = ceil(d / (c - t)), at least 1, with c, d, t of the module's docstring. None if t >= c: then sending activations
    takes longer than compute at every batch, and only fewer tensor ranks help (`max_tensor_ranks`). kinds: keywords of
    `phases`.
    """
    needed = 1
    zero, one = (phases(cfg, B, length, **kinds) for B in (0, 1))
    for phase, (compute, communication) in one.items():
        fixed = zero[phase].communication
        slack = compute - (communication - fixed)
        if slack < 0.0 or (fixed and not slack):
            return None
        if fixed:
            needed = max(needed, math.ceil(fixed / slack))
    return needed


def critical_tokens(n_ranks: int, peak: float, bandwidth: float, bytes_per_element: int = 2) -> float:
    """Tokens a rank above which compute can hide data parallelism's messages: (N - 1)/N b/2 C/W, whatever the scheme.

    For n tokens, compute is 2 n P FLOPs forward and 4 n P backward; with b bytes an element, ddp sends 2 b P bytes
    backward, zero1 b P in each phase, fsdp b P forward and 2 b P backward; the limit is the same for all. For bf16 b/2
    is 1, which gives B/N > C/W of "How to Scale Your Model" (part 5), with peak C FLOP/s and bandwidth W bytes/s.

    >>> critical_tokens(10**9, 4.59e14, 1.8e11)  # TPU v5p, one axis
    2549.9...
    """
    return _sent(bytes_per_element, n_ranks) / 2 * peak / bandwidth


def max_tensor_ranks(
    cfg: Config, length: int | None = None, *, peak: float, bandwidth: float, hidden_bytes: int = 2
) -> int:
    """The most tensor-parallel ranks whose messages compute can hide; it does not depend on the batch.

    With Y ranks, peak C, bandwidth W, F FLOPs for a sequence's forward and b bytes an element: F/(Y C) must be at least
    4 L T D b (Y - 1)/(Y W), so Y <= 1 + F W/(4 L T D b C). (Backward has twice the compute for as many bytes.) This is
    an upper bound: unless tensor parallelism is asynchronous, a block waits for its messages instead of hiding them.
    """
    T = cfg.context_length if length is None else length
    flops = sum(accounting.forward_flops(cfg, 1, T).values())
    return 1 + int(flops * bandwidth / (4 * cfg.n_layers * T * cfg.d_model * hidden_bytes * peak))


def rank_bytes(
    cfg: Config,
    batch_size: int = 1,
    length: int | None = None,
    *,
    scheme: Scheme = "ddp",
    n_data: int = 1,
    gathered_blocks: int = 2,
    param_bytes: int = 4,
    grad_bytes: int = 4,
    copy_bytes: int = 0,
    n_moments: int = 2,
    moment_bytes: int = 4,
    **activations: Any,
) -> dict[str, int]:
    """Bytes that one rank holds in a step, by kind: table 1 of the ZeRO paper, plus the activations of its own batch.

    zero1 divides the optimizer state by n_data. fsdp divides parameters and gradients too, and holds `gathered_blocks`
    whole blocks in the dtype of the cast copy: the one being computed, and those gathered ahead. Sizes are rounded up
    once for all leaves, while `purelm.dist.sharding` rounds up the rows of each leaf.

    Args:
        param_bytes, grad_bytes, copy_bytes, n_moments, moment_bytes, activations: keywords of `accounting.train_bytes`.
    """
    _check(scheme, n_data, 1)
    P = accounting.n_params(cfg)
    parts = accounting.params(cfg)
    block = (parts["attention"] + parts["ffn"]) // cfg.n_layers
    n_model, n_optimizer = (n_data if scheme == "fsdp" else 1), (1 if scheme == "ddp" else n_data)
    optimizer = accounting.optimizer_bytes(P, n_moments=n_moments, bytes_per_element=moment_bytes)
    return {
        "parameters": -(-param_bytes * P // n_model),
        "gathered": gathered_blocks * block * (copy_bytes or param_bytes) if scheme == "fsdp" else copy_bytes * P,
        "gradients": -(-grad_bytes * P // n_model),
        "optimizer": -(-optimizer // n_optimizer),
        "activations": sum(accounting.activation_bytes(cfg, batch_size, length, **activations).values()),
    }


def table(
    cfg: Config,
    batch_size: int = 1,
    length: int | None = None,
    *,
    n_ranks: int,
    peak: float,
    bandwidth: float,
    param_bytes: int = 4,
    grad_bytes: int = 4,
    hidden_bytes: int = 2,
) -> str:
    """A Markdown table of all schemes on n_ranks: bytes sent, times, `smallest_batch`, memory without activations.

    Row `tensor` has batch_size * n_ranks sequences on its one group of ranks, so that every row is the same work.
    "overlapped" is the time of a step whose communication is hidden as far as possible, "exposed" the time of the
    communication that remains.
    """
    wire = {"param_bytes": param_bytes, "grad_bytes": grad_bytes, "hidden_bytes": hidden_bytes}
    lines = [
        "| scheme | sent, GB | compute, ms | communication, ms | overlapped, ms | exposed, ms | smallest batch | "
        "states, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows: list[tuple[str, int, dict[str, Any]]] = [
        (s, batch_size, {"scheme": s, "n_data": n_ranks, **wire}) for s in _SCHEMES
    ]
    for name, B, layout in [*rows, ("tensor", batch_size * n_ranks, {"n_tensor": n_ranks, **wire})]:
        sent = sum(communication_bytes(cfg, B, length, **layout).values())
        found = phases(cfg, B, length, peak=peak, bandwidth=bandwidth, **layout).values()
        compute, communication = (sum(column) for column in zip(*found, strict=True))
        overlapped = sum(max(phase) for phase in found)
        smallest = smallest_batch(cfg, length, peak=peak, bandwidth=bandwidth, **layout)
        held = rank_bytes(cfg, scheme=layout.get("scheme", "ddp"), n_data=layout.get("n_data", 1), gathered_blocks=0)
        states = (sum(held.values()) - held["activations"]) / layout.get("n_tensor", 1) / 2**30
        milliseconds = (1e3 * s for s in (compute, communication, overlapped, overlapped - compute))
        lines.append(
            f"| {name} | {sent / 1e9:.3g} | "
            + " | ".join(f"{x:.1f}" for x in milliseconds)
            + f" | {'none' if smallest is None else smallest} | {states:.1f} |"
        )
    return "\n".join(lines)


def _sent(n_bytes: float, n_ranks: int) -> float:
    """Bytes that a rank sends when n_bytes are gathered by, or summed and scattered among, n_ranks in a ring."""
    return (n_ranks - 1) / n_ranks * n_bytes


def _check(scheme: str, n_data: int, n_tensor: int) -> None:
    if scheme not in _SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(_SCHEMES)}, got {scheme!r}")
    for name, n in (("n_data", n_data), ("n_tensor", n_tensor)):
        if n < 1:
            raise ValueError(f"{name} must be at least 1, got {n}")
