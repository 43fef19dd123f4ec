"""A classifier as a step: keep the documents of a class, or drop them; a model of ours or a fastText model.

    find = scorer("quality.safetensors", "positive")         # text -> ("positive", its score)
    partial(keep_class, settings=KeepClass(find, "positive", 0.5, name="quality"))
    partial(drop_class, settings=toxicity("jigsaw_fasttext_bigrams_hatespeech_final.bin"))

There is no default model and no word list in its place: `toxicity`, `nsfw` and `quality` without a path raise and say
where a model comes from.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from purelm.curate.classifier import NO_CLASS, classify
from purelm.curate.classifier_files import load_classifier
from purelm.curate.document import Document, Drop
from purelm.curate.fasttext import FastText, load_fasttext, scores_of

__all__ = [
    "Class", "KeepClass", "Scorer", "drop_class", "fasttext_class", "keep_class", "nsfw", "quality", "scorer",
    "toxicity",
]  # fmt: skip

Class = tuple[str, float]  # (label, score in [0, 1])
Scorer = Callable[[str], Class]

FASTTEXT_ENDINGS = (".bin", ".ftz")


@dataclass(frozen=True)
class KeepClass:
    """Which class is meant, and from which score on a document is of it."""

    scorer: Scorer  # text -> the best label and its score, or always `label` and its score, as `scorer` binds it
    label: str
    least: float = 0.5
    name: str = "class"  # of what is added to meta: NAME, NAME_score; and of the reason of a Drop

    def __post_init__(self):
        if not callable(self.scorer):
            raise ValueError(f"scorer={self.scorer!r}: give a function text -> (label, score)")
        for name in ("label", "name"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: give a name")
        if isinstance(self.least, bool) or not isinstance(self.least, int | float) or not 0 <= self.least <= 1:
            raise ValueError(f"least={self.least!r}: allowed is 0 to 1")


def keep_class(document: Document, settings: KeepClass) -> Document | Drop:
    """The document with label and score noted, if it is of the class.

    Drops: `NAME: LABEL`, with the score, where another label is the best; `NAME: below least`, with the score. A text
    without words the model knows (label "und") is dropped as another label.
    """
    label, score = settings.scorer(document.text)
    if label != settings.label:
        return Drop(f"{settings.name}: {label}", score)
    if score < settings.least:
        return Drop(f"{settings.name}: below least", score)
    return document.noted(**{settings.name: label, f"{settings.name}_score": score})


def drop_class(document: Document, settings: KeepClass) -> Document | Drop:
    """The document with label and score noted, unless it is of the class: Drop `NAME: LABEL`, with the score."""
    label, score = settings.scorer(document.text)
    if label == settings.label and score >= settings.least:
        return Drop(f"{settings.name}: {label}", score)
    return document.noted(**{settings.name: label, f"{settings.name}_score": score})


def fasttext_class(model: FastText, text: str, label: str | None = None, most_characters: int = 100_000) -> Class:
    """`classifier.classify` of a fastText model: the best label, or the one that is asked for, and its score."""
    if label is not None and label not in model.labels:
        raise ValueError(f"label={label!r}: the model has {', '.join(model.labels[:20])}")
    found = scores_of(model, text[:most_characters])
    if not found.any():
        return NO_CLASS
    best = int(found.argmax()) if label is None else model.labels.index(label)
    return model.labels[best], min(1.0, float(found[best]))


def scorer(path: str | os.PathLike, label: str | None = None) -> Scorer:
    """The function text -> (label, score) of a model's file: .safetensors of ours, .bin or .ftz of fastText.

    label: always this one's score, so that a threshold below a half means what it says; None: the best label.
    ValueError names a file of another kind, a damaged one, and a label that the model does not have.
    """
    name = os.fspath(path)
    if name.lower().endswith(FASTTEXT_ENDINGS):
        found = load_fasttext(name)
        labels, function = found.labels, partial(fasttext_class, found, label=label)
    elif name.lower().endswith(".safetensors"):
        ours = load_classifier(name)
        labels, function = ours.cfg.labels, partial(classify, ours, label=label)
    else:
        raise ValueError(f"{name}: models end in .safetensors (experiments.train_classifier), .bin or .ftz (fastText)")
    if label is not None and label not in labels:
        raise ValueError(f"{name}: has no label {label!r}; it has {', '.join(labels[:20])}")
    return function


def toxicity(path: str | os.PathLike | None = None, label: str = "toxic", least: float = 0.4) -> KeepClass:
    """For `drop_class`: toxic speech, by Dolma's fastText model (labels toxic, non-toxic) or one of your own.

    0.4 is the threshold of Dolma v1 (Soldaini et al. 2024, arXiv:2402.00159), there for sentences.
    """
    return _preset("toxicity", path, label, least, "Dolma's jigsaw_fasttext_bigrams_hatespeech_final.bin")


def nsfw(path: str | os.PathLike | None = None, label: str = "nsfw", least: float = 0.4) -> KeepClass:
    """For `drop_class`: obscene text, by Dolma's fastText model (labels nsfw, non-nsfw) or one of your own."""
    return _preset("nsfw", path, label, least, "Dolma's jigsaw_fasttext_bigrams_nsfw_final.bin")


def quality(path: str | os.PathLike | None = None, label: str = "hq", least: float = 0.018112) -> KeepClass:
    """For `keep_class`: text like that of good sources, by DCLM's fastText model (labels hq, cc) or one of your own.

    0.018112 is the score of DCLM's model that a tenth of its pool exceeds (Li et al. 2024, arXiv:2406.11794, code):
    another model needs its own, see the table of experiments.train_classifier.
    """
    return _preset("quality", path, label, least, "DCLM's openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train.bin")


def _preset(name: str, path: str | os.PathLike | None, label: str, least: float, public: str) -> KeepClass:
    if path is None:
        raise ValueError(
            f"{name}: no model is given and none comes with the library: give the path of a .safetensors file of "
            f"experiments.train_classifier, or of a fastText .bin or .ftz file such as {public}"
        )
    return KeepClass(scorer(path, label), label, least, name)
