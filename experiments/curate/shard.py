"""Stage 1: one input of a crawl to the documents that its steps keep, and exact counts of what happened to the others.

It leaves in its folder: kept.jsonl.zst (or .gz), statistics.json, domains.json, digests.npy (D, 16) of exact texts and,
for near-duplicates, signatures.npy (D, K), for the D documents kept.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from experiments.curate.config import Curate
from experiments.curate.files import append_packed, write_json
from experiments.curate.statistics import MOST_PLACES, Examples, Funnel, domain_of, length_class, read_of
from experiments.curate.steps import extraction
from purelm.curate.document import Document, Drop, Raw, Step
from purelm.curate.exact import digest
from purelm.curate.minhash import MinHash, signature
from purelm.curate.normalise import comparable
from purelm.curate.read import records
from purelm.curate.shingles import shingles
from purelm.curate.skipped import Read, Skipped, tally

__all__ = ["Tell", "filter_input", "min_hash"]

Tell = Callable[[int, int], None]  # documents and bytes of them that are done, more than last time
TELL_EVERY = 200  # records
# What is skipped in any crawl; the places of all else are named.
EXPECTED = ("type: ", "status: ", "empty")


def min_hash(cfg: Curate) -> MinHash:
    """The settings of near-duplicates; ValueError where they do not fit."""
    d = cfg.dedup
    return MinHash(d.n_hashes, d.n_bands, d.ngram, d.jaccard, cfg.seed)


def filter_input(cfg: Curate, path: str, out: Path, steps: Mapping[str, Step], tell: Tell) -> None:
    """The files named above, of the input `path`."""
    near = min_hash(cfg) if cfg.dedup.kind == "near" else None
    first = extraction(cfg.filter)
    funnel, examples = Funnel(("extract", *steps)), Examples(cfg.seed, cfg.examples)
    languages, lengths, masked, domains = (Counter[str]() for _ in range(4))
    places: list[str] = []
    digests, signatures = bytearray(), []
    read, told, kept = Read(), (0, 0), (0, 0)
    n_bytes = 0  # of pages, and of texts in UTF-8
    with open(out / f"kept.jsonl.{cfg.compression}", "wb") as file, append_packed(file, cfg.compression) as lines:
        for n, item in enumerate(records(path, most_bytes=most_bytes(cfg), field=cfg.filter.field), 1):
            read = tally(read, item)
            if n % TELL_EVERY == 0:
                tell(read.records - told[0], n_bytes - told[1])
                told = read.records, n_bytes
            if isinstance(item, Skipped):
                if not item.reason.startswith(EXPECTED) and len(places) < MOST_PLACES:
                    places.append(f"{item.reason}: {item.where}"[:500])
                continue
            n_bytes += len(item.content) if isinstance(item, Raw) else utf8_size(item.text)
            document = _through(item, first, steps, funnel, examples, languages)
            if document is None:
                continue
            lines.write(line_of(document))
            digests += digest(document.text)
            if near is not None:
                signatures.append(signature(shingles(comparable(document.text), near.ngram), near))
            lengths[length_class(len(document.text))] += 1
            domains[domain_of(document.url)] += 1
            masked.update(document.meta.get("pii") or {})
            kept = kept[0] + 1, kept[1] + len(document.text)
            examples.add("kept", document)
    tell(read.records - told[0], n_bytes - told[1])
    np.save(out / "digests.npy", np.frombuffer(bytes(digests), np.uint8).reshape(-1, 16))
    if near is not None:
        np.save(out / "signatures.npy", np.stack(signatures) if signatures else np.zeros((0, near.n_hashes), np.uint32))
    write_json(out / "domains.json", dict(sorted(domains.items())))
    counts = {"languages": languages, "lengths": lengths, "masked": masked}
    statistics = {
        "read": read_of(read), "places": places, "funnel": funnel.as_json(),
        "kept": {"documents": kept[0], "characters": kept[1]},
        **{name: dict(sorted(counter.items())) for name, counter in counts.items()}, "examples": examples.as_json(),
    }  # fmt: skip
    write_json(out / "statistics.json", statistics)


def most_bytes(cfg: Curate) -> int:
    """Of a record."""
    return int(cfg.filter.most_megabytes * 1e6)


def utf8_size(text: str) -> int:
    """Bytes."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def line_of(document: Document) -> bytes:
    """A document as a line of JSON; half a surrogate pair, which no file can hold, as a question mark."""
    row = {"id": document.id, "url": document.url, "text": document.text, "meta": dict(document.meta)}
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"


def _through(
    item: Raw | Document, first: Callable[[Raw], Document | Drop], steps: Mapping[str, Step], funnel: Funnel,
    examples: Examples, languages: Counter[str],
) -> Document | None:  # fmt: skip
    """The document after all steps, or None; counted."""
    if isinstance(item, Raw):
        found = first(item)
        if isinstance(found, Drop):
            funnel.drop("extract", len(item.content), found.reason)
            examples.add(f"extract: {found.reason}", Document(item.id, "", item.url), found.value)
            return None
        funnel.kept("extract", len(item.content), len(found.text))
        document = found
    else:
        document = item
    for name, step in steps.items():
        before = len(document.text)
        found = step(document)
        if name == "language":
            languages[_language(found)] += 1
        if isinstance(found, Drop):
            funnel.drop(name, before, found.reason)
            examples.add(f"{name}: {found.reason}", document, found.value)
            return None
        funnel.kept(name, before, len(found.text))
        document = found
    return document


def _language(found: Document | Drop) -> str:
    if isinstance(found, Document):
        return str(found.meta["language"])
    return str(found.value) if found.reason == "language" else "unsure"
