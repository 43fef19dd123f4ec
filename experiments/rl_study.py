"""Studies of reinforcement learning from rewards: runs of every variation with every seed, and a page of results.

    python -m experiments.rl_study                                       # the studies, and what each varies
    python -m experiments.rl_study baselines --jobs 8 --device cuda      # 8 runs at a time, all on one GPU
    python -m experiments.rl_study baselines --seeds 0 1 2 3 4           # what is finished is not run again
    python -m experiments.rl_study baselines --smoke                     # runs of a second: whether all works

The model is small and starts from random parameters: `prepare_task`, a short `sft`, `grpo` (experiments/studies/values
has all flags). Each run is a process and lies in a folder of its own, named after a hash of its settings, in RUNS; a
study that was killed goes on when it is started again, its runs from their checkpoints.

It leaves in RESULTS: rl_NAME.json with the figures of all runs, rl_NAME.png, and rl_NAME.md, one page. A run that fails
(a loss that is not finite) is named there, and the exit status is 1.
"""

import dataclasses
import hashlib
import json
import re
import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro

from experiments.bench.report import cpu_name, versions
from experiments.console import pick_device, program, progress_bar, say
from experiments.limits import Count, Place, Seed, Text
from experiments.lock import locked
from experiments.studies import page
from experiments.studies.jobs import Job, run_all
from experiments.studies.values import OWN, STUDIES, Study, Variation, argv, scaled_down
from purelm import track
from purelm.align.recipe import fields_of
from purelm.align.recipes import RECIPES


@dataclass(frozen=True)
class Args:
    """Run a study."""

    name: Annotated[Text, tyro.conf.Positional] = ""
    """of the study; none: list them"""
    jobs: Count = 2
    """runs at a time"""
    device: str = "auto"
    seeds: tuple[Seed, ...] = ()
    """default: the study's, 0 1 2"""
    steps: Count | None = None
    """rollout batches of a run; default: the study's"""
    only: tuple[Text, ...] = ()
    """labels of variations; default: all"""
    smoke: bool = False
    """two variations, two seeds, three batches; results go into RUNS"""
    conclusion: Text = ""
    """what you make of the results, for the page; the program adds what the numbers say"""
    runs: Place = Path("runs/studies")
    """folder of the runs"""
    results: Place | None = None
    """default: experiments/results"""


class Places(NamedTuple):
    """Where the parts of one run lie."""

    task: Path
    start: Path
    run: Path


@program
def main(args: Args) -> None:
    """List the studies, or run one."""
    if not args.name:
        print(
            "\n".join(
                f"{x.name:14} {x.question}\n{'':14} {', '.join(v.label for v in x.variations)}"
                for x in STUDIES.values()
            )
        )
        return
    study = chosen(args)
    device = pick_device(args.device)
    signal.signal(signal.SIGTERM, _stop)
    folder = args.runs / study.name
    with locked(folder):
        failed = carried_out(study, args.runs, str(device), args.jobs)
        result = collected(study, args.runs, failed)
    result |= {
        "command": f"python -m experiments.rl_study {shlex.join(sys.argv[1:])}",
        "device": _named(device),
    }
    results = args.results or (folder if args.smoke else Path("experiments/results"))
    page.write(results, study, result, args.conclusion)
    print(page.table(result))
    print(page.concluded(result["summary"]))
    for name, said in failed.items():
        say(f"failed: {name}: {said}")
    print(f"{results}: rl_{study.name}.md, .png, .json")
    if failed:
        raise SystemExit(1)


def chosen(args: Args) -> Study:
    """The study that is asked for; ValueError for names of none."""
    if args.name not in STUDIES:
        raise ValueError(f"name: no study is called {args.name!r}; there are {', '.join(STUDIES)}")
    study = STUDIES[args.name]
    labels = [x.label for x in study.variations]
    if wrong := [x for x in args.only if x not in labels]:
        raise ValueError(f"only: {wrong[0]!r} is no variation of {args.name}; there are {', '.join(labels)}")
    if args.only:
        study = dataclasses.replace(study, variations=tuple(x for x in study.variations if x.label in args.only))
    if args.smoke:
        study = scaled_down(study)
    if args.seeds:
        study = dataclasses.replace(study, seeds=args.seeds)
    if len(set(study.seeds)) < len(study.seeds):
        raise ValueError(f"seeds: {', '.join(map(str, study.seeds))}: one is given twice")
    if args.steps is not None:
        study = dataclasses.replace(study, grpo={**study.grpo, "steps": args.steps})
    return study


def carried_out(study: Study, runs: Path, device: str, at_a_time: int) -> dict[str, str]:
    """Tasks, then starts, then runs; {name: what it said} of runs that failed. ValueError where a start failed."""
    failed: dict[str, str] = {}
    for stage, label in enumerate(("tasks", "starts", "runs")):
        jobs = {}
        for variation in study.variations:
            for seed in study.seeds:
                job = _jobs(study, variation, seed, runs, device)[stage]
                jobs[job.name] = job
        with progress_bar(f"{study.name}: {label}", len(jobs), label) as bar:
            failed |= run_all(list(jobs.values()), at_a_time, bar)
        if failed and stage < 2:
            raise ValueError(f"{label}: " + "; ".join(f"{name}: {said}" for name, said in failed.items()))
    return failed


def _jobs(study: Study, variation: Variation, seed: int, runs: Path, device: str) -> tuple[Job, Job, Job]:
    place, (task, sft, grpo) = place_of(study, variation, seed, runs), settings(study, variation)
    data = {"train": place.task / "train.jsonl", "heldout": place.task / "heldout.jsonl", "device": device}
    logs = runs / "logs"
    return (
        Job(place.task.name, ("-m", "experiments.prepare_task", *argv({**task, "out": place.task})),
            place.task / "provenance.json", logs / f"{place.task.name}.log"),
        Job(place.start.name, ("-m", "experiments.sft", *argv({**sft, "seed": seed, **data, "run": place.start,
                                                               "model": place.task / "start"})),
            place.start / "report.html", logs / f"{place.start.name}.log", place.start / "checkpoints"),
        Job(place.run.name, ("-m", "experiments.studies.grpo", *argv({**grpo, "seed": seed, **data, "run": place.run,
                                                                      "model": place.start / "export"})),
            place.run / "summary.json", logs / f"{place.run.name}.log", place.run / "checkpoints"),
    )  # fmt: skip


def settings(study: Study, variation: Variation) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Flags of prepare_task, sft and grpo; the same data and form of prompts for both of the latter."""
    return (
        {**study.task, **variation.task},
        {**study.sft, **variation.sft},
        {**study.grpo, **variation.grpo},
    )


def place_of(study: Study, variation: Variation, seed: int, runs: Path) -> Places:
    """Folders named after hashes of all that decides what is in them, but for the code and the device."""
    task, sft, grpo = settings(study, variation)
    recipe = fields_of({**RECIPES, **OWN}[grpo["recipe"]])
    label = re.sub(r"[^a-z0-9.]+", "-", variation.label.lower()).strip("-")
    return Places(
        runs / "tasks" / f"task-{_hash(task)}",
        runs / "starts" / f"start-{_hash(task, sft)}-seed{seed}",
        runs / study.name / f"{label}-{_hash(task, sft, grpo, recipe)}-seed{seed}",
    )


def _hash(*parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:10]


def collected(study: Study, runs: Path, failed: Mapping[str, str]) -> dict[str, Any]:
    """The result as it is written, but for command and device."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for variation in study.variations:
        places = {seed: place_of(study, variation, seed, runs).run for seed in study.seeds}
        found[variation.label] = {
            seed: page.of_run(track.read_rows(run / "metrics.jsonl"))
            for seed, run in places.items()
            if run.name not in failed
        }
    return {
        "study": study.name, "question": study.question, "note": study.note, "seeds": list(study.seeds),
        "task": dict(study.task), "sft": dict(study.sft), "grpo": dict(study.grpo),
        "variations": {x.label: {**x.task, **x.sft, **x.grpo} for x in study.variations},
        "summary": page.summarised(found), "runs": found, "failed": dict(failed), "versions": versions(),
    }  # fmt: skip


def _named(device: torch.device) -> str:
    return cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main(tyro.cli(Args))
