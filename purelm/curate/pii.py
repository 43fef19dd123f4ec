"""E-mail addresses, telephone numbers and IP addresses in a text, replaced by marks.

    mask_emails("Write to ann@example.org!") == ("Write to |||EMAIL_ADDRESS|||!", 1)

Masking is repeated until nothing is found, so it is idempotent: what was masked holds no address of that kind any more.
These are rules on forms: a number that looks like a telephone's is masked too, and other ways of writing are missed
(numbers without area code, "ann at example dot org").
Time is linear in the text: no pattern looks further than an address is long.
"""

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from purelm.curate.document import Document

__all__ = ["EMAIL", "IP", "PHONE", "PII", "mask", "mask_emails", "mask_ips", "mask_phones", "mask_pii"]

EMAIL, PHONE, IP = "|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||", "|||IP_ADDRESS|||"  # as in CS336's assignment 4

MOST_LOCAL = 64  # characters before the @ (RFC 5321, 4.5.3.1)
LOCAL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._%+'-]*[A-Za-z0-9_+-])?$")
DOMAIN = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![\w@])")
FILES = {"png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "json", "html", "htm", "php", "pdf"}  # icon@2x.png

OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
IPV4 = re.compile(rf"(?<![\w.\-])(?<!\w/){OCTET}(?:\.{OCTET}){{3}}(?!\w|[.\-]\w)")
# Four numbers after such a word are a version or a section.
NO_ADDRESS = re.compile(
    r"(?:\b(?:version|ver|v|release|build|revision|rev|firmware|driver|update|section|sec|chapter|clause)|\u00a7)"
    r"[\s.:#]{0,3}$",
    re.IGNORECASE,
)
IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:]{1,40}(?:\.[0-9]{1,3}){0,3}(?![\w:])")

PHONES = re.compile(
    r"(?<![\w.,$#=/%&+\-\u20ac\u00a3])(?<!\d\()"
    r"(?:"
    # international (E.164): + or 00, country code, at most 15 digits in all, which _is_phone counts
    r"(?:\+|00(?=[1-9]\d{0,2}[ .\-]))[1-9]\d{0,2}[ .\-]?(?:\(\d{1,4}\)[ .\-]?)?\d{1,12}(?:[ .\-]\d{1,9}){0,5}"
    # North America: area codes begin at 200
    r"|(?:1[ .\-])?(?:\([2-9]\d\d\)[ .\-]{0,2}\d{3}[ .\-]?|[2-9]\d\d[ .\-]\d{3}[ .\-]|[2-9]\d{5})\d{4}"
    # with a trunk 0: pairs (France), or an area code and two groups (Britain, Australia, ...)
    r"|0[1-9](?:[ .\-]\d\d){4}"
    r"|(?:\(0\d{2,4}\) ?|0\d{2,4}[ \-])\d{3,4}[ \-]?\d{3,4}"
    r")"
    r"(?!\w|[.,\-/]\d|%)",
    re.ASCII,
)
# All characters of a telephone number and of an IPv4 address: the scan for them is several times faster than those
# patterns, whose look-behind is tried at every character.
RUN = re.compile(r"[0-9+(][0-9+() .\-]{6,}")
AFTER_RUN = 2  # characters that the patterns' look-ahead needs
LOOKED_BACK = 2  # characters that their look-behind needs
MOST_LENGTH = 160  # characters, more than an address of any kind has
NO_PHONE = re.compile(r"(?:isbn|issn|doi|arxiv|pmid|lccn)(?:-?1[03])?[\s.:#/]{0,3}$", re.IGNORECASE)
BEFORE = 20  # characters that NO_ADDRESS and NO_PHONE look at

Masked = tuple[str, int]  # the text and how many were replaced


@dataclass(frozen=True)
class PII:
    """What is masked."""

    emails: bool = True
    phones: bool = True
    ipv4: bool = True
    ipv6: bool = False

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r}: allowed is True or False")


def mask(document: Document, settings: PII) -> Document:
    """The document with its addresses masked, and how many as `pii` in its meta: {"emails": 2}."""
    text, counts = mask_pii(document.text, settings)
    return document._replace(text=text).noted(pii=dict(counts)) if counts else document


def mask_pii(text: str, settings: PII = PII()) -> tuple[str, Mapping[str, int]]:
    """The text with all kinds of `settings` masked, and the counts of emails, ips and phones that are not 0.

    Example:
        >>> mask_pii("ann@example.org, 10.0.0.1, (212) 555-0123")
        ('|||EMAIL_ADDRESS|||, |||IP_ADDRESS|||, |||PHONE_NUMBER|||', {'emails': 1, 'ips': 1, 'phones': 1})
    """
    counts: dict[str, int] = {}
    while True:
        found = 0
        if settings.emails and (part := _emails(text))[1]:
            text, n = part
            counts["emails"], found = counts.get("emails", 0) + n, found + n
        if (settings.ipv4 or settings.ipv6) and (part := _ips(text, settings.ipv4, settings.ipv6))[1]:
            text, n = part
            counts["ips"], found = counts.get("ips", 0) + n, found + n
        if settings.phones and (part := _phones(text))[1]:
            text, n = part
            counts["phones"], found = counts.get("phones", 0) + n, found + n
        if not found:
            return text, counts


def mask_emails(text: str) -> Masked:
    """The text with |||EMAIL_ADDRESS||| for each e-mail address, and their number.

    An address is ASCII letters, digits and . _ % + ' - around an @ (64 before it), with a domain of at least two labels
    whose last is letters: no names of files such as icon@2x.png, no @names.
    """
    return _until_none(text, _emails)


def mask_phones(text: str) -> Masked:
    """The text with |||PHONE_NUMBER||| for each telephone number, and their number.

    Forms: international with + or 00 and 8 to 15 digits; North American with ten digits, also without separators;
    French pairs; a trunk 0, area code and two groups. Not parts of longer numbers, decimals, prices or paths; not after
    the words ISBN, ISSN, DOI, arXiv and PMID.
    """
    return _until_none(text, _phones)


def mask_ips(text: str, v4: bool = True, v6: bool = False) -> Masked:
    """The text with |||IP_ADDRESS||| for each IP address, and their number.

    IPv4 is four numbers to 255 without leading zeros; not inside of longer dotted numbers, not after a word and a slash
    (Chrome/1.2.3.4), and not after the words version, release, section and the like. IPv6 in all forms of RFC 4291 with
    a digit in them.
    """
    return _until_none(text, lambda part: _ips(part, v4, v6))


def _until_none(text: str, once: Callable[[str], Masked]) -> Masked:
    """Masks until nothing is found: what stood beside an address may only then look like one."""
    total = 0
    while (found := once(text))[1]:
        text, total = found[0], total + found[1]
    return text, total


def _emails(text: str) -> Masked:
    # From the @ backwards and forwards: a search that begins at the local part takes quadratic time on long words.
    at = text.find("@")
    parts, done = [], 0
    while at >= 0:
        local = LOCAL.match(_local_run(text, max(done, at - MOST_LOCAL), at))
        domain = DOMAIN.match(text, at + 1) if local else None
        if local and domain and domain[0].rpartition(".")[2].lower() not in FILES:
            begin = at - len(local[0])
            parts += [text[done:begin], EMAIL]
            done = domain.end()
            at = text.find("@", done)
        else:
            at = text.find("@", at + 1)
    return ("".join((*parts, text[done:])), len(parts) // 2) if parts else (text, 0)


def _local_run(text: str, start: int, at: int) -> str:
    """The characters before an @ that may be of a local part."""
    i = at
    while i > start and (text[i - 1] in "._%+'-" or (text[i - 1].isascii() and text[i - 1].isalnum())):
        i -= 1
    return text[i:at].lstrip(".%+'-")


def _ips(text: str, v4: bool, v6: bool) -> Masked:
    n = 0
    if v4:
        text, n = _replaced(text, IPV4, IP, _is_ipv4)
    if v6:
        text, more = _replaced(text, IPV6, IP, _is_ipv6)
        n += more
    return text, n


def _is_ipv4(found: re.Match[str], text: str) -> bool:
    return NO_ADDRESS.search(text, max(0, found.start() - BEFORE), found.start()) is None


def _is_ipv6(found: re.Match[str], text: str) -> bool:
    if not any(c.isdigit() for c in found[0]):  # dead::beef is as likely a name in a program
        return False
    try:
        ipaddress.IPv6Address(found[0])
        return True
    except ValueError:
        return False


def _phones(text: str) -> Masked:
    return _replaced(text, PHONES, PHONE, _is_phone)


def _is_phone(found: re.Match[str], text: str) -> bool:
    number = found[0]
    if number[0] == "+" or number.startswith("00"):
        digits = sum(c.isdigit() for c in number.removeprefix("00"))
        if not 8 <= digits <= 15 or number.count(".") == 1:  # one dot: a decimal number with its sign
            return False
    elif " " in number and not any(c in number for c in "().-"):
        before, after = text[max(0, found.start() - 2) : found.start()], text[found.end() : found.end() + 2]
        if (before[1:] == " " and before[0].isdigit()) or (after[:1] == " " and after[1:].isdigit()):
            return False  # of a row of numbers
    return NO_PHONE.search(text, max(0, found.start() - BEFORE), found.start()) is None


def _replaced(text: str, pattern: re.Pattern[str], mark: str, is_one: Callable[[re.Match[str], str], bool]) -> Masked:
    parts: list[str] = []
    done = 0
    runs = ((0, len(text)),) if pattern is IPV6 else (run.span() for run in RUN.finditer(text))
    for start, end in runs:
        at = max(start, done)
        while at < end and (found := pattern.search(text, at, end + AFTER_RUN)):
            at = found.end()
            if not is_one(found, text):
                continue
            parts += [text[done : found.start()], mark]
            done = at
            # What follows stands behind a mark now and is looked at again so: each pass would else find one more of a
            # row of addresses, and a long row take quadratic time.
            while next_one := _behind(mark, text[done : done + MOST_LENGTH], pattern, is_one):
                skipped, taken = next_one
                parts += [text[done : done + skipped], mark]
                done += taken
            at = done
    return ("".join((*parts, text[done:])), len(parts) // 2) if parts else (text, 0)


def _behind(
    mark: str, text: str, pattern: re.Pattern[str], is_one: Callable[[re.Match[str], str], bool]
) -> tuple[int, int] | None:
    """Where an address begins and ends in the text behind a mark, at its first or second character; None for none."""
    for skipped in range(LOOKED_BACK):
        found = pattern.match(mark + text, len(mark) + skipped)
        if found and is_one(found, found.string):
            return skipped, found.end() - len(mark)
    return None
