"""What `jit` needs done differently on some versions of torch."""

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
    """Mend torch 2.11's inductor, which may overwrite a tensor before it has read it: once, with the fix of 2.12.

    On a CPU, a write may get new loops in order to be fused with what makes its value. That dropped the reads that
    it had to wait for (https://github.com/pytorch/pytorch/issues/177631): {"a": b.softmax(0), "b": a.softmax(1)} was
    wrong. How f or _store is written cannot help, for there every order is right already.
    """
    if _torch_version() >= (2, 12):
        return
    from torch._inductor.dependencies import StarDep, WeakDep  # imported late: it takes as long as torch itself
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
    config.cache_key_tag += "-pytorch177631"  # code that was compiled without the fix may lie on disk


@memo(1)  # to enter it costs 5 us, to make it 8 more, in every call of a compiled block
def nested_graph_breaks() -> Any:
    """While compiling: a break inside f ends the graph there only, and the next one reaches to the end of `run`.

    Otherwise f's own last graph would return its results, and a second copy of the state would exist until `run`
    had stored them. Before torch 2.13 that second copy is there, unless f is cut by `in_stages`.
    """
    if _torch_version() < (2, 13):
        return contextlib.nullcontext()
    from torch._dynamo import config  # imported late: it takes as long as torch itself

    return config.patch(nested_graph_breaks=True)
