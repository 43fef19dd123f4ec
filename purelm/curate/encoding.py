"""The text of bytes whose encoding is declared, declared wrongly, or not at all.

The order, in which the first that fits is taken:
1. a byte order mark (UTF-8, UTF-16);
2. ISO-2022 by its escapes, then UTF-8, where the bytes are valid: other encodings hardly ever are by chance, while
   declarations often are wrong. Not where a fifth of the bytes are NULs: that is UTF-16, declared or not;
3. declared encodings of several bytes a character, of the HTTP header, then of the page's <meta>: bytes of another
   encoding seldom fit them;
4. declared encodings of one byte a character, which fit nearly everything; windows-1252 last, which many servers say
   of all their pages;
5. the encoding that Resiliparse detects (uchardet); 6. windows-1252.
An encoding fits where at most one character in 1,000 (and one in any text: pages are cut in the middle of a character)
cannot be decoded, and no more than there are characters beyond ASCII that can; those become U+FFFD. Where none fits,
the one with the fewest such characters is taken.

Names mean what the WHATWG Encoding Standard says: iso-8859-1 is windows-1252, gb2312 is gb18030, and so on.
"""

import codecs
import re
from typing import NamedTuple

__all__ = ["Decoded", "declared_in", "decoded"]

BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
# Python's codecs that hold all the characters of the standard's of these names.
WIDER = {
    "gbk": "gb18030", "gb2312": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "big5": "big5hkscs",
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874",
}  # fmt: skip
SEVERAL_BYTES = ("utf", "gb", "cp932", "cp949", "big5", "euc", "iso2022", "hz")
META_BYTES = 4096  # the standard looks at 1,024; pages put the declaration later too
META = re.compile(rb"""<(?:meta|\?xml)\b[^>]{0,512}?(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9_:.-]{2,40})""", re.I)
MANY_NULS = 5  # one byte in so many, and more, is UTF-16
TOLERATED = 1000  # one character in so many may be wrong


class Decoded(NamedTuple):
    """A text, its encoding by Python's name, and the number of characters that could not be decoded."""

    text: str
    encoding: str
    replaced: int


def declared_in(page: bytes) -> str:
    """The encoding that the head of a page declares, in lower case; empty for none."""
    found = META.search(page, 0, META_BYTES)
    return found[1].decode("ascii").lower() if found else ""


def decoded(content: bytes, charset: str = "") -> Decoded:
    """The text of a page by the rules at the head of this file; charset: of the HTTP header, if any.

    Never raises for any bytes; needs the extra `curate`.

    Example:
        >>> decoded(bytes([0xC6, 0xFC, 0xCB, 0xDC]), "EUC-JP").text == "\u65e5\u672c"
        True
    """
    for mark, name in BOMS:
        if content.startswith(mark):
            text = content[len(mark) :].decode(name, "replace")
            return Decoded(text, name, text.count("\ufffd"))
    if b"\x1b$" in content and content.isascii():
        for name in ("iso2022_jp", "iso2022_kr"):
            try:
                return Decoded(content.decode(name), name, 0)
            except UnicodeDecodeError:
                pass
    is_wide = MANY_NULS * content.count(0) > len(content)
    if not is_wide:
        try:
            return Decoded(content.decode("utf-8"), "utf-8", 0)
        except UnicodeDecodeError:
            pass
    meta = _codec(declared_in(content))
    declared = [name for name in (_codec(charset), "utf-8" if meta.startswith("utf-16") else meta) if name]
    # Stable: HTTP before meta.
    declared.sort(key=lambda name: (not name.startswith(SEVERAL_BYTES), name == "cp1252"))
    if is_wide:  # NULs are the first or the second bytes of ASCII
        guess = "utf-16-be" if content[::2].count(0) > content[1::2].count(0) else "utf-16-le"
        declared = [*(name for name in declared if name.startswith("utf-16")), guess, *declared]
    tried: dict[str, Decoded] = {}
    for known in (*declared, None, "cp1252"):
        name = _detected(content) if known is None else known
        if not name or name in tried:
            continue
        text = content.decode(name, "replace")
        tried[name] = found = Decoded(text, name, text.count("\ufffd"))
        if found.replaced <= max(1, len(text) // TOLERATED) and 2 * found.replaced <= _beyond_ascii(text):
            return found
    return min(tried.values(), key=lambda found: found.replaced)  # the earliest of equals


def _beyond_ascii(text: str) -> int:
    return len(text) - len(text.encode("ascii", "ignore"))


def _codec(label: str) -> str:
    """Python's name of an encoding, as wide as the WHATWG's of that label; empty where there is none of text."""
    label = label.strip().lower()
    if not label or not label.isascii() or label in ("replacement", "x-user-defined"):
        return ""
    try:
        info = codecs.lookup(label.removeprefix("x-"))
    except (LookupError, ValueError):
        return ""
    name = WIDER.get(info.name, info.name)
    if name == "utf-16":
        name = "utf-16-le"
    # hex, rot13, idna, unicode_escape are no encodings of pages
    known = name.startswith((*SEVERAL_BYTES, "cp", "iso8859", "koi8", "mac", "tis")) and name != "utf-7"
    return name if known else ""


def _detected(content: bytes) -> str:
    try:
        from resiliparse.parse.encoding import detect_encoding
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "resiliparse":
            raise
        raise ModuleNotFoundError("an encoding needs resiliparse: pip install 'purelm[curate]'") from None
    # Without html5_compatible=False, 2.0.1 calls Korean UTF-8, as all names that its table does not have.
    return _codec(detect_encoding(content, html5_compatible=False) or "")
