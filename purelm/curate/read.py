"""Records of crawls and corpora as a stream, whatever state the files are in.

| name ends in | read as | gives |
|---|---|---|
| .warc, .wet, .wat, also with .gz, .zst or .lz4 | WARC (extra `curate`) | Raw of responses, Document of WET's |
| .jsonl, .ndjson, .json, also with .gz or .zst | a JSON object a line | Document |
| .parquet, a folder of such, hub:owner/name | rows (extra `hub`) | Document |

Nothing in a file raises: what cannot be read is in the stream as `Skipped`, with its place and a reason.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from purelm.curate.document import Document, Raw
from purelm.curate.json_documents import document_of, json_documents
from purelm.curate.skipped import Skipped
from purelm.curate.warc import warc_records
from purelm.data.archives import check_is_file
from purelm.data.checks import check_int
from purelm.data.tables import parquet_files, table_rows

__all__ = ["MOST_RECORD_BYTES", "records"]

MOST_RECORD_BYTES = 1 << 24  # Common Crawl cuts pages at 5 MiB (at 1 MiB before 2025)
WARC_ENDINGS = (".warc", ".wet", ".wat")
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")


def records(
    path: str | os.PathLike,
    *,
    most_bytes: int = MOST_RECORD_BYTES,
    statuses: Collection[int] | None = (200,),
    field: str = "text",
) -> Iterator[Raw | Document | Skipped]:
    """Stream the records of a file, and in their places what was skipped.

    Args:
        path: by the table at the head of this file.
        most_bytes: of a record as it is stored, of a page unpacked, and of a line; what is longer is skipped, and no
            more than that is held (a gzip bomb is unpacked in passing at most).
        statuses: HTTP statuses that are wanted; None for all.
        field: of JSON lines and rows, the document's text. `id` and `url` are read too (Dolma's `metadata.url` as
            well); other fields go to the document's meta.

    A file cut anywhere gives a prefix of the whole file's records. ValueError for a name of no known ending, a path
    that is no file, and arguments out of range; ModuleNotFoundError naming the extra to install.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "two.jsonl")
        >>> _ = path.write_text('{"id": "a", "text": "One."}\\n{"id": "b", "te')
        >>> [getattr(item, "text", None) or item.reason for item in records(path)]
        ['One.', 'damaged']
    """
    check_int("most_bytes", most_bytes, 1)
    if statuses is not None and (isinstance(statuses, str) or not all(isinstance(s, int) for s in statuses)):
        raise ValueError(f"statuses={statuses!r}: give HTTP statuses such as (200,), or None for all")
    if not isinstance(field, str) or not field:
        raise ValueError(f"field={field!r}: give the name of a field")
    name = os.fspath(path)
    if name.startswith("hub:") or Path(name).is_dir() or name.lower().endswith(".parquet"):
        return _rows(name, most_bytes, field)
    bare = name.lower()
    for ending in (".gz", ".zst", ".lz4"):
        bare = bare.removesuffix(ending)
    if not bare.endswith(WARC_ENDINGS + JSON_ENDINGS) or (bare.endswith(JSON_ENDINGS) and name.endswith(".lz4")):
        raise ValueError(
            f"path={name!r}: names end in {', '.join(WARC_ENDINGS + JSON_ENDINGS)} (also with .gz or .zst) or .parquet"
        )
    check_is_file(Path(name), name)
    if bare.endswith(WARC_ENDINGS):
        return warc_records(name, most_bytes=most_bytes, statuses=statuses)
    return json_documents(Path(name), most_bytes=most_bytes, field=field)


def _rows(name: str, most_bytes: int, field: str) -> Iterator[Document | Skipped]:
    if name.startswith("hub:"):
        yield from (_row(row, where, most_bytes, field) for where, row in table_rows(name))
        return
    for file in parquet_files(Path(name)):
        where = str(file)
        try:
            for where, row in table_rows(file):
                yield _row(row, where, most_bytes, field)
        except ValueError as error:
            yield Skipped("damaged", f"after {where}: {error}")


def _row(row: Mapping[str, Any], where: str, most_bytes: int, field: str) -> Document | Skipped:
    found = document_of(row, where, field)
    return Skipped("too large", where) if isinstance(found, Document) and len(found.text) > most_bytes else found
