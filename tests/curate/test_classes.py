"""Classifiers as steps. Oracles: the scorers that they are given, and models of known scores."""

from functools import partial

import pytest
import torch

from purelm.curate.classes import KeepClass, drop_class, fasttext_class, keep_class, nsfw, quality, scorer, toxicity
from purelm.curate.classifier import Classifier, Config, classify
from purelm.curate.classifier_files import save_classifier
from purelm.curate.document import Document, Drop, outcomes
from purelm.curate.fasttext import load_fasttext, scores_of
from purelm.curate.features import Features
from tests.curate.test_fasttext import model_file

DOCUMENT = Document("1", "some text", meta={"a": 1})


def always(label, score):
    return lambda text: (label, score)


def test_keep_and_drop():
    settings = KeepClass(always("good", 0.7), "good", 0.7, "quality")
    kept = keep_class(DOCUMENT, settings)
    assert kept == DOCUMENT.noted(quality="good", quality_score=0.7) and DOCUMENT.meta == {"a": 1}
    assert drop_class(DOCUMENT, settings) == Drop("quality: good", 0.7)
    high = KeepClass(always("good", 0.7), "good", 0.71, "quality")
    assert keep_class(DOCUMENT, high) == Drop("quality: below least", 0.7)
    assert drop_class(DOCUMENT, high) == kept
    other = KeepClass(always("bad", 0.9), "good", 0.0, "quality")
    assert keep_class(DOCUMENT, other) == Drop("quality: bad", 0.9)
    assert drop_class(DOCUMENT, other) == DOCUMENT.noted(quality="bad", quality_score=0.9)
    steps = {"q": partial(keep_class, settings=high)}
    assert [o.step for o in outcomes(steps, [DOCUMENT])] == ["q"]


@pytest.mark.parametrize(
    "bad, message",
    [({"least": 1.1}, "least=1.1"), ({"least": float("nan")}, "least=nan"), ({"label": ""}, "label="),
     ({"name": ""}, "name="), ({"scorer": None}, "scorer=None"), ({"least": True}, "least=True")],
)  # fmt: skip
def test_ranges(bad, message):
    with pytest.raises(ValueError, match=message):
        KeepClass(**{"scorer": always("a", 1.0), "label": "a", **bad})


@pytest.mark.parametrize("preset, name", [(toxicity, "toxicity"), (nsfw, "nsfw"), (quality, "quality")])
def test_presets_refuse_without_a_model(preset, name, tmp_path):
    with pytest.raises(ValueError, match=rf"^{name}: no model is given .*train_classifier.*\.ftz file such") as error:
        preset()
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no such file"):
        preset(tmp_path / "none.bin")


def test_models_of_both_kinds_are_one_protocol(tmp_path):
    cfg = Config(("toxic", "fine"), Features(16, 1))
    params = {"rows": torch.zeros(16, 2), "bias": torch.tensor([1.0, 0.0])}
    ours, theirs = tmp_path / "m.safetensors", tmp_path / "m.bin"
    model = Classifier(params, cfg, 2.0)
    save_classifier(ours, model)
    model_file(theirs)
    settings = toxicity(ours)
    score = 1 / (1 + 2.718281828459045**-0.5)
    assert drop_class(DOCUMENT, settings) == Drop("toxicity: toxic", pytest.approx(score))
    assert scorer(ours)("some text") == classify(model, "some text") == ("toxic", pytest.approx(score))
    assert scorer(ours, "fine")("some text") == ("fine", pytest.approx(1 - score))
    assert scorer(ours, "fine")("  ") == ("und", 0.0)
    fast = load_fasttext(theirs)
    expected = scores_of(fast, "one two\none")
    for i, label in enumerate(fast.labels):
        assert scorer(theirs, label)("one two\none") == (label, pytest.approx(expected[i]))
    assert scorer(theirs)("one two\none") == fasttext_class(fast, "one two\none") == (
        fast.labels[expected.argmax()], pytest.approx(expected.max())
    )  # fmt: skip
    with pytest.raises(ValueError, match="has no label 'hq'; it has toxic, fine"):
        quality(ours)
    with pytest.raises(ValueError, match="has no label 'toxic'"):
        toxicity(theirs)
    with pytest.raises(ValueError, match=r"models end in \.safetensors"):
        scorer(tmp_path / "m.pt")
    with pytest.raises(ValueError, match="label='x'"):
        fasttext_class(fast, "one", "x")
