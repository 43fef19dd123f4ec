"""What processes share of a rollout batch: each has its own rows, and all then have all rows. Legend: R rows."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from purelm import tree
from purelm.dist.agreement import check_same
from purelm.dist.collectives import all_gather
from purelm.dist.world import World
from purelm.generate import Generation

__all__ = ["ONE", "check_alike", "everyones", "joined_rows", "share"]

ONE = World(0, 1, torch.device("cpu"))  # one process; the device is not used
_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes

Parts = list[dict[str, float]]


class _Sent(NamedTuple):
    """A process's rows. Few tensors, since each costs as much as some hundred numbers to send."""

    rows: list[int]
    lengths: list[int]
    tokens: Tensor  # of all rows, one after the other
    logprobs: Tensor
    model_logprobs: Tensor
    finish_reasons: list[str]
    texts: list[str]
    parts: Parts


def check_alike(world: World, params: Any, problems: str, key: Tensor) -> None:
    """ValueError on every process unless all are to answer the same problems with the same parameters and key.

    Parameters are compared by the sums of their bits as whole numbers, which do not depend on the order.
    """
    if world.size == 1:
        return
    sums = [x.contiguous().view(_WHOLE_NUMBERS[x.element_size()]).sum(dtype=torch.int64) for x in tree.leaves(params)]
    digest = hashlib.sha256(torch.stack(sums).cpu().numpy().tobytes()).hexdigest()
    check_same({"parameters": digest, "problems": problems, "key": str(key.tolist())})


def everyones(world: World, rows: Sequence[int], mine: Generation, parts: Parts, n: int) -> tuple[Generation, Parts]:
    """(generation, rewards by part) of all n rows, in their order; rows: the numbers of this process's."""
    if world.size == 1:
        return mine, parts
    assert mine.texts is not None
    sent = _Sent(
        list(rows), [len(x) for x in mine.tokens], _flat(mine.tokens, torch.int64), _flat(mine.logprobs, torch.float32),
        _flat(mine.model_logprobs, torch.float32), mine.finish_reasons, mine.texts, parts,
    )  # fmt: skip
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, sent)
    of_row: dict[int, tuple[Any, ...]] = {}
    for one in found:
        tensors = (x.split(one.lengths) for x in (one.tokens, one.logprobs, one.model_logprobs))
        of_row |= dict(zip(one.rows, zip(*tensors, one.finish_reasons, one.texts, one.parts, strict=True), strict=True))
    in_order = zip(*(of_row[row] for row in range(n)), strict=True)
    tokens, logprobs, model_logprobs, reasons, texts, every = (list(x) for x in in_order)
    return Generation(tokens, logprobs, reasons, texts, model_logprobs), every


def _flat(rows: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=dtype), *rows])


def share(world: World, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's rows of a batch, whose number of rows the number of processes divides; 0-d entries stay."""
    B = len(batch["tokens"])
    m = B // world.size
    mine = slice(world.rank * m, world.rank * m + m)
    return {name: x[mine] if x.ndim and len(x) == B else x for name, x in batch.items()}


def joined_rows(world: World, x: Tensor) -> Tensor:
    """The inverse of `share` of one entry: the rows of all processes."""
    return x if world.size == 1 else all_gather(x)
