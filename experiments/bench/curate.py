"""Quality rules beside datatrove's filters: MB/s and documents/s of CPU time, one thread.

python -m experiments.bench.curate --data FILE [--json FILE]

FILE has a document a line, its text under "text" (.jsonl, .jsonl.gz, .jsonl.zst). Each row goes from str to verdict,
the shared pass included. "all" are all documents; "first 100" those that datatrove gets too, with its own words, which
are spaCy's (pip install --target FOLDER datatrove spacy; FOLDER on PYTHONPATH). "English list": the rules in order
until one drops the document, and "no stop": each of them on each document. The programs take turns and the best round
counts; datatrove has one round, after a warm-up on one document.
"""

import gc
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from experiments.bench.report import publish, row
from experiments.console import program, say
from experiments.limits import Count
from purelm.curate.document import Document, Drop
from purelm.curate.rules import ALL, ENGLISH, Rule, judged
from purelm.curate.words import scan
from purelm.data.json_lines import json_rows

PACKAGES = ("purelm", "numba", "numpy", "datatrove", "spacy")
NAMES = {
    "gopher": "Gopher quality", "repetition": "Gopher repetition", "c4": "C4", "fineweb": "FineWeb",
    "refinedweb": "RefinedWeb",
}  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Quality rules beside datatrove."""

    data: Path
    peer_documents: Count = 100
    """how many datatrove gets"""
    rounds: Count = 5
    json: Path | None = None


def one_rule(rule: Rule, engine: Any, documents: Sequence[Document]) -> None:
    for document in documents:
        rule(scan(document.text, engine))


def in_order(rules: Mapping[str, Rule], engine: Any, documents: Sequence[Document]) -> int:
    """How many are kept."""
    return sum(not isinstance(judged(document, rules, engine), Drop) for document in documents)


def no_stop(rules: Mapping[str, Rule], engine: Any, documents: Sequence[Document]) -> None:
    for document in documents:
        scanned = scan(document.text, engine)
        for rule in rules.values():
            rule(scanned)


def datatrove_filters() -> dict[str, Any]:
    """Its filters in the order of ENGLISH, or none where it is not installed, or spaCy is not."""
    if not (importlib.util.find_spec("datatrove") and importlib.util.find_spec("spacy")):
        return {}
    from datatrove.pipeline import filters

    return {
        "gopher": filters.GopherQualityFilter(),
        "repetition": filters.GopherRepetitionFilter(),
        "c4": filters.C4QualityFilter(filter_no_terminal_punct=False),
        "fineweb": filters.FineWebQualityFilter(),
    }


def theirs(filters: Sequence[Any], documents: Sequence[Document]) -> int:
    """How many are kept; a document keeps its words from one filter to the next, as in its pipelines."""
    from datatrove.data import Document as Theirs

    n = 0
    for document in documents:
        their = Theirs(text=document.text, id=document.id)
        for f in filters:
            found = f.filter(their)
            if not (found[0] if isinstance(found, tuple) else found):
                break
        else:
            n += 1
    return n


def best(programs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """CPU seconds of each program: the best of `rounds` rounds in which they take turns, after one for warm-up."""
    seconds = dict.fromkeys(programs, float("inf"))
    for number in range(rounds + 1):
        gc.collect()
        for name, run in programs.items():
            start = time.process_time()
            run()
            if number > 0:
                seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds


def peers(documents: Sequence[Document]) -> dict[str, float]:
    """CPU seconds of datatrove's filters, each alone (it remembers the words of 5 texts: not of the filter before)."""
    filters = datatrove_filters()
    if not filters:
        return {}
    theirs(list(filters.values()), documents[:1])
    groups = {**{name: [f] for name, f in filters.items()}, "English list": list(filters.values())}
    seconds = {}
    for name, group in groups.items():
        start = time.process_time()
        n = theirs(group, documents)
        seconds[name] = time.process_time() - start
        say(f"datatrove, {name}: keeps {n} of {len(documents)}")
    return seconds


@program
def main(args: Args) -> None:
    rows_of_file = list(json_rows(args.data))
    for where, found in rows_of_file:
        if not isinstance(found.get("text"), str):
            raise ValueError(f'{where}: no "text" with a string')
    documents = [Document(where, found["text"]) for where, found in rows_of_file]
    if not documents:
        raise ValueError(f"data {args.data}: no documents")
    few = documents[: args.peer_documents]
    engine = "numba" if importlib.util.find_spec("numba") else "python"
    programs: dict[str, Callable[[], Any]] = {}
    for what, some in (("all", documents), (f"first {len(few)}", few)):
        for name, rule in ALL.items():
            programs[f"{name}|{what}"] = partial(one_rule, rule, engine, some)
        programs[f"English list|{what}"] = partial(in_order, ENGLISH, engine, some)
    programs["English list, no stop|all"] = partial(no_stop, ENGLISH, engine, documents)
    seconds = best(programs, args.rounds)
    if engine == "numba":
        seconds |= best({f"English list, plain Python|first {len(few)}": partial(in_order, ENGLISH, "python", few)}, 1)
    kept = [in_order(ENGLISH, engine, some) for some in (documents, few)]
    say(f"the English list keeps {kept[0]} of {len(documents):,} documents, and {kept[1]} of the first {len(few)}")
    peer = peers(few)
    rows = []
    for key, value in seconds.items():
        name, what = key.split("|")
        some = documents if what == "all" else few
        label = f"{NAMES.get(name, name)}, {what}"
        megabytes = sum(len(document.text.encode("utf-8", "surrogatepass")) for document in some) / 1e6
        has_peer = what != "all" and name not in ("refinedweb", "English list, plain Python")
        for unit, amount in (("MB/s", megabytes), ("documents/s", len(some))):
            their = amount / peer[name] if has_peer and name in peer else None
            against = "datatrove" if has_peer else None
            rows.append(row(label, amount / value, unit, peer=against, peer_value=their, packages=PACKAGES))
    publish(rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
