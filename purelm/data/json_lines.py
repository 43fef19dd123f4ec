"""Rows of JSON-lines files, and of JSON arrays."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from purelm.data.archives import bare_name, file_blocks
from purelm.data.sources import lines

__all__ = ["json_rows", "rows_of"]

MOST_ARRAY_BYTES = 1 << 30  # of a JSON array, which is read whole: alpaca_data.json has 23 MB


def json_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every line that is not empty; `where` names file and line, for errors about the row.

    A file whose name ends in .gz or .zst is unpacked as it is read. ValueError for a file that is not there, damaged
    or not UTF-8, and for a line that is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    for number, raw in enumerate(lines(file_blocks(path, str(path)), str(path)), 1):
        if raw.strip():
            where = f"{path}, line {number}"
            yield where, _object(_decoded(raw, where), where)


def rows_of(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`json_rows`, but for a file named .json that holds an array: then the objects in it, and `where` counts them.

    An array is read whole, and may have a gigabyte.
    """
    path = Path(path)
    if not (bare_name(path.name.lower()).endswith(".json") and path.is_file() and _first_byte(path) == b"["):
        yield from json_rows(path)
        return
    whole = bytearray()
    for block in file_blocks(path, str(path)):
        whole += block
        if len(whole) > MOST_ARRAY_BYTES:
            raise ValueError(f"{path}: an array of more than {MOST_ARRAY_BYTES >> 20} MiB; write it as JSON lines")
    values = _decoded(bytes(whole), str(path))
    for number, value in enumerate(values, 1):
        where = f"{path}, entry {number}"
        yield where, _object(value, where)


def _first_byte(path: Path) -> bytes:
    for block in file_blocks(path, str(path)):
        if start := block.lstrip()[:1]:
            return start
    return b""


def _decoded(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not a JSON object")
    return value
