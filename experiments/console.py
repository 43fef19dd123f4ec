"""What the programs share towards their user: one-line errors, a live progress bar, compiling where it can work."""

import functools
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

USER_ERRORS = (ValueError, OSError)


def program(main: Callable[..., None]) -> Callable[..., None]:
    """A main whose user errors (bad argument, bad file) end as one clear line and exit status 2, no traceback."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            main(*args, **kwargs)
        except USER_ERRORS as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapped


@contextmanager
def progress_bar(description: str, total: float, unit: str = "") -> Iterator[Callable[..., None]]:
    """A live bar; yields update(completed, text=""). Where the output is no terminal it prints a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_progress(description, total)
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


def _line_progress(description: str, total: float) -> Callable[..., None]:
    """Progress for logs: a line at each tenth of the way."""
    last = -1

    def update(completed: float, text: str = "") -> None:
        nonlocal last
        tenth = int(10 * completed / total) if total else 10
        if tenth > last:
            last = tenth
            print(f"{description}: {completed:,.0f}/{total:,.0f} {text}".rstrip(), file=sys.stderr, flush=True)

    return update


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def pick_device(name: str) -> torch.device:
    """ "auto" -> the accelerator where there is one, else the CPU; ValueError when what is named is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: this torch ({torch.__version__}) sees no GPU; use cpu or auto")
    return torch.device(name)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile can work here: on a CPU it needs a C++ compiler, on a GPU triton (torch brings it)."""
    if device.type == "cpu":
        return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return True
