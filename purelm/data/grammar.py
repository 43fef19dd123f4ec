"""Probabilistic grammars whose texts each have exactly one derivation, so that entropy is a sum and not an estimate.

A grammar is plain data. *Picks* are lists of weighted templates, drawn anew at each mention. *Variables* are lists of
weighted records of strings (a name with its pronouns, say), drawn at their first mention in a text and the same ever
after. A template is text with `[pick]` and `{variable}` or `{variable.form}` in it. The law of a pick depends on
nothing; the law of a variable depends on nothing, or on the value of one parent variable mentioned before it.

Why each text has one derivation. Read a text from the left along the grammar. At a first mention, the strings
that may stand there are prefix-free: none is the beginning of another, so at most one of them begins the rest of the
text, and it names the value. A later mention is a known string. At a pick, lay any two alternatives side by side. They
may begin alike, with the same letters, mentions and picks, which a reader reads in the same way for both. Where they
part, write out what may stand there, picks as all their alternatives and mentions as all their values: always the
letters come to differ before either alternative ends. So at most one alternative fits the text, and by induction over
the reading the derivation is determined. Since no alternative begins another, no text of the grammar begins another
either: a reader also knows where a text ends. `build` in grammar_build.py checks these conditions and refuses a
grammar that fails them.

Why the entropy is a sum. log p(text) is the sum of the logs of the choices on its one derivation. A choice's law is
that of its pick, or of its variable given the parent; reaching it depends on picks alone, and picks are independent of
variables. So by linearity E[-log p] is the sum, over places in the grammar, of the probability of reaching the place
times the entropy of its law (for a variable with a parent: conditional entropy under the parent's own marginal).
Expected bytes are the same sum with lengths in place of entropies.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Choice", "Entropy", "Grammar", "Variable", "derive", "entropy", "every_text", "parse", "render"]

WORD = 2**32  # draws are integers below it


class Variable(NamedTuple):
    """Records, one of which is drawn at the first mention in a text. Its forms have names; "" is the plain one."""

    values: Sequence[Mapping[str, str]]
    weights: Sequence[float]  # in any unit; with a parent: unused
    parent: str | None = None
    table: Sequence[Sequence[float]] = ()  # weights for each value of the parent; 0 is impossible


class Mention(NamedTuple):
    """`{variable}` or `{variable.form}` in a template."""

    variable: str
    form: str


class Pick(NamedTuple):
    """`[name]` in a template."""

    name: str


Item = str | Mention | Pick
Items = tuple[Item, ...]


class Choice(NamedTuple):
    """One step of a derivation."""

    name: str  # of the pick or variable
    chosen: int  # number of the alternative or value
    log_prob: float  # nats


class Entropy(NamedTuple):
    """Closed form of what one document costs the best possible predictor, and how long it is."""

    nats_per_document: float
    bytes_per_document: float

    @property
    def bits_per_byte(self) -> float:
        """The floor: expected bits over expected bytes, delimiters between documents not counted."""
        return self.nats_per_document / math.log(2) / self.bytes_per_document


class Law(NamedTuple):
    """The probabilities of the values of a choice, and how random integers choose between them."""

    log_probs: tuple[float, ...]
    thresholds: tuple[int, ...]  # of draws below WORD: value i for thresholds[i - 1] <= draw < thresholds[i]


@dataclass(frozen=True, eq=False)
class Grammar:
    """A checked grammar, from `build`. The last three fields are computed from the others."""

    variables: Mapping[str, Variable]
    picks: Mapping[str, Sequence[tuple[float, str]]]
    start: str
    templates: Mapping[str, tuple[Items, ...]]  # of each pick
    laws: Mapping[str, tuple[Law, ...]]  # of each pick and variable: one law, or one for each value of the parent
    max_choices: int  # in one document


# --- texts


def render(grammar: Grammar, draws: Sequence[int]) -> str:
    """The text that these random integers below 2**32 choose: one integer for each choice, in order of reading."""
    out: list[str] = []
    _render(grammar, grammar.start, iter(draws), {}, out.append, None)
    return "".join(out)


def derive(grammar: Grammar, draws: Sequence[int]) -> tuple[str, list[Choice]]:
    """`render`, with the choices made."""
    out: list[str] = []
    choices: list[Choice] = []
    _render(grammar, grammar.start, iter(draws), {}, out.append, choices)
    return "".join(out), choices


def _render(grammar, name, draws, known, write, choices) -> None:
    # The inner loop of sampling, kept simple for speed: one dict look-up for each item.
    (law,) = grammar.laws[name]
    index = bisect_right(law.thresholds, next(draws))
    if choices is not None:
        choices.append(Choice(name, index, law.log_probs[index]))
    for item in grammar.templates[name][index]:
        kind = item.__class__
        if kind is str:
            write(item)
        elif kind is Pick:
            _render(grammar, item[0], draws, known, write, choices)
        else:
            variable, form = item
            if variable not in known:
                law = _law_of(grammar, variable, known)
                at = bisect_right(law.thresholds, next(draws))
                known[variable] = at
                if choices is not None:
                    choices.append(Choice(variable, at, law.log_probs[at]))
            write(grammar.variables[variable].values[known[variable]][form])


def parse(grammar: Grammar, text: str) -> list[Choice]:
    """The choices of the one derivation of `text`, in order of reading; ValueError where there is none."""
    reader = _Reader(grammar, text)
    found = reader.derivations()
    if not found:
        at = reader.furthest
        raise ValueError(
            f"text: not of this grammar from character {at} on: {text[max(0, at - 20) : at]!r} is followed by "
            f"{text[at : at + 20]!r}"
        )
    assert len(found) == 1, "build lets no ambiguous grammar through"
    return found[0]


class _Reader:
    """All derivations of a text, found by trying every alternative. It does not assume that there is only one, so it
    can be used to test that."""

    def __init__(self, grammar: Grammar, text: str):
        self.grammar, self.text = grammar, text
        self.furthest = 0  # character up to which some derivation fits, for error messages

    def derivations(self) -> list[list[Choice]]:
        whole = self._pick(Pick(self.grammar.start), 0, {}, ())
        return [_unlink(choices) for end, _, choices in whole if end == len(self.text)]

    def _items(self, items: Items, at: int, known: dict[str, int], choices: tuple):
        self.furthest = max(self.furthest, at)
        for i, item in enumerate(items):
            if isinstance(item, str):  # fixed text: nothing to try
                if not self.text.startswith(item, at):
                    return
                at += len(item)
            else:
                ways = (self._pick if isinstance(item, Pick) else self._mention)(item, at, known, choices)  # type: ignore[arg-type]
                for end, now, after in ways:
                    yield from self._items(items[i + 1 :], end, now, after)
                return
        self.furthest = max(self.furthest, at)
        yield at, known, choices

    def _pick(self, item: Pick, at: int, known: dict[str, int], choices: tuple):
        (law,) = self.grammar.laws[item.name]
        for chosen, items in enumerate(self.grammar.templates[item.name]):
            if not items or items[0].__class__ is not str or self.text.startswith(items[0], at):
                yield from self._items(items, at, known, (choices, Choice(item.name, chosen, law.log_probs[chosen])))

    def _mention(self, item: Mention, at: int, known: dict[str, int], choices: tuple):
        values = self.grammar.variables[item.variable].values
        if item.variable in known:
            text = values[known[item.variable]][item.form]
            if self.text.startswith(text, at):
                yield at + len(text), known, choices
            return
        law = _law_of(self.grammar, item.variable, known)
        for chosen, value in enumerate(values):
            text = value[item.form]
            if self.text.startswith(text, at) and law.log_probs[chosen] > -math.inf:
                choice = Choice(item.variable, chosen, law.log_probs[chosen])
                yield at + len(text), known | {item.variable: chosen}, (choices, choice)


def _unlink(choices: tuple) -> list[Choice]:
    """The linked list (rest, choice) as a list. (Linked, so that branches of the reader share their beginnings.)"""
    out = []
    while choices:
        choices, choice = choices
        out.append(choice)
    return out[::-1]


def every_text(grammar: Grammar) -> Iterator[tuple[str, float]]:
    """Every derivation of a grammar, as its text and log-probability: for small grammars."""
    for text, _, log_prob in _expand(grammar, (Pick(grammar.start),), {}):
        yield text, log_prob


def _expand(grammar: Grammar, items: Items, known: dict[str, int]) -> Iterator[tuple[str, dict[str, int], float]]:
    if not items:
        yield "", known, 0.0
        return
    for head, now, log_prob in _heads(grammar, items[0], known):
        for tail, end, more in _expand(grammar, items[1:], now):
            yield head + tail, end, log_prob + more


def _heads(grammar: Grammar, item: Item, known: dict[str, int]) -> Iterator[tuple[str, dict[str, int], float]]:
    if isinstance(item, str):
        yield item, known, 0.0
    elif isinstance(item, Pick):
        (law,) = grammar.laws[item.name]
        for chosen, inner in enumerate(grammar.templates[item.name]):
            for text, now, log_prob in _expand(grammar, inner, known):
                yield text, now, log_prob + law.log_probs[chosen]
    elif item.variable in known:
        yield grammar.variables[item.variable].values[known[item.variable]][item.form], known, 0.0
    else:
        for chosen, log_prob in enumerate(_law_of(grammar, item.variable, known).log_probs):
            if log_prob > -math.inf:
                text = grammar.variables[item.variable].values[chosen][item.form]
                yield text, known | {item.variable: chosen}, log_prob


# --- expectations


def entropy(grammar: Grammar) -> Entropy:
    """Expected nats and expected bytes of a document, exactly: the sums at the head of this file."""
    marginals = {name: _marginal(grammar, name) for name in grammar.variables}
    drawn_nats = {}
    for name, variable in grammar.variables.items():
        over = marginals[variable.parent] if variable.parent else [1.0]
        laws = grammar.laws[name]
        drawn_nats[name] = sum(p * _law_entropy(law) for p, law in zip(over, laws, strict=True))

    def items_cost(items: Items, known: set[str]) -> tuple[float, float]:
        nats, n_bytes = 0.0, 0.0
        for item in items:
            if isinstance(item, str):
                n_bytes += len(item.encode())
            elif isinstance(item, Pick):
                inner = pick_cost(item.name, known)
                nats, n_bytes = nats + inner[0], n_bytes + inner[1]
            else:
                if item.variable not in known:
                    nats += drawn_nats[item.variable]
                    known.add(item.variable)
                values = grammar.variables[item.variable].values
                pairs = zip(marginals[item.variable], values, strict=True)
                n_bytes += sum(p * len(value[item.form].encode()) for p, value in pairs if p)
        return nats, n_bytes

    def pick_cost(name: str, known: set[str]) -> tuple[float, float]:
        (law,) = grammar.laws[name]
        nats, n_bytes = _law_entropy(law), 0.0
        before = frozenset(known)
        for log_p, items in zip(law.log_probs, grammar.templates[name], strict=True):
            inside = set(before)
            inner = items_cost(items, inside)
            nats, n_bytes = nats + math.exp(log_p) * inner[0], n_bytes + math.exp(log_p) * inner[1]
            known |= inside  # `build` refuses grammars that mention what only some alternatives have drawn
        return nats, n_bytes

    return Entropy(*pick_cost(grammar.start, set()))


def _marginal(grammar: Grammar, name: str) -> list[float]:
    parent = grammar.variables[name].parent
    over = _marginal(grammar, parent) if parent else [1.0]
    sums = [0.0] * len(grammar.variables[name].values)
    for p, law in zip(over, grammar.laws[name], strict=True):
        for i, log_p in enumerate(law.log_probs):
            sums[i] += p * math.exp(log_p)
    return sums


def _law_of(grammar: Grammar, variable: str, known: Mapping[str, int]) -> Law:
    parent = grammar.variables[variable].parent
    return grammar.laws[variable][known[parent] if parent else 0]


def _law_entropy(law: Law) -> float:
    return -math.fsum(math.exp(log_p) * log_p for log_p in law.log_probs if log_p > -math.inf)


