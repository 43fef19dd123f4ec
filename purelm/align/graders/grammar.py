"""The grammar of answers, from the list of items down to the term. What a factor is: `atoms`.

answer   := item ((, | ; | and | or) item)*
item     := words | operand (= | < | \\le | \\in ... operand)*
operand  := ratio ((\\cup | \\cap | \\setminus) ratio)* [unit]
ratio    := sum (: sum)*
sum      := [sign] term ((+ | - | \\pm | \\mp) term)*
term     := factor ((\\cdot | / | nothing) factor | %)*      1/2x is (1/2)x
"""

from purelm.align.graders.atoms import FUNCTIONS, NAMES, Atoms
from purelm.align.graders.nodes import MINUS_ONE, Node, product, quotient, total
from purelm.align.graders.stream import Unread
from purelm.align.graders.tokens import Token, tokens
from purelm.align.graders.units import is_unit

__all__ = ["parse"]

SIGNS = {
    "=": "=", "<": "<", ">": ">", "le": "<=", "leq": "<=", "leqslant": "<=", "lt": "<", "ge": ">=", "geq": ">=",
    "geqslant": ">=", "gt": ">", "ne": "!=", "neq": "!=", "approx": "~", "equiv": "==", "sim": "~", "in": "in",
    "to": "->", "rightarrow": "->", "Rightarrow": "->", "implies": "->", "perp": "perp", "parallel": "parallel",
}  # fmt: skip
SETS = {"cup": "union", "cap": "cap", "setminus": "setminus", "backslash": "setminus"}
JOINS = {"and": "all", "or": "list", "land": "all", "wedge": "all", "lor": "list", "vee": "list"}
WORDS = ("word", "run", "letter")


class _Grammar(Atoms):
    def answer(self) -> Node:
        items, joined = [self.item()], "list"
        while self.peek().kind != "end":
            comma = self.take(",", ";")
            if self.peek().text in JOINS and self.peek().kind in ("word", "run", "cmd"):
                joined = JOINS[self.next().text]
            elif not comma:
                raise Unread(f"{self.peek().text!r} after an answer")
            items.append(self.item())
        return items[0] if len(items) == 1 else Node(joined, tuple(items))

    def item(self) -> Node:
        with self.deeper():
            operands, signs = [self.words() or self.operand()], []
            while (sign := self.sign()) is not None:
                signs.append(sign)
                operands.append(self.operand())
        if not signs:
            return operands[0]
        if signs == ["in"]:
            return Node("in", tuple(operands))
        return Node("rel", (tuple(signs), tuple(operands)))

    def words(self) -> Node | None:
        """An item that is words alone: no solution."""
        first, start = self.peek(), self.i
        long = first.kind in WORDS and len(first.text) > 2 and first.text not in FUNCTIONS | NAMES.keys()
        if not (long or first.kind == "word" or first.text.lower() == "no") or self.is_join(first):
            return None
        found = []
        while (self.peek().kind in WORDS and not self.is_join(self.peek())) or self.at("-", "'"):
            found.append(self.next().text.lower())
        if self.peek().kind == "end" or self.at(",", ";", ")", "]", "}", "\\}") or self.is_join(self.peek()):
            if len(found) == 1 and len(found[0]) == 1:
                return Node("var", (first.text,))
            return Node("text", (" ".join(found),))
        if self.at("=") and len("".join(found)) > 2:
            return Node("var", (" ".join(found),))
        self.i = start
        return None

    def is_join(self, token: Token) -> bool:
        return token.kind in WORDS and token.text in ("and", "or")

    def sign(self) -> str | None:
        token = self.peek()
        if token.kind == "sym" and token.text in ("<", ">", "!", "="):
            if (after := self.peek(1)).text == "=" and not after.spaced:
                self.i += 2
                return {"=": "="}.get(token.text, token.text + "=")
            if token.text == "!":
                return None
        elif token.kind == "cmd" and token.text == "not" and self.peek(1).text == "=":
            self.i += 2
            return "!="
        elif token.kind != "cmd":
            return None
        sign = SIGNS.get(token.text)
        self.i += sign is not None
        return sign

    def operand(self) -> Node:
        found, op = [self.ratio()], ""
        while self.peek().kind == "cmd" and self.peek().text in SETS:
            if op not in ("", SETS[self.peek().text]):
                raise Unread("set operations of two kinds")
            op = SETS[self.next().text]
            found.append(self.ratio())
        return self.labelled(found[0] if not op else Node(op, tuple(found)))

    def labelled(self, value: Node) -> Node:
        """The value with the unit that follows it."""
        words: list[tuple[str, int]] = []
        sign = 1
        while self.peek().kind in WORDS and not self.is_join(self.peek()):
            word = self.next().text
            if word == "per":
                sign = -1
                continue
            power = self.unit_power()
            words.append((word, sign * power))
            if self.at("/") and self.peek(1).kind in WORDS:
                self.i += 1
                sign = -1
            elif self.at("cdot", "*", "-") and self.peek(1).kind in WORDS:
                self.i += 1
        if not words:
            return value
        name = words[0][0].lower()
        if name in ("percent", "percents", "pct") and len(words) == 1:
            return Node("percent", (value,))
        return Node("qty", (value, tuple(words)))

    def unit_power(self) -> int:
        if not self.take("^"):
            return 1
        braced, minus = self.take("{"), self.take("-")
        power = self.next().text
        if braced:
            self.need("}")
        if power not in ("1", "2", "3", "4"):
            raise Unread(f"a unit to the power {power}")
        return -int(power) if minus else int(power)

    def ratio(self) -> Node:
        first = self.i
        parts = [self.sum()]
        while self.take(":"):
            parts.append(self.sum())
        if len(parts) == 1:
            return parts[0]
        written = [token.text for token in self.tokens[first : self.i] if token.kind == "num"]
        return Node("ratio", (tuple(parts), any(x.startswith("0") and len(x) == 2 for x in written[1:])))

    def sum(self) -> Node:
        terms = []
        sign = self.next().text if self.at("+", "-", "pm", "mp") else "+"
        while True:
            term = self.term()
            if sign == "-":
                term = product(MINUS_ONE, term)
            elif sign in ("pm", "mp"):
                term = Node(sign, (term,))
            terms.append(term)
            if not self.at("+", "-", "pm", "mp"):
                return total(*terms)
            sign = self.next().text

    def term(self) -> Node:
        value = self.mixed()
        while True:
            if self.take("*", "cdot", "times", "ast"):
                value = product(value, self.signed_factor())
            elif self.take("/", "div"):
                value = quotient(value, self.signed_factor())
            elif self.starts_factor() and not self.starts_label():
                value = product(value, self.factor())
            elif self.take("%"):  # 2/3% is (2/3)%
                value = Node("percent", (value,))
            else:
                return value

    def mixed(self) -> Node:
        """A factor, or a mixed number: 1\\frac34, 1 3/4."""
        first, second = self.peek(), self.peek(1)
        if first.kind == "num" and first.text.isdigit():
            if second.kind == "cmd" and second.text in ("frac", "dfrac", "tfrac", "cfrac"):
                self.i += 1
                whole, part = self.number(first), self.factor()
                if part.op == "mul" and len(part.args) == 2 and part.args[0].op == "num":
                    bottom = part.args[1]
                    if bottom.op == "pow" and bottom.args[0].op == "num":
                        return total(whole, part)
                return product(whole, part)
            slash, last = self.peek(2), self.peek(3)
            if second.kind == last.kind == "num" and second.spaced and slash.text == "/":
                self.i += 1
                whole, top = self.number(first), self.number(self.next())
                self.i += 1
                return total(whole, quotient(top, self.number(self.next())))
        return self.factor()

    def signed_factor(self) -> Node:
        if self.take("-"):
            return product(MINUS_ONE, self.factor())
        self.take("+")
        return self.factor()

    def starts_label(self) -> bool:
        """Whether the next token, after a factor, is a word and not a product of variables."""
        token = self.peek()
        if token.kind == "word":
            return len(token.text) > 1 or is_unit(token.text)
        if token.kind == "run" and token.text not in FUNCTIONS and token.text not in NAMES:
            return (
                is_unit(token.text)
                or token.text.lower() in ("percent", "and", "or")
                or (len(token.text) > 2 and token.spaced)
            )
        return False


def parse(text: str, thousands: bool = True) -> Node:
    """The tree of a tidy text; Unread where it is not in the grammar, TooBig beyond a bound.

    >>> parse("x=5").op, parse("(1, 2]").args[:2]
    ('rel', ('(', ']'))
    """
    reader = _Grammar(tokens(text, thousands))
    if not reader.tokens:
        raise Unread("nothing")
    return reader.answer()
