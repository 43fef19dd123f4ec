"""Workarounds of `jit` for single versions of torch."""

import contextlib
import functools
from typing import Any

import torch

from purelm.caches import memo

__all__ = ["keep_writes_behind_reads", "nested_graph_breaks"]


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


@functools.cache  # and not memo: what is mended is to be mended once
def keep_writes_behind_reads() -> None:
    """Patch Inductor of torch 2.11, which may overwrite a tensor before reading it, with the fix of 2.12; runs once.

    On a CPU, Inductor may recompute a write's loops in order to fuse it with the computation of the value. In 2.11 this
    dropped the write's dependencies on earlier reads (https://github.com/pytorch/pytorch/issues/177631), so that
    {"a": b.softmax(0), "b": a.softmax(1)} with both donated was wrong. The order in f and in _store is correct, so the
    scheduler itself has to be patched.
    """
    if _torch_version() >= (2, 12):
        return
    from torch._inductor.dependencies import StarDep, WeakDep  # imported late: takes as long as importing torch
    from torch._inductor.scheduler import SchedulerNode
    from torch.compiler import config
    from torch.utils._ordered_set import OrderedSet

    recompute = SchedulerNode.recompute_size_and_body

    @functools.wraps(recompute)
    def recompute_and_keep_order(node: Any, *args: Any, **kwargs: Any) -> None:
        order = OrderedSet(dep for dep in node.read_writes.reads if isinstance(dep, (WeakDep, StarDep)))
        recompute(node, *args, **kwargs)
        node.set_read_writes(node.read_writes.with_read(order).rename(node.mutation_renames))

    SchedulerNode.recompute_size_and_body = recompute_and_keep_order  # type: ignore[method-assign, assignment]
    config.cache_key_tag += "-pytorch177631"  # so that code compiled without the fix is not taken from the disk cache


@memo(1)  # entering it takes 5 us in every call of a compiled block; making it would take 8 us more
def nested_graph_breaks() -> Any:
    """Context manager: after a graph break inside f, the next graph continues past f's end to the end of jit's `run`.

    Without it f's last graph returns f's results as new tensors, so that a second copy of the state exists until `run`
    has stored them. Before torch 2.13 this does nothing, and only `in_stages` avoids the second copy.
    """
    if _torch_version() < (2, 13):
        return contextlib.nullcontext()
    from torch._dynamo import config  # imported late: takes as long as importing torch

    return config.patch(nested_graph_breaks=True)
