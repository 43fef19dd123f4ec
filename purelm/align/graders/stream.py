"""The reader's place in the tokens, and what both halves of the grammar need."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from purelm.align.graders.nodes import Node
from purelm.align.graders.policy import MAX_DEPTH, TooBig
from purelm.align.graders.tokens import Token

__all__ = ["END", "Stream", "Unread"]

END = Token("end", "")


class Unread(ValueError):
    """The text is not in the grammar."""


class Stream:
    """Tokens with a place; the depth of what is open."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = list(tokens)
        self.i = 0
        self.depth = 0
        self.bars = 0  # |x| that are open

    def peek(self, ahead: int = 0) -> Token:
        """The token at the place, or after it; END at the end."""
        place = self.i + ahead
        return self.tokens[place] if place < len(self.tokens) else END

    def next(self) -> Token:
        """The token at the place, which is passed."""
        token = self.peek()
        self.i += 1
        return token

    def at(self, *texts: str, kinds: Sequence[str] = ("sym", "cmd")) -> bool:
        """Whether the next token is one of these signs or commands."""
        token = self.peek()
        return token.kind in kinds and token.text in texts

    def take(self, *texts: str) -> bool:
        """Pass the next token if it is one of these."""
        found = self.at(*texts)
        self.i += found
        return found

    def need(self, *texts: str) -> str:
        """Pass the next token, which must be one of these."""
        if not self.at(*texts):
            raise Unread(f"{self.peek().text!r} where {' or '.join(texts)} is expected")
        return self.next().text

    @contextmanager
    def deeper(self) -> Iterator[None]:
        """One level down."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooBig(f"more than {MAX_DEPTH} levels")
        try:
            yield
        finally:
            self.depth -= 1

    def separated(
        self, item: Callable[[], Node], close: Sequence[str], signs: Sequence[str] = (",", ";")
    ) -> list[Node]:
        """Items up to one of `close`, which is not passed."""
        items: list[Node] = []
        if self.at(*close):
            return items
        while True:
            items.append(item())
            if not self.take(*signs):
                return items
