"""Tokens of an answer in LaTeX, or in something like it."""

import re
from typing import NamedTuple

from purelm.align.graders.policy import MAX_LENGTH, MAX_TOKENS, TooBig

__all__ = ["Token", "tidy", "tokens"]


class Token(NamedTuple):
    """kind: num, letter, run (letters outside of \\text), word (letters inside), cmd (without backslash), env, sym."""

    kind: str
    text: str
    spaced: bool = False  # space before it


# Unicode -> LaTeX.
SIGNS = {
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u22c5": "\\cdot ",
    "\u00f7": "\\div ", "\u2264": "\\le ", "\u2265": "\\ge ", "\u2260": "\\ne ", "\u221e": "\\infty ",
    "\u03c0": "\\pi ", "\u221a": "\\sqrt ", "\u00b0": "\\degree ", "\u2205": "\\emptyset ", "\u222a": "\\cup ",
    "\u2229": "\\cap ", "\u2208": "\\in ", "\u00b1": "\\pm ", "\u2213": "\\mp ", "\u00bd": "\\frac12 ",
    "\u00bc": "\\frac14 ", "\u00be": "\\frac34 ", "\u2153": "\\frac13 ", "\u2154": "\\frac23 ", "\u00b2": "^2 ",
    "\u00b3": "^3 ", "\u00a0": "~", "\u2009": "\\,", "\u202f": "\\,", "\u2019": "'", "\u03b8": "\\theta ",
    "\u2248": "\\approx ", "\u20ac": "$", "\u00a3": "$", "\u211d": "\\mathbb{R} ", "\u2061": "", "\u200b": "",
}  # fmt: skip
_SIGNS = str.maketrans(SIGNS)

# Commands that say how something looks, not what it is.
LOOKS = set(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits boxed fbox mathbf boldsymbol bm "
    "vec overrightarrow hat bar overline underline widehat mathcal mathit mathsf quad qquad hspace thinspace nolimits "
    "angle triangle middle hfill".split()
)
SPACES = {",", ";", ":", "!", " ", "(", ")", "[", "]", "$", "\n", "\t", "/"}  # after a backslash
TEXT = {"text", "textbf", "textit", "textrm", "textnormal", "textup", "mbox", "mathrm", "operatorname", "hbox", "rm"}

_THOUSANDS = r"(?:\{,\}|,\\!|\\,|\\[ ]|~)"
_TOKEN = re.compile(
    rf"""(?P<num>[0-9]{{1,3}}(?:(?:,|{_THOUSANDS})[0-9]{{3}})+(?![0-9])(?:\.[0-9]+)?
          | [0-9]*\.[0-9]*(?:\\overline|\\bar)\s*\{{[0-9]+\}} | [0-9]*\.[0-9]*\([0-9]+\)
          | (?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+(?![A-Za-z0-9.]))?)
      | (?P<env>\\(?:begin|end)\s*\{{[A-Za-z]+\*?\}})
      | (?P<cmd>\\[A-Za-z]+) | (?P<escape>\\.)
      | (?P<run>[A-Za-z]+) | (?P<space>[\s~$]+) | (?P<sym>.)""",
    re.VERBOSE | re.DOTALL,
)
_PLAIN = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")


def tidy(text: str) -> str:
    """Signs of Unicode as LaTeX; without space, dollar signs and punctuation at both ends. TooBig for long texts."""
    if len(text) > MAX_LENGTH:
        raise TooBig(f"{len(text)} characters, more than {MAX_LENGTH}")
    text = text.translate(_SIGNS)
    before = None
    while before != text:
        before = text
        text = text.strip().strip("$").rstrip(",;:").strip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        for start, end in (("\\(", "\\)"), ("\\[", "\\]"), ("**", "**")):
            if text.startswith(start) and text.endswith(end) and len(text) >= 4:
                text = text[2:-2]
        for box in ("\\boxed{", "\\fbox{"):
            if text.startswith(box) and text.endswith("}") and _balanced(inside := text[len(box) : -1]):
                text = inside
    return text


def _balanced(text: str) -> bool:
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def tokens(text: str, thousands: bool = True) -> list[Token]:
    """The tokens of a tidy text. A comma is part of a number (1,000) only outside of brackets, and if `thousands`.

    >>> [token.text for token in tokens("1,000 (1,000)")]
    ['1000', '(', '1', ',', '000', ')']
    """
    out: list[Token] = []
    braces: list[bool] = []  # of each open brace: is it that of \\text?
    opening_text = spaced = False
    depth = position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        assert match is not None
        kind, piece = match.lastgroup or "", match.group()
        if kind == "num" and "," in re.sub(_THOUSANDS, "", piece) and (depth or not thousands):
            match = _PLAIN.match(text, position)
            assert match is not None
            piece = match.group()
        position = match.end()
        in_text = any(braces[-1:])
        if kind == "escape" and piece[1] in SPACES:
            kind = "space"
        if kind == "space":
            spaced = True
            continue
        if kind == "cmd" and piece[1:] in TEXT:
            opening_text = True
            spaced = True
            continue
        if kind == "cmd" and piece[1:] in LOOKS:
            continue
        if piece == "{":
            braces.append(opening_text or in_text)
            opening_text = False
            if braces[-1]:
                continue
        elif piece == "}":
            if braces and braces.pop():
                spaced = True
                continue
        opening_text = False
        depth += {"(": 1, "[": 1, "\\{": 1, ")": -1, "]": -1, "\\}": -1}.get(piece, 0)
        depth = max(depth, 0)
        if kind == "num":
            piece = re.sub(_THOUSANDS, "", piece).replace(",", "")
        elif kind == "run":
            kind = "word" if in_text else "letter" if len(piece) == 1 else "run"
        elif kind == "env":
            piece = "".join(piece.split()).rstrip("*}").replace("*", "")
        elif kind == "cmd":
            piece = piece[1:]
        elif kind == "escape":
            kind, piece = ("sym", piece[1]) if piece[1] in "%&#_|" else ("sym", piece)
        out.append(Token(kind, piece, spaced))
        spaced = False
        if len(out) > MAX_TOKENS:
            raise TooBig(f"more than {MAX_TOKENS} tokens")
    return out
