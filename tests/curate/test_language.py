"""Languages. Oracles: texts whose language is known, the Declaration of Human Rights where it is; py3langid itself."""

import sys
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.curate import language as module
from purelm.curate.document import Document, Drop
from purelm.curate.language import NO_LANGUAGE, KeepLanguage, identify, keep_language, language_of_script

pytest.importorskip("py3langid")

KNOWN = {
    "en": "Moby Dick is a novel by Herman Melville about the voyage of a whaling ship and its captain.",
    "de": "Der Zauberberg ist ein Roman, in dem ein junger Mann seinen Vetter in den Bergen besucht.",
    "fr": "Bonjour \u00e0 tous, je suis tr\u00e8s heureux de vous accueillir sur cette page.",
    "ru": "\u042d\u0442\u043e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0442\u0435\u043a\u0441\u0442 \u043e "
    "\u043f\u043e\u0433\u043e\u0434\u0435, \u043a\u043e\u0442\u043e\u0440\u044b\u0439.",
    "zh": "\u6b22\u8fce\u6765\u5230\u6211\u4eec\u7684\u7f51\u7ad9",
}


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("\u4f60\u597d", "zh"), ("\u6771\u4eac\u30bf\u30ef\u30fc", "ja"), ("\u3053\u3093", "ja"),
        ("\uc548\ub155", "ko"), ("\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "th"), ("\u05e9\u05dc\u05d5\u05dd", "he"),
        ("\u03b3\u03b5\u03b9\u03b1", "el"),
        ("\u10d2\u10d0\u10db", "ka"), ("\u0be8\u0ba9\u0bcd\u0bb1\u0bbf", "ta"), ("\u12a0\u121b\u122d", "am"),
    ],
)  # fmt: skip
def test_scripts(text, language):
    """Sure at any length, digits and signs not counted; a fifth of other letters is the most."""
    assert identify(text) == identify(f"{text}, 12!") == (language, 1.0)
    letters = sum(c.isalpha() for c in text)
    mixed = language_of_script(text * 4 + "a" * letters)
    assert mixed == (language, pytest.approx(0.8, abs=0.05)) or mixed is None
    assert language_of_script(text + "a" * letters) is None


def test_no_language():
    for text in ("", " \n", "12:30 - 14:00", "\u2764 \U0001f600", "x" * 0):
        assert identify(text) == NO_LANGUAGE
    assert language_of_script("Tokyo") is None and language_of_script("\u0434\u0430") is None
    assert identify("1" * 50 + KNOWN["en"], most_characters=50) == NO_LANGUAGE
    with pytest.raises(ValueError, match="most_characters"):
        identify("x", 0)


@given(st.text(max_size=60))
def test_scores(text):
    """In [0, 1], and 0 where there is no letter alone; equal to py3langid's normalised where that is asked."""
    language, score = identify(text)
    assert 0 <= score <= 1 and isinstance(language, str)
    assert (language == "und") == (not any(module.LETTER.match(c) for c in text))
    if text.isascii() and language != "und":
        assert (language, score) == module._identifier().classify(text)


def test_step():
    document = Document("1", KNOWN["en"], meta={"a": 1})
    kept = keep_language(document, KeepLanguage(["en", "de"]))
    assert kept.text == document.text and kept.meta["language"] == "en" and kept.meta["a"] == 1
    assert keep_language(document, KeepLanguage(["de"])) == Drop("language", "en")
    unsure = KeepLanguage(["xx"], 0.5, identify=lambda text: ("xx", 0.4))
    assert keep_language(document, unsure) == Drop("unsure", 0.4)
    assert keep_language(document, KeepLanguage(["xx"], 0.4, unsure.identify)).meta["language_score"] == 0.4
    for wrong in ({"languages": "en"}, {"languages": []}, {"least": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            KeepLanguage(**wrong)


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ModuleNotFoundError, match=r"py3langid: pip install 'purelm\[curate\]'"):
        module._identifier.__wrapped__()


def test_human_rights(shared_data):
    """Twenty languages, each the whole declaration, and its lines of 40 characters and more: 98 in 100."""
    path = shared_data / "multilingual" / "udhr2.zip"
    if not path.exists():
        pytest.skip(f"no {path}")
    names = {
        "eng": "en", "deu": "de", "fra": "fr", "spa": "es", "ita": "it", "nld": "nl", "pol": "pl", "rus": "ru",
        "ukr": "uk", "jpn": "ja", "kor": "ko", "ell": "el", "fin": "fi", "hun": "hu", "tur": "tr", "arb": "ar",
        "heb": "he", "tha": "th", "vie": "vi", "swe": "sv",
    }  # fmt: skip
    right = total = 0
    with zipfile.ZipFile(path) as archive:
        files = {name.rpartition("/")[2].split(".")[0].split("_")[0]: name for name in sorted(archive.namelist())[::-1]}
        for name, code in names.items():
            text = archive.read(files[name]).decode("utf-8-sig")
            assert identify(text)[0] == code, name
            lines = [line.strip() for line in text.splitlines() if len(line.strip()) >= 40][:20]
            right += sum(identify(line)[0] == code for line in lines)
            total += len(lines)
    assert total > 300 and right >= 0.98 * total
