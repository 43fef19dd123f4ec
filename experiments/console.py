"""What all programs need for their command line: one-line errors, live progress, the choice of a device."""

import dataclasses
import functools
import os
import re
import select
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from experiments.limits import check
from purelm.devices import multiplies_natively

USER_ERRORS = (ValueError, OSError)


def program(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a main: its configuration is checked against the ranges; a user's error is one line, without traceback.

    Exit status 2: a bad argument or file. 1: no memory left. 130: Ctrl-C. 141, without a word: nobody reads the output
    any more, as after `| head`.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            for given in args:
                if dataclasses.is_dataclass(given):
                    check(given)
            main(*args, **kwargs)
        except USER_ERRORS as error:
            if isinstance(error, BrokenPipeError) and _unread():
                raise SystemExit(141) from None
            _end(str(error), 2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        except SystemExit:  # already prints its own line; purelm.dist.world.PeerError is a RuntimeError too
            raise
        except (RuntimeError, MemoryError) as error:
            text = no_memory(error)
            if text is None:
                raise
            _end(text, 1)

    return wrapped


def _unread() -> bool:
    """Whether standard output is a pipe that nobody reads; then it is silenced, or Python would complain at its end."""
    try:
        at = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file
        return False
    look = select.poll()
    look.register(at, 0)
    if not any(event & select.POLLERR for _, event in look.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), at)
    return True


def safe(piece: str) -> str:
    """On a terminal, control characters would be commands to it: U+FFFD in their place."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", piece) if sys.stdout.isatty() else piece


def _end(text: str, status: int) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)
    raise SystemExit(status) from None


def no_memory(error: BaseException) -> str | None:
    """One line about a failed allocation; None if the error is another."""
    first = (str(error).strip().splitlines() or [""])[0][:200]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in first:
        return f"no memory left: {first or type(error).__name__}; make the model or the batch smaller"
    return None


@contextmanager
def progress_bar(description: str, total: float, unit: str = "") -> Iterator[Callable[..., None]]:
    """A live bar; yields update(completed, text=""). If the output is not a terminal, `line_progress` in its place."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield line_progress(description, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, text="")

        def update(completed: float, text: str = "") -> None:
            progress.update(task, completed=completed, text=text)

        yield update


def quiet(done: float, text: str = "") -> None:
    """The progress function of all processes but the first: prints nothing."""


FIRST_LINE = 2.0  # seconds measured before the remaining time is estimated from them
LINE_EVERY = 15.0  # seconds, and at least as long as a twentieth of the time that has passed


def line_progress(
    description: str, total: float, now: Callable[[], float] = time.monotonic
) -> Callable[..., None]:
    """Progress for logs: update(completed, text="") prints a line with the time that has passed and that is left.

    Measuring begins with the first update. The first line comes after two more updates and `FIRST_LINE` seconds, then
    one every `LINE_EVERY` seconds, and one at the end. The time left assumes the speed since the first update.
    """
    began: tuple[float, float] | None = None
    updates, last, ended = 0, -1.0, False

    def update(completed: float, text: str = "") -> None:
        nonlocal began, updates, last, ended
        at = now()
        if began is None:
            began = at, completed
        updates += 1
        passed, done = at - began[0], completed - began[1]
        end = completed >= total > 0
        if last < 0:
            due = updates > 2 and passed >= FIRST_LINE
        else:
            due = passed - last >= max(LINE_EVERY, passed / 20)
        if ended or not (due or end):
            return
        last, ended = passed, end
        where = f"{completed:,.0f}/{total:,.0f}" if total else f"{completed:,.0f}"
        times = f"{clock(passed)} passed"
        if not end and total and done > 0:
            times += f", {clock(passed * (total - completed) / done)} left"
        print(f"{description}: {where}  {text}{'  ' if text else ''}{times}", file=sys.stderr, flush=True)

    return update


def clock(seconds: float) -> str:
    """
    >>> clock(59.6), clock(3725)
    ('1:00', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def pick_device(name: str) -> torch.device:
    """ "auto" -> the accelerator where there is one, else the CPU; ValueError if the named device does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,4})?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: this torch ({torch.__version__}) sees no GPU; use cpu or auto")
    device = torch.device(name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device {name!r}: there are {torch.cuda.device_count()} GPUs, the first is cuda:0")
    return device


def in_bf16(compute: str, device: torch.device) -> bool:
    """Whether to compute in bf16: yes for "bf16", and for "auto" on a GPU with bf16 units.

    "auto" is fp32 on a CPU: a step in bf16 is a third faster on one with bf16 units, but 30 times slower without.
    """
    return compute == "bf16" or (
        compute == "auto" and device.type == "cuda" and multiplies_natively(torch.bfloat16, device)
    )


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile can work here: on a CPU it needs a C++ compiler, on a GPU triton (torch brings it)."""
    if device.type == "cpu":
        return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return True
