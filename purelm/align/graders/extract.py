"""Where the answer is in a response."""

import re

__all__ = ["answer_tag", "boxed", "gsm8k_gold", "last_number"]

_BOX = re.compile(r"\\boxed\s*\{")
_STEP = re.compile(r"\\.|[{}]", re.DOTALL)
# Starts and ends on a digit; commas only before groups of three; the sign is not that of a difference or of a range.
_NUMBER = re.compile(
    r"(?P<minus>(?<![0-9A-Za-z)\]}.])[-\u2212]\s?)?(?P<money>\\?\$\s?)?(?P<minus2>(?<=\$)[-\u2212])?"
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?<![0-9.])(?=\.[0-9]))(?P<point>\.[0-9]+)?"
)
GOLD = "####"


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} holds; None without one, or where its brace is not closed.

    The last one wins, and of boxes inside one another the inner one. \boxed 5 is no box. Escaped braces are text.

    >>> boxed(r"\boxed{3}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    start = text.rfind("\\boxed")
    match = _BOX.match(text, start) if start >= 0 else None
    if match is None:
        return None
    depth = 1
    for step in _STEP.finditer(text, match.end()):
        depth += {"{": 1, "}": -1}.get(step.group(), 0)
        if depth == 0:
            return text[match.end() : step.start()]
    return None


def answer_tag(text: str) -> str | None:
    """What is between the last <answer> and the </answer> at the end; None where one is missing or more text follows.

    >>> answer_tag("</think> <answer>5</answer>"), answer_tag("<answer>5</answer> or 6")
    ('5', None)
    """
    _, opened, rest = text.rpartition("<answer>")
    inside, closed, after = rest.partition("</answer>")
    return inside if opened and closed and not after.strip() else None


def last_number(text: str) -> str | None:
    r"""The last number in the text, without commas between groups of three digits; None where there is none.

    A number starts and ends on a digit; its sign does not follow a digit, a letter or a bracket. What is read wrongly:
    10^3 is 3, 3/4 is 4, 2nd is 2, and the number of a question that runs on after the answer (use stop strings).

    >>> last_number("He pays $1,234.50."), last_number("72 clips, altogether."), last_number("3-5")
    ('1234.50', '72', '5')
    """
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007
        pass
    if found is None:
        return None
    sign = "-" if found["minus"] or found["minus2"] else ""
    return sign + (found["digits"].replace(",", "") or "0") + (found["point"] or "")


def gsm8k_gold(text: str) -> str | None:
    """The number after the last ####, without commas; None where there is none.

    >>> gsm8k_gold("so she pays 2 * 600 = 1200.\\n#### 1,200")
    '1200'
    """
    _, mark, rest = text.rpartition(GOLD)
    match = re.match(r"\s*\$?\s*([-\u2212]?[0-9][0-9,]*(?:\.[0-9]+)?)", rest) if mark else None
    return match[1].replace(",", "").replace("\u2212", "-") if match else None
