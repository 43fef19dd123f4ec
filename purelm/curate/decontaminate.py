"""Documents that hold pieces of evaluation sets: runs of n words that both share, to drop the document or cut them out.

    tests = index({"gsm8k": [("gsm8k-0", "Janet's ducks lay 16 eggs ..."), ...]}, n=13)
    partial(decontaminated, tests=tests, settings=GPT3)     # Drop("contaminated: gsm8k", 0.31), or the document

Words are those of `normalise.folded`: lower case, no accents, no punctuation. Runs are compared by 64-bit hashes
(`shingles`). An evaluation text of fewer than n words is looked for whole, if it has `least_words`; the Index says how
many texts are not looked for at all. Share is measured of an evaluation text: its distinct runs that the document holds
("runs"), or its words within these ("words").

| preset | n | a text counts if | then | source |
|---|---|---|---|---|
| GPT3 | 13 | one run is shared | cut with 200 characters on both sides | Brown et al. 2020, appendix C |
| DATATROVE | 12 | one run is shared | drop | datatrove 0.10, n-gram decontamination |
| PALM | 8 | 70 % of its runs are | drop | Chowdhery et al. 2022, section 8 |
| LLAMA2 | 10 | 80 % of its words are | drop | Touvron et al. 2023, appendix A.6 ("dirty") |
| TULU3 | 8 | half of its words are | drop | Lambert et al. 2024, section 3.2 |

PaLM's and Llama 2's numbers sort examples of evaluations, over tokens of their tokenizers, Llama 2's with up to four
tokens of difference within a run; here they are of words, exact, and sort training documents. GPT-3 also ignored runs
that stand in more than ten training documents, which one document cannot know: pass `ignored` to `index`. None of the
presets but datatrove's was compared with its authors' code; a share of exactly the bound counts here. Post-training
examples have their own matcher, whose words keep the signs of maths (`purelm.align.data.contamination`).
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from purelm.curate.document import Document, Drop
from purelm.curate.limits import check_several
from purelm.curate.normalise import folded
from purelm.curate.shingles import shingles
from purelm.data.checks import check_int

__all__ = [
    "DATATROVE", "GPT3", "LLAMA2", "PALM", "TULU3", "Decontamination", "Found", "Index", "decontaminated", "index",
    "look",
]  # fmt: skip

SEPARATE = re.compile(r"\S+")
BITS = 20  # of a hash, that a table of bytes is looked up by before the search
U64 = NDArray[np.uint64]


@dataclass(frozen=True)
class Decontamination:
    """When a document is contaminated, and what then."""

    n: int = 13  # words of a run; the index must have the same
    share: float = 0.0  # least share of an evaluation text that must be found, and at least one run; 1: all of it
    measure: Literal["runs", "words"] = "runs"
    action: Literal["drop", "cut", "note"] = "drop"
    window: int = 200  # cut: characters that go too, before and after a shared run
    least_piece: int = 200  # cut: pieces of fewer characters go too
    most_pieces: int = 10  # cut: a document that falls into more is dropped

    def __post_init__(self):
        check_int("n", self.n, 1, 1000)
        check_int("window", self.window, 0)
        check_int("least_piece", self.least_piece, 0)
        check_int("most_pieces", self.most_pieces, 1)
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share!r}: allowed is 0 to 1")
        for name, allowed in (("measure", ("runs", "words")), ("action", ("drop", "cut", "note"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed: {', '.join(allowed)}")


GPT3 = Decontamination(13, action="cut")
DATATROVE = Decontamination(12)
PALM = Decontamination(8, 0.7)
LLAMA2 = Decontamination(10, 0.8, "words")
TULU3 = Decontamination(8, 0.5, "words")


class Index(NamedTuple):
    """Runs of evaluation texts; hashes of runs of all lengths are in one sorted array."""

    n: int
    sets: tuple[str, ...]
    ids: tuple[tuple[int, str], ...]  # of each text its set's number and its id
    lengths: tuple[int, ...]  # words of the runs there are: n, and those of texts that are shorter
    hashes: U64  # (H,) sorted, distinct
    firsts: NDArray[np.int64]  # (H + 1,): where each hash's places begin
    texts: NDArray[np.int64]  # (P,): the text of each place
    starts: NDArray[np.int64]  # (P,): the word of that text where the run begins
    n_words: NDArray[np.int64]  # (T,)
    n_runs: NDArray[np.int64]  # (T,) distinct ones that are not ignored
    seen: NDArray[np.bool_]  # (2^BITS,): first bits of the hashes
    n_ignored: int  # texts that are not looked for: too short, or of ignored runs alone


class Found(NamedTuple):
    """The evaluation text of which a document holds the largest share."""

    set: str
    id: str
    share: float


def index(
    sets: Mapping[str, Iterable[tuple[str, str]]], n: int = 13, *, least_words: int = 8, ignored: Iterable[str] = ()
) -> Index:
    """The Index of evaluation sets, each of (id, text)s.

    least_words: shorter texts are not looked for, texts of so many and fewer than n words are looked for whole.
    ignored: runs that count as common, as text. Memory: about 24 bytes a word.
    """
    check_int("n", n, 1, 1000)
    check_int("least_words", least_words, 1)
    check_several("ignored", ignored)
    common = [shingles(folded(text), max(1, len(folded(text).split()))) for text in ignored]
    common_hashes = np.unique(np.concatenate([np.zeros(0, np.uint64), *common]))
    ids: list[tuple[int, str]] = []
    parts: list[U64] = []
    n_words, n_runs, lengths, n_ignored = [], [], {n}, 0
    for number, texts in enumerate(sets.values()):
        check_several(f"sets[{tuple(sets)[number]!r}]", texts)
        for test in texts:
            check_several(f"sets[{tuple(sets)[number]!r}]: an (id, text)", test)
            name, text = test
            words = folded(text)
            m = words.count(" ") + 1 if words else 0
            found = shingles(words, n) if m >= min(n, least_words) else np.zeros(0, np.uint64)
            kept = found[~np.isin(found, common_hashes)] if len(common_hashes) else found
            n_ignored += not len(kept)
            if len(kept) and m < n:
                lengths.add(m)
            ids.append((number, str(name)))
            n_words.append(m)
            n_runs.append(len(np.unique(kept)))
            parts.append(found)
    flat = np.concatenate([np.zeros(0, np.uint64), *parts])
    texts_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts]).astype(np.int64)
    starts = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(part)) for part in parts)])
    keep = ~np.isin(flat, common_hashes)
    flat, texts_of, starts = flat[keep], texts_of[keep], starts[keep]
    order = np.argsort(flat, kind="stable")
    hashes, firsts = np.unique(flat[order], return_index=True)
    seen = np.zeros(1 << BITS, bool)
    seen[hashes >> np.uint64(64 - BITS)] = True
    return Index(
        n, tuple(sets), tuple(ids), tuple(sorted(lengths)), hashes, np.append(firsts, len(flat)).astype(np.int64),
        texts_of[order], starts[order], np.array(n_words, np.int64), np.array(n_runs, np.int64), seen, n_ignored,
    )  # fmt: skip


def hits(tests: Index, words: str) -> list[tuple[int, int, int]]:
    """(number of a hash in the index, word of the text where its run begins, words of it), of a folded text."""
    found = []
    total = words.count(" ") + 1 if words else 0
    for n in tests.lengths:
        if total < n:
            continue
        runs = shingles(words, n)
        at = np.flatnonzero(tests.seen[runs >> np.uint64(64 - BITS)])
        if len(at):
            place = np.searchsorted(tests.hashes, runs[at])
            same = tests.hashes[np.minimum(place, len(tests.hashes) - 1)] == runs[at]
            found += [(int(p), int(a), n) for p, a in zip(place[same], at[same], strict=True)]
    return found


def look(tests: Index, text: str, measure: Literal["runs", "words"] = "runs", share: float = 0.0) -> list[Found]:
    """Each evaluation text that shares a run and at least `share` with a text, the largest share first."""
    return [found for found, _ in _shares(tests, hits(tests, folded(text)), measure, share)]


def _shares(
    tests: Index, at: Iterable[tuple[int, int, int]], measure: str, share: float
) -> list[tuple[Found, int]]:
    """With the number of each."""
    runs: dict[int, set[int]] = {}
    words: dict[int, set[int]] = {}
    for number in {number for number, _, _ in at}:
        for place in range(tests.firsts[number], tests.firsts[number + 1]):
            text = int(tests.texts[place])
            runs.setdefault(text, set()).add(number)
            if measure == "words":
                start = int(tests.starts[place])
                words.setdefault(text, set()).update(range(start, min(start + tests.n, int(tests.n_words[text]))))
    found = []
    for text in sorted(runs):
        held = len(words[text]) / tests.n_words[text] if measure == "words" else len(runs[text]) / tests.n_runs[text]
        if held >= share:
            number, name = tests.ids[text]
            found.append((Found(tests.sets[number], name, float(held)), text))
    return sorted(found, key=lambda item: (-item[0].share, item[1]))


def decontaminated(document: Document, tests: Index, settings: Decontamination = GPT3) -> Document | Drop:
    """The document, if it holds no evaluation text; else by settings.action:

    drop: Drop `contaminated: SET`, with the share of the text of which it holds most.
    note: the document, `contaminated` (set, id and share) in its meta.
    cut: the document without the shared runs, the characters around them, and what is left in short pieces, pieces
    between blank lines, `contaminated` and `pieces` (how many) in its meta. Drop `contaminated: SET` where it falls
    into more than settings.most_pieces, and where no piece is left.

    ValueError where the index has another n.
    """
    if tests.n != settings.n:
        raise ValueError(f"tests: an index of runs of {tests.n} words; the settings have n={settings.n}")
    at = hits(tests, folded(document.text))
    found = _shares(tests, at, settings.measure, settings.share) if at else []
    if not found:
        return document
    worst = found[0][0]
    drop = Drop(f"contaminated: {worst.set}", worst.share)
    if settings.action == "drop":
        return drop
    noted = document.noted(contaminated={"set": worst.set, "id": worst.id, "share": worst.share})
    if settings.action == "note":
        return noted
    texts = {text for _, text in found}
    numbers = {n for n, _, _ in at if texts & set(tests.texts[tests.firsts[n] : tests.firsts[n + 1]].tolist())}
    pieces = _cut(document.text, [(i, i + m) for n, i, m in at if n in numbers], settings)
    if not pieces or len(pieces) > settings.most_pieces:
        return drop
    return noted._replace(text="\n\n".join(pieces)).noted(pieces=len(pieces))


def _cut(text: str, runs: Collection[tuple[int, int]], settings: Decontamination) -> list[str]:
    """The pieces left of a text without runs of words (first, end) and a window around each."""
    places = [match.span() for match in SEPARATE.finditer(text) if folded(match.group())]
    spans = sorted((places[a][0] - settings.window, places[b - 1][1] + settings.window) for a, b in runs)
    pieces, at = [], 0
    for start, end in [*spans, (len(text), len(text))]:
        if start > at:
            pieces.append(text[at:start].strip())
        at = max(at, end)
    return [piece for piece in pieces if piece and len(piece) >= settings.least_piece]
