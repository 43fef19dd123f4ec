"""A run: its stages one after the other, each by the back end, then the links to what was made and the report."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.console import progress_bar, say
from experiments.curate import backends
from experiments.curate.config import Curate, stage_settings
from experiments.curate.evaluations import looked_for
from experiments.curate.files import best_compression, read_json
from experiments.curate.page import write_page
from experiments.curate.plan import FORMAT, Input, Task, check_done, digest, find_inputs, place
from experiments.curate.shard import min_hash
from experiments.curate.statistics import merged, top_domains
from experiments.curate.steps import contents, steps_of
from experiments.curate.tokens import load_tokenizer
from experiments.curate.work import Result, attempt
from experiments.lock import locked
from purelm import track
from purelm.files import sync
from purelm.tokenizer import fingerprint

__all__ = ["curate", "summary"]

TOP_DOMAINS = 50
STAGES = ("filter", "duplicates", "scatter", "text", "tokens")
PLACES_SHOWN = 5
Backend = Callable[[Sequence[Task], Callable[[int, int], None]], Iterator[Result]]


def curate(cfg: Curate, executor: Any = None) -> None:
    """The whole run. executor: in the place of submitit's, for the back end slurm.

    ValueError for settings and inputs that cannot be used, for outputs of other settings, and, after everything that
    could be done, for tasks that failed.
    """
    cfg = replace(cfg, compression=best_compression(cfg.compression))
    inputs = find_inputs(cfg.input, cfg.output)
    settings = checked(cfg)
    with locked(cfg.output), ExitStack() as stack:
        backend = _backend(cfg, executor, stack)
        upstream = digest([FORMAT])
        n_outputs = 0
        for stage in STAGES if cfg.final.tokenizer is not None else STAGES[:-1]:
            n = {"filter": len(inputs), "duplicates": 1, "scatter": len(inputs)}.get(stage, n_outputs)
            tasks = _tasks(cfg, stage, n, inputs, settings[stage], upstream, n_outputs)
            _run_stage(tasks, backend, cfg.redo)
            upstream = digest([upstream, [task.made_from for task in tasks]])
            if stage == "filter":
                n_outputs = _n_outputs(cfg, len(inputs))
        _link(cfg, "text", f"documents.jsonl.{cfg.compression}", f"{{}}.jsonl.{cfg.compression}", n_outputs)
        n_token_files = n_outputs if cfg.final.tokenizer is not None else 0
        for ending in ("json", "bin"):
            _link(cfg, "tokens", f"tokens.{ending}", f"train-{{}}.{ending}", n_token_files)
        counts = _counts(cfg, len(inputs), n_outputs)
        if "evaluation texts" in settings["filter"]:
            counts["evaluation texts"] = settings["filter"]["evaluation texts"]
        track.write_json(cfg.output / "counts.json", counts)
        write_page(cfg, inputs, counts)
    for line in summary(counts):
        say(line)
    say(f"{cfg.output}: text/, counts.json, report.html")


def summary(counts: dict[str, Any]) -> list[str]:
    """What became of everything, a line each for reading, the steps and duplicates; and the first places of damage."""
    read, duplicates = counts["read"], counts["duplicates"]
    skipped = ", ".join(f"{n:,} {reason}" for reason, n in read["skipped"].items())
    lines = [f"read {read['records']:,} records" + (f"; skipped: {skipped}" if skipped else "")]
    lines += [f"  {place}" for place in counts["places"][:PLACES_SHOWN]]
    for step, x in counts["funnel"].items():
        if x["documents"] > x["kept"]:
            lines.append(f"{step}: {x['kept']:,} of {x['documents']:,} documents kept")
    documents = sum(x["documents"] for x in counts["text"])
    exact, near = duplicates["exact"], duplicates["near"]
    return [*lines, f"{documents:,} documents left, without {exact:,} exact and {near:,} near duplicates"]


def checked(cfg: Curate) -> dict[str, dict[str, Any]]:
    """The settings by stage, with hashes of the files they name; ValueError before anything is written."""
    min_hash(cfg)
    steps = steps_of(cfg.filter)
    settings = stage_settings(cfg)
    settings["filter"] |= contents(cfg.filter)
    if "decontaminate" in steps:
        settings["filter"]["evaluation texts"] = looked_for(steps["decontaminate"])
    if cfg.final.tokenizer is not None:
        settings["tokens"]["tokenizer"] = fingerprint(load_tokenizer(cfg.final.tokenizer))
    return settings


def _backend(cfg: Curate, executor: Any, stack: ExitStack) -> Backend:
    if cfg.backend == "slurm":
        executor = executor or backends.slurm_executor(cfg.slurm, cfg.workers, cfg.output / "slurm")
        return lambda tasks, tell: backends.run_slurm(attempt, tasks, executor, cfg.slurm.array, tell)
    if cfg.backend == "ray":
        ray = stack.enter_context(backends.started_ray(cfg.ray_address))
        return lambda tasks, tell: backends.run_ray(attempt, tasks, cfg.workers, ray, tell)
    if cfg.workers == 1:
        return lambda tasks, tell: backends.run_here(attempt, tasks, tell)
    pool = stack.enter_context(closing(backends.Pool(attempt)))
    return lambda tasks, tell: backends.run_local(pool, tasks, cfg.workers, tell)


def _tasks(
    cfg: Curate, stage: str, n: int, inputs: Sequence[Input], settings: dict[str, Any], upstream: str, n_outputs: int
) -> list[Task]:
    # What does not change an output is left out of what workers are sent.
    plain = replace(cfg, input=(), redo=False)
    tasks = []
    for number in range(n):
        mine = (inputs[number],) if stage == "filter" else ()
        made_from = {"settings": settings, "input": [list(x) for x in mine], "before": upstream}
        tasks.append(Task(plain, stage, number, made_from, mine, len(inputs), n_outputs))
    return tasks


def _run_stage(tasks: list[Task], backend: Backend, redo: bool) -> None:
    stage = tasks[0].stage
    todo = check_done(tasks, redo)
    if len(todo) < len(tasks):
        say(f"{stage}: {len(tasks) - len(todo):,} of {len(tasks):,} are done already")
    failures: list[Result] = []
    start, documents, n_bytes, done = time.perf_counter(), 0, 0, 0
    with progress_bar(stage, len(todo), "inputs" if stage == "filter" else "parts") as update:

        def tell(more: int, more_bytes: int) -> None:
            nonlocal documents, n_bytes
            documents, n_bytes = documents + more, n_bytes + more_bytes
            seconds = max(time.perf_counter() - start, 1e-3)
            update(done, f"{documents / seconds:,.0f} docs/s  {n_bytes / seconds / 1e6:,.1f} MB/s")

        tell(0, 0)
        for result in backend(todo, tell) if todo else ():
            done += 1
            tell(0, 0)
            if result.error is not None:
                say(f"{result.name}: {result.error}")
                failures.append(result)
    if failures:
        first = failures[0]
        raise ValueError(
            f"{stage}: {len(failures):,} of {len(todo):,} parts failed, first {first.name}: {first.error}. Start again "
            "to go on from here"
        )


def _n_outputs(cfg: Curate, n_inputs: int) -> int:
    """Final shards: one for each shard_megabytes of text that passed the filter, so that it is known early."""
    paths = [place(cfg, "filter", i) / "statistics.json" for i in range(n_inputs)]
    characters = sum(read_json(path)["kept"]["characters"] for path in paths)
    return max(1, -(-characters // int(cfg.final.shard_megabytes * 1e6)))


def _counts(cfg: Curate, n_inputs: int, n_outputs: int) -> dict[str, Any]:
    """All exact counts of the run, a function of inputs and settings alone."""
    shards = [place(cfg, "filter", i) for i in range(n_inputs)]
    total = merged((read_json(shard / "statistics.json") for shard in shards), cfg.examples)
    total["domains"] = top_domains([shard / "domains.json" for shard in shards], TOP_DOMAINS)
    total["duplicates"] = read_json(place(cfg, "duplicates", 0) / "clusters.json")
    total["text"] = [read_json(place(cfg, "text", k) / "counts.json") for k in range(n_outputs)]
    total["tokens"] = [
        read_json(place(cfg, "tokens", k) / "tokens.json")["n_tokens"]
        for k in range(n_outputs if cfg.final.tokenizer is not None else 0)
    ]
    return total


def _link(cfg: Curate, stage: str, source: str, target: str, n: int) -> None:
    """OUT/STAGE/ with a name for each part's file, a second one of the same file; names of earlier runs are removed."""
    folder = cfg.output / stage
    wanted = {target.format(f"{k:05d}"): place(cfg, stage, k) / source for k in range(n)}
    if wanted:
        folder.mkdir(exist_ok=True)
    for old in folder.glob(f"*{Path(target).suffix}") if folder.is_dir() else ():
        if old.name not in wanted:
            old.unlink()
    for name, file in wanted.items():
        path = folder / name
        if path.exists() and os.path.samefile(path, file):
            continue
        temporary = folder / f".{name}.new"
        temporary.unlink(missing_ok=True)
        os.link(file, temporary)
        os.replace(temporary, path)
    if wanted:
        sync(folder)
