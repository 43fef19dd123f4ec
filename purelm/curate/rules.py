"""Lists of quality rules over one pass, as a step of a pipeline.

    step = partial(judged, rules=ENGLISH)
    step(document)  # the document, its text as the rules leave it, or Drop("gopher: too few words", 12)

A rule is a pure function of a scan: it returns the scan, another one where it changes the text, or a Drop. A rule of
one's own is another entry: {**ENGLISH, "mine": mine}.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Literal

from purelm.curate import c4, fineweb, gopher, refinedweb, repetition
from purelm.curate.document import Document, Drop
from purelm.curate.words import Scan, scan

__all__ = ["ALL", "COURSE", "ENGLISH", "Rule", "judged"]

Rule = Callable[[Scan], Scan | Drop]

# Gopher's quality goes first: it is the cheapest, and what it keeps has at most some 100,000 words.
ENGLISH: Mapping[str, Rule] = MappingProxyType(
    {
        "gopher": partial(gopher.quality, config=gopher.GOPHER),
        "repetition": partial(repetition.repetition, config=repetition.GOPHER),
        "c4": partial(c4.clean, config=c4.FINEWEB),
        "fineweb": partial(fineweb.quality, config=fineweb.FINEWEB),
    }
)
# RefinedWeb's corrections too: FineWeb does without them.
ALL: Mapping[str, Rule] = MappingProxyType(
    {**ENGLISH, "refinedweb": partial(refinedweb.clean, config=refinedweb.REFINEDWEB)}
)
COURSE: Mapping[str, Rule] = MappingProxyType({"gopher": partial(gopher.quality, config=gopher.COURSE)})


def judged(
    document: Document, rules: Mapping[str, Rule] = ENGLISH, engine: Literal["auto", "python", "numba"] = "auto"
) -> Document | Drop:
    """The document through the rules in order, or the first Drop, its reason after the rule's name.

    The text is scanned once, and again where a rule changed it. See `words.scan` for `engine`.

    >>> judged(Document("1", "Home"), engine="python")
    Drop(reason='gopher: too few words', value=1)
    """
    scanned = scan(document.text, engine)
    for name, rule in rules.items():
        found = rule(scanned)
        if isinstance(found, Drop):
            return Drop(f"{name}: {found.reason}", found.value)
        scanned = found
    return document if scanned.text == document.text else document._replace(text=scanned.text)
