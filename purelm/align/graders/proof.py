"""What exact arithmetic does not decide, by sympy. It has no bound of its own: a Grader runs it in a worker process."""

from typing import Any

from purelm.align.graders.nodes import Node, variables

__all__ = ["prove"]

DIGITS = 60
POINTS = ("-1.37", "0.7310585", "2.236", "-0.4142")  # where variables are tried


def prove(a: Node, b: Node) -> bool | str:
    """Whether a - b is 0: False if it is not, to 60 digits, at some point; True if sympy simplifies it to 0.

    Variables are real. The string is the reason where neither happens.
    """
    try:
        import sympy
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "purelm.align.graders.prove needs sympy: pip install 'purelm[math]'", name="sympy"
        ) from None
    try:
        gap = _build(sympy, a) - _build(sympy, b)
        names = sorted(variables(a) | variables(b))
        for k in range(len(POINTS) if names else 1):
            at = {sympy.Symbol(n, real=True): sympy.Rational(POINTS[(k + i) % 4]) + i for i, n in enumerate(names)}
            value = sympy.N(gap.subs(at), DIGITS)
            if value.is_number and value.is_finite and abs(value) > sympy.Float(10) ** (-DIGITS // 2):
                return False
        if sympy.simplify(gap) == 0 or sympy.simplify(sympy.expand(gap, func=True, trig=True)) == 0:
            return True
        unknown = sympy.Dummy()
        if not names and sympy.minimal_polynomial(gap, unknown) == unknown:  # of an algebraic number
            return True
    except sympy.polys.polyerrors.NotAlgebraic:
        pass
    except (ValueError, TypeError, ArithmeticError, AttributeError, NotImplementedError, RecursionError) as error:
        return f"undecided: sympy: {type(error).__name__}"
    return "undecided: agrees to 60 digits, but sympy has no proof"


RENAMED = {"ln": "log", "abs": "Abs", "norm": "Abs", "ceil": "ceiling", "max": "Max", "min": "Min", "gcd": "gcd",
           "lcm": "lcm"}  # fmt: skip
SAME = ("sin cos tan cot sec csc asin acos atan sinh cosh tanh exp floor factorial binomial").split()


def _build(sympy: Any, node: Node) -> Any:
    """The tree as a sympy expression: constructors alone, no text is parsed."""
    op, args = node
    if op == "num":
        return sympy.Rational(args[0].numerator, args[0].denominator)
    if op == "var":
        return sympy.Symbol(args[0], real=True)
    if op == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "inf": sympy.oo}[args[0]]
    if op == "fn":
        name, values = args[0], [_build(sympy, x) for x in args[1:]]
        if name == "root":
            base, degree = values
            odd = base.is_negative and degree.is_Integer and degree % 2
            return sympy.real_root(base, degree) if odd else sympy.root(base, degree)
        if name == "log":
            return sympy.log(values[0]) / sympy.log(values[1] if len(values) > 1 else 10)
        if name == "binom":
            return sympy.binomial(*values)
        function = RENAMED.get(name, name)
        if name not in SAME and name not in RENAMED:
            raise ValueError(f"no function {name}")
        return getattr(sympy, function)(*values)
    if op in ("percent", "deg"):
        return _build(sympy, args[0]) * (sympy.Rational(1, 100) if op == "percent" else sympy.pi / 180)
    if op == "ratio":
        top, bottom = args[0]
        return _build(sympy, top) / _build(sympy, bottom)
    values = [_build(sympy, x) for x in args]
    if op == "pow":
        return sympy.Pow(*values)
    if op in ("add", "mul"):
        return (sympy.Add if op == "add" else sympy.Mul)(*values)
    raise ValueError(f"{op} is no expression")
