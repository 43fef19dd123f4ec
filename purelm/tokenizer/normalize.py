r"""Unicode normalization of the text between special tokens, as Hugging Face's library does it, and the second cut.

    text --cut at special tokens--> spans --normal form--> spans --cut at bpe.normalized_tokens--> spans

A special token is looked for in the text as it is; one of `bpe.normalized_tokens` in what the first cut leaves, after
normalization, as its own normal form. Each span is normalized apart. Decoding gives normalized text: a normal form
cannot be undone, and offsets count its characters.

Unicode versions. The library's tables are of Unicode 10, unicodedata's depend on Python (14.0 in 3.11). A character
that is older is the same in both, by Unicode's stability policy. The newer ones that have a combining class or a
decomposition are `_NEWER`: they are left as they are, as the library leaves them, and what lies between them is
normalized apart. With that, the results are equal for all single characters and all pairs that were tried
(tokenizers 0.23, Python 3.11).
"""

import re
import unicodedata
from collections.abc import Iterator
from typing import Literal

from purelm.tokenizer import tables
from purelm.tokenizer.bpe import BPE
from purelm.tokenizer.splitting import special_matcher

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
_STRETCH = 256  # characters that are normalized at a time

_NEWER = re.compile(
    "([\u05c8-\u05c9\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b-\u0d3c\u0eba\u1715\u1abf-\u1af0\u1df6-\u1dfa"
    "\u32ff\ua7f2-\ua7f4\ua82c\uab69\U00010781-\U00010785\U00010787-\U000107b0\U000107b2-\U000107ba"
    "\U00010d24-\U00010d27\U00010d69-\U00010d6d\U00010eab-\U00010eac\U00010ecb-\U00010ecf\U00010ef0-\U00010efb"
    "\U00010efd-\U00010eff\U00010f46-\U00010f50\U00010f82-\U00010f85\U00011070\U0001133b\U000113ce-\U000113d0"
    "\U0001145e\U00011839-\U0001183a\U00011935\U00011938\U0001193d-\U0001193e\U00011943\U000119e0\U00011a34\U00011a47"
    "\U00011a99\U00011d42\U00011d44-\U00011d45\U00011d97\U00011f41-\U00011f42\U0001612f\U00016ff0-\U00016ff1"
    "\U0001d127-\U0001d128\U0001d250-\U0001d252\U0001d25b-\U0001d25c\U0001d25f\U0001d280-\U0001d281\U0001e08f"
    "\U0001e130-\U0001e136\U0001e2ae\U0001e2ec-\U0001e2ef\U0001e4ec-\U0001e4ef\U0001e5ee-\U0001e5ef\U0001e6e3"
    "\U0001e6e6\U0001e6ee-\U0001e6ef\U0001e6f5\U0001f16c\U0001fbf0-\U0001fbf9]+)"
)


def normalize(text: str, form: Form | None) -> str:
    r"""`text` in a Unicode normal form (None: as it is), with the characters of `_NEWER` left as they are.

    >>> normalize("e\u0301", "NFC") == "\u00e9"
    True
    """
    if form is None or text.isascii() or unicodedata.is_normalized(form, text):
        return text
    parts, start = [], 0
    while start < len(text):  # mostly a few words are to be changed, and the rest is let through quickly
        end = text.find(" ", start + _STRETCH)  # a space is a border of every normal form
        end = len(text) if end < 0 else end
        parts.append(_normalize(text[start:end], form))
        start = end
    return "".join(parts)


def _normalize(text: str, form: Form) -> str:
    if text.isascii() or unicodedata.is_normalized(form, text):
        return text
    parts = _NEWER.split(text)
    parts[::2] = [unicodedata.normalize(form, part) for part in parts[::2]]
    return "".join(parts)


def is_plain(bpe: BPE, text: str) -> bool:
    """Whether `text` needs one cut at special tokens and nothing else: then `segments` changes no character."""
    if bpe.normalized_tokens:
        return False
    # Parts of a text in a normal form are in it too.
    return bpe.normalizer is None or text.isascii() or unicodedata.is_normalized(bpe.normalizer, text)


def segments(bpe: BPE, text: str, allowed: frozenset[str]) -> Iterator[tuple[str, int]]:
    """(normalized text, id of the special token behind it or -1), one after the other; the last has -1.

    allowed: the special tokens that are cut out.
    """
    ids = tables.special_ids(bpe)
    second = {normalize(name, bpe.normalizer): ids[name] for name in allowed & bpe.normalized_tokens}
    for part, token_id in _cut(text, {name: ids[name] for name in allowed - bpe.normalized_tokens}):
        found = list(_cut(normalize(part, bpe.normalizer), second))
        yield from found[:-1]
        yield found[-1][0], token_id


def _cut(text: str, ids: dict[str, int]) -> Iterator[tuple[str, int]]:
    start = 0
    for match in special_matcher(frozenset(ids)).finditer(text) if ids else ():
        yield text[start : match.start()], ids[match.group()]
        start = match.end()
    yield text[start:], -1
