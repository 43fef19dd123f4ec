"""Whether two trees say the same, by exact arithmetic; what that cannot decide goes to a prover."""

from collections.abc import Callable, Sequence

from purelm.align.graders.nodes import MINUS_ONE as MINUS
from purelm.align.graders.nodes import Node, map_children, number, product, variables, walk
from purelm.align.graders.normal import SCALARS, Normal, NotScalar
from purelm.align.graders.numeric import differ, value
from purelm.align.graders.policy import Policy, TooBig
from purelm.align.graders.polynomials import Poly, Undefined
from purelm.align.graders.relations import MINUS_OO, OO, assigned, interval, same_relation, solved
from purelm.align.graders.units import label

__all__ = ["Comparison", "Prover"]

# (a, b) -> True, False, or the reason why that is not known.
Prover = Callable[[Node, Node], bool | str]
REALS = Node("var", ("\\mathbb R",))
NEEDS_PROOF = "undecided: agrees in floating point, and only a Grader with sympy can say more"


class Comparison:
    """One answer against one gold. `doubts`: why parts could not be decided; `means`: how parts were equal."""

    def __init__(self, policy: Policy, prove: Prover | None = None) -> None:
        self.policy = policy
        self.prove = prove
        self.normal = Normal()
        self.doubts: list[str] = []
        self.means: set[str] = set()

    def same(self, a: Node, b: Node) -> bool:
        """Whether answer a is equal to gold b."""
        if a == b:
            self.means.add("same form")
            return True
        self.normal.steps.spend(1)
        a, b = self.plain(a), self.plain(b)
        for rule in (self.relations, self.measured, self.collections, self.structures):
            found = rule(a, b)
            if found is not None:
                return found
        return self.scalars(a, b)

    def plain(self, node: Node) -> Node:
        """Without x in, with both values of a +- sign, and with degrees as a sign."""
        if node.op == "in":
            node = node.args[1]
        if node == REALS:
            return Node("seq", ("(", ")", (MINUS_OO, OO)))
        if node.op == "qty":
            name, _ = label(node.args[1])
            if name == "angle":
                return Node("deg", (node.args[0],))
            if not name:
                return node.args[0]
        if node.op not in ("list", "all", "set") and any(x.op in ("pm", "mp") for x in walk(node)):
            return Node("list", (_signed(node, True), _signed(node, False)))
        return node

    def relations(self, a: Node, b: Node) -> bool | None:
        """Equations and inequalities against each other, against values and against intervals."""
        related = [any(x.op == "rel" for x in (node, *(node.args if node.op == "list" else ()))) for node in (a, b)]
        if not any(related):
            return None
        if all(related):
            return self.both_related(a, b)
        mine, other, answers = (a, b, True) if related[0] else (b, a, False)
        if other.op in ("seq", "union") and (not answers or self.policy.interval_relation == "both"):
            found = interval(mine)
            if found is not None:
                return self.same(found, other) if answers else self.same(other, found)
        if mine.op == "rel" and self.policy.assignment and (found := assigned(mine)) is not None:
            return self.same(found, other) if answers else self.same(other, found)
        if answers and self.policy.equation_solution and mine.op == "rel":
            names = variables(mine)
            if len(names) == 1:
                return self.same(a, Node("rel", (("=",), (Node("var", (names.pop(),)), other))))
        return None if mine.op == "list" else False

    def both_related(self, a: Node, b: Node) -> bool | None:
        """Two relations."""
        if a.op != "rel" or b.op != "rel":
            return None
        if len(a.args[0]) > 1 or len(b.args[0]) > 1:
            first, second = interval(a), interval(b)
            if first is not None and second is not None and variables(a) == variables(b):
                return self.same(first, second)
            return a.args[0] == b.args[0] and self.in_order(a.args[1], b.args[1])
        one, two = solved(a), solved(b)
        if one is not None and two is not None and one[:2] == two[:2]:
            return self.same(one[2], two[2])
        copied = two is not None and not variables(two[2]) and one is None
        if copied and not self.policy.equation_solution:
            return False
        try:
            found = same_relation(a, b, self.normal)
        except (ArithmeticError, NotScalar) as error:
            found = None if isinstance(error, TooBig) else a.args[0] == b.args[0] and self.in_order(*_sides(a, b))
        if found is None:
            self.doubts.append("undecided: relations")
        elif found:
            self.means.add("exact arithmetic")
        return bool(found)

    def measured(self, a: Node, b: Node) -> bool | None:
        """Units, degrees, percent, ratios, bases."""
        policy, ops = self.policy, (a.op, b.op)
        if "qty" in ops:
            if ops == ("qty", "qty"):
                (unit_a, size_a), (unit_b, size_b) = label(a.args[1]), label(b.args[1])
                if policy.units == "ignored":
                    return self.same(a.args[0], b.args[0])
                if unit_a != unit_b:
                    return False
                if size_a == size_b:
                    return self.same(a.args[0], b.args[0])
                return self.same(product(number(size_a), a.args[0]), product(number(size_b), b.args[0]))
            if policy.units == "required":
                return False
            return self.same(*(x.args[0] if x.op == "qty" else x for x in (a, b)))
        if "deg" in ops and ops != ("deg", "deg") and policy.units != "required":
            bare = [x.args[0] if x.op == "deg" else x for x in (a, b)]
            return self.same(*bare) or self.scalars(a, b)
        if "percent" in ops and ops != ("percent", "percent") and policy.percent == "either":
            bare = [x.args[0] if x.op == "percent" else x for x in (a, b)]
            return self.scalars(a, b) or self.same(*bare)
        if ops == ("ratio", "ratio"):
            (parts_a, clock_a), (parts_b, clock_b) = a.args, b.args
            if len(parts_a) != len(parts_b):
                return False
            if clock_a or clock_b or policy.colon == "clock":
                return self.in_order(parts_a, parts_b)
            first_a, first_b = parts_a[0], parts_b[0]
            return all(
                self.same(product(x, first_b), product(y, first_a)) for x, y in zip(parts_a, parts_b, strict=True)
            )
        if "ratio" in ops and (policy.colon == "clock" or any(x.op == "ratio" and x.args[1] for x in (a, b))):
            return False
        if "base" in ops:
            return False  # the same digits to the same base are the same tree
        return None

    def collections(self, a: Node, b: Node) -> bool | None:
        """What has no order: sets, lists without brackets, unions; a number is the set of itself."""
        unordered = ("set", "list", "all") if self.policy.lists == "set" else ("set",)
        if self.policy.lists == "sequence" and "list" in (a.op, b.op):
            a, b = (Node("seq", ("(", ")", x.args)) if x.op == "list" else x for x in (a, b))
            return self.structures(a, b) or False
        if a.op in unordered or b.op in unordered:
            if {a.op, b.op} & {"seq", "union", "matrix", "text", "cap", "setminus"}:
                return False
            if self.policy.lists == "sequence" and a.op != b.op:
                return False
            return self.any_order(self.items(a, unordered), self.items(b, unordered))
        if a.op == b.op and a.op in ("union", "cap", "all"):
            return self.any_order(a.args, b.args)
        return None

    def items(self, node: Node, unordered: Sequence[str]) -> list[Node]:
        """Elements, a +- sign being two."""
        if node.op not in unordered:
            return [node]
        items: list[Node] = []
        for item in node.args[0] if node.op == "set" else node.args:
            item = self.plain(item)
            items += item.args if item.op in unordered and item.op != "set" else [item]
        return items

    def structures(self, a: Node, b: Node) -> bool | None:
        """Words, tuples and intervals, matrices."""
        if "text" in (a.op, b.op):
            names = [x.args[0].lower() if x.op in ("text", "var") else None for x in (a, b)]
            return names[0] is not None and names[0] == names[1]
        if a.op == b.op == "seq":
            return a.args[:2] == b.args[:2] and self.in_order(a.args[2], b.args[2])
        if a.op == b.op and a.op in ("matrix", "det"):
            if len(a.args[0]) != len(b.args[0]):
                return False
            return all(self.in_order(x, y) for x, y in zip(a.args[0], b.args[0], strict=True))
        if {a.op, b.op} == {"seq", "matrix"} and self.policy.column_vector:
            columns = [x for x in (a, b) if x.op == "matrix" and all(len(row) == 1 for row in x.args[0])]
            if columns:
                entries = Node("seq", ("(", ")", tuple(row[0] for row in columns[0].args[0])))
                return self.same(*(entries if x.op == "matrix" else x for x in (a, b)))
            return False
        if a.op == b.op == "setminus":
            return self.in_order(a.args, b.args)
        return None

    def in_order(self, a: Sequence[Node], b: Sequence[Node]) -> bool:
        """Whether each item is equal to that at its place."""
        return len(a) == len(b) and all(self.same(x, y) for x, y in zip(a, b, strict=True))

    def any_order(self, a: Sequence[Node], b: Sequence[Node]) -> bool:
        """Whether each item has an equal one on the other side: {1,1} is {1}."""
        return all(any(self.same(x, y) for y in b) for x in a) and all(any(self.same(x, y) for x in a) for y in b)

    def scalars(self, a: Node, b: Node) -> bool:
        """Two expressions."""
        if a.op not in SCALARS or b.op not in SCALARS:
            return False
        try:
            first, second = self.normal.of(a), self.normal.of(b)
            steps = self.normal.steps
            gap = steps.poly_add(steps.poly_mul(first.num, second.den), steps.poly_mul(second.num, first.den), -1)
            if not gap:
                self.means.add("exact arithmetic")
                return True
            if _independent(gap):
                return self.tolerated(a, b)
        except NotScalar:
            return False
        except Undefined:
            self.doubts.append("undefined: division by zero")
            return False
        except TooBig as error:
            self.doubts.append(f"undecided: {error}")
            return False
        if differ(a, b, variables(a) | variables(b)):
            return self.tolerated(a, b)
        found = NEEDS_PROOF if self.prove is None else self.prove(a, b)
        if isinstance(found, str):
            self.doubts.append(found)
            return self.tolerated(a, b)
        if found:
            self.means.add("sympy")
        return found or self.tolerated(a, b)

    def tolerated(self, a: Node, b: Node) -> bool:
        """Policy.float_tolerance, for what is written with a point."""
        most = self.policy.float_tolerance
        if not most or not any(x.op == "num" and x.args[1] for node in (a, b) for x in walk(node)):
            return False
        try:
            (x, _), (y, _) = value(a, {}), value(b, {})
        except (ArithmeticError, ValueError, KeyError):
            return False
        if abs(x - y) > most * max(abs(x), abs(y)):
            return False
        self.means.add("float tolerance")
        return True


def _independent(p: Poly) -> bool:
    """Whether such a polynomial is 0 only if it has no terms: radicals, i, variables, one transcendental constant."""
    constants = set()
    for monomial in p:
        for name, _ in monomial:
            if name[0] == "L" or name in ("cpi", "ce"):
                constants.add(name)
            elif name[0] not in "rv" and name not in ("ci", "cinf"):
                return False
    return len(constants) <= 1


def _signed(node: Node, plus: bool) -> Node:
    if node.op in ("pm", "mp"):
        inner = _signed(node.args[0], plus)
        return inner if (node.op == "pm") == plus else product(MINUS, inner)
    return map_children(lambda child: _signed(child, plus), node)


def _sides(a: Node, b: Node) -> tuple[Sequence[Node], Sequence[Node]]:
    return a.args[1], b.args[1]
