"""Memory of a computation: bytes saved for backward, the timeline of allocations, peaks.

Three measures; none of them sees everything:

- `record_saved`: tensors that autograd keeps from forward for backward (saved_tensors_hooks), by storage.
- `timeline`: every allocation and free on a device in order of time, temporaries inside an operator included (the
  profiler's memory events, on a CPU as on a GPU).
- `memory_of`: kept and peak bytes of one forward and backward pass; on a GPU by the caching allocator's counters.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from experiments.bench.train_step import SIZES, shapes, synchronize
from experiments.capacity import check_fits
from purelm.models.config import Config

PHASE = "phase/"  # prefix of the profiler's ranges that mark the parts of a step
SMALL = Config(vocab_size=1024, context_length=128, d_model=128, n_layers=4, n_heads=4)


def chosen(size: str | None, model: Config, batch_size: int | None, device: torch.device) -> tuple[Config, int]:
    """(config, sequences in a batch), from a size of experiments.bench.train_step or from the --model flags."""
    if size is not None and model != SMALL:
        raise ValueError(f"size {size!r} and --model flags were both given: give one of them ({', '.join(SIZES)})")
    cfg, n = (model, 4) if size is None else shapes(size, device)
    n = n if batch_size is None else batch_size
    check_fits(cfg, n, device, moments=0)
    return cfg, n


class Saved(NamedTuple):
    """One storage that autograd keeps."""

    label: str  # what `record_saved`'s label function said when it was saved first
    shape: tuple[int, ...]  # of the tensor that was saved, which may be a view of part of the storage
    dtype: torch.dtype
    bytes: int  # of the whole storage: that is what stays alive


@contextmanager
def record_saved(label: Callable[[Tensor], str] = lambda x: "", known: Iterable[Tensor] = ()) -> Iterator[list[Saved]]:
    """The tensors that operations in the context save for backward, each storage once.

    sum(x.bytes) = bytes that forward leaves to backward, beyond `known` (parameters, tables, inputs). `label` is asked
    when a storage is saved for the first time.
    Not seen: what a checkpointed function keeps (its arguments stand in a closure), and attributes of a Function's
    ctx that are not saved tensors. Storages are held until the end of the context, so that no address comes twice.

    >>> w, x = torch.ones(3, 5, requires_grad=True), torch.ones(2, 3)
    >>> with record_saved(known=[w]) as saved:
    ...     y = (x @ w).exp()
    >>> sum(x.bytes for x in saved)  # x for dw, and exp's result: 4 (2 3 + 2 5)
    64
    """
    # Keyed by the storage object's address, which is not reused while the dict holds the object.
    seen: dict[int, Any] = {}
    for x in known:
        storage = x.untyped_storage()
        seen[storage._cdata] = storage
    found: list[Saved] = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in seen and storage.nbytes():
            seen[storage._cdata] = storage
            found.append(Saved(label(x), tuple(x.shape), x.dtype, storage.nbytes()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found


class Phase(NamedTuple):
    """A named part of a profile."""

    name: str
    start_ns: int
    end_ns: int


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A part of a step that `phases` finds again in a profile."""
    with record_function(PHASE + name):
        yield


def memory_profile() -> Any:
    """A profiler that records allocations."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def phases(prof: Any) -> list[Phase]:
    """The phases of a finished profile, in the order of time."""
    found = [
        Phase(e.name().removeprefix(PHASE), e.start_ns(), e.start_ns() + e.duration_ns())
        for e in prof.profiler.kineto_results.events()
        if e.name().startswith(PHASE) and e.device_type() == torch.autograd.DeviceType.CPU
    ]
    return sorted(found, key=lambda p: p.start_ns)


def timeline(prof: Any, device: torch.device) -> list[tuple[int, int]]:
    """(time in ns, bytes allocated since the profile began) after each allocation and free on the device.

    On a CPU, frees of memory that was allocated before the profile are not seen, so the bytes never fall below 0.
    """
    wanted = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    events = [
        (e.start_ns(), e.nbytes())
        for e in prof.profiler.kineto_results.events()
        if e.name() == "[memory]" and e.device_type() == wanted
    ]
    events.sort(key=lambda e: e[0])  # stable: events of the same time stay in order
    out, live = [], 0
    for at, change in events:
        live += change
        out.append((at, live))
    return out


def level(line: Sequence[tuple[int, int]], at_ns: int) -> int:
    """Bytes allocated at this time."""
    return next((live for at, live in reversed(line) if at <= at_ns), 0)


def peak_of(line: Sequence[tuple[int, int]], part: Phase) -> int:
    """Most bytes allocated at any time of the phase, its start included."""
    inside = [live for at, live in line if part.start_ns <= at <= part.end_ns]
    return max([level(line, part.start_ns), *inside])


class Use(NamedTuple):
    """Bytes allocated in addition to those before the measurement."""

    kept: int  # between forward and backward
    peak: int  # at any time of the two


def memory_of(
    forward: Callable[[], Tensor], inputs: Sequence[Tensor], device: torch.device, cotangent: Tensor | None = None
) -> Use:
    """Kept and peak bytes of y = forward() and of torch.autograd.grad(y, inputs, cotangent), gradients included.

    Tensors from before the call (parameters, batch, cotangent) are not counted. Call it once for warm-up: the first
    call allocates workspaces.
    """
    if device.type == "cuda":
        synchronize(device)
        base = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        y = forward()
        kept = torch.cuda.memory_allocated(device) - base
        grads = torch.autograd.grad(y, inputs, cotangent)
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - base
        del grads
        return Use(kept, peak)
    with memory_profile() as prof:
        with phase("forward"):
            y = forward()
        with phase("backward"):
            grads = torch.autograd.grad(y, inputs, cotangent)
        del grads
    line = timeline(prof, device)
    backward = next(p for p in phases(prof) if p.name == "backward")
    return Use(level(line, backward.start_ns), max((live for _, live in line), default=0))


def human(n_bytes: float) -> str:
    """Bytes in MiB.

    >>> human(3 * 2**19)
    '1.5 MiB'
    """
    return f"{n_bytes / 2**20:,.4g} MiB"


def columns(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
