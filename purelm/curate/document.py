"""What the steps of a curation pipeline take and give: documents, and reasons to drop them.

    def long_enough(document: Document, least: int = 50) -> Document | Drop:
        n = len(document.text)
        return document if n >= least else Drop("too short", n)

    steps = {"length": long_enough, "pii": partial(mask, settings=PII())}
    for outcome in outcomes(steps, documents):
        outcome.document, outcome.step, outcome.drop      # step and drop are None where it was kept

A step is a pure function of one document, its first argument, with its settings bound by name. What it found is added
to `meta`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

__all__ = ["Counts", "Document", "Drop", "Outcome", "Raw", "Step", "counted", "merged", "outcomes"]

EMPTY: Mapping[str, Any] = MappingProxyType({})


class Raw(NamedTuple):
    """A record of a crawl, before its text is known."""

    id: str  # unique in its source: the record's own, or the source's name and the record's number
    content: bytes
    url: str = ""
    content_type: str = ""  # of the HTTP header, without parameters, lower-case: text/html
    charset: str = ""  # of the HTTP header, as declared
    meta: Mapping[str, Any] = EMPTY  # JSON values: date, source file, language of the record, ...


class Document(NamedTuple):
    """A text, where it comes from, and what was found about it."""

    id: str
    text: str
    url: str = ""
    meta: Mapping[str, Any] = EMPTY  # JSON values

    def noted(self, **found: Any) -> "Document":
        """The document with more in its meta."""
        return self._replace(meta={**self.meta, **found})


class Drop(NamedTuple):
    """Why a document is left out."""

    reason: str  # one of few: reports count by it
    value: float | int | str | None = None  # what was measured


Step = Callable[[Document], Document | Drop]


class Outcome(NamedTuple):
    """What became of a document: as it was when a step dropped it, or after all steps."""

    document: Document
    step: str | None = None  # the name of the step that dropped it; None: it is kept
    drop: Drop | None = None


def outcomes(steps: Mapping[str, Step], documents: Iterable[Document]) -> Iterator[Outcome]:
    """Each document through the steps in order, until one drops it."""
    for document in documents:
        for name, step in steps.items():
            found = step(document)
            if isinstance(found, Drop):
                yield Outcome(document, name, found)
                break
            document = found
        else:
            yield Outcome(document)


class Counts(NamedTuple):
    """Documents and characters in, kept, and dropped by (step, reason): adds up over shards exactly."""

    documents: int = 0
    characters: int = 0
    kept: int = 0
    kept_characters: int = 0
    dropped: Mapping[tuple[str, str], int] = MappingProxyType({})


def counted(counts: Counts, outcome: Outcome, characters: int) -> Counts:
    """Counts with one more outcome; characters: of the document before the first step."""
    dropped: Mapping[tuple[str, str], int] = counts.dropped
    if outcome.drop is not None:
        key = (outcome.step or "", outcome.drop.reason)
        dropped = {**dropped, key: dropped.get(key, 0) + 1}
    is_kept = outcome.drop is None
    return Counts(
        counts.documents + 1,
        counts.characters + characters,
        counts.kept + is_kept,
        counts.kept_characters + (len(outcome.document.text) if is_kept else 0),
        dropped,
    )


def merged(a: Counts, b: Counts) -> Counts:
    """The counts of both."""
    keys = [*a.dropped, *(key for key in b.dropped if key not in a.dropped)]
    dropped = {key: a.dropped.get(key, 0) + b.dropped.get(key, 0) for key in keys}
    return Counts(
        a.documents + b.documents, a.characters + b.characters, a.kept + b.kept,
        a.kept_characters + b.kept_characters, dropped,
    )  # fmt: skip
