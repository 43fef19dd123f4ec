"""SIGTERM and Ctrl-C as requests: the loop finishes its step and saves; a second signal ends the process at once.

    with asked_to_stop(world) as ask:
        for ...:
            step
            if number := ask():   # the signal's number, on all ranks after the same step
                save, and raise SystemExit(128 + number)
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from purelm.dist.world import World

# Ctrl-C reaches all processes from the terminal, and again from torchrun: within this time, both are one request.
PASSED_ON = 5.0  # seconds


@contextmanager
def asked_to_stop(world: World) -> Iterator[Callable[[], int]]:
    """Yields a function to call after each step: it returns 0, or the number of the signal that asks to stop.

    A signal to any rank counts, and all ranks get the same answer after the same step: each call starts an all-reduce
    of one number and reads the result of the last one, so that nothing waits.
    """
    wish = _Wish(world)
    old = {}
    if threading.current_thread() is threading.main_thread():  # Python allows handlers in the main thread only
        old = {number: signal.signal(number, wish.take) for number in (signal.SIGTERM, signal.SIGINT)}
    answers = _Agreed(world) if world.size > 1 else None
    try:
        yield (lambda: wish.number) if answers is None else (lambda: answers.ask(wish.number))
        if answers is not None:
            answers.read()  # a message under way ends before any other begins
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class _Wish:
    """The first signal."""

    def __init__(self, world: World):
        self.number = 0
        self.when = 0.0
        self.speaks = world.rank == 0

    def take(self, number: int, frame: Any) -> None:
        """The handler. os.write, because print is not safe in a signal handler."""
        if not self.number:
            self.number, self.when = number, time.monotonic()
            if self.speaks:
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: finishing the step, then saving; once more ends at once\n".encode())
            return
        if "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self.when < PASSED_ON:
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


class _Agreed:
    """The maximum over ranks of the numbers given to the call before."""

    def __init__(self, world: World):
        self.device = world.device
        self.under_way: tuple[Any, torch.Tensor] | None = None

    def ask(self, number: int) -> int:
        found = self.read()
        mine = torch.tensor(number, dtype=torch.int32).to(self.device)
        work = dist.all_reduce(mine, op=dist.ReduceOp.MAX, async_op=True)
        self.under_way = self._to_host(work, mine)
        return found

    def _to_host(self, work: Any, x: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """(what to wait for, where the number then is): on a GPU a copy and an event, since .item() waits for all."""
        if self.device.type != "cuda":
            return work, x
        work.wait()  # makes the stream wait, not the host
        host = torch.zeros((), dtype=torch.int32, pin_memory=True)
        host.copy_(x, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return event, host

    def read(self) -> int:
        if self.under_way is None:
            return 0
        handle, x = self.under_way
        self.under_way = None
        handle.synchronize() if isinstance(handle, torch.cuda.Event) else handle.wait()
        return int(x)
