"""Makes a grammar ready, and proves that each of its texts has one derivation (the conditions are in grammar.py)."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from purelm.data.grammar import WORD, Grammar, Item, Items, Law, Mention, Pick, Variable

__all__ = ["build"]

_ITEM = re.compile(r"\[(\w+)\]|\{(\w+)(?:\.(\w+))?\}")


def build(
    variables: Mapping[str, Variable], picks: Mapping[str, Sequence[tuple[float, str]]], start: str
) -> Grammar:
    """Check a grammar and make it ready.

    Raises ValueError, naming the pick or variable, for an unknown name or form, a pick inside itself, a weight that is
    not positive, a variable mentioned after alternatives of which only some have drawn it, a parent drawn after its
    child, and alternatives that a reader could not tell apart (see the head of grammar.py).
    """
    for name, variable in variables.items():
        rows = variable.table if variable.parent else (variable.weights,)
        if variable.parent and variable.parent not in variables:
            raise ValueError(f"variable {name}: parent {variable.parent!r} is unknown")
        n_rows = len(variables[variable.parent].values) if variable.parent else 1
        if len(rows) != n_rows or any(len(row) != len(variable.values) for row in rows):
            raise ValueError(f"variable {name}: weights must be {n_rows} rows of {len(variable.values)}")
        if any(min(row) < 0 or max(row) <= 0 for row in rows) or (not variable.parent and min(rows[0]) <= 0):
            raise ValueError(f"variable {name}: weights must be positive (in a parent's table 0 is allowed)")
    for name, alternatives in picks.items():
        if not alternatives or min(weight for weight, _ in alternatives) <= 0:
            raise ValueError(f"pick {name}: at least one alternative is needed, and weights must be positive")
        if name in variables:
            raise ValueError(f"{name} is the name of a pick and of a variable")
    templates = {name: tuple(_items(text, name) for _, text in value) for name, value in picks.items()}
    laws: dict[str, tuple[Law, ...]] = {
        name: (_law([weight for weight, _ in value]),) for name, value in picks.items()
    }
    for name, variable in variables.items():
        laws[name] = tuple(map(_law, variable.table if variable.parent else (variable.weights,)))
    grammar = Grammar(variables, picks, start, templates, laws, 0)
    _check(grammar)
    return replace(grammar, max_choices=_max_choices(grammar))


def _law(weights: Sequence[float]) -> Law:
    total = math.fsum(weights)
    log_probs = tuple(math.log(w / total) if w else -math.inf for w in weights)
    # Rounding moves a probability by at most 2**-32. The last value of positive weight gets what remains.
    thresholds = [round(math.fsum(weights[: i + 1]) / total * WORD) for i in range(len(weights))]
    return Law(log_probs, tuple(thresholds))


def _items(template: str, name: str) -> Items:
    items: list[Item] = []
    at = 0
    for match in _ITEM.finditer(template):
        if match.start() > at:
            items.append(template[at : match.start()])
        pick, variable, form = match.groups()
        items.append(Pick(pick) if pick else Mention(variable, form or ""))
        at = match.end()
    if at < len(template):
        items.append(template[at:])
    for item in items:
        if isinstance(item, str) and re.search(r"[\[\]{}]", item):
            raise ValueError(f"pick {name}: a bracket without its partner in {template!r}")
    return tuple(items)


def _max_choices(grammar: Grammar) -> int:
    """A bound on the choices in a document: every variable once, and the longest way through the picks."""

    def longest(name: str) -> int:
        return 1 + max(
            sum(longest(item.name) for item in items if isinstance(item, Pick)) for items in grammar.templates[name]
        )

    return len(grammar.variables) + longest(grammar.start)


# --- what is checked


def _check(grammar: Grammar) -> None:
    """Walk the grammar as a reader does, and check each place, knowing which variables are surely drawn by then and
    which may be."""
    first: set[Mention] = set()
    compared: set[tuple[str, frozenset[str]]] = set()

    def walk(name: str, sure: frozenset[str], maybe: frozenset[str], inside: tuple[str, ...]):
        if name not in grammar.templates:
            raise ValueError(f"pick {inside[-1] if inside else 'start'}: [{name}] is unknown")
        if name in inside:
            raise ValueError(f"pick {name} is inside itself: {' > '.join((*inside, name))}")
        results = []
        for items in grammar.templates[name]:
            now, some = sure, maybe
            for item in items:
                if isinstance(item, Pick):
                    now, some = walk(item.name, now, some, (*inside, name))
                elif isinstance(item, Mention):
                    if item.variable not in now:
                        _check_first(grammar, item, name, now, some)
                        first.add(item)
                    now, some = now | {item.variable}, some | {item.variable}
            results.append((now, some))
        if (name, sure) not in compared:
            compared.add((name, sure))
            _check_apart(grammar, name, sure)
        return frozenset.intersection(*(s for s, _ in results)), frozenset.union(*(m for _, m in results))

    for name, templates in grammar.templates.items():
        for item in itertools.chain(*templates):
            if isinstance(item, Mention):
                if item.variable not in grammar.variables:
                    raise ValueError(f"pick {name}: {{{item.variable}}} is unknown")
                if any(item.form not in value for value in grammar.variables[item.variable].values):
                    raise ValueError(f"pick {name}: {item.variable} has no form {item.form!r} in some value")
    walk(grammar.start, frozenset(), frozenset(), ())
    for item in sorted(first):
        variable = grammar.variables[item.variable]
        for row in variable.table if variable.parent else (variable.weights,):
            texts = sorted(v[item.form] for v, weight in zip(variable.values, row, strict=True) if weight)
            for a, b in itertools.pairwise(texts):  # sorted, a prefix comes right before a text that it begins
                if b.startswith(a):
                    raise ValueError(f"variable {item.variable}: {a!r} is the beginning of {b!r} at a first mention")


def _check_first(grammar: Grammar, item: Mention, name: str, sure: frozenset[str], maybe: frozenset[str]) -> None:
    if item.variable in maybe:
        raise ValueError(f"pick {name}: {item.variable} is drawn by some alternatives before, and not by others")
    parent = grammar.variables[item.variable].parent
    if parent and parent not in sure:
        raise ValueError(f"pick {name}: {item.variable} is mentioned before its parent {parent}")


def _check_apart(grammar: Grammar, name: str, known: frozenset[str]) -> None:
    alternatives = grammar.templates[name]
    for i, j in itertools.combinations(range(len(alternatives)), 2):
        if not _apart(grammar, alternatives[i], alternatives[j], known, {}):
            one, other = grammar.picks[name][i][1], grammar.picks[name][j][1]
            raise ValueError(f"pick {name}: a reader could not tell {one!r} from {other!r}")


def _apart(grammar: Grammar, a: Items, b: Items, known: frozenset[str], values: Mapping[str, int]) -> bool:
    """Whether no text of `a` is a text of `b` or begins one, nor the other way round, judged by their first difference.

    Variables in `known` have the same value in both texts (the one in `values` if it is there); others may differ.
    """
    while a and b:
        x, y = _settled(grammar, a[0], values), _settled(grammar, b[0], values)
        if isinstance(x, str) and isinstance(y, str):
            n = min(len(x), len(y))
            if x[:n] != y[:n]:
                return True
            a = ((x[n:],) if x[n:] else ()) + a[1:]
            b = ((y[n:],) if y[n:] else ()) + b[1:]
        elif x == y:  # the same strings in both, and prefix-free: so the same value, or the same alternative
            known |= _surely_drawn(grammar, (x,))
            a, b = a[1:], b[1:]
        elif isinstance(x, Pick):
            return all(_apart(grammar, inner + a[1:], b, known, values) for inner in grammar.templates[x.name])
        elif isinstance(y, Pick):
            return all(_apart(grammar, a, inner + b[1:], known, values) for inner in grammar.templates[y.name])
        elif isinstance(x, Mention):
            return all(
                _apart(grammar, (text, *a[1:]), b, known, now)
                for text, now in _readings(grammar, x, known, values)
            )
        else:
            a, b = b, a
    return False


def _settled(grammar: Grammar, item: Item, values: Mapping[str, int]) -> Item:
    if isinstance(item, Mention) and item.variable in values:
        return grammar.variables[item.variable].values[values[item.variable]][item.form]
    return item


def _readings(
    grammar: Grammar, item: Mention, known: frozenset[str], values: Mapping[str, int]
) -> Iterator[tuple[str, Mapping[str, int]]]:
    """The strings that may stand for a mention, each with the values that are settled by it."""
    variable = grammar.variables[item.variable]
    children = [
        (other.table, values[name])
        for name, other in grammar.variables.items()
        if other.parent == item.variable and name in values
    ]
    for i, value in enumerate(variable.values):
        if variable.parent and variable.parent in values and not variable.table[values[variable.parent]][i]:
            continue
        if item.variable not in known:
            yield value[item.form], values
        elif all(table[i][child] for table, child in children):
            yield value[item.form], {**values, item.variable: i}


def _surely_drawn(grammar: Grammar, items: Items) -> frozenset[str]:
    """The variables that every text of `items` mentions."""
    found = frozenset(item.variable for item in items if isinstance(item, Mention))
    for item in items:
        if isinstance(item, Pick):
            found |= frozenset.intersection(*(_surely_drawn(grammar, inner) for inner in grammar.templates[item.name]))
    return found
