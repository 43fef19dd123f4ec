"""What a reader passes over, and exact counts of it.

A reader's stream holds records and, in their places, `Skipped` values, so that nothing is lost unseen:

    read = Read()
    for item in records("crawl.warc.gz"):
        read = tally(read, item)
        if not isinstance(item, Skipped):
            ...
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from purelm.curate.document import Document, Raw

__all__ = ["Read", "Skipped", "merged_reads", "tally"]


class Skipped(NamedTuple):
    """A stretch of a source that gave no record.

    Reasons: `type: TYPE` and `status: CODE`, records that were not asked for; `empty`, no content; `too large`;
    `truncated`, shorter than it says
    or with the next record inside of it; `damaged`, bytes that cannot be read, one for a whole stretch of them;
    `not a WARC file`; `no text`, a row without the field.
    """

    reason: str  # one of few: counts go by it
    where: str  # the file, and the byte, line or row


class Read(NamedTuple):
    """How many records were read and their size, and how many were skipped for each reason."""

    records: int = 0
    size: int = 0  # bytes of Raw.content and characters of Document.text
    skipped: Mapping[str, int] = MappingProxyType({})


def tally(read: Read, item: Raw | Document | Skipped) -> Read:
    """The counts with one more item of a reader's stream."""
    if isinstance(item, Skipped):
        return read._replace(skipped={**read.skipped, item.reason: read.skipped.get(item.reason, 0) + 1})
    size = len(item.content if isinstance(item, Raw) else item.text)
    return read._replace(records=read.records + 1, size=read.size + size)


def merged_reads(a: Read, b: Read) -> Read:
    """The counts of both."""
    reasons = [*a.skipped, *(reason for reason in b.skipped if reason not in a.skipped)]
    skipped = {reason: a.skipped.get(reason, 0) + b.skipped.get(reason, 0) for reason in reasons}
    return Read(a.records + b.records, a.size + b.size, skipped)
