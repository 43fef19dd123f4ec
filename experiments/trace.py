"""Where the time of a profile goes: by op or kernel, by group of them, by phase of the step.

On a GPU the time of kernels on the device, each in the phase that launched it; on a CPU the time of an op itself,
without the ops that it calls.
"""

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.memory import PHASE
from experiments.ranges import OP

GROUPS = ("matmul", "attention", "softmax+loss", "norm", "elementwise", "optimizer", "other")
# First match wins. ATen ops on a CPU; on a GPU also kernels of cuBLAS, CUTLASS, PyTorch and Triton.
_BY_NAME = (
    ("attention", r"flash|fmha|scaled_dot_product|sdpa|attention"),
    ("matmul", r"gemm|::(mm|bmm|addmm|baddbmm|matmul|linear|dot|mv)\b|cutlass|nvjet|xmma|cublas|splitK"),
    ("softmax+loss", r"softmax|SoftMax|cross_entropy|nll_loss|logsumexp"),
    ("norm", r"rms_norm|layer_norm|RowwiseMoments"),
    ("optimizer", r"adamw|_fused_adam|multi_tensor|foreach"),
)
# The group by the op of the model's bundle, for events whose name does not tell it. Events of backward are matched to
# those of forward by autograd's sequence numbers.
_BY_OP = {
    "attention": "attention",
    "linear_cross_entropy": "softmax+loss",
    "rms_norm": "norm",
    "layer_norm": "norm",
}
_ELEMENTWISE = re.compile(
    r"::(add|sub|mul|div|neg|exp|log|sqrt|rsqrt|pow|square|tanh|sigmoid|silu|where|masked_fill|fill|zero|copy|cat|stack"
    r"|sum|mean|amax|max|lerp|addcmul|addcdiv|reciprocal|clamp|maximum|eq|ge|gt|le|lt|logical|bitwise|index|gather"
    r"|scatter|embedding|select_backward|slice_backward|sin|cos|arange|rsub)"
    r"|elementwise|reduce_kernel|CatArray|Memcpy|Memset|memcpy|memset|index|scatter|gather|embedding|triton_"
)


class Entry(NamedTuple):
    """Time of one op or kernel in one phase."""

    name: str
    group: str
    phase: str  # forward, backward, optimizer; "" outside of these
    us: float
    calls: int


def group_of(name: str, op: str | None, phase: str) -> str:
    """Group of an op or kernel `name` that ran inside the op `op` of the bundle.

    Everything in the optimizer's phase is "optimizer". Matrix products, attention kernels, softmax, losses and norms go
    by their names, the rest by the op that they are part of, so squares and means of an eager norm are "norm".

    >>> group_of("aten::bmm", "attention", "forward"), group_of("aten::mul", "rms_norm", "forward")
    ('matmul', 'norm')
    """
    if phase == "optimizer":
        return "optimizer"
    for group, pattern in _BY_NAME:
        if re.search(pattern, name):
            return group
    if op in _BY_OP:
        return _BY_OP[op]
    return "elementwise" if op is not None or _ELEMENTWISE.search(name) else "other"


def entries(prof: Any, cuda: bool) -> list[Entry]:
    """Times of a finished profile, longest first."""
    events = [e for e in prof.events() if str(e.device_type).endswith("CPU")]
    annotations = {e.name for e in events if e.is_user_annotation}
    parts = sorted(
        (e.time_range.start, e.time_range.end, e.name.removeprefix(PHASE)) for e in events if e.name.startswith(PHASE)
    )
    op_of = _ops_of(events)
    us: dict[tuple[str, str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str, str], int] = defaultdict(int)

    for e in events:
        if cuda:
            pieces = [(k.name, k.duration) for k in e.kernels if k.name not in annotations]
        else:
            pieces = [] if e.is_user_annotation or e.name == "[memory]" else [(e.name, e.self_cpu_time_total)]
        phase = _phase_at(parts, e.time_range.start)
        for name, duration in pieces:
            key = (name, group_of(name, op_of.get(id(e)), phase), phase)
            us[key] += duration
            calls[key] += 1
    found = [Entry(*key, us[key], calls[key]) for key in us if us[key] > 0]
    return sorted(found, key=lambda x: -x.us)


def _phase_at(parts: Sequence[tuple[float, float, str]], at: float) -> str:
    k = bisect_right(parts, at, key=lambda p: p[0]) - 1
    return parts[k][2] if k >= 0 and at <= parts[k][1] else ""


def _ops_of(events: Sequence[Any]) -> dict[int, str]:
    """The bundle's op that each event belongs to, by id of the event."""
    above: dict[int, Any] = {id(child): e for e in events for child in e.cpu_children}
    of_sequence: dict[int, str] = {}
    out: dict[int, str] = {}
    for e in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        parent = above.get(id(e))
        op = e.name.removeprefix(OP) if e.name.startswith(OP) else out.get(id(parent)) if parent is not None else None
        if op is not None and e.sequence_nr >= 0:
            # An op that makes no autograd node carries the number of the next node: of several, the last made it.
            of_sequence[e.sequence_nr] = op
        elif op is None and e.sequence_nr >= 0 and (e.name.startswith("autograd::") or "Backward" in e.name):
            op = of_sequence.get(e.sequence_nr)
        if op is not None:
            out[id(e)] = op
    return out


def share(found: Sequence[Entry], group: str, phases: Sequence[str] | None = None) -> float:
    """Percent of the time in these phases (all of them when None) that the group takes."""
    inside = [x for x in found if phases is None or x.phase in phases]
    total = sum(x.us for x in inside)
    return 100 * sum(x.us for x in inside if x.group == group) / total if total else 0.0
