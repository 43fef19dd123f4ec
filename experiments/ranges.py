"""Named ranges in a profile, put around a model's parts from outside: by wrapping its ops and its block function.

    ranges = Ranges(device)
    loss = transformer.loss(params, batch, cfg, ops=ranges.ops(ops, params), wrap_block=ranges.wrap_block(params))

Ranges are torch.profiler.record_function's, on a GPU also NVTX's (for nsys). In forward they are named
"block 3/attention", "block 3/feed-forward", "op/rms_norm"; in backward "block 3/feed-forward backward",
"block 3/attention backward", which hooks of the tensors between the parts open and close.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from purelm import tree
from purelm.ops import Ops

OP = "op/"  # prefix of the ranges around single ops


@contextmanager
def named_range(name: str, nvtx: bool = False) -> Iterator[None]:
    """A range of the profiler, and of NVTX."""
    with record_function(name):
        if nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if nvtx:
                torch.cuda.nvtx.range_pop()


def around_ops(ops: Ops, around: Callable[[str, tuple[Any, ...]], AbstractContextManager]) -> Ops:
    """The same ops, each run within the context around(its name, its positional arguments)."""

    def wrapped(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(op)
        def call(*args: Any, **kwargs: Any) -> Any:
            with around(name, args):
                return op(*args, **kwargs)

        return call

    names = [name for name in ops._fields if name not in ("enter", "final")]  # these do nothing in one process
    return ops._replace(**{name: wrapped(name, getattr(ops, name)) for name in names})


def addresses(params: Any) -> dict[int, str]:
    """Path of each parameter by the address of its data, so that a wrapped op can tell which layer calls it."""
    names: dict[int, str] = {}

    def note(path: str, x: Tensor) -> None:
        names[x.data_ptr()] = path

    tree.map_with_path(note, params)
    return names


def path_of(args: tuple[Any, ...], names: dict[int, str]) -> str | None:
    """Path of the first parameter among an op's arguments."""
    found = (names.get(x.data_ptr()) for x in args if isinstance(x, Tensor))
    return next((path for path in found if path is not None), None)


def block_of(path: str) -> int | None:
    """Number of the block that a parameter belongs to.

    >>> block_of("layers.3.attn.q_proj.weight"), block_of("lm_head.weight")
    (3, None)
    """
    parts = path.split(".")
    return int(parts[1]) if parts[0] == "layers" else None


class Slot:
    """At most one open range; opening the next one closes it."""

    def __init__(self, nvtx: bool):
        self.nvtx = nvtx
        self.open: Any = None

    def switch(self, name: str | None) -> None:
        if self.open is not None:
            self.open.__exit__(None, None, None)
        self.open = None if name is None else named_range(name, self.nvtx)
        if self.open is not None:
            self.open.__enter__()


class Ranges:
    """The ranges of a step; the object's state is which ones are open."""

    def __init__(self, device: torch.device):
        self.nvtx = device.type == "cuda"
        self.phase = Slot(self.nvtx)
        self.forward = Slot(self.nvtx)
        self.backward = Slot(self.nvtx)  # on a GPU only hooks use it, in autograd's thread

    def ops(self, ops: Ops, params: Any) -> Ops:
        """`ops` with a range around each call; the second half of a block begins with its first parameter."""
        names = addresses(params)
        halves: set[int] = set()

        @contextmanager
        def around(name: str, args: tuple[Any, ...]) -> Iterator[None]:
            path = path_of(args, names)
            i = None if path is None else block_of(path)
            if i is not None and i not in halves and path is not None and path.split(".")[2] in ("ln2", "ffn"):
                halves.add(i)
                self.forward.switch(f"block {i}/feed-forward")
                self._on_gradient(args[0], f"block {i}/attention backward")
            with named_range(OP + name, self.nvtx):
                yield

        return around_ops(ops, around)

    def wrap_block(self, params: Any) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
        """A `wrap_block` that opens and closes the ranges of each block."""
        names = addresses(params)

        def wrap(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def block(layer: Any, x: Tensor, ctx: Any) -> Tensor:
                i = block_of(names[tree.leaves(layer)[0].data_ptr()])
                if i == 0:
                    self._on_gradient(x, None)
                self.forward.switch(f"block {i}/attention")
                y = f(layer, x, ctx)
                self.forward.switch(None)
                self._on_gradient(y, f"block {i}/feed-forward backward")
                return y

            return block

        return wrap

    def _on_gradient(self, x: Tensor, name: str | None) -> None:
        """When the gradient of x is complete, backward enters the part `name`."""
        if x.requires_grad:
            x.register_hook(lambda g: self.backward.switch(name))
