"""Values of expressions in floating point, with the size of what was rounded on the way."""

import cmath
import math
from collections.abc import Callable, Mapping

from purelm.align.graders.nodes import Node

__all__ = ["differ", "value"]

CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j}
FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "asin": cmath.asin, "acos": cmath.acos, "atan": cmath.atan,
    "sinh": cmath.sinh, "cosh": cmath.cosh, "tanh": cmath.tanh, "ln": cmath.log, "exp": cmath.exp, "abs": abs,
    "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x), "cot": lambda x: 1 / cmath.tan(x),
}  # fmt: skip
POINTS = 3
CLOSE = 1e-9  # of the largest value on the way: a thousand roundings of 2^-52 and some loss by the functions


def value(node: Node, variables: Mapping[str, float]) -> tuple[complex, float]:
    """(value, largest absolute value on the way). ArithmeticError or ValueError where there is none."""
    largest = 0.0

    def at(node: Node) -> complex:
        nonlocal largest
        out = inside(node)
        largest = max(largest, abs(out))
        return out

    def inside(node: Node) -> complex:
        op, args = node
        if op == "num":
            return float(args[0])
        if op == "var":
            return variables[args[0]]
        if op == "const":
            if args[0] not in CONSTANTS:
                raise ValueError(f"{args[0]} is not a number")
            return CONSTANTS[args[0]]
        if op == "add":
            return sum(map(at, args))
        if op == "mul":
            return math.prod(map(at, args))
        if op == "pow":
            base, exponent = at(args[0]), at(args[1])
            real = isinstance(base, complex) and base.imag == 0 and base.real < 0
            if (real or (not isinstance(base, complex) and base < 0)) and exponent != int(exponent.real):
                raise ValueError("a root of a negative number is a matter of the branch")
            return base**exponent
        if op == "percent":
            return at(args[0]) / 100
        if op == "deg":
            return at(args[0]) * math.pi / 180
        if op == "fn" and args[0] == "root":
            return inside(Node("pow", (args[1], Node("pow", (args[2], Node("num", (-1, False)))))))
        if op == "fn" and args[0] == "log":
            return cmath.log(at(args[1])) / cmath.log(at(args[2]) if len(args) > 2 else 10)
        if op == "fn" and args[0] in FUNCTIONS:
            return FUNCTIONS[args[0]](at(args[1]))
        raise ValueError(f"{op} has no value in floating point")

    return at(node), largest


def differ(a: Node, b: Node, names: set[str]) -> bool | None:
    """True: they differ at some point, beyond rounding. False: they agree at all points. None: they have no values."""
    agreed = 0
    for point in range(POINTS):
        variables = {
            name: 0.37 + math.modf((k + 1) * (point + 1) * 0.618034)[0] for k, name in enumerate(sorted(names))
        }
        try:
            (x, big_x), (y, big_y) = value(a, variables), value(b, variables)
            gap = abs(x - y)
            if not math.isfinite(gap):
                continue
        except (ArithmeticError, ValueError, KeyError, RecursionError):
            continue
        if gap > CLOSE * max(big_x, big_y):
            return True
        agreed += 1
    return False if agreed else None
