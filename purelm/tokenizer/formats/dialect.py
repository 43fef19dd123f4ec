r"""Which regular expressions mean the same to Python's `regex` and to Oniguruma, which runs Hugging Face's Split.

Oniguruma reads many signs differently: ^ and $ are ends of lines, \w takes other characters, {n}? is not lazy and
{n,m}+ not possessive, [ inside a class opens a class, && intersects classes, letters under (?i:) may match several
characters at once. And the two go on by different rules after a match without characters. So a pattern is taken only if
all its signs are among those that were found to agree; anything else is refused by name.

The Unicode version of Oniguruma is older than that of `regex`, as in `compiled.classes`: characters assigned since are
"other".
"""

from string import hexdigits
from typing import NamedTuple, NoReturn

__all__ = ["check_dialect"]

MOST_REPEATS = 1000  # of a counted repetition, and of all that are nested together
_MOST_NESTED = 50  # groups in groups: more is no pre-tokenizer, and parsers recurse
_INFINITE = 1 << 40

# General categories and scripts whose members are equal in both, but for characters of newer Unicode versions.
_CATEGORIES = (
    "L Lu Ll Lt Lm Lo M Mn Mc Me N Nd Nl No P Pc Pd Ps Pe Pi Pf Po S Sm Sc Sk So Z Zs Zl Zp Cc Cf "
    "Arabic Armenian Bengali Cyrillic Devanagari Georgian Greek Gujarati Han Hangul Hebrew Hiragana Katakana Khmer Lao "
    "Latin Tamil Telugu Thai Tibetan"
)
_PROPERTIES = frozenset(_CATEGORIES.split())
_CASED = frozenset(("Lu", "Ll", "Lt"))  # `regex` widens these under (?i:), Oniguruma does not
_CHARACTERS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "a": "\a"}
_GROUPS = ("(?:", "(?>", "(?=", "(?!", "(?<=", "(?<!", "(?i:")
_FOLDED_PAIRS = ("ss", "ff", "fi", "fl", "st")  # under (?i:) Oniguruma matches one character with them, as U+00DF


class _Width(NamedTuple):
    """Characters that a part of the pattern can match, and the counts of its nested repetitions multiplied."""

    least: int
    most: int
    repeats: int = 1


_NOTHING, _ONE = _Width(0, 0), _Width(1, 1)


def check_dialect(pattern: str) -> None:
    r"""ValueError that names the first sign of `pattern` that the two libraries may read differently.

    >>> check_dialect(r" ?\p{L}+|\s+(?!\S)|[^\s\p{L}]")
    >>> check_dialect(r"\w+")
    Traceback (most recent call last):
    ...
    ValueError: \w at character 0 of the pattern '\\w+' (characters such as U+00B2 and U+200D are words to one only)
    """
    parser = _Parser(pattern)
    width = parser.alternatives(0, False, False)
    if parser.folds and parser.leaves_out_case is not None:
        # `regex` (2026.11) skips places by a set of first characters whose case it forgets when one branch is (?i:).
        parser.refuse(
            "a negated class or property of letters of one case", "beside (?i:) the two differ", parser.leaves_out_case
        )
    if not width.least:
        raise ValueError(
            f"the pattern {pattern!r} can match no characters, where Hugging Face's library cuts and `regex` does not"
        )


class _Parser:
    """Recursive descent over `text`; `at` is the place where it is."""

    def __init__(self, text: str):
        self.text, self.at = text, 0
        self.folds = False  # whether there is a (?i:
        self.leaves_out_case: int | None = None  # place of a negation of some letters only

    def refuse(self, what: str, why: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        raise ValueError(f"{what} at character {at} of the pattern {self.text!r} ({why})")

    def peek(self, length: int = 1) -> str:
        return self.text[self.at : self.at + length]

    def alternatives(self, depth: int, folded: bool, behind: bool) -> _Width:
        """Sequences between |, up to the closing parenthesis or the end."""
        widths = [self.sequence(depth, folded, behind)]
        while self.peek() == "|":
            self.at += 1
            widths.append(self.sequence(depth, folded, behind))
        if self.at < len(self.text) and not depth:
            self.refuse("')'", "it closes no group")
        return _Width(min(w.least for w in widths), max(w.most for w in widths), max(w.repeats for w in widths))

    def sequence(self, depth: int, folded: bool, behind: bool) -> _Width:
        least = most = 0
        repeats, letters, spaces_taken = 1, "", False
        while self.at < len(self.text) and self.peek() not in "|)":
            start = self.at
            if self.peek() == "$":
                # Behind a run of white space taken whole there is no newline: the end of the line is that of the text.
                if not spaces_taken:
                    self.refuse("$", r"the end of a line in Hugging Face's library; \s++$ is the end of the text")
                self.at += 1
                spaces_taken = False
                continue
            width, letter = self.atom(depth, folded, behind)
            atom_end = self.at
            width = self.quantified(width, start, folded)
            letters += letter if letter else "|"
            spaces_taken = self.text[start : self.at] in (r"\s++", r"\s*+") and atom_end == start + 2
            least += width.least
            most = min(_INFINITE, most + width.most)
            repeats = max(repeats, width.repeats)
        if folded:
            for pair in _FOLDED_PAIRS:
                if pair in letters.lower():
                    self.refuse(f"{pair!r} under (?i:) before", "one character can stand for both")
        return _Width(least, most, repeats)

    def atom(self, depth: int, folded: bool, behind: bool) -> tuple[_Width, str]:
        """(its width, the character that it is, or an empty string)."""
        sign = self.peek()
        if sign == "(":
            if folded:
                self.refuse("a group under (?i:)", "only characters and classes are known to agree there")
            return self.group(depth, behind), ""
        if sign == "[":
            self.character_class(folded)
            return _ONE, ""
        if sign == "\\":
            return self.escape(folded, False)
        if sign in "^*+?{}]":
            why = "the beginning of a line in Hugging Face's library" if sign == "^" else "put a backslash before it"
            self.refuse(sign, why)
        self.at += 1
        if sign != ".":
            self.literal(sign, folded)
        return _ONE, "" if sign == "." else sign

    def literal(self, character: str, folded: bool) -> str:
        if folded and (not character.isascii() or character in "iI"):
            self.refuse(f"{character!r} under (?i:) before", "its capital and small forms differ between the two")
        return character

    def group(self, depth: int, behind: bool) -> _Width:
        start = self.at
        if depth >= _MOST_NESTED:
            self.refuse("a group", f"nested deeper than {_MOST_NESTED}")
        opening = next((name for name in _GROUPS if self.text.startswith(name, start)), "(")
        if opening == "(":
            if self.peek(2) in ("(?", "(*"):
                self.refuse(repr(self.peek(4)), f"groups that agree are ( and {' '.join(_GROUPS)}")
            if behind:
                self.refuse("a capturing group in a look-behind", "write (?:")
        if behind and opening != "(?:":
            self.refuse(repr(opening), "in a look-behind only (?: is known to agree")
        self.at += len(opening)
        self.folds |= opening == "(?i:"
        looks_behind = behind or opening in ("(?<=", "(?<!")
        width = self.alternatives(depth + 1, opening == "(?i:", looks_behind)
        if self.peek() != ")":
            self.refuse("a group without )", "opened here", start)
        self.at += 1
        if opening in ("(?<=", "(?<!") and (width.least != width.most or not width.least):
            self.refuse("a look-behind", "it must have one fixed length, not 0", start)
        if opening in ("(?=", "(?!", "(?<=", "(?<!"):
            return _NOTHING._replace(repeats=width.repeats)
        return width

    def quantified(self, width: _Width, start: int, folded: bool) -> _Width:
        """The width with the quantifier that stands here, if one does."""
        at, sign = self.at, self.peek()
        if not sign or sign not in "*+?{":
            return width
        least, most = self.counts() if sign == "{" else {"*": (0, _INFINITE), "+": (1, _INFINITE), "?": (0, 1)}[sign]
        if sign != "{":
            self.at += 1
        if folded:
            self.refuse(f"{sign} under (?i:)", "put the quantifier behind the group", at)
        follows = self.peek()
        if follows == "?" and sign == "{" and least == most:
            self.refuse("{n}?", "not lazy but optional in Hugging Face's library", at)
        if follows == "+" and sign == "{":
            why = "a repetition in Hugging Face's library: write (?>...{n,m})"
            self.refuse("{n,m}+, a possessive interval", why, at)
        if follows in ("?", "+"):
            self.at += 1
        if self.peek() and self.peek() in "*+?{":
            self.refuse(f"{self.peek()} behind a quantifier", "put (?: ) around what it repeats")
        if not width.least:
            self.refuse(f"{self.text[start:at]}{sign}", "what is repeated can match no characters", start)
        repeats = width.repeats * (max(1, most) if sign == "{" and most < _INFINITE else max(1, least))
        if repeats > MOST_REPEATS:
            self.refuse("a counted repetition", f"{repeats:,} times in all; allowed is {MOST_REPEATS:,}", at)
        return _Width(least * width.least, min(_INFINITE, most * width.most), repeats)

    def counts(self) -> tuple[int, int]:
        start = self.at
        end = self.text.find("}", start)
        low, comma, high = self.text[start + 1 : max(end, start)].partition(",")
        digits = [part for part in (low, high) if part]
        if not digits or not all(part.isascii() and part.isdigit() and len(part) <= 9 for part in digits):
            self.refuse("{", r"no {n}, {n,} or {n,m}; as a character it is \{")
        self.at = end + 1
        least = int(low or 0)
        most = (int(high) if high else _INFINITE) if comma else least
        if most < least or not most:
            self.refuse(self.text[start : end + 1], "allowed is {n,m} with n <= m and m > 0", start)
        return least, most

    def escape(self, folded: bool, inside: bool, negated: bool = False) -> tuple[_Width, str]:
        """An escape; inside: in a class, negated: that begins with [^."""
        start, sign = self.at, self.text[self.at + 1 : self.at + 2]
        self.at += 2
        if sign and sign in "sSdD":
            return _ONE, ""
        if sign and sign in "pP":
            end = self.text.find("}", self.at)
            name = self.text[self.at + 1 : end] if self.peek() == "{" and end > 0 else ""
            if name not in _PROPERTIES:
                self.refuse(rf"\{sign} of another property", f"allowed are {' '.join(sorted(_PROPERTIES))}", start)
            if folded and name in _CASED:
                self.refuse(rf"\{sign}{{{name}}} under (?i:)", "the two differ on letters of the other case", start)
            self.at = end + 1
            if name in _CASED and (sign == "P" or negated):
                self.leaves_out_case = start
            return _ONE, ""
        if sign == "A" and not inside:
            return _NOTHING, ""
        if sign and sign in _CHARACTERS:
            return _ONE, _CHARACTERS[sign]
        if sign and sign in "xu":
            length = 2 if sign == "x" else 4
            digits = self.peek(length)
            value = int(digits, 16) if len(digits) == length and set(digits) <= set(hexdigits) else -1
            # \x80 and above are bytes to Oniguruma, and halves of surrogate pairs are no characters.
            if value < 0 or (sign == "x" and value > 0x7F) or 0xD800 <= value < 0xE000:
                self.refuse(rf"\{sign}{digits}", r"allowed are \x00 to \x7F and \u with four digits", start)
            self.at += length
            return _ONE, self.literal(chr(value), folded)
        if sign and sign.isascii() and sign.isprintable() and not sign.isalnum():
            return _ONE, self.literal(sign, folded)
        whys = {"w": "characters such as U+00B2 and U+200D are words to one only"}
        whys |= dict.fromkeys("Wbb", whys["w"])
        self.refuse(f"\\{sign}", whys.get(sign.lower(), "not known to mean the same in both"), start)

    def character_class(self, folded: bool) -> None:
        start = self.at
        self.at += 1
        negated = self.peek() == "^"
        self.at += negated
        if self.peek() == "]":
            self.refuse("[]", r"an empty class, or one that holds ]: write \]", start)
        previous = ""  # the character before, which a range could begin with
        first = True
        while self.peek() != "]":
            at, sign = self.at, self.peek()
            if not sign:
                self.refuse("a class without ]", "opened here", start)
            if sign == "[" or self.peek(2) in ("&&", "--", "~~", "||"):
                self.refuse(self.peek(2), "an operation on classes in one of the two: put a backslash before each")
            if sign == "-" and not first and self.text[at + 1 : at + 2] != "]":
                self.at += 1
                end = self.class_item(folded, negated)
                if not previous or not end or previous > end:
                    self.refuse("-", r"no range of two characters; as a character it is \-", at)
                if folded and any(c.isalpha() for c in (previous, end)):
                    self.refuse(f"{previous}-{end} under (?i:)", "write its letters one by one", at)
                if negated and not (previous.isdigit() and end.isdigit()):
                    self.leaves_out_case = at
                previous = ""
            else:
                previous = self.class_item(folded, negated)
                if negated and previous.isalpha():
                    self.leaves_out_case = at
                if folded and negated and (not previous or previous.isalpha()):
                    self.refuse("[^ under (?i:)", "the two differ on what it leaves out", start)
            first = False
        self.at += 1

    def class_item(self, folded: bool, negated: bool) -> str:
        if self.peek() == "\\":
            return self.escape(folded, True, negated)[1]
        sign = self.peek()
        if sign in ("[", ""):
            self.refuse("[", r"as a character it is \[")
        self.at += 1
        return self.literal(sign, folded)
