"""Syntax trees of answers.

num (Fraction, written with a point?)   var (name)   const (pi | e | i | inf)   text (words)
add, mul (terms)   pow (base, exponent)   fn (name, arguments...)   pm, mp (term)   percent (x)   deg (x)
base (digits, base)   qty (value, words)   ratio (parts, is it a time?)
list, all (items): without brackets, joined by a comma or "or", and by "and"
seq (open, close, items)   set (items)   union, cap, setminus (items)   matrix (rows)   det (rows)
rel (signs, operands)   in (x, set)
"""

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

__all__ = ["Node", "children", "number", "product", "total", "variables", "walk"]


class Node(NamedTuple):
    """An operation and its arguments: Nodes, or what the list above says."""

    op: str
    args: tuple[Any, ...] = ()


ZERO, ONE, MINUS_ONE = (Node("num", (Fraction(n), False)) for n in (0, 1, -1))


def number(value: Fraction | int, decimal: bool = False) -> Node:
    """A number; `decimal` if it is written with a point."""
    return Node("num", (Fraction(value), decimal))


def total(*terms: Node) -> Node:
    """The sum; sums inside are taken apart."""
    flat = [part for term in terms for part in (term.args if term.op == "add" else (term,))]
    return flat[0] if len(flat) == 1 else Node("add", tuple(flat))


def product(*factors: Node) -> Node:
    """The product; products inside are taken apart, and the sign of a number is part of it."""
    flat = [part for factor in factors for part in (factor.args if factor.op == "mul" else (factor,))]
    if len(flat) == 2 and flat[0] == MINUS_ONE and flat[1].op == "num":
        return Node("num", (-flat[1].args[0], flat[1].args[1]))
    return flat[0] if len(flat) == 1 else Node("mul", tuple(flat))


def quotient(top: Node, bottom: Node) -> Node:
    """top / bottom."""
    return product(top, Node("pow", (bottom, MINUS_ONE)))


def children(node: Node) -> Iterator[Node]:
    """The Nodes right below, also those in tuples (rows of a matrix)."""
    stack = list(reversed(node.args))
    while stack:
        item = stack.pop()
        if isinstance(item, Node):
            yield item
        elif isinstance(item, tuple):
            stack += reversed(item)


def walk(node: Node) -> Iterator[Node]:
    """The node and all below it."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack += children(node)


def variables(node: Node) -> set[str]:
    """Names of the variables in it."""
    return {x.args[0] for x in walk(node) if x.op == "var"}


def map_children(function: Callable[[Node], Node], node: Node) -> Node:
    """The node with function(child) for each child."""

    def at(item: Any) -> Any:
        if isinstance(item, Node):
            return function(item)
        return tuple(at(x) for x in item) if isinstance(item, tuple) else item

    return Node(node.op, tuple(at(x) for x in node.args))
