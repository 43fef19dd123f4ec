"""Polynomials with rational coefficients over named generators, and their quotients: exact, and bounded.

A polynomial is {monomial: Fraction}, a monomial a sorted tuple of (generator, exponent). Generators are strings:

    r2, r3, ...   a prime under a root: exponents are fractions from 0, below 1, the rest goes to the coefficient
    v...          a variable          ci, cpi, ce   i (with i^2 = -1), pi, e
    L2, L3, ...   ln of a prime       c... f... E... R...   what is not taken apart

Products of powers r_p^q are linearly independent over the rationals (Besicovitch 1940), so that a sum of radicals is 0
only if all coefficients are.
"""

from fractions import Fraction
from math import floor
from typing import NamedTuple

from purelm.align.graders.policy import MAX_BITS, MAX_STEPS, TooBig

__all__ = ["Monomial", "Poly", "Quotient", "Steps", "Undefined", "canonical", "constant", "generator", "root"]

Exponent = int | Fraction
Monomial = tuple[tuple[str, Exponent], ...]
Poly = dict[Monomial, Fraction]
ONE: Poly = {(): Fraction(1)}
MAX_POWER = 64  # of a sum of several terms
MAX_PRIME = 10_000  # trial division by numbers up to here


class Undefined(ArithmeticError):
    """Division by zero."""


class Quotient(NamedTuple):
    """num / den."""

    num: Poly
    den: Poly = ONE


def constant(value: Fraction | int) -> Quotient:
    """A number."""
    return Quotient({(): Fraction(value)} if value else {})


def generator(name: str, exponent: Exponent = 1) -> Quotient:
    """A generator to a power."""
    return Quotient({((name, exponent),): Fraction(1)})


def canonical(q: Quotient) -> str:
    """A name: the same for the same polynomials in num and den."""
    return "/".join(str(sorted((m, str(c)) for m, c in p.items())) for p in (q.num, q.den))


def rational(q: Quotient) -> Fraction | None:
    """The number that it is, or None."""
    if q.den is ONE or q.den == ONE:
        if not q.num:
            return Fraction(0)
        return q.num.get(()) if len(q.num) == 1 else None
    return None


def bounded(value: Fraction) -> Fraction:
    """The value, unless it has too many digits."""
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise TooBig(f"a number of more than {MAX_BITS} bits")
    return value


def integer_power(value: Fraction, n: int) -> Fraction:
    """value ** n, bounded before it is formed."""
    bits = max(value.numerator.bit_length(), value.denominator.bit_length())
    if value not in (0, 1, -1) and abs(n) * (bits - 1) > MAX_BITS:
        raise TooBig(f"a number of more than {MAX_BITS} bits")
    if not value and n < 0:
        raise Undefined("division by zero")
    if value in (0, 1, -1):
        n = n % 2 + 2 if n > 0 else n % 2
    return value**n


def primes_of(n: int) -> dict[int, int]:
    """Prime factors of n >= 1 with their powers; TooBig where two large ones remain."""
    if n.bit_length() > MAX_BITS:
        raise TooBig(f"a number of more than {MAX_BITS} bits")
    found: dict[int, int] = {}
    p = 2
    while p * p <= n and p <= MAX_PRIME:
        while n % p == 0:
            found[p] = found.get(p, 0) + 1
            n //= p
        p += 1 + (p > 2)
    if n > 1:
        if p * p <= n:
            raise TooBig(f"a factor of {n.bit_length()} bits under a root")
        found[n] = found.get(n, 0) + 1
    return found


def root(value: Fraction, q: Fraction) -> Quotient:
    """value^q for a positive value."""
    found = {p: k for p, k in primes_of(value.numerator).items()}
    for p, k in primes_of(value.denominator).items():
        found[p] = found.get(p, 0) - k
    coefficient, monomial = Fraction(1), []
    for p, k in sorted(found.items()):
        exponent = k * q
        whole = floor(exponent)
        coefficient = bounded(coefficient * integer_power(Fraction(p), whole))
        if exponent != whole:
            monomial.append((f"r{p}", exponent - whole))
    return Quotient({tuple(sorted(monomial)): coefficient})


def times(a: Monomial, b: Monomial) -> tuple[Fraction, Monomial]:
    """(coefficient, monomial) of the product of two monomials."""
    if not a or not b:
        return Fraction(1), a or b
    powers = dict(a)
    for name, exponent in b:
        powers[name] = powers.get(name, 0) + exponent
    return reduced(powers)


def reduced(powers: dict[str, Exponent]) -> tuple[Fraction, Monomial]:
    """Exponents of primes between 0 and 1, of i 0 or 1; none that is 0."""
    coefficient = Fraction(1)
    for name, exponent in powers.items():
        if name[0] == "r":
            whole = floor(exponent)
            if whole:
                coefficient *= integer_power(Fraction(int(name[1:])), whole)
                powers[name] = exponent - whole
        elif name == "ci":
            coefficient *= -1 if exponent % 4 >= 2 else 1
            powers[name] = exponent % 2
    return coefficient, tuple(sorted((n, e) for n, e in powers.items() if e))


class Steps:
    """Arithmetic of quotients that counts what it does, and stops at a bound."""

    def __init__(self, most: int = MAX_STEPS) -> None:
        self.left = most

    def spend(self, n: int) -> None:
        """Count n steps."""
        self.left -= n
        if self.left < 0:
            raise TooBig("too many steps of arithmetic")

    def poly_add(self, a: Poly, b: Poly, sign: int = 1) -> Poly:
        """a + sign b."""
        self.spend(1 + len(b))
        out = dict(a)
        for monomial, coefficient in b.items():
            value = bounded(out.get(monomial, Fraction(0)) + sign * coefficient)
            if value:
                out[monomial] = value
            else:
                out.pop(monomial, None)
        return out

    def poly_mul(self, a: Poly, b: Poly) -> Poly:
        """a b."""
        if b is ONE:
            return a
        if a is ONE:
            return b
        self.spend(1 + len(a) * len(b))
        out: Poly = {}
        for m, x in a.items():
            for n, y in b.items():
                coefficient, monomial = times(m, n)
                value = bounded(out.get(monomial, 0) + coefficient * x * y)
                if value:
                    out[monomial] = value
                else:
                    out.pop(monomial, None)
        return out

    def add(self, a: Quotient, b: Quotient, sign: int = 1) -> Quotient:
        """a + sign b."""
        if a.den == b.den:
            return Quotient(self.poly_add(a.num, b.num, sign), a.den)
        num = self.poly_add(self.poly_mul(a.num, b.den), self.poly_mul(b.num, a.den), sign)
        return Quotient(num, self.poly_mul(a.den, b.den))

    def mul(self, a: Quotient, b: Quotient) -> Quotient:
        """a b."""
        return Quotient(self.poly_mul(a.num, b.num), self.poly_mul(a.den, b.den))

    def invert(self, a: Quotient) -> Quotient:
        """1 / a, with a denominator only where a has several terms."""
        if not a.num:
            raise Undefined("division by zero")
        if len(a.num) > 1:
            return Quotient(a.den, a.num)
        ((monomial, coefficient),) = a.num.items()
        factor, inverse = reduced({name: -exponent for name, exponent in monomial})
        return Quotient(self.poly_mul({inverse: factor / coefficient}, a.den))

    def power(self, a: Quotient, n: int) -> Quotient:
        """a ** n for an integer n."""
        if n < 0:
            return self.power(self.invert(a), -n)
        if len(a.num) == 1 and len(a.den) == 1:  # one term: no product is formed
            a = Quotient(self.poly_mul(a.num, self.invert(Quotient(a.den)).num)) if a.den != ONE else a
            ((monomial, coefficient),) = a.num.items()
            factor, raised = reduced({name: exponent * n for name, exponent in monomial})
            return Quotient({raised: bounded(factor * integer_power(coefficient, n))})
        if n > MAX_POWER:
            raise TooBig(f"a sum to the power {n}")
        out, square = Quotient(ONE), a
        while n:
            if n & 1:
                out = self.mul(out, square)
            n >>= 1
            if n:
                square = self.mul(square, square)
        return out
