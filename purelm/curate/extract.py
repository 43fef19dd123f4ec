"""The text of a crawled page: bytes to characters (encoding.py), HTML to plain text (Resiliparse).

What happens to bad input:
- NULs and other control characters but tab, newline and carriage return are taken out of the text;
- bytes that fit no encoding become U+FFFD; a page with more than `most_replaced` of them is dropped;
- pages of more than `most_bytes` are dropped, and so are pages that Resiliparse 2.0 would take minutes for: with a
  tag of more than MOST_ATTRIBUTES attributes, or, for main_content, divisions nested deeper than MOST_DEPTH (its time
  grows with the square of both: measured 80 s for 100,000 attributes, 1 s for a depth of 5,000).
"""

import re
from dataclasses import dataclass

from purelm.curate.document import Document, Drop, Raw
from purelm.curate.encoding import decoded
from purelm.data.checks import check_int

__all__ = ["Extraction", "extract", "text_of"]

HTML_TYPES = ("text/html", "application/xhtml+xml", "application/xml", "text/xml", "")
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
MOST_DEPTH = 2000
MOST_ATTRIBUTES = 5000
LONG_TAG = 2 * MOST_ATTRIBUTES  # characters: an attribute has one and a space at least
TAG_START = re.compile("<[a-zA-Z]")
DIVISION = re.compile(r"<(/?)(?:div|article)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Extraction:
    """How pages become text."""

    main_content: bool = False  # without navigation, headers, footers, comments
    plain_text: bool = False  # text/plain is taken as it is; else dropped
    most_bytes: int = 10 << 20
    most_replaced: float = 0.01  # share of characters that could not be decoded

    def __post_init__(self):
        check_int("most_bytes", self.most_bytes, 1)
        if not 0 <= self.most_replaced <= 1:
            raise ValueError(f"most_replaced={self.most_replaced!r}: allowed is 0 to 1")


def text_of(html: str, main_content: bool = False) -> str:
    """The visible text of a page, white space folded, a line for each block (Resiliparse's extract_plain_text).

    ModuleNotFoundError where the extra `curate` is not installed. Takes any string; see the head of this file for
    those that take long.
    """
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "resiliparse":
            raise
        raise ModuleNotFoundError("text of HTML needs resiliparse: pip install 'purelm[curate]'") from None
    return extract_plain_text(html, main_content=main_content)


def extract(raw: Raw, settings: Extraction) -> Document | Drop:
    """A page's text as a document, or why it has none; meta gets the encoding.

    Drops: `too large`, `not HTML` (by the content type; without one, bytes that hold NULs at their head),
    `undecodable`, `too many attributes`, `nested too deeply`, `no text`.
    """
    if len(raw.content) > settings.most_bytes:
        return Drop("too large", len(raw.content))
    is_text = settings.plain_text and raw.content_type == "text/plain"
    if not is_text and raw.content_type not in HTML_TYPES:
        return Drop("not HTML", raw.content_type)
    if (
        raw.content_type == ""
        and b"\0" in raw.content[:1024]
        and not raw.content.startswith((b"\xff\xfe", b"\xfe\xff"))
    ):
        return Drop("not HTML", "binary")
    html, encoding, replaced = decoded(raw.content, raw.charset)
    if replaced > settings.most_replaced * len(html) and replaced > 1:
        return Drop("undecodable", replaced / len(html))
    html = CONTROLS.sub("", html)
    if is_text:
        text = html
    else:
        if (attributes := _attributes(html)) > MOST_ATTRIBUTES:
            return Drop("too many attributes", attributes)
        if settings.main_content and (depth := _depth(html)) > MOST_DEPTH:
            return Drop("nested too deeply", depth)
        text = CONTROLS.sub("", text_of(html, settings.main_content))  # a character reference may be one
    if not text.strip():
        return Drop("no text")
    return Document(raw.id, text, raw.url, {**raw.meta, "encoding": encoding})


def _attributes(html: str) -> int:
    """At least as many as the most attributes of a tag; 0 where no tag is long."""
    most = 0
    for piece in html.split(">"):
        if len(piece) > LONG_TAG and (tag := TAG_START.search(piece)):
            # Attributes end at white space, a slash or a closing quote.
            inner = piece[tag.start() :]
            most = max(most, len(re.findall(r"""[\s/"']+[^\s/"'=]""", inner)))
    return most


def _depth(html: str) -> int:
    """How deep divisions are nested, those that are never closed included; 0 where there are few."""
    if html.count("<") <= MOST_DEPTH:
        return 0
    depth = deepest = 0
    for tag in DIVISION.finditer(html):
        depth = max(0, depth - 1) if tag[1] else depth + 1
        deepest = max(deepest, depth)
    return deepest
