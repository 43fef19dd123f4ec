"""experiments.rl_study. Oracles: the programs' own parsers, for flags; numpy, for spreads; a count of processes that
run at once; the metrics of a run that is done by hand."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tyro

from experiments import limits
from experiments.finetune.config import Sft
from experiments.prepare_task import Args as Prepare
from experiments.prepare_task import task_of
from experiments.rl.config import Grpo
from experiments.rl_study import Args as StudyArgs
from experiments.rl_study import chosen, place_of, settings
from experiments.studies import page
from experiments.studies.grpo import known
from experiments.studies.jobs import Job, run_all
from experiments.studies.values import OWN, STUDIES, Study, Variation, argv, scaled_down
from purelm.align.data.tasks import split
from purelm.align.recipe import differences
from purelm.align.recipes import RECIPES
from tests.programs import run_here

ROOT = Path(__file__).resolve().parents[2]
ALL = [(study, v) for study in STUDIES.values() for v in study.variations]


@pytest.mark.parametrize("study, variation", ALL, ids=[f"{s.name}: {v.label}" for s, v in ALL])
def test_every_flag_is_one_of_its_program(study, variation):
    """Programs parse them, the task has as many problems, answers fit, the recipe is known."""
    for of in (study, scaled_down(study)):
        task, sft, grpo = settings(of, variation)
        prepare = tyro.cli(Prepare, args=[*argv(task), "--out", "x"])
        data = ["--run", "x", "--model", "x", "--train", "x"]
        tuned = tyro.cli(Sft, args=[*argv(sft), *data])
        run = tyro.cli(Grpo, args=[*argv(grpo), *data])
        for given in (prepare, tuned, run):
            limits.check(given)
        train, heldout = split(
            task_of(prepare), 0, n_train=prepare.n_train, n_heldout=prepare.n_heldout, style=prepare.style
        )
        longest = max(len(f" {row['response']}") for row in train + heldout)
        assert longest + 1 <= min(run.max_new_tokens, tuned.max_new_tokens)
        assert max(len(row["prompt"]) for row in train + heldout) + run.max_new_tokens <= prepare.model.context_length
        assert run.recipe in {**RECIPES, **OWN} and run.eval_prompts <= len(heldout)


def test_studies_vary_what_they_ask():
    """Labels and settings differ within a study; objectives of its own differ from the course's in one or two parts."""
    assert len(STUDIES) == 6
    for study in STUDIES.values():
        assert len(study.seeds) >= 3 and len({v.label for v in study.variations}) == len(study.variations) >= 3
        places = {place_of(study, v, seed, Path("x")).run for v in study.variations for seed in study.seeds}
        assert len(places) == len(study.variations) * len(study.seeds)
    changed = {name: set(differences(RECIPES["course2026_grpo"], recipe)) for name, recipe in OWN.items()}
    assert changed == {
        "study_raw": {"advantage"}, "study_centered": {"advantage"}, "study_leave_one_out": {"advantage"},
        "study_constant": {"aggregate"}, "study_token_mean": {"aggregate"},
        "study_centered_token_mean": {"advantage", "aggregate"},
    }  # fmt: skip


def test_a_folder_is_that_of_its_settings():
    study = STUDIES["baselines"]
    v = study.variations[1]
    first = place_of(study, v, 0, Path("x"))
    assert first == place_of(replace(study, question="?"), v, 0, Path("x"))
    other = place_of(replace(study, grpo={**study.grpo, "steps": 7}), v, 0, Path("x"))
    assert (first.task, first.start) == (other.task, other.start) and first.run != other.run
    other = place_of(replace(study, sft={**study.sft, "steps": 7}), v, 0, Path("x"))
    assert first.task == other.task and first.start != other.start and first.run != other.run
    assert first.start != place_of(study, v, 1, Path("x")).start


def test_recipes_of_studies_are_known_within():
    before = dict(RECIPES)
    with known(OWN):
        assert RECIPES == {**before, **OWN}
    assert before == RECIPES
    with pytest.raises(ValueError, match="grpo are published ones"), known({"grpo": OWN["study_raw"]}):
        pass
    assert before == RECIPES


def job(folder, name, code):
    return Job(name, ("-c", code, str(folder)), folder / f"{name}.done", folder / "logs" / f"{name}.log")


def test_some_processes_at_a_time(tmp_path):
    """Each notes when it began and ended: never more than two at once, and two at some time."""
    code = (
        "import sys, time, pathlib; f = pathlib.Path(sys.argv[1]); a = time.monotonic(); time.sleep(0.4); "
        "(f / '{0}.done').write_text(f'{{a}} {{time.monotonic()}}')"
    )
    jobs = [job(tmp_path, name, code.format(name)) for name in "abcd"]
    seen = []
    assert run_all(jobs, 2, seen.append) == {}
    spans = [tuple(map(float, (tmp_path / f"{name}.done").read_text().split())) for name in "abcd"]
    at_once = [sum(a <= x < b for a, b in spans) for x, _ in spans]
    assert max(at_once) == 2 and seen[0] == 0 and seen[-1] == 4
    before = (tmp_path / "a.done").read_text()
    assert run_all(jobs, 2, seen.append) == {} and (tmp_path / "a.done").read_text() == before


def test_what_fails_is_named_and_the_others_run(tmp_path):
    jobs = [
        job(tmp_path, "bad", "import sys; print('first'); sys.exit('error: the loss is not finite')"),
        job(tmp_path, "lazy", "print('did nothing')"),
        job(tmp_path, "good", "import sys, pathlib; (pathlib.Path(sys.argv[1]) / 'good.done').touch()"),
    ]
    assert run_all(jobs, 1, lambda n: None) == {"bad": "the loss is not finite", "lazy": "did nothing"}
    assert (tmp_path / "good.done").exists()


def test_a_job_goes_on_from_its_checkpoint(tmp_path):
    code = "import sys, pathlib; pathlib.Path(sys.argv[1], 'x.done').write_text(' '.join(sys.argv[2:]))"
    one = job(tmp_path, "x", code)._replace(checkpoints=tmp_path / "checkpoints")
    for wanted in ("", "--resume"):
        assert run_all([one], 1, lambda n: None) == {} and (tmp_path / "x.done").read_text() == wanted
        (tmp_path / "x.done").unlink()
        (tmp_path / "checkpoints/step-00000001").mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkpoints/step-00000001/manifest.json").touch()


@pytest.mark.parametrize("finishes", [True, False])
def test_a_process_that_a_killed_study_left_is_waited_for(tmp_path, finishes):
    """What it finishes is not run again; what it leaves is taken up after it, with --resume."""
    run = tmp_path / "run"
    code = "import sys, pathlib; pathlib.Path(sys.argv[1], 'x.done').write_text(' '.join(sys.argv[2:]) or 'anew')"
    one = job(tmp_path, "x", code)._replace(checkpoints=run / "checkpoints")
    left = (
        "import pathlib, sys, time\nfrom experiments.lock import locked\nf = pathlib.Path(sys.argv[1])\n"
        "with locked(f / 'run'):\n    (f / 'began').touch()\n"
        "    while not (f / 'go').exists():\n        time.sleep(0.02)\n"
        "    p = f / 'run/checkpoints/step-00000001'\n    p.mkdir(parents=True)\n    (p / 'manifest.json').touch()\n"
        f"    if {finishes}:\n        (f / 'x.done').write_text('by the other')\n"
    )
    seen = []

    def wait(n):
        seen.append(n)
        if len(seen) == 4:
            assert not (tmp_path / "x.done").exists()
            (tmp_path / "go").touch()

    with subprocess.Popen([sys.executable, "-c", left, str(tmp_path)], cwd=ROOT) as other:
        try:
            while not (tmp_path / "began").exists():
                assert other.poll() is None
                time.sleep(0.02)
            assert run_all([one], 1, wait) == {}
        finally:
            other.kill()
    assert (tmp_path / "x.done").read_text() == ("by the other" if finishes else "--resume") and len(seen) > 4


def test_one_that_was_there_first_is_waited_for(tmp_path):
    """A job that fails while another process holds its run waits, and has not failed."""
    code = (
        "import fcntl, os, pathlib, subprocess, sys, time\nf = pathlib.Path(sys.argv[1])\n"
        "(f / 'run').mkdir(exist_ok=True)\nlock = open(f / 'run/.lock', 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX); os.set_inheritable(lock.fileno(), True)\n"
        "end = f'import time, pathlib; time.sleep(1); pathlib.Path({str(f / \"x.done\")!r}).touch()'\n"
        "subprocess.Popen([sys.executable, '-c', end], close_fds=False); sys.exit('error: is locked')"
    )
    one = job(tmp_path, "x", code)._replace(checkpoints=tmp_path / "run/checkpoints")
    assert run_all([one], 1, lambda n: None) == {} and (tmp_path / "x.done").exists()


def test_processes_are_asked_to_stop(tmp_path):
    """When the caller is interrupted, a process gets SIGTERM once, and time to save."""
    code = (
        "import pathlib, signal, sys, time\nf = pathlib.Path(sys.argv[1])\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), (f / 'saved').touch(), sys.exit(3)))\n"
        "(f / 'began').touch()\ntime.sleep(60)"
    )

    def interrupt(n):
        if (tmp_path / "began").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all([job(tmp_path, "x", code)], 1, interrupt)
    assert (tmp_path / "saved").exists()


def metrics(start, end, n=40):
    rows = [{"step": 0, "heldout_reward": start}]
    for i in range(1, n + 1):
        more = {"reward": i / n, "entropy": 1.0, "clipped_low": 0.01 * i, "clipped_high": 0.02, "seconds_sampling": 0.5}
        rows.append({"step": i, **more, "seconds_training": 0.25})
        if i % 20 == 0:
            rows.append({"step": i, "heldout_reward": start + (end - start) * i / n})
    return rows


def test_figures_of_a_run():
    """Worked by hand."""
    found = page.of_run(metrics(0.2, 0.8))
    assert found["curve"] == [[0, 0.2], [20, 0.5], [40, 0.8]]
    assert (found["start"], found["final"]) == (0.2, 0.8) and found["over_the_run"] == pytest.approx(0.65)
    assert found["reward"] == pytest.approx(np.mean([i / 40 for i in range(21, 41)]))
    assert found["clipped"] == pytest.approx(np.mean([0.01 * i + 0.02 for i in range(21, 41)]))
    assert found["seconds"] == pytest.approx(30) and "grad_norm" not in found
    with pytest.raises(ValueError, match="no held-out reward before and after"):
        page.of_run([{"step": 0, "heldout_reward": 0.1}])


def result_of(**finals):
    runs = {k: {s: page.of_run(metrics(0.2, x)) for s, x in enumerate(v)} for k, v in finals.items()}
    study = Study("some", "Why?", tuple(Variation(k, {"optim.lr": 1e-3}) for k in finals), {}, {}, {"gold": "{a}"})
    result = {
        "seeds": [0, 1, 2], "task": study.task, "sft": study.sft, "grpo": study.grpo, "runs": runs, "failed": {},
        "summary": page.summarised(runs), "command": "python", "device": "cpu",
        "versions": {"python": "3", "torch": "2", "purelm": "0"},
    }  # fmt: skip
    return study, result


def test_spread_and_sentences():
    """Oracle: numpy; which seeds lie above which, by eye."""
    study, result = result_of(a=[0.9, 0.8, 0.85], b=[0.5, 0.6, 0.79], c=[0.7, 0.82, 0.6], d=[0.1, 0.2, 0.0])
    s = result["summary"]["b"]["final"]
    assert (s["mean"], s["sd"]) == pytest.approx((np.mean([0.5, 0.6, 0.79]), np.std([0.5, 0.6, 0.79], ddof=1)))
    assert (s["low"], s["high"]) == pytest.approx((0.5, 0.79))
    said = page.concluded(result["summary"])
    assert "Highest at the end: a, 0.850 (0.800 to 0.900 over seeds)." in said
    assert "All of its seeds end above all seeds of: b (0.630), d (0.100)." in said
    assert "(Two equal variations come out so in 1 of 10 pairs.)" in said  # 2 of the 20 orders of 3 and 3
    assert "Not told apart from it by these seeds: c (0.707)." in said
    assert "No seed ends above its start: d (0.100)." in said
    text = page.page(study, {**result, "failed": {"a-seed9": "the loss is not finite"}}, "I think so.")
    assert "| a | 3 | 0.200 +- 0.000 | 0.850 +- 0.050 | 0.800, 0.900 |" in text
    assert "I think so.\n\nHighest" in text and "- a-seed9: the loss is not finite" in text and '--gold "{a}"' in text
    _, result = result_of(a=[0.9, 0.8], b=[])
    assert "| a | 2 of 3 |" in page.table(result) and "| b | 0 of 3 |" in page.table(result)
    assert page.concluded(result["summary"]) == "There are not two variations to compare."
    said = page.concluded(result_of(a=[0.9], b=[0.1])[1]["summary"])
    assert "nothing can be told apart" in said and "above all seeds" not in said


def test_a_figure(tmp_path):
    _, result = result_of(a=[0.9, 0.8], b=[0.3], c=[])
    page.draw(tmp_path / "x.png", result["runs"], "some")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG" and [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_what_is_wrong_is_named(tmp_path):
    for flags, message in (
        (("nothing",), "name: no study is called 'nothing'; there are learning_rate"),
        (("baselines", "--only", "x"), "only: 'x' is no variation of baselines; there are raw reward"),
        (("baselines", "--seeds", "1", "1"), "seeds: 1, 1: one is given twice"),
        (("baselines", "--jobs", "0"), "jobs must be at least 1"),
        (("baselines", "--device", "tpu"), "device must be"),
    ):
        done = run_here("experiments.rl_study", *flags, "--runs", tmp_path / "runs")
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert not (tmp_path / "runs").exists()
    assert "What does it matter which baseline" in run_here("experiments.rl_study").stdout
    study = chosen(StudyArgs("baselines", seeds=(5,), steps=9, only=("centred",)))
    assert [v.label for v in study.variations] == ["centred"] and study.seeds == (5,) and study.grpo["steps"] == 9


@pytest.mark.slow
def test_a_study_is_stopped_and_goes_on(tmp_path):
    """SIGTERM in its runs: nothing is left running, and the same command ends it; a third time nothing runs again."""
    flags = ["off_policy", "--smoke", "--device", "cpu", "--runs", str(tmp_path), "--steps", "30"]
    command = [sys.executable, "-m", "experiments.rl_study", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    runs = tmp_path / "off_policy_smoke"
    while not list(runs.glob("*/metrics.jsonl")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and not (runs / "rl_off_policy_smoke.json").exists()
    for log in (tmp_path / "logs").glob("1-x-*.log"):
        assert "Traceback" not in log.read_text()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((runs / "rl_off_policy_smoke.json").read_text())
    assert [len(x) for x in result["runs"].values()] == [2, 2] and not result["failed"]
    for label, seeds in result["runs"].items():
        for seed, found in seeds.items():
            study = chosen(StudyArgs("off_policy", smoke=True, steps=30))
            (variation,) = (v for v in study.variations if v.label == label)
            place = place_of(study, variation, int(seed), tmp_path)
            rows = [json.loads(line) for line in (place.run / "metrics.jsonl").read_text().splitlines()]
            assert sum("reward" in row for row in rows) == 30
            assert found["final"] == [row["heldout_reward"] for row in rows if "heldout_reward" in row][-1]
    written = {p: p.stat().st_mtime_ns for p in runs.glob("*/summary.json")}
    again = run_here("experiments.rl_study", *flags)
    assert again.returncode == 0 and written == {p: p.stat().st_mtime_ns for p in runs.glob("*/summary.json")}
    assert "rl_off_policy_smoke.md" in again.stdout and (runs / "rl_off_policy_smoke.png").is_file()
