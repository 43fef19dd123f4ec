"""Rows of OpenR1-Math-220k: problems with two to four generations each, and verdicts on them.

    rows = read("OpenR1-Math-220k/data", openr1)             # parquet files here; or "hub:open-r1/OpenR1-Math-220k"
    kept, counts = clean(rows, [verifiable(), difficulty(0.25, 0.75, pass_rate), correct(), chosen()])

Fields, from the card of open-r1/OpenR1-Math-220k (225,129 rows): problem, solution, answer, problem_type,
question_type, source, uuid; and, one item a generation: generations, is_reasoning_complete, correctness_math_verify,
correctness_llama (null where that judge was not asked), finish_reasons; correctness_count. Configurations: default
(93,733 rows), extended (131,396), all.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from purelm.align.data.cleaning import Removed, Row, Step, filtered
from purelm.align.data.examples import text

__all__ = ["chosen", "correct", "each_generation", "openr1", "pass_rate"]

JUDGES = ("correctness_math_verify", "correctness_llama")
COMPLETE = "is_reasoning_complete"


def openr1(given: dict[str, Any]) -> list[Row]:
    """The object, if it has what the steps below look at, with its problem as "prompt"; "response" comes by `chosen`.

    A verdict that is null is unknown. The fields "source" and "messages" of the data set are left out: the first is
    NuminaMath's (here "collection"), the second repeats the problem and a generation.
    """
    text(given, "problem")
    generations = given.get("generations")
    if not isinstance(generations, list) or not all(isinstance(x, str) for x in generations):
        raise ValueError("its 'generations' is not a list of texts")
    for name in (COMPLETE, *JUDGES):
        verdicts = given.get(name)
        if verdicts is not None and (not isinstance(verdicts, list) or len(verdicts) != len(generations)):
            raise ValueError(f"its {name!r} is not a list of {len(generations)} verdicts, one a generation")
    rest = {key: value for key, value in given.items() if key not in ("source", "messages")}
    return [{**rest, "prompt": given["problem"], "collection": given.get("source")}]


def _right(row: Row, judges: Sequence[str]) -> list[bool | None]:
    """Of each generation whether a judge finds it right; None where none was asked."""
    verdicts = [row[name] for name in judges if row.get(name) is not None]
    given = [[v[i] for v in verdicts if v[i] is not None] for i in range(len(row["generations"]))]
    return [any(x) if x else None for x in given]


def pass_rate(row: Row, judges: Sequence[str] = JUDGES) -> float | None:
    """The share of generations that a judge finds right, of those that were judged; None if none was.

    >>> pass_rate({"generations": ["a", "b", "c"], "correctness_math_verify": [True, False, None]})
    0.5
    """
    known = [x for x in _right(row, judges) if x is not None]
    return sum(known) / len(known) if known else None


def correct(judges: Sequence[str] = JUDGES, complete: bool = True) -> Step:
    """Keeps of each row the generations that a judge finds right and, if `complete`, whose reasoning came to its end.

    Reasons of rows that have none: "no generation", "none complete", "none correct" (of the complete ones). Kept rows
    have "pass_rate", that before, or what they have as such already.
    """
    named = (COMPLETE, *JUDGES, "finish_reasons")

    def look(row: Row) -> Row | Removed:
        if not row["generations"]:
            return Removed(row, "no generation")
        ends = row.get(COMPLETE) or [None] * len(row["generations"])
        whole = [i for i, end in enumerate(ends) if end or not complete]
        if not whole:
            return Removed(row, "none complete")
        right = _right(row, judges)
        kept = [i for i in whole if right[i]]
        if not kept:
            return Removed(row, "none correct")
        lists = {name: [row[name][i] for i in kept] for name in ("generations", *named) if row.get(name) is not None}
        return {**row, **lists, "pass_rate": _known_rate(row, judges)}

    return filtered("correct", look)


def chosen(choose: Callable[[Sequence[str]], str] = lambda generations: generations[0]) -> Step:
    """Makes one of the generations the response; choose: the first, or say `partial(min, key=len)`, the shortest."""

    def look(row: Row) -> Row | Removed:
        if not row["generations"]:
            return Removed(row, "no generation")
        return {"prompt": row["prompt"], "response": choose(row["generations"]), **_about(row)}

    return filtered("chosen", look)


def each_generation(rows: Iterable[Row]) -> Iterator[Row]:
    """A row for each generation, its only one; with the pass rate of all. Comes before the steps, not among them."""
    for row in rows:
        n = len(row["generations"])
        lists = [name for name in ("generations", COMPLETE, *JUDGES, "finish_reasons") if row.get(name) is not None]
        rate = _known_rate(row, JUDGES)
        for i in range(n):
            yield {**row, **{name: [row[name][i]] for name in lists}, "pass_rate": rate}


def _about(row: Row) -> Row:
    """What is kept of a row beside its texts."""
    rate = _known_rate(row, JUDGES)
    kept = {name: row[name] for name in ("answer", "uuid", "collection", "source") if row.get(name) is not None}
    return {**kept, "pass_rate": rate}


def _known_rate(row: Row, judges: Sequence[str]) -> float | None:
    return row["pass_rate"] if "pass_rate" in row else pass_rate(row, judges)
