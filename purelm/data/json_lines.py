"""Rows of JSON-lines files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["json_rows"]


def json_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every line that is not empty; `where` names file and line, for errors about the row.

    ValueError for a file that is not there or not UTF-8, and for a line that is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: not a JSON object")
            yield where, row
