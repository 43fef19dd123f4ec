"""The step `decontaminate`: questions of evaluation sets, looked for in documents."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.curate.config import Decontaminate
from purelm.curate import decon
from purelm.curate import decontaminate as runs
from purelm.curate.document import Step
from purelm.data import documents
from purelm.data.archives import bare_name

__all__ = ["decontamination", "files_of", "looked_for", "texts_of"]

PRESETS = {
    "gpt3": runs.GPT3, "datatrove": runs.DATATROVE, "palm": runs.PALM, "llama2": runs.LLAMA2, "tulu3": runs.TULU3,
}  # fmt: skip
TEXT_ENDINGS = (".txt", ".zip")


def files_of(cfg: Decontaminate) -> list[Path]:
    """The files of all that is named, each once."""
    from experiments.data_kinds import question_files  # it imports much

    return list(dict.fromkeys(file for path in cfg.files for file in question_files(path)))


def texts_of(file: Path) -> list[tuple[str, str]]:
    """(id, text) of a file: the questions of a test set, the documents of text."""
    from experiments.data_kinds import questions_in

    if bare_name(file.name.lower()).endswith(TEXT_ENDINGS):
        return [(f"{file.name} document {i}", text) for i, text in enumerate(documents(file))]
    return questions_in(file)


def sets_of(cfg: Decontaminate) -> Mapping[str, list[tuple[str, str]]]:
    """The texts of each file by its name, or by its path where another file has that name."""
    files = files_of(cfg)
    names = [file.name for file in files]
    return {file.name if names.count(file.name) == 1 else str(file): texts_of(file) for file in files}


def decontamination(cfg: Decontaminate) -> Step | None:
    """The step; None where none is asked for. `step.keywords["tests"]` is its index.

    ValueError where there are settings without files, settings that do not fit, and files without a text that is long
    enough to be looked for.
    """
    if cfg == Decontaminate():
        return None
    name = "filter.decontaminate"
    if not cfg.files:
        raise ValueError(f"{name}: no evaluation set is given and none comes with the library: give its files")
    preset = cfg.preset or "gpt3"
    tests: Any
    step: Step
    if preset == "decon":
        if cfg.action not in (None, "drop"):
            raise ValueError(f"{name}.action {cfg.action!r}: decon only drops")
        more: dict[str, Any] = {key: x for key, x in (("n", cfg.n), ("least", cfg.share)) if x is not None}
        more["least_words"] = max(cfg.n or 0, decon.Decon().least_words)
        try:
            settings = decon.Decon(**more)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        sets = {key: [decon.Example(*text) for text in texts] for key, texts in sets_of(cfg).items()}
        tests = decon.index(sets, settings)
        n_texts = len(tests.names) + tests.n_ignored
        step = partial(decon.cleared, tests=tests)
    else:
        more = {key: value for key in ("n", "share", "action") if (value := getattr(cfg, key)) is not None}
        chosen = replace(PRESETS[preset], **more)
        tests = runs.index(sets_of(cfg), chosen.n)
        n_texts = len(tests.ids)
        step = partial(runs.decontaminated, tests=tests, settings=chosen)
    if n_texts == tests.n_ignored:
        raise ValueError(f"{name}.files: none of their {n_texts} texts is long enough to be looked for")
    return step


def looked_for(step: Any) -> dict[str, int]:
    """For the report: how many texts are looked for, and how many are not since they are too short."""
    tests = step.keywords["tests"]
    n = len(tests.names) if isinstance(tests, decon.Index) else len(tests.ids) - tests.n_ignored
    return {"looked for": n, "too short": tests.n_ignored}
