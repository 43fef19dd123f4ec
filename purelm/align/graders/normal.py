"""Normal forms: an expression as a quotient of polynomials (`polynomials`), in which equal ones are mostly the same."""

from fractions import Fraction
from functools import reduce
from math import ceil, comb, factorial, floor, gcd, lcm

from purelm.align.graders.nodes import Node
from purelm.align.graders.policy import TooBig
from purelm.align.graders.polynomials import (
    ONE,
    Poly,
    Quotient,
    Steps,
    Undefined,
    canonical,
    constant,
    generator,
    primes_of,
    rational,
    root,
)

__all__ = ["Normal", "NotScalar"]

MAX_FACTORIAL = 500
SCALARS = {"num", "var", "const", "add", "mul", "pow", "fn", "percent", "deg", "ratio"}


class NotScalar(ValueError):
    """The tree is not that of one number or expression."""


class Normal:
    """Normal forms of the trees of one comparison, whose steps are counted together."""

    def __init__(self) -> None:
        self.steps = Steps()
        self.known: dict[Node, Quotient] = {}

    def of(self, node: Node) -> Quotient:
        """The normal form; NotScalar, TooBig or Undefined where there is none."""
        if node not in self.known:
            self.known[node] = self.form(node)
        return self.known[node]

    def form(self, node: Node) -> Quotient:
        """`of`, not remembered."""
        op, args = node
        if op == "num":
            return constant(args[0])
        if op == "var":
            return generator("v" + args[0])
        if op == "const":
            return generator("c" + args[0])
        if op == "add":
            return reduce(self.steps.add, map(self.of, args))
        if op == "mul":
            return reduce(self.steps.mul, map(self.of, args))
        if op == "pow":
            return self.power(self.of(args[0]), self.of(args[1]))
        if op == "percent":
            return self.steps.mul(self.of(args[0]), constant(Fraction(1, 100)))
        if op == "deg":
            return self.steps.mul(self.of(args[0]), self.steps.mul(generator("cpi"), constant(Fraction(1, 180))))
        if op == "ratio" and len(args[0]) == 2:
            return self.steps.mul(self.of(args[0][0]), self.steps.invert(self.of(args[0][1])))
        if op == "fn":
            return self.function(args[0], [self.of(x) for x in args[1:]])
        raise NotScalar(op)

    def power(self, base: Quotient, exponent: Quotient) -> Quotient:
        """base ** exponent."""
        q = rational(exponent)
        if q is not None:
            return self.steps.power(base, int(q)) if q.denominator == 1 else self.root(base, q)
        value = rational(base)
        is_e = base == generator("ce")
        if not is_e and (value is None or value <= 0):
            return generator(f"fpow({canonical(base)},{canonical(exponent)})")
        if exponent.den != ONE:
            return generator(f"fpow({canonical(base)},{canonical(exponent)})")
        # b^(x + y) = b^x b^y, and each prime of b by itself
        primes = {2: 0} if is_e else primes_of(value.numerator)  # type: ignore[union-attr]
        if is_e:
            names = {"e": 1}
        else:
            names = {str(p): k for p, k in primes.items()}
            for p, k in primes_of(value.denominator).items():  # type: ignore[union-attr]
                names[str(p)] = names.get(str(p), 0) - k
        out = constant(1)
        for monomial, coefficient in exponent.num.items():
            for name, k in names.items():
                if monomial:
                    part = generator(f"E{name}^{monomial}", coefficient * k)
                else:
                    part = generator("ce", coefficient) if is_e else self.root(constant(int(name)), coefficient * k)
                out = self.steps.mul(out, part)
        return out

    def root(self, base: Quotient, q: Fraction) -> Quotient:
        """base ** q for a fraction q. Of a negative number, roots of odd degree are real, and square roots have i."""
        if not base.num:
            if q < 0:
                raise Undefined("division by zero")
            return base
        if len(base.num) == 1 and base.den == ONE:
            ((monomial, coefficient),) = base.num.items()
            out = constant(1)
            if coefficient < 0:
                if q.denominator % 2:
                    out = constant(-1 if q.numerator % 2 else 1)
                elif q.denominator == 2:
                    out = self.steps.power(generator("ci"), q.numerator % 4)
                else:
                    return generator(f"R{canonical(base)}", q)
            inner: Poly = {}
            for name, exponent in monomial:
                if name[0] == "r" or name in ("cpi", "ce"):
                    out = self.steps.mul(out, self.prime_power(name, exponent * q))
                elif len(monomial) == 1 and exponent == 1 and name[0] == "v":
                    out = self.steps.mul(out, generator(name, q))
                else:
                    inner = {tuple(x for x in monomial if x[0][0] != "r" and x[0] not in ("cpi", "ce")): Fraction(1)}
            if inner:
                out = self.steps.mul(out, generator(f"R{canonical(Quotient(inner))}", q))
            return self.steps.mul(out, root(abs(coefficient), q))
        content = self.content(base.num) / self.content(base.den)
        part = self.steps.mul(base, constant(1 / content))
        return self.steps.mul(root(content, q), generator(f"R{canonical(part)}", q))

    def prime_power(self, name: str, exponent: Fraction) -> Quotient:
        """A generator for a positive number, to any power."""
        return root(Fraction(int(name[1:])), exponent) if name[0] == "r" else generator(name, exponent)

    def content(self, p: Poly) -> Fraction:
        """The largest rational number that leaves whole coefficients."""
        top = reduce(gcd, (c.numerator for c in p.values()))
        return Fraction(top, reduce(lcm, (c.denominator for c in p.values())))

    def function(self, name: str, args: list[Quotient]) -> Quotient:
        """A named function of normal forms; one that is not taken apart becomes a generator of that name."""
        values = [rational(x) for x in args]
        value = values[0]
        if name == "root":
            return self.power(args[0], self.steps.invert(args[1]))
        if name == "exp":
            return self.power(generator("ce"), args[0])
        if name == "ln":
            found = self.logarithm(args[0])
        elif name == "log":
            top, bottom = self.logarithm(args[0]), self.logarithm(args[1] if len(args) > 1 else constant(10))
            found = None if top is None or bottom is None else self.logarithm_ratio(top, bottom)
        elif name in ("sin", "cos", "tan"):
            found = self.trigonometry(name, args[0])
        elif all(v is not None for v in values):
            found = self.of_rationals(name, [v for v in values if v is not None])
        elif name == "factorial" and value is None:
            found = None
        else:
            found = None
        return found if found is not None else generator(f"f{name}({','.join(map(canonical, args))})")

    def of_rationals(self, name: str, values: list[Fraction]) -> Quotient | None:
        """Functions of rational numbers that are rational; None for others."""
        value = values[0]
        if name in ("factorial", "binom", "gcd", "lcm") and any(v.denominator != 1 for v in values):
            return None
        if name == "factorial" and value >= 0:
            if value > MAX_FACTORIAL:
                raise TooBig(f"the factorial of more than {MAX_FACTORIAL}")
            return constant(factorial(int(value)))
        if name == "binom" and values[1] >= 0 and value >= 0:
            if value > 10 * MAX_FACTORIAL:
                raise TooBig("a binomial coefficient of large numbers")
            return constant(comb(int(value), int(values[1])))
        if name in ("gcd", "lcm"):
            return constant(reduce(gcd if name == "gcd" else lcm, map(int, values)))
        if name in ("max", "min"):
            return constant(max(values) if name == "max" else min(values))
        if name in ("abs", "norm"):
            return constant(abs(value))
        if name in ("floor", "ceil"):
            return constant(floor(value) if name == "floor" else ceil(value))
        return None

    def logarithm(self, x: Quotient) -> Quotient | None:
        """ln of a product of powers of primes and of e: a sum of L_p; None for others."""
        if len(x.num) != 1 or x.den != ONE:
            return None
        ((monomial, coefficient),) = x.num.items()
        if coefficient <= 0 or any(name[0] != "r" and name != "ce" for name, _ in monomial):
            return None
        out = constant(0)
        for sign, n in ((1, coefficient.numerator), (-1, coefficient.denominator)):
            for p, k in primes_of(n).items():
                out = self.steps.add(out, self.steps.mul(constant(sign * k), generator(f"L{p}")))
        for name, exponent in monomial:
            part = constant(exponent)
            out = self.steps.add(out, part if name == "ce" else self.steps.mul(part, generator(f"L{name[1:]}")))
        return out

    def logarithm_ratio(self, top: Quotient, bottom: Quotient) -> Quotient:
        """top / bottom, a number where one is a multiple of the other."""
        if not bottom.num:
            raise Undefined("a logarithm to base 1")
        if top.num.keys() == bottom.num.keys():
            ratios = {top.num[m] / bottom.num[m] for m in top.num}
            if len(ratios) == 1:
                return constant(ratios.pop())
        return self.steps.mul(top, self.steps.invert(bottom))

    def trigonometry(self, name: str, x: Quotient) -> Quotient | None:
        """sin, cos and tan of multiples of pi/12; None for others."""
        if x.den != ONE or set(x.num) - {(("cpi", 1),)}:
            return None
        turns = x.num.get((("cpi", 1),), Fraction(0)) * 12  # in units of pi/12
        if turns.denominator != 1:
            return None
        sine, cosine = self.sine(int(turns)), self.sine(int(turns) + 6)
        if name == "tan":
            return self.steps.mul(sine, self.steps.invert(cosine))
        return sine if name == "sin" else cosine

    def sine(self, k: int) -> Quotient:
        """sin(k pi/12)."""
        k %= 24
        if k >= 12:
            return self.steps.mul(constant(-1), self.sine(k - 12))
        k = min(k, 12 - k)
        roots = {0: {}, 1: {6: 1, 2: -1}, 2: {1: 2}, 3: {2: 2}, 4: {3: 2}, 5: {6: 1, 2: 1}, 6: {1: 4}}[k]
        out = constant(0)
        for n, quarters in roots.items():
            term = self.steps.mul(constant(Fraction(quarters, 4)), root(Fraction(n), Fraction(1, 2)))
            out = self.steps.add(out, term)
        return out
