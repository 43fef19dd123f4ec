"""The compiled walk of the language identifier. Oracle: py3langid."""

import zipfile

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("py3langid")
pytest.importorskip("numba")
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from purelm.curate.bayes import bayes_of, classify

THEIRS = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
OURS = bayes_of(THEIRS)


@given(st.text(max_size=60))
@example("")
@example("LA VIE EN ROSE, CAF\xc9")
@example("e\u0301te\u0301 \ud800 la me\u0301moire")
@example("the of and " * 400)
@example("\u041e\u0432\u043e \u0458\u0435 \u043d\u0435\u043a\u0438 \u0442\u0435\u043a\u0441\u0442")
def test_it_says_what_py3langid_says(text):
    assert classify(OURS, text) == THEIRS.classify(text)


def test_in_many_languages(shared_data):
    with zipfile.ZipFile(shared_data / "multilingual" / "udhr2.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".txt")][::8]
        texts = [archive.read(name).decode("utf-8", "replace")[:700] for name in names]
    found = [classify(OURS, text) for text in texts]
    assert found == [THEIRS.classify(text) for text in texts]
    assert len({label for label, _ in found}) > 15
