"""The letter of a multiple-choice answer."""

import re
from collections.abc import Sequence

__all__ = ["mmlu_letter"]

# "A" before a lower-case word is mostly the article; after these words it is not.
_END = r"(?![A-Za-z0-9'])(?!(?<=A)\s{1,9}(?!because|since|as|and|is|for|due)[a-z])"
_SAID = "correct answer is|answer is|answer:|answer -"


def mmlu_letter(text: str, options: Sequence[str] | None = None) -> str | None:
    r"""The letter that a response chooses (A to D, or as many as there are options); None where it names none.

    Read are, in this order, each at its first place: "the correct answer is B", "answer: (B)", \boxed{B}; a letter that
    is all of the response or starts it ("B. There is ..."); an option's text that is all that is said to be the answer.
    No option is looked for inside of other text: "The correct answer is 10000 polyomaviruses." is not the option "10".

    >>> mmlu_letter("The correct answer is B. There is only one such group."), mmlu_letter("A group is a set.")
    ('B', None)
    """
    if options is not None and not 2 <= len(options) <= 26:
        raise ValueError(f"options has {len(options)} entries: allowed are 2 to 26")
    last = chr(ord("A") + (4 if options is None else len(options)) - 1)
    text = text.strip()
    letter = rf"\*{{0,3}}\(?(?:\\text\{{|\\boxed\{{|\$){{0,3}}\(?(?P<letter>[A-{last}]){_END}"
    patterns = (
        rf"(?i:{_SAID})\s{{0,9}}:?\s{{0,9}}(?i:option |choice )?{letter}",
        rf"\\boxed\s{{0,9}}\{{\s{{0,9}}{letter}",
        rf"\A(?i:option |choice )?{letter}(?=\Z|\s{{0,9}}[).:,*\n]|\s{{1,9}}(?:because|since))",
    )
    for pattern in patterns:
        if match := re.search(pattern, text):
            return match["letter"]
    if options is None:
        return None
    said = re.search(rf"(?i:{_SAID})\s{{0,9}}:?\s{{0,9}}(.*)", text)
    whole = _tidy(said[1] if said else text)
    found = [chr(ord("A") + i) for i, option in enumerate(options) if _tidy(option) == whole]
    return found[0] if len(found) == 1 and whole else None


def _tidy(text: str) -> str:
    return " ".join(text.split()).strip(" .\"'*").lower()
