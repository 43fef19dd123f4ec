"""Rows of data sets: JSON lines, JSON arrays, parquet files, a set of the hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from purelm.data.json_lines import rows_of
from purelm.data.sources import hub_records

__all__ = ["parquet_files", "table_rows"]


def table_rows(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each row of a source, streamed.

    A source is a parquet file, a folder of such files or "hub:owner/name[:config][:split]", which `datasets` reads, or
    any other file, which is read as `rows_of` does. Only hub: uses the network.
    """
    if str(source).startswith("hub:"):
        yield from hub_records(str(source))
        return
    path = Path(source)
    files = parquet_files(path)
    if not files:
        yield from rows_of(path)
        return
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise ModuleNotFoundError(f"{path}: needs datasets: pip install 'purelm[hub]'") from None
    for file in files:
        number, rows = 0, None
        while True:
            try:
                if rows is None:
                    rows = iter(datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True))
                row = next(rows)
            except StopIteration:
                break
            except Exception as error:  # datasets lets through what pyarrow raises
                reason = (str(error).strip().splitlines() or [""])[0]
                raise ValueError(f"{file}: cannot be read ({type(error).__name__}: {reason})") from error
            yield f"{file}, row {number}", row
            number += 1


def parquet_files(path: Path) -> list[Path]:
    """The file, if it is a parquet file, or those in a folder, by name; none for any other file.

    ValueError for a folder without any; where they lie in folders of it, as in a clone from the hub, for which to name.
    """
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{path}: no such file or folder; a set of the hub is named hub:OWNER/NAME")
        return [path] if path.suffix == ".parquet" else []
    if files := sorted(path.glob("*.parquet")):
        return files
    inner = sorted({file.parent.relative_to(path).as_posix() for file in path.rglob("*.parquet")})
    if inner:
        raise ValueError(f"{path}: its parquet files lie in {', '.join(inner)}: name one of these folders")
    raise ValueError(f"{path}: no .parquet file in it")
