"""The language of a text, and how sure that is.

Without a model file it is py3langid (a naive Bayes of byte n-grams, 140 labels, the model inside of the package; extra
`curate`), its scores normalised to a distribution over the languages. For short texts a script that one language has to
itself decides before it: a Bayes of four Han characters is unsure between Chinese and Wu.
With a fastText model, `fasttext.label_of` takes the place of `identify`.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from purelm.caches import memo
from purelm.curate.bayes import Bayes, bayes_of, classify
from purelm.curate.document import Document, Drop
from purelm.data.checks import check_int
from purelm.tokenizer.engine import has_numba

__all__ = [
    "NO_LANGUAGE", "KeepLanguage", "Language", "identify", "keep_language", "known_languages", "language_of_script",
]  # fmt: skip

Language = tuple[str, float]  # (ISO 639 code, score in [0, 1])
NO_LANGUAGE: Language = ("und", 0.0)  # ISO 639-2 for undetermined: a text without letters
MOST_CHARACTERS = 1000  # that are looked at; py3langid takes 0.4 ms for them
SHORT = 40  # letters, below which a script decides
SCRIPT_SHARE = 0.8  # of the letters
# Scripts, by the first word of the characters' Unicode names, and the language that nearly all text in them has.
SCRIPTS = {
    "CJK": "zh", "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko", "THAI": "th", "LAO": "lo", "KHMER": "km",
    "MYANMAR": "my", "GREEK": "el", "HEBREW": "he", "ARMENIAN": "hy", "GEORGIAN": "ka", "TAMIL": "ta", "TELUGU": "te",
    "KANNADA": "kn", "MALAYALAM": "ml", "GUJARATI": "gu", "GURMUKHI": "pa", "ORIYA": "or", "SINHALA": "si",
    "ETHIOPIC": "am",
}  # fmt: skip
LETTER = re.compile(r"[^\W\d_]")


def language_of_script(text: str) -> Language | None:
    """The language of a text by its script alone, with the script's share of the letters as score.

    None where no script that a single language uses has SCRIPT_SHARE of the letters. Han with a kana among it is
    Japanese.

    Example:
        >>> language_of_script("\u6771\u4eac\u30bf\u30ef\u30fc"), language_of_script("Tokyo")  # Han and kana; Latin
        (('ja', 1.0), None)
    """
    letters = LETTER.findall(text)
    if not letters:
        return None
    counts: Counter[str] = Counter()
    for letter in letters:
        name = unicodedata.name(letter, "").split(" ", 1)[0]
        counts[SCRIPTS.get(name.split("-")[0], "")] += 1
    if counts["ja"] and counts["zh"]:
        counts["ja"] += counts.pop("zh")
    language, n = max(counts.items(), key=lambda item: item[1])
    share = n / len(letters)
    return (language, share) if language and share >= SCRIPT_SHARE else None


def identify(text: str, most_characters: int = MOST_CHARACTERS) -> Language:
    """(language, score) of a text by its first characters; NO_LANGUAGE where there are no letters among them.

    ModuleNotFoundError where the extra `curate` is not installed.

    Example:
        >>> identify("The quick brown fox jumps over the lazy dog.")[0], identify("12:30")
        ('en', ('und', 0.0))
    """
    check_int("most_characters", most_characters, 1)
    text = text[:most_characters]
    if not LETTER.search(text):
        return NO_LANGUAGE
    if len(text) < 4 * SHORT and not text.isascii() and len(LETTER.findall(text)) < SHORT:
        if (found := language_of_script(text)) is not None:
            return found
    language, score = classify(_bayes(), text) if has_numba() else _identifier().classify(text)
    return language, min(1.0, max(0.0, float(score)))


def known_languages() -> frozenset[str]:
    """The codes that `identify` may give, but for "und"."""
    return frozenset(_identifier().nb_classes) | frozenset(SCRIPTS.values())


@memo(1)
def _bayes() -> Bayes:
    return bayes_of(_identifier())


@memo(1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "py3langid":
            raise
        raise ModuleNotFoundError("a language needs py3langid: pip install 'purelm[curate]'") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@dataclass(frozen=True)
class KeepLanguage:
    """Which languages are kept."""

    languages: Collection[str] = ("en",)
    least: float = 0.65  # score; 0.65 in FineWeb and DCLM, there of fastText's
    identify: Callable[[str], Language] = identify  # text -> (language, score)

    def __post_init__(self):
        if isinstance(self.languages, str) or not self.languages or not all(isinstance(x, str) for x in self.languages):
            raise ValueError(f"languages={self.languages!r}: give codes such as ('en', 'de')")
        object.__setattr__(self, "languages", tuple(self.languages))
        if not 0 <= self.least <= 1:
            raise ValueError(f"least={self.least!r}: allowed is 0 to 1")


def keep_language(document: Document, settings: KeepLanguage) -> Document | Drop:
    """The document with its language and score noted.

    Drops: `language`, with the one found; `unsure`, with its score, where that is below the least.
    """
    language, score = settings.identify(document.text)
    if language not in settings.languages:
        return Drop("language", language)
    if score < settings.least:
        return Drop("unsure", score)
    return document.noted(language=language, language_score=score)
