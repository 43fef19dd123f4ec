"""The grammar of a factor: numbers, letters, brackets, commands, functions, matrices; powers and signs after them."""

import re
from fractions import Fraction

from purelm.align.graders.nodes import MINUS_ONE, Node, number, product, quotient
from purelm.align.graders.policy import MAX_BITS, TooBig
from purelm.align.graders.stream import Stream, Unread
from purelm.align.graders.tokens import Token

__all__ = ["FUNCTIONS", "NAMES", "Atoms"]

INVERSE = {"sin": "asin", "cos": "acos", "tan": "atan"}
FUNCTIONS = {
    *INVERSE, "cot", "sec", "csc", "arcsin", "arccos", "arctan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "ln",
    "log", "lg", "exp", "gcd", "lcm", "max", "min", "sqrt", "abs", "binom",
}  # fmt: skip
RENAMED = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}
NAMES = {"pi": "pi", "infty": "inf", "infinity": "inf", "inf": "inf", "oo": "inf"}
FRACTIONS = {"frac", "dfrac", "tfrac", "cfrac"}
BINOMIALS = {"binom", "dbinom", "tbinom"}
EMPTY = {"emptyset", "varnothing"}
FENCES = {
    "lfloor": ("rfloor", "floor"),
    "lceil": ("rceil", "ceil"),
    "lvert": ("rvert", "abs"),
    "lVert": ("rVert", "norm"),
}
GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar ldots dots cdots "
    "star".split()
)
MATRICES = {"pmatrix", "bmatrix", "matrix", "array", "smallmatrix", "Bmatrix"}
DEGREES = {"circ", "degree"}
MAX_SIGNS = 8  # powers, factorials, ... after one factor
CALLED = re.compile("[fghFGHP]$")  # f(x) is f of x; x(x+1) is a product


class Atoms(Stream):
    """Readers of a factor. Those of sums and items are in `grammar`."""

    def item(self) -> Node:
        """An item of a list."""
        raise NotImplementedError

    def sum(self) -> Node:
        """A sum."""
        raise NotImplementedError

    def number(self, token: Token) -> Node:
        """A number as it is written: 12, .5, 18., 3e5, 0.\\overline{3}, 0.(3)."""
        text = token.text
        if len(text) > MAX_BITS // 4:
            raise TooBig(f"a number of {len(text)} characters")
        if match := re.match(r"([0-9]*)\.([0-9]*)(?:\\overline\s*\{|\\bar\s*\{|\()([0-9]+)", text):
            whole, fixed, cycle = match.groups()
            nines = 10 ** len(fixed) * (10 ** len(cycle) - 1)
            value = Fraction(int(whole + fixed + cycle or "0") - int(whole + fixed or "0"), nines)
            return number(value)
        mantissa, _, exponent = text.lower().partition("e")
        if len(exponent) > 4 or abs(int(exponent or 0)) > MAX_BITS // 4:
            raise TooBig(f"an exponent {exponent}")
        whole, point, digits = mantissa.partition(".")
        value = Fraction(int(whole + digits), 10 ** len(digits)) * Fraction(10) ** int(exponent or 0)
        return number(value, bool(point and digits))

    def starts_factor(self) -> bool:
        """Whether a factor may start here without a sign of multiplication before it."""
        token = self.peek()
        if token.kind == "cmd":
            known = FRACTIONS | BINOMIALS | EMPTY | FUNCTIONS | GREEK | NAMES.keys() | FENCES.keys()
            return token.text in known or token.text in ("mathbb", "dfrac", "langle")
        if token.kind == "sym":
            return token.text in ("(", "[", "{", "\\{") or (token.text == "|" and not self.bars)
        return token.kind in ("letter", "run", "word") or (token.kind == "env" and "begin" in token.text)

    def factor(self) -> Node:
        """An atom with the powers, factorials, percent and degree signs after it."""
        with self.deeper():
            value = self.atom()
            for _ in range(MAX_SIGNS):
                if self.raised():
                    value = self.power(value)
                elif self.at("!") and not (self.peek(1).text == "=" and not self.peek(1).spaced):
                    self.i += 1
                    value = Node("fn", ("factorial", value))
                elif self.take(*DEGREES):
                    value = Node("deg", (value,))
                else:
                    return value
        raise TooBig(f"more than {MAX_SIGNS} signs after a factor")

    def power(self, base: Node) -> Node:
        """base^..., the sign being passed."""
        braced = [token.text for token in self.tokens[self.i : self.i + 3]]
        if braced[:1] == ["{"] and braced[-1] == "}" and braced[1] in DEGREES:
            self.i += 3
            return Node("deg", (base,))
        if self.take(*DEGREES):
            return Node("deg", (base,))
        return Node("pow", (base, self.exponent()))

    def exponent(self) -> Node:
        """What follows ^; 2^10 is 1024, as it is meant, though LaTeX sets a 1 high and the 0 low."""
        with self.deeper():
            if self.take("-"):
                return product(MINUS_ONE, self.exponent())
            self.take("+")
            value = self.number(self.next()) if self.peek().kind == "num" else self.atom()
            if self.raised():  # a^b^c is a^(b^c)
                value = Node("pow", (value, self.exponent()))
            return value

    def raised(self) -> bool:
        """Pass ^ or **."""
        if self.at("*") and self.peek(1).text == "*":
            self.i += 2
            return True
        return self.take("^")

    def argument(self) -> Node:
        """An argument of a command: braces, or one token; of a number, one digit."""
        token = self.peek()
        if token.kind == "num" and token.text.isdigit() and len(token.text) > 1:
            self.tokens[self.i] = Token("num", token.text[1:])
            return number(int(token.text[0]))
        if token.kind == "run":
            self.letters()
        with self.deeper():
            return self.atom()

    def letters(self) -> None:
        """The run here becomes letters."""
        token = self.peek()
        first = Token("letter", token.text[0], token.spaced)
        self.tokens[self.i : self.i + 1] = [first, *(Token("letter", x) for x in token.text[1:])]

    def atom(self) -> Node:
        """One of the things that stand alone."""
        token = self.peek()
        if token.kind == "num":
            self.i += 1
            return self.based(token) if self.at("_") else self.number(token)
        if token.kind == "run":
            return self.run(token)
        if token.kind in ("letter", "word"):
            self.i += 1
            return self.variable(token.text)
        if token.kind == "cmd":
            self.i += 1
            return self.command(token.text)
        if token.kind == "env":
            self.i += 1
            return self.matrix(token.text)
        return self.group(token)

    def based(self, token: Token) -> Node:
        """101_2"""
        self.i += 1
        base = self.number(self.next()) if self.peek().kind == "num" else self.argument()
        value = base.args[0]
        if base.op != "num" or value.denominator != 1 or not 2 <= value <= 36 or not token.text.isdigit():
            raise Unread("an index of a number that is not a base")
        return self.number(token) if value == 10 else Node("base", (token.text.lstrip("0") or "0", int(value)))

    def run(self, token: Token) -> Node:
        """Letters without a command: a function, a name, a product of variables, or one long name."""
        if token.text in FUNCTIONS or token.text in NAMES:
            self.i += 1
            return self.command(token.text)
        if len(token.text) > 4:
            self.i += 1
            return self.variable(token.text)
        self.letters()
        return self.atom()

    def variable(self, name: str) -> Node:
        """A letter with its index; e and i are the constants."""
        if self.take("_"):
            index = self.argument()
            index_name = index.args[0] if index.op in ("num", "var") else index
            return Node("var", (f"{name}_{index_name}",))
        if name in ("e", "i"):
            return Node("const", (name,))
        if CALLED.match(name) and self.at("(") and self.peek(1).kind == "letter" and self.peek(2).text == ")":
            self.i += 3
            return Node("var", (f"{name}({self.peek(-2).text})",))
        return Node("var", (name,))

    def command(self, name: str) -> Node:
        """\\name and its arguments."""
        if name in FRACTIONS:
            top = self.argument()
            return quotient(top, self.argument())
        if name in NAMES:
            return Node("const", (NAMES[name],))
        if name in BINOMIALS:
            top = self.argument()
            return Node("fn", ("binom", top, self.argument()))
        if name in EMPTY:
            return Node("set", ((),))
        if name in FENCES:
            close, function = FENCES[name]
            value = self.sum()
            self.need(close)
            return Node("fn", (function, value))
        if name == "langle":
            items = self.separated(self.item, ("rangle",))
            self.need("rangle")
            return Node("seq", ("(", ")", tuple(items)))
        if name == "lbrace":
            return self.braces("rbrace", "\\}")
        if name == "mathbb":
            return Node("var", (f"\\mathbb {self.argument().args[0]}",))
        if name == "sqrt":
            return self.root()
        if name in FUNCTIONS:
            return self.function(name)
        if name in GREEK:
            return self.variable("\\" + name)
        raise Unread(f"the command \\{name}")

    def root(self) -> Node:
        """\\sqrt{x}, \\sqrt[n]{x}, sqrt(x)."""
        degree = number(2)
        if self.take("["):
            degree = self.sum()
            self.need("]")
        return Node("fn", ("root", self.argument(), degree))

    def function(self, name: str) -> Node:
        """sin x, \\sin^2 x, \\log_2 8, \\max(1,2)."""
        name = RENAMED.get(name, name)
        base = power = None
        while self.at("^", "_"):
            if self.take("_"):
                base = self.argument()
            else:
                self.i += 1
                power = self.exponent()
        if power == MINUS_ONE and name in INVERSE:
            name, power = INVERSE[name], None
        if self.at("("):
            self.i += 1
            arguments = self.separated(self.item, (")",))
            self.need(")")
        else:
            arguments = [self.function_argument()]
        if base is not None:
            if name != "log":
                raise Unread(f"an index of {name}")
            arguments.append(base)
        elif name == "lg":
            name = "log"
        value = Node("fn", (name, *arguments))
        return value if power is None else Node("pow", (value, power))

    def function_argument(self) -> Node:
        """Of sin 2x: the factors up to a sign or to another function."""
        minus = self.take("-")
        value = self.factor()
        while self.starts_factor() and self.peek().text not in FUNCTIONS and self.peek().kind in ("letter", "cmd"):
            value = product(value, self.factor())
        if self.at("/") and self.peek(1).kind == "num":
            self.i += 1
            value = quotient(value, self.factor())
        return product(MINUS_ONE, value) if minus else value

    def group(self, token: Token) -> Node:
        """Brackets of each kind."""
        if self.take("\\{"):
            return self.braces("\\}", "rbrace")
        if self.take("{"):
            items = self.separated(self.item, ("}", "choose"))
            if self.take("choose"):
                return Node("fn", ("binom", items[0], self.to("}")))
            self.need("}")
            if not items:
                raise Unread("empty braces")
            return items[0] if len(items) == 1 else Node("set", (tuple(items),))
        if token.text in ("(", "[") and token.kind == "sym":
            self.i += 1
            bars, self.bars = self.bars, 0
            items = self.separated(self.item, (")", "]"))
            close = self.need(")", "]")
            self.bars = bars
            if len(items) == 1 and (token.text, close) in (("(", ")"), ("[", "]")):
                return items[0]
            return Node("seq", (token.text, close, tuple(items)))
        if token.text == "|" and token.kind == "sym":
            self.i += 1
            self.bars += 1
            value = self.sum()
            self.need("|")
            self.bars -= 1
            return Node("fn", ("abs", value))
        raise Unread(f"{token.text!r} where a number, a letter or a bracket is expected")

    def to(self, close: str) -> Node:
        """A sum and the bracket that closes it."""
        value = self.sum()
        self.need(close)
        return value

    def braces(self, *close: str) -> Node:
        """A set, after its opening brace."""
        items = self.separated(self.item, close)
        self.need(*close)
        return Node("set", (tuple(items),))

    def matrix(self, name: str) -> Node:
        """Rows of an environment."""
        kind = name.partition("{")[2]
        if kind == "array" and self.take("{"):
            while not self.take("}"):
                if self.next().kind == "end":
                    raise Unread("columns without an end")
        if kind not in MATRICES and kind != "vmatrix":
            raise Unread(f"the environment {kind}")
        rows: list[list[Node]] = [[]]
        while not (self.peek().kind == "env" and self.peek().text.startswith("\\end")):
            if self.take("\\\\"):
                rows.append([])
            elif not self.take("&", "hline"):
                rows[-1].append(self.item())
        self.i += 1
        filled = tuple(tuple(row) for row in rows if row)
        if not filled or len({len(row) for row in filled}) > 1:
            raise Unread("rows of different lengths")
        return Node("det" if kind == "vmatrix" else "matrix", (filled,))
