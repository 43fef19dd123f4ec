"""Equations and inequalities: their solved form, their intervals, and whether two say the same."""

from fractions import Fraction

from purelm.align.graders.nodes import MINUS_ONE, Node, product, total, variables
from purelm.align.graders.normal import Normal
from purelm.align.graders.polynomials import Poly, Quotient, rational

__all__ = ["assigned", "interval", "same_relation", "solved"]

FLIP = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!=", "==": "==", "~": "~"}
OO, MINUS_OO = Node("const", ("inf",)), product(MINUS_ONE, Node("const", ("inf",)))


def solved(node: Node) -> tuple[str, str, Node] | None:
    """(variable, sign, value) of x = 5, 5 < x and the like; None for others."""
    if node.op != "rel" or len(node.args[0]) != 1 or node.args[0][0] not in FLIP:
        return None
    (sign,), (left, right) = node.args
    if left.op != "var":
        left, right, sign = right, left, FLIP[sign]
    if left.op != "var" or left.args[0] in variables(right):
        return None
    return left.args[0], sign, right


def assigned(node: Node) -> Node | None:
    """5 of x = 5; None for others."""
    found = solved(node)
    return found[2] if found is not None and found[1] == "=" else None


def interval(node: Node) -> Node | None:
    """The set of real numbers that an inequality, a chain a < x <= b, or several joined by "or" describe; or None."""
    if node.op == "list":
        parts = [interval(x) for x in node.args]
        return None if None in parts else Node("union", tuple(parts))
    if node.op != "rel":
        return None
    signs, operands = node.args
    if len(signs) == 2:
        if signs[0][:1] == ">" and signs[1][:1] == ">":
            signs, operands = tuple(FLIP[s] for s in reversed(signs)), operands[::-1]
        low, middle, high = operands
        if middle.op != "var" or any(s not in ("<", "<=") for s in signs):
            return None
        return Node("seq", ("[" if signs[0] == "<=" else "(", "]" if signs[1] == "<=" else ")", (low, high)))
    found = solved(node)
    if found is None:
        return None
    _, sign, value = found
    if sign in ("<", "<="):
        return Node("seq", ("(", "]" if sign == "<=" else ")", (MINUS_OO, value)))
    if sign in (">", ">="):
        return Node("seq", ("[" if sign == ">=" else "(", ")", (value, OO)))
    if sign == "!=":
        return Node("union", (Node("seq", ("(", ")", (MINUS_OO, value))), Node("seq", ("(", ")", (value, OO)))))
    return None


def same_relation(a: Node, b: Node, normal: Normal) -> bool | None:
    """Whether left - right of the one is a constant times that of the other, positive where the signs have a direction.

    None where the sign of the constant is not known.
    """
    (sign_a,), (sign_b,) = a.args[0], b.args[0]
    if sign_a not in FLIP or sign_b not in (sign_a, FLIP[sign_a]):
        return False
    groups_a, groups_b = _by_variables(_difference(a, normal)), _by_variables(_difference(b, normal))
    if not groups_a or groups_a.keys() != groups_b.keys():
        return False
    first = next(iter(groups_a))
    steps = normal.steps
    for key, part in groups_a.items():
        left, right = steps.poly_mul(part, groups_b[first]), steps.poly_mul(groups_b[key], groups_a[first])
        if steps.poly_add(left, right, -1):
            return False
    if sign_a in ("=", "!=", "==", "~"):
        return True
    factor = rational(steps.mul(Quotient(groups_a[first]), steps.invert(Quotient(groups_b[first]))))
    return None if factor is None else (factor > 0) == (sign_a == sign_b)


def _difference(node: Node, normal: Normal) -> Poly:
    """left - right; of a quotient, its numerator where the denominator is a sum."""
    left, right = node.args[1]
    found = normal.of(total(left, product(MINUS_ONE, right)))
    if len(found.den) > 1 and node.args[0][0] not in ("=", "!="):
        raise ArithmeticError("an inequality with a denominator")
    return found.num


def _by_variables(p: Poly) -> dict[tuple, Poly]:
    """Product of powers of variables -> its coefficient; divided by the common power of each variable."""
    names = {name for monomial in p for name, _ in monomial if name[0] == "v"}
    low = {name: min(dict(monomial).get(name, 0) for monomial in p) for name in names}
    out: dict[tuple, dict] = {}
    for monomial, coefficient in p.items():
        powers = dict(monomial)
        key = tuple((n, powers.get(n, 0) - low[n]) for n in sorted(names) if powers.get(n, 0) != low[n])
        rest = tuple(x for x in monomial if x[0][0] != "v")
        group = out.setdefault(key, {})
        group[rest] = group.get(rest, Fraction(0)) + coefficient
    return out
