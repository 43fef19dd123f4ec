"""Exact counts of what the filter did: of one input, and of all of them, in whatever order they are added.

A funnel is {step: {documents, characters, kept, kept_characters, dropped: {reason: n}}}, in the order of the steps;
`characters` of the step "extract" are bytes of pages. Examples are those with the smallest hash of (seed, id), so that
they are a random sample that does not depend on the order or the number of workers.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from experiments.curate.files import read_json
from purelm.curate.document import Document
from purelm.curate.skipped import Read, merged_reads
from purelm.curate.url import host_of, registered_domain

__all__ = ["Examples", "Funnel", "domain_of", "length_class", "merged", "rank", "read_of", "top_domains"]

SHOWN = 1500  # characters of an example
MOST_PLACES = 20  # of damage, named in the report
SHARDS_AT_ONCE = 256  # whose domains are in memory


def rank(seed: int, *parts: str) -> int:
    """A 64-bit number that is random in the seed and the parts."""
    text = "\0".join((str(seed), *parts))
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


class Funnel:
    """Counts of the documents that reached each step; `as_json` is its value."""

    def __init__(self, steps: Iterable[str]):
        self.rows: dict[str, list[int]] = {step: [0, 0, 0, 0] for step in steps}
        self.dropped: dict[str, Counter[str]] = {step: Counter() for step in self.rows}

    def kept(self, step: str, before: int, after: int) -> None:
        """One more document passed, of so many characters before and after."""
        row = self.rows[step]
        row[0], row[1], row[2], row[3] = row[0] + 1, row[1] + before, row[2] + 1, row[3] + after

    def drop(self, step: str, before: int, reason: str) -> None:
        """One more document was dropped."""
        row = self.rows[step]
        row[0], row[1] = row[0] + 1, row[1] + before
        self.dropped[step][reason] += 1

    def as_json(self) -> dict[str, Any]:
        names = ("documents", "characters", "kept", "kept_characters")
        return {
            step: dict(zip(names, row, strict=True)) | {"dropped": dict(sorted(self.dropped[step].items()))}
            for step, row in self.rows.items()
        }


class Examples:
    """The `most` documents with the smallest rank for each kind."""

    def __init__(self, seed: int, most: int):
        self.seed, self.most = seed, most
        self.heaps: dict[str, list[tuple[int, str, dict[str, Any]]]] = {}

    def add(self, kind: str, document: Document, value: Any = None) -> None:
        """One more of a kind; value: what was measured."""
        if not self.most:
            return
        number = rank(self.seed, document.id)
        heap = self.heaps.setdefault(kind, [])
        # The largest number is at the heap's head, as the smallest of its negative.
        if len(heap) == self.most and -heap[0][0] <= number:
            return
        text = document.text[:SHOWN].encode("utf-8", "replace").decode()
        shown = {"rank": number, "id": document.id, "url": document.url, "value": value, "text": text}
        entry = (-number, document.id, shown)
        if all(entry[:2] != other[:2] for other in heap):
            (heapq.heappushpop if len(heap) == self.most else heapq.heappush)(heap, entry)

    def as_json(self) -> dict[str, list[dict[str, Any]]]:
        return {kind: sorted((x[2] for x in heap), key=_order) for kind, heap in sorted(self.heaps.items())}


def _order(example: Mapping[str, Any]) -> tuple[int, str]:
    return example["rank"], example["id"]


def length_class(characters: int) -> str:
    """The power of two at or below a length.

    >>> length_class(1000), length_class(0)
    ('512', '0')
    """
    return str(1 << (characters.bit_length() - 1) if characters else 0)


def domain_of(url: str) -> str:
    """The registered domain, or the host where that has none."""
    host = host_of(url)
    return registered_domain(host) or host


def read_of(read: Read) -> dict[str, Any]:
    """As JSON."""
    return {"records": read.records, "size": read.size, "skipped": dict(sorted(read.skipped.items()))}


def merged(parts: Iterable[Mapping[str, Any]], examples: int) -> dict[str, Any]:
    """The statistics of all inputs: sums, and the examples and places that come first."""
    total: dict[str, Any] = {"read": read_of(Read()), "places": [], "funnel": {}, "kept": {}, "languages": {},
                             "lengths": {}, "masked": {}, "examples": {}}  # fmt: skip
    for part in parts:
        reads = [Read(x["records"], x["size"], x["skipped"]) for x in (total["read"], part["read"])]
        total["read"] = read_of(merged_reads(*reads))
        total["places"] = (total["places"] + part["places"])[:MOST_PLACES]
        for step, row in part["funnel"].items():
            sums = total["funnel"].setdefault(step, {})
            for name, n in row.items():
                sums[name] = _added(sums.get(name, {}), n) if name == "dropped" else sums.get(name, 0) + n
        for name in ("kept", "languages", "lengths", "masked"):
            total[name] = _added(total[name], part[name])
        for kind, shown in part["examples"].items():
            found = sorted(total["examples"].get(kind, []) + shown, key=_order)
            total["examples"][kind] = found[:examples]
    total["examples"] = dict(sorted(total["examples"].items()))
    return total


def _added(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in sorted({*a, *b})}


def top_domains(paths: list[Path], n: int) -> list[tuple[str, int]]:
    """The n domains with the most kept documents, exactly; each file is {domain: documents}.

    Many files are read several times, for a part of all domains each time, so that memory is bounded.
    """
    passes = -(-len(paths) // SHARDS_AT_ONCE)
    best: list[tuple[str, int]] = []
    for number in range(passes):
        counts: Counter[str] = Counter()
        for path in paths:
            counts.update(dict(_part(read_json(path), number, passes)))
        best = sorted([*best, *counts.items()], key=lambda item: (-item[1], item[0]))[:n]
    return best


def _part(domains: Mapping[str, int], number: int, passes: int) -> Iterator[tuple[str, int]]:
    return ((name, k) for name, k in domains.items() if passes == 1 or rank(0, name) % passes == number)
