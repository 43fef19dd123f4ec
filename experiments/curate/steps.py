"""The steps of one document that a configuration asks for, and the lists and models that they need."""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from experiments.curate.config import Classes, Filter
from experiments.curate.evaluations import decontamination, files_of
from purelm.curate import classes, rules
from purelm.curate.document import Document, Drop, Step
from purelm.curate.extract import Extraction, extract
from purelm.curate.fasttext import label_of, load_fasttext
from purelm.curate.language import KeepLanguage, keep_language, known_languages
from purelm.curate.pii import PII, mask
from purelm.curate.url import UrlFilter, keep_url, word_list

__all__ = ["contents", "extraction", "steps_of", "warm"]

RULES = {"english": rules.ENGLISH, "all": rules.ALL, "course": rules.COURSE}
# Settings of each step by a classifier, and whether the class is kept.
CLASSES: dict[str, tuple[Callable[..., classes.KeepClass], bool]] = {
    "quality": (classes.quality, True), "toxicity": (classes.toxicity, False), "nsfw": (classes.nsfw, False),
}  # fmt: skip


def extraction(cfg: Filter) -> Callable[..., Document | Drop]:
    """raw -> Document | Drop."""
    settings = Extraction(main_content=cfg.main_content, most_bytes=int(cfg.most_megabytes * 1e6))
    return partial(extract, settings=settings)


def steps_of(cfg: Filter) -> Mapping[str, Step]:
    """By name, in order. ValueError and OSError for lists, models and modules that cannot be used."""
    steps: dict[str, Step] = {}
    if cfg.domains or cfg.words:
        domains = word_list(cfg.domains) if cfg.domains else frozenset()
        hard = word_list(cfg.words) if cfg.words else frozenset()
        steps["url"] = partial(keep_url, settings=UrlFilter(domains=domains, hard=hard))
    if cfg.languages != ("all",):
        model = load_fasttext(cfg.language_model) if cfg.language_model else None
        _check_languages(cfg.languages, frozenset(model.labels) if model else known_languages())
        more = {"identify": partial(label_of, model)} if model else {}
        steps["language"] = partial(keep_language, settings=KeepLanguage(cfg.languages, cfg.language_least, **more))
    if cfg.rules != "none":
        steps["rules"] = partial(rules.judged, rules=RULES[cfg.rules])
    for name, (preset, kept) in CLASSES.items():
        settings = class_of(f"filter.{name}", getattr(cfg, name), preset)
        if settings is not None:
            steps[name] = partial(classes.keep_class if kept else classes.drop_class, settings=settings)
    decontaminate = decontamination(cfg.decontaminate)
    if decontaminate is not None:
        steps["decontaminate"] = decontaminate
    if cfg.pii:
        steps["pii"] = partial(mask, settings=PII())
    if cfg.classifier:
        steps["classifier"] = classifier(cfg.classifier)
    return steps


def _check_languages(given: tuple[str, ...], known: frozenset[str]) -> None:
    """ValueError for a language that no text is found to have: all would be dropped."""
    for code in given:
        if code not in known:
            several = "all stands alone" if code == "all" else f"it knows {', '.join(sorted(known))}"
            raise ValueError(f"filter.languages {code!r}: {several}")


def class_of(name: str, cfg: Classes, preset: Callable[..., classes.KeepClass]) -> classes.KeepClass | None:
    """The settings of a step by a classifier; None where none is asked for. ValueError names the flag."""
    if cfg == Classes():
        return None
    if cfg.model is not None and cfg.label is not None and cfg.least is None:
        raise ValueError(
            f"{name}.least: must be given with a label of one's own; the default is that of a public model. The table "
            "of experiments.train_classifier helps to choose it"
        )
    more = {key: value for key, value in (("label", cfg.label), ("least", cfg.least)) if value is not None}
    try:
        return preset(cfg.model, **more)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def classifier(name: str) -> Step:
    """The function that MODULE:NAME names."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function) if module and function else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"filter.classifier {name!r}: {error}") from None
    if not callable(found):
        raise ValueError(f"filter.classifier {name!r}: give MODULE:NAME of a function Document -> Document | Drop")
    return found


def contents(cfg: Filter) -> dict[str, str]:
    """Hashes of the files that steps are made from: the lists, the models, test sets, the classifier's source."""
    files: dict[str, Any] = {"domains": cfg.domains, "words": cfg.words, "language_model": cfg.language_model}
    for name in CLASSES:
        files[f"{name}.model"] = getattr(cfg, name).model
    for file in files_of(cfg.decontaminate):
        files[f"decontaminate {file}"] = file
    if cfg.classifier:
        files["classifier"] = _source(cfg.classifier)
    return {f"{name}'s content": _sha256(Path(path)) for name, path in files.items() if path is not None}


def _source(name: str) -> str:
    step = inspect.unwrap(classifier(name))
    try:
        return inspect.getfile(step.func if isinstance(step, partial) else step)
    except TypeError:
        raise ValueError(
            f"filter.classifier {name!r}: its source is not to be found: give a function of a module of your own"
        ) from None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def warm(steps: Mapping[str, Step]) -> None:
    """Load models and machine code, so that the first document's time is like that of the others."""
    document: Any = Document("", "The quick brown fox jumps over the lazy dog. " * 30, "http://example.org/")
    for name, step in steps.items():
        if name != "classifier":
            step(document)
