"""The studies of `experiments.rl_study`: a question, the flags of three programs, and what is varied.

A run of a study is prepare_task, then `sft` for a start that has learned the form of answers, then `grpo`. Flags are
those of the programs, without dashes. Variations of one seed go on from the same start where task and sft are the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from purelm.align import advantages, aggregation
from purelm.align.recipe import Recipe
from purelm.align.recipes import RECIPES

__all__ = ["OWN", "STUDIES", "Flags", "Study", "Variation", "argv", "scaled_down"]

Flags = Mapping[str, Any]  # {"optim.lr": 1e-3, "sort.n-numbers": (3, 5), "no-export": ()}


@dataclass(frozen=True)
class Variation:
    """What differs from the study's flags."""

    label: str
    grpo: Flags = field(default_factory=dict)
    sft: Flags = field(default_factory=dict)
    task: Flags = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """One question, answered by runs of every variation with every seed."""

    name: str
    question: str
    variations: tuple[Variation, ...]
    task: Flags
    sft: Flags
    grpo: Flags
    note: str = ""
    """what a reader of the results must know"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of the start and of the run that goes on from it; the task is the same"""


def argv(flags: Flags) -> list[str]:
    """As a command line has them.

    >>> argv({"optim.lr": 1e-3, "sort.n-numbers": (3, 5), "no-export": ()})
    ['--optim.lr', '0.001', '--sort.n-numbers', '3', '5', '--no-export']
    """
    return [
        word
        for name, x in flags.items()
        for word in (f"--{name}", *map(str, x if isinstance(x, tuple) else (x,)))
    ]  # fmt: skip


def scaled_down(study: Study) -> Study:
    """Two variations and two seeds of runs that take a second: whether everything works, and no more."""
    model = {"model.d-model": 16, "model.n-layers": 1, "model.n-heads": 2}
    return replace(
        study,
        name=f"{study.name}_smoke",
        variations=study.variations[:2],
        task={**study.task, "n-train": 40, "n-heldout": 8, **model},
        sft={**study.sft, "steps": 2, "batch-size": 4},
        grpo={**study.grpo, "steps": 3, "prompts": 2, "group-size": 4, "eval-every": 1, "eval-prompts": 8},
        seeds=study.seeds[:2],
    )


# Sorting five digits, by a model of 193,088 parameters that has seen 60 batches of answers.
TASK = {"task": "sort", "n-train": 4000, "n-heldout": 200, "sort.n-numbers": (5, 5)}
SFT = {
    "response": " {response}", "grade": "exact", "max-length": 64, "max-new-tokens": 12, "steps": 60, "batch-size": 64,
    "optim.lr": 2e-3, "eval-every": 0,
}  # fmt: skip
GRPO = {
    "gold": "{response}", "grade": "exact", "recipe": "course2026_grpo", "steps": 300, "prompts": 16, "group-size": 16,
    "max-new-tokens": 12, "optim.lr": 1e-3, "optim.schedule": "linear", "optim.lr-min-ratio": 0.05,
    "optim.warmup-steps": 20, "eval-every": 20, "eval-prompts": 200, "rows-per-pass": 256, "sample-rows": 256,
    "no-export": (),
}  # fmt: skip
OFF_POLICY = {**GRPO, "recipe": "course2026_off_clip", "optim.lr": 3e-4}


def _own(source: str, **objective: Any) -> Recipe:
    """CS336's GRPO, on-policy, with other parts."""
    base = RECIPES["course2026_grpo"]
    return replace(base, objective=replace(base.objective, **objective), source=source)


_constant = RECIPES["course2026_dr_grpo"].objective.aggregate
# Compositions that differ from CS336's GRPO in what is asked alone; not published recipes, and known to studies alone.
OWN: dict[str, Recipe] = {
    "study_raw": _own("study of baselines", advantage=advantages.raw),
    "study_centered": _own("study of baselines", advantage=advantages.centered),
    "study_leave_one_out": _own("study of baselines", advantage=advantages.leave_one_out),
    "study_constant": _own("study of normalisation", aggregate=_constant),
    "study_token_mean": _own("study of normalisation", aggregate=aggregation.token_mean),
    "study_centered_token_mean": _own(
        "study of normalisation", advantage=advantages.centered, aggregate=aggregation.token_mean
    ),
}


def _recipes(**labels: str) -> tuple[Variation, ...]:
    return tuple(Variation(label.replace("_", " "), {"recipe": name}) for label, name in labels.items())


def _study(name: str, question: str, variations: tuple[Variation, ...], **changes: Any) -> Study:
    return Study(name, question, variations, **{"task": TASK, "sft": SFT, "grpo": GRPO, **changes})


_ALL = (
    _study(
        "learning_rate",
        "How does the learning rate decide what GRPO reaches, and from where on does it do harm?",
        tuple(Variation(f"lr {lr:g}", {"optim.lr": lr}) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    ),
    _study(
        "baselines",
        "What does it matter which baseline is taken from the rewards, all else equal?",
        (
            Variation("raw reward", {"recipe": "study_raw"}),
            Variation("centred", {"recipe": "study_centered"}),
            Variation("leave one out", {"recipe": "study_leave_one_out"}),
            Variation("std-normalised (GRPO)", {"recipe": "course2026_grpo"}),
            Variation("mean-normalised (MaxRL)", {"recipe": "course2026_maxrl"}),
        ),
        note="Leave-one-out is G / (G - 1) times centred: AdamW divides a constant factor out, the gradient's clipping "
        "does not.",
    ),
    _study(
        "normalisation",
        "What do the division by the group's deviation and the normalisation by length matter?",
        (
            Variation("std, mean of each answer (GRPO)", {"recipe": "course2026_grpo"}),
            Variation("centred, mean of each answer", {"recipe": "study_centered"}),
            Variation("std, constant", {"recipe": "study_constant"}),
            Variation("centred, constant (Dr. GRPO)", {"recipe": "course2026_dr_grpo"}),
            Variation("std, token mean", {"recipe": "study_token_mean"}),
            Variation("centred, token mean", {"recipe": "study_centered_token_mean"}),
        ),
        task={**TASK, "sort.n-numbers": (3, 5), "n-train": 2400},  # there are 1,000 problems of three digits
        note="Three to five digits, so that right answers differ in length, from 6 to 10 tokens and the end.",
    ),
    _study(
        "off_policy",
        "How many optimizer steps can be taken on one batch of rollouts (clip 0.2)?",
        tuple(
            Variation(f"{epochs} x {parts} steps", {"epochs": epochs, "minibatches": parts})
            for epochs, parts in ((1, 1), (1, 4), (1, 16), (2, 8), (4, 4), (4, 16))
        ),
        grpo=OFF_POLICY,
        note="Epochs x minibatches. Rollouts and learning rate are the same in all runs, the number of the optimizer's "
        "steps is not.",
    ),
    _study(
        "clipping",
        "What bounds the ratio best where 16 steps are taken on a batch of rollouts (2 epochs of 8 minibatches)?",
        (
            Variation("no ratio", {"recipe": "course2026_off_naive"}),
            Variation("ratio, no clip", {"recipe": "course2026_off_no_clip"}),
            Variation("clip 0.2", {"recipe": "course2026_off_clip"}),
            Variation("clip-higher 0.28", {"recipe": "glm4_9b_slime"}),
            Variation("sequence ratio (GSPO)", {"recipe": "course2026_off_gspo"}),
            Variation("CISPO", {"recipe": "cispo"}),
        ),
        grpo={**OFF_POLICY, "epochs": 2, "minibatches": 8},
        note="CISPO takes the mean over tokens, the others that of each answer; answers have nearly one length here.",
    ),
    _study(
        "prompts",
        "What does the form of the prompt matter, for the start and for what is learned from rewards?",
        tuple(Variation(style, task={"style": style}) for style in ("spaced", "compact", "worded")),
        note="Each form has its own start: 60 batches of answers in this form.",
    ),
)  # fmt: skip
STUDIES: dict[str, Study] = {study.name: study for study in _ALL}
