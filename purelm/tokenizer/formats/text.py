"""Text files on disk: strict UTF-8 and JSON in, all or nothing out."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from purelm.files import hold, remove_leftovers


def read_text(path: str | os.PathLike) -> str:
    """The UTF-8 text of a file, CRLF as newlines; ValueError names the file and line of a byte that is not UTF-8."""
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{os.fspath(path)}, line {line}: byte {error.start} is not UTF-8") from None


def parse_json(text: str, name: str) -> Any:
    """json.loads, with a ValueError that names the file, and the line and the column where there is one."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name}, line {error.lineno}, column {error.colno}: {error.msg}; the file is damaged or cut short"
        ) from None
    except RecursionError:
        raise ValueError(f"{name}: its JSON is nested too deeply; the file is damaged") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{name}: {error}") from None


def write_atomic(texts: Mapping[str | os.PathLike, str]) -> None:
    """Write each text beside its path, flush all to the disk, then rename: a file is always the old or the new one.

    What a killed process left beside these paths is removed.
    """
    written: list[tuple[str, str | os.PathLike]] = []
    handles: list[int] = []  # held open until all is renamed, so that no other process removes these as leftovers
    try:
        for path, text in texts.items():
            folder, name = Path(path).parent, Path(path).name
            remove_leftovers(folder, re.compile(rf"\.{re.escape(name)}\.(?P<id>\w{{8}})\.tmp"))
            handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".tmp")
            handles.append(handle)
            written.append((temporary, path))
            hold(handle)
            with open(handle, "wb", closefd=False) as file:
                file.write(text.encode("utf-8"))
                file.flush()
                os.fsync(handle)
            os.chmod(temporary, 0o666 & ~_umask())
        for temporary, path in written:
            os.replace(temporary, path)
    except BaseException:
        for temporary, _ in written:
            Path(temporary).unlink(missing_ok=True)
        raise
    finally:
        for handle in handles:
            os.close(handle)


def _umask() -> int:
    """The process's file mode mask, read from /proc: os.umask would have to set it, which other threads would see."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022
