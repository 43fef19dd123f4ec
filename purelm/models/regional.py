"""A block as a value, and wrappers of it that are made once.

`wrap_block` is called in every evaluation of a model. What it returns must be the same object each time, or
wrap_block=jit would compile in every step.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from purelm.models.config import Config
from purelm.models.layers import Context, Params, attend_all, block
from purelm.ops import Ops

__all__ = ["Block", "made_once"]

MOST = 16  # results kept for one maker: kinds of blocks in use at a time
_made: "WeakKeyDictionary[Any, OrderedDict[Hashable, Any]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Block:
    """(layer's params, x_BTD, ctx) -> x_BTD. Equal where cfg, ops and window are."""

    cfg: Config
    ops: Ops
    window: int | None

    def __hash__(self) -> int:
        # torch 2.11's dynamo hashes a block made inside of a compiled function before its fields are there
        return hash((Block, getattr(self, "cfg", None), getattr(self, "window", None)))

    def __call__(self, layer: Params, x_BTD: Tensor, ctx: Context) -> Tensor:
        attend = attend_all(self.cfg, self.ops, self.window)
        return block(layer, x_BTD, ctx, cfg=self.cfg, ops=self.ops, attend=attend)


def made_once(maker: Callable[..., Any], key: Hashable, make: Callable[[], Any]) -> Any:
    """make(), or what it returned for an equal key before; kept for as long as `maker`, the last MOST of them.

    Where maker or key cannot be looked up, and inside torch.compile, which sees each call once, make() it is.

    >>> made_once(Block, "key", lambda: []) is made_once(Block, "key", lambda: [])
    True
    """
    if torch.compiler.is_compiling():
        return make()
    try:
        kept = _made.setdefault(maker, OrderedDict())
        found = key in kept
    except TypeError:  # not hashable, or no weak references to it
        return make()
    if not found:
        kept[key] = make()
        if len(kept) > MOST:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
