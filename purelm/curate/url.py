"""Addresses of pages: host, registered domain, and which pages to leave out by them.

The domain that someone registered is one label below the public suffix (publicsuffix.org: com, co.uk, github.io, ...),
by the list inside of the package publicsuffixlist (extra `curate`); nothing is fetched.
"""

import ipaddress
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from purelm.caches import memo
from purelm.curate.document import Document, Drop
from purelm.data.checks import check_int

__all__ = ["UrlFilter", "host_of", "keep_url", "registered_domain", "word_list"]

WITH_HOST = re.compile(r"(?:[a-z][a-z0-9+.\-]*:)?//", re.IGNORECASE)
BARE = re.compile(r"[^\s:/?#@]+(?::\d+)?(?:[/?#]|$)")  # example.org/a, but not mailto:me@example.org
NOT_A_LETTER = re.compile(r"[^a-z0-9]+")


def host_of(url: str) -> str:
    """The host of a URL in lower case, without port and user, in ASCII (IDNA) where it can be; empty for none.

    Example:
        >>> host_of("HTTPS://me@Www.Example.co.uk.:8080/a?b")
        'www.example.co.uk'
    """
    url = url.strip()
    if not WITH_HOST.match(url):
        if not BARE.match(url):
            return ""
        url = f"//{url}"
    try:
        host = (urlsplit(url).hostname or "").rstrip(".").lower()  # hostname leaves what is after a % as it is
    except ValueError:  # an unclosed [ of IPv6
        return ""
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode("ascii")
    except UnicodeError:
        return host


@memo(1 << 16)
def registered_domain(host: str) -> str:
    """The domain below the public suffix; the address itself for an IP; empty for a suffix alone and for no host.

    A top-level domain that the list does not know counts as a suffix. ModuleNotFoundError without the extra `curate`.

    Example:
        >>> registered_domain("news.bbc.co.uk"), registered_domain("a.b.github.io"), registered_domain("co.uk")
        ('bbc.co.uk', 'b.github.io', '')
    """
    if not host:
        return ""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return _suffixes().privatesuffix(host.lower().rstrip(".")) or ""


@memo(1)
def _suffixes() -> Any:
    try:
        from publicsuffixlist import PublicSuffixList
    except ModuleNotFoundError as error:
        if error.name != "publicsuffixlist":
            raise
        raise ModuleNotFoundError("a registered domain needs publicsuffixlist: pip install 'purelm[curate]'") from None
    return PublicSuffixList()


@dataclass(frozen=True)
class UrlFilter:
    """Which addresses to leave out: lists that the user supplies; by default nothing is left out.

    The rule of RefinedWeb (Penedo et al. 2023, appendix G.1): blocked domains; a word that is banned wherever it stands
    in the address (strict), one that is banned as a word of it (hard), and words of which `most_soft` + 1 different
    ones ban it (soft; two in the paper).
    """

    domains: Collection[str] = frozenset()  # in lower case; with them all hosts below
    urls: Collection[str] = frozenset()  # whole addresses
    strict: Collection[str] = ()  # letters and digits in lower case, found also inside of and across words
    hard: Collection[str] = frozenset()
    soft: Collection[str] = frozenset()
    most_soft: int = 1

    def __post_init__(self):
        check_int("most_soft", self.most_soft, 0)
        for name in ("domains", "urls", "strict", "hard", "soft"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(x, str) and x for x in value):
                raise ValueError(f"{name}={value!r}: give strings that are not empty")
            if name not in ("domains", "urls") and any(NOT_A_LETTER.search(x) for x in value):
                wrong = next(x for x in value if NOT_A_LETTER.search(x))
                raise ValueError(f"{name}: {wrong!r} can match nothing: give a-z and 0-9, in lower case")
            object.__setattr__(self, name, tuple(value) if name == "strict" else frozenset(value))
        object.__setattr__(self, "domains", frozenset(host_of(x) for x in self.domains))


def keep_url(document: Document, settings: UrlFilter) -> Document | Drop:
    """The document, unless its address is to be left out; one without an address stays.

    Drops: `domain`, `url`, `strict word`, `hard word`, `soft words`, with what was found.
    """
    if not document.url:
        return document
    if settings.domains:
        labels = host_of(document.url).split(".")
        for i in range(len(labels)):
            if (domain := ".".join(labels[i:])) in settings.domains:
                return Drop("domain", domain)
    if document.url in settings.urls:
        return Drop("url", document.url)
    if not (settings.strict or settings.hard or settings.soft):
        return document
    words = [word for word in NOT_A_LETTER.split(document.url.lower()) if word]
    joined = "".join(words)
    for word in settings.strict:
        if word in joined:
            return Drop("strict word", word)
    for word in words:
        if word in settings.hard:
            return Drop("hard word", word)
    soft = len(settings.soft.intersection(words)) if isinstance(settings.soft, frozenset) else 0
    return Drop("soft words", soft) if soft > settings.most_soft else document


def word_list(path: str | os.PathLike) -> frozenset[str]:
    """The entries of a list: a line each, without white space around; empty lines and those that begin with # are none.

    A million domains take about 100 MB. OSError for a file that cannot be read, ValueError for one that is not UTF-8.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)}: not UTF-8 (byte {error.start})") from None
    return frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))
