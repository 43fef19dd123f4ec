"""Steps that remove rows from data, and say how many and why.

    kept, counts = clean(rows, [unique(), length_window(n_tokens, 1, 512)])
    print(table(counts))

A `Step` is a name and a pure function from rows to rows, each of which it keeps, changes or gives back as `Removed`.
Rows go through all steps one by one: memory is that of what is kept, and of a step's own (`unique`: 16 bytes a row
and their place in a set).
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from purelm.align.data.words import words
from purelm.align.graders import equal, question_only
from purelm.align.graders.grammar import parse
from purelm.align.graders.policy import TooBig
from purelm.align.graders.rewards import Grade
from purelm.align.graders.stream import Unread
from purelm.align.graders.tokens import tidy

__all__ = [
    "Counts", "Removed", "Row", "Step", "asked", "both", "clean", "difficulty", "exact", "filtered", "length_window",
    "normalised", "prompt_of", "table", "unique", "verifiable",
]  # fmt: skip

Row = dict[str, Any]
T = TypeVar("T")
NO_ANSWER = ("proof", "notfound")  # in place of an answer, in NuminaMath 1.5 and what was made of it


class Removed(NamedTuple):
    """A row that a step removes."""

    row: Row
    reason: str  # one of few: it is counted
    detail: str = ""  # of this row: what it matched, what was not read


class Step(NamedTuple):
    """One way to clean: `run` gives for each row, in order, the row (or a changed one) or a `Removed`."""

    name: str
    run: Callable[[Iterable[Row]], Iterator[Row | Removed]]


class Counts(NamedTuple):
    """What a step did: n_in = n_out + the sum over removed."""

    step: str
    n_in: int
    n_out: int
    removed: dict[str, int]  # by reason


def clean(
    rows: Iterable[Row],
    steps: Sequence[Step],
    *,
    into: Callable[[Iterator[Row]], Any] = list,
    watch: Callable[[str, Removed], None] | None = None,
) -> tuple[Any, tuple[Counts, ...]]:
    """(what is kept, the Counts of each step), the steps one after another.

    Args:
        into: what becomes of the kept rows, which come as a stream: a list of them, or say `write` to a file, whose
            result then comes in place of the list. It must take them all.
        watch: called with the step's name and each `Removed`.

    ValueError names a step that gives back more or fewer rows than it was given.

    >>> kept, counts = clean([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}], [unique(prompt_of)])
    >>> [row["prompt"] for row in kept], counts[0].removed
    (['a', 'b'], {'duplicate': 1})
    """
    given = [0 for _ in steps]
    outcomes: list[Counter[str | None]] = [Counter() for _ in steps]  # None: kept

    def through(number: int, source: Iterable[Row]) -> Iterator[Row]:
        step = steps[number]

        def counted() -> Iterator[Row]:
            for row in source:
                given[number] += 1
                yield row

        for found in step.run(counted()):
            reason = found.reason if isinstance(found, Removed) else None
            outcomes[number][reason] += 1
            if not isinstance(found, Removed):
                yield found
            elif watch is not None:
                watch(step.name, found)

    stream: Iterable[Row] = rows
    for number in range(len(steps)):
        stream = through(number, stream)
    result = into(iter(stream))
    counts = []
    for step, n, found in zip(steps, given, outcomes, strict=True):
        if found.total() != n:
            raise ValueError(f"step {step.name!r}: was given {n} rows and gave back {found.total()}")
        counts.append(Counts(step.name, n, found[None], {str(k): v for k, v in found.items() if k is not None}))
    return result, tuple(counts)


def table(counts: Sequence[Counts]) -> str:
    """The counts as lines of text.

    >>> print(table([Counts("unique", 1200, 1150, {"duplicate": 50})]))
    step           in     out  removed
    unique      1,200   1,150       50  duplicate 50
    """
    width = max([6, *(len(x.step) for x in counts)]) + 2
    lines = [f"{'step':{width}}{'in':>9}{'out':>8}{'removed':>9}"]
    for x in counts:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in x.removed.items())
        lines.append(f"{x.step:{width}}{x.n_in:>9,}{x.n_out:>8,}{x.n_in - x.n_out:>9,}  {reasons}".rstrip())
    return "\n".join(lines)


def filtered(name: str, look: Callable[[Row], Row | Removed]) -> Step:
    """The step that applies `look` to each row by itself."""
    return Step(name, lambda rows: (look(row) for row in rows))


def both(row: Row) -> tuple[str, ...]:
    """The texts of a row: prompt and response."""
    return (row["prompt"], row["response"])


def prompt_of(row: Row) -> tuple[str, ...]:
    """The prompt alone."""
    return (row["prompt"],)


def asked(row: Row) -> tuple[str, ...]:
    """What was asked, without a template: each message of a user, else the question, else the prompt."""
    if "messages" in row:
        return tuple(m["content"] for m in row["messages"] if m["role"] == "user")
    return (row.get("question") or row["prompt"],)


Texts = Callable[[Row], tuple[str, ...]]  # those of a row that a step looks at


def exact(text: str) -> str:
    """The text itself, as that by which `unique` tells texts apart."""
    return text


def normalised(text: str) -> str:
    """The text's words, signs and brackets (`words`), without punctuation, case and kinds of white space.

    >>> normalised("What is  3 - 4 ?") == normalised("what is 3-4?"), normalised("3 - 4") == normalised("3 + 4")
    (True, False)
    """
    return " ".join(words(text, brackets=True))


def unique(texts: Texts = both, form: Callable[[str], str] = exact) -> Step:
    """Keeps the first of the rows whose texts have the same form; reason "duplicate".

    Texts are compared by a hash of 128 bits.
    """

    def run(rows: Iterable[Row]) -> Iterator[Row | Removed]:
        seen: set[bytes] = set()
        for row in rows:
            digest = hashlib.blake2b(digest_size=16)
            for text in texts(row):
                data = form(text).encode("utf-8", "surrogatepass")
                digest.update(len(data).to_bytes(8, "little") + data)
            if (key := digest.digest()) in seen:
                yield Removed(row, "duplicate")
            else:
                seen.add(key)
                yield row

    return Step("unique", run)


def length_window(count: Callable[[str], int], low: int, high: int | None, texts: Texts = both) -> Step:
    """Keeps rows of low to high tokens, both included; reasons "too short" and "too long".

    count: text -> its tokens, such as `lambda text: len(encode(bpe, text, None))`; each of the texts is counted by
    itself, as `align.responses` encodes them. high: None for any.
    """
    if low < 0 or (high is not None and high < low):
        raise ValueError(f"length_window: needs 0 <= low <= high, got low {low} and high {high}")

    def look(row: Row) -> Row | Removed:
        n = sum(map(count, texts(row)))
        if low <= n and (high is None or n <= high):
            return row
        return Removed(row, "too short" if n < low else "too long", f"{n} tokens")

    return filtered("length", look)


def difficulty(low: float, high: float, rate: Callable[[Row], float | None]) -> Step:
    """Keeps problems that are solved in a share low to high of attempts, both included.

    rate: row -> that share, None where it is not known, such as `openr1.pass_rate`. Reasons: "too hard" (below low),
    "too easy" (above high), "no pass rate".
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"difficulty: needs 0 <= low <= high <= 1, got low {low} and high {high}")

    def look(row: Row) -> Row | Removed:
        share = rate(row)
        if share is None:
            return Removed(row, "no pass rate")
        if low <= share <= high:
            return row
        return Removed(row, "too hard" if share < low else "too easy", f"{share:.3f}")

    return filtered("difficulty", look)


def verifiable(field: str = "answer", *, grade: Grade = equal, most_words: int = 3) -> Step:
    r"""Keeps rows whose answer a grader can check: it is read, and in a box it is graded equal to itself.

    Reasons: "no answer" (not there, empty, or one of NO_ANSWER), "not read" (not in the graders' grammar), "sentence"
    (a text of more than most_words words, which nobody says in the same way again), "not equal to itself".
    """

    def look(row: Row) -> Row | Removed:
        answer = row.get(field)
        text = str(answer).strip() if isinstance(answer, str | int | float) else ""
        if not text or text.lower() in NO_ANSWER:
            return Removed(row, "no answer", text)
        try:
            tree = parse(tidy(text))
        except (Unread, TooBig) as error:
            return Removed(row, "not read", f"{text}: {error}")
        if tree.op == "text" and len(words(text)) > most_words:
            return Removed(row, "sentence", text)
        if not question_only(f"\\boxed{{{text}}}", text, grade)["reward"]:
            return Removed(row, "not equal to itself", text)
        return row

    return filtered("verifiable", look)
