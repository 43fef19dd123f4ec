"""The study over a client that answers from the surrogate back end at once, with the service's budget."""

import dataclasses
import datetime as dt
import errno
import json
import os
from pathlib import Path

import pytest

from experiments.lock import locked
from experiments.scaling import study
from experiments.scaling.client import Conflict, InsufficientBudget
from experiments.scaling.service.backend import Control, Done, Late, charge
from experiments.scaling.service.schemas import (
    Completed,
    Experiment,
    Failed,
    Rules,
    Timeout,
    TrainingConfig,
    Unexpected,
    config_digest,
    problem,
    total_steps,
)
from experiments.scaling.service.surrogate import Surrogate, backend
from purelm import track
from tests.programs import run_here

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
RULES = Rules(min_vocab_size=4096)


class Local:
    """A service of one key, without a server."""

    backend = "surrogate"

    def __init__(self, folder, budget, seed=0):
        self.folder, self.total, self.seed, self.used = folder, budget, seed, 0.0
        self.runs, self.final, self.final_result = {}, None, None

    def rules(self):
        return RULES.model_dump()

    def budget(self):
        left = self.total - self.used
        return {"used_seconds": self.used, "remaining_seconds": left, "total_budget_seconds": self.total}

    def trained(self, cfg, number):
        control = Control(self.folder / str(number), self.seed, lambda s: None, lambda x, s: None, lambda: False)
        control.folder.mkdir()
        out = backend(Surrogate()).run(cfg, RULES, control)
        seconds = charge(out.seconds, cfg.max_runtime_seconds)
        common = {"queued_at": NOW, "dispatched_at": NOW, "run_id": "r", "used_runtime_seconds": seconds}
        if isinstance(out, Done):
            status = Completed(**common, val_losses=list(out.val_losses), completed_at=NOW)
        elif isinstance(out, Late):
            status = Failed(**common, failed_at=NOW, reason=Timeout(partial_val_losses=list(out.val_losses)))
        else:
            status = Failed(**common, failed_at=NOW, reason=Unexpected(failure=out.failure))
        return Experiment(experiment_id=number, training_config=cfg, status=status), seconds

    def submit(self, body, *, known=False):
        cfg = TrainingConfig.model_validate(body)
        assert known and problem(cfg, RULES) is None, problem(cfg, RULES)
        if (digest := config_digest(cfg)) not in self.runs:
            if cfg.max_runtime_seconds > self.total - self.used:
                raise InsufficientBudget("insufficient budget", self.budget())
            self.runs[digest], seconds = self.trained(cfg, len(self.runs) + 1)
            self.used += seconds
        return {"experiment_id": self.runs[digest].experiment_id}

    def experiments(self):
        return [x.model_dump(mode="json") for x in self.runs.values()]

    def experiment(self, number):
        return self.experiments()[number - 1]

    def wait(self, ids, progress):
        found = [self.experiment(x) for x in ids]
        progress(found)
        return found

    def submit_final(self, body, predicted):
        self.final, self.predicted = TrainingConfig.model_validate(body), predicted

    def start_final_run(self):
        longer = self.final.model_copy(update={"max_runtime_seconds": 4 * self.total})  # as the service does
        ran = self.trained(longer, 10**6)[0].model_dump(mode="json")
        told = backend(Surrogate()).reveal(longer, RULES, self.seed, longer.max_runtime_seconds)
        self.final_result = {"training_config": self.final.model_dump(mode="json"), "status": ran["status"],
                             "predicted_final_loss": self.predicted, "revealed": told}  # fmt: skip

    def final_run(self):
        return self.final_result


def args(tmp_path, **changes):
    made = study.Args(
        "s", tmp_path / "out", tmp_path / "f.jsonl", widths=(256, 384, 512, 768), final_widths=(512, 768, 1024, 1280),
        batch=128, rates=(5e-4, 1e-3, 2e-3), bootstrap=200,
    )  # fmt: skip
    made = dataclasses.replace(made, **changes)
    study._checked(made)
    return made


@pytest.mark.parametrize("seed", [0, 1])
def test_a_study_foretells_its_final_run(tmp_path, seed):
    """Oracle: the hidden law, by the run itself; within 3 %, which a law fitted badly misses by far."""
    client, given = Local(tmp_path, 43_200.0, seed), args(tmp_path)
    study.carry_out(given, client)
    result = json.loads((given.out / "study.json").read_text())
    assert client.used <= client.total and len(client.runs) >= 18
    assert result["measured"][0] == pytest.approx(result["predicted"][0], rel=0.03)
    largest = max(x.training_config.total_train_tokens for x in client.runs.values())
    assert result["final"]["total_train_tokens"] > largest
    rows = track.read_rows(given.forecasts)
    assert [x["kind"] for x in rows] == ["forecast", "outcome"] and rows[1]["held"] == result["held"]
    page = (given.out / "study.md").read_text()
    assert f"**{result['measured'][0]:.4f}**" in page and "simulated" in page and (given.out / "study.png").is_file()
    told = result["final_run"]["revealed"]
    assert f"{told['law']['E']:.4f} + " in page and f"regret, without noise: {told['regret']:.4f}" in page
    assert client.predicted == rows[0]["loss"] == result["predicted"][0]

    before, runs = given.forecasts.read_bytes(), len(client.runs)
    study.carry_out(given, client)  # again: nothing is submitted, nothing foretold anew
    assert (given.forecasts.read_bytes(), len(client.runs)) == (before, runs)
    assert json.loads((given.out / "study.json").read_text()) == result

    # With other samples the interval stays the one that was written down.
    study.carry_out(dataclasses.replace(given, seed=9, coverage=0.5), client)
    assert json.loads((given.out / "study.json").read_text()) == result

    # What is another study is refused, and a run that was made is foretold no more.
    for change, words in (({"name": "t"}, "other name"), ({"rates": (1e-3, 2e-3, 4e-3)}, "other rates")):
        with pytest.raises(ValueError, match=words):
            study.carry_out(dataclasses.replace(given, **change), client)
    with pytest.raises(ValueError, match="another key"):
        study.carry_out(given, Local(tmp_path, 43_200.0, seed))
    with pytest.raises(ValueError, match="can be foretold no more"):
        study.carry_out(dataclasses.replace(given, forecasts=tmp_path / "other.jsonl"), client)
    client.final_result["training_config"]["model_seed"] = 1
    with pytest.raises(ValueError, match="not this study's"):
        study.carry_out(given, client)
    assert given.forecasts.read_bytes() == before and not (tmp_path / "other.jsonl").exists()


def test_shapes_and_dtype_are_those_asked_for(tmp_path):
    """Of every run, the final one too; and runs for the speed have half of the least updates."""
    client = Local(tmp_path, 43_200.0)
    given = args(tmp_path, aspect=64, head_dim=64, dtype="bfloat16", least_steps=90, multiple=0.5)
    study.carry_out(given, client)
    result = json.loads((given.out / "study.json").read_text())
    configs = [x.training_config for x in client.runs.values()] + [TrainingConfig.model_validate(result["final"])]
    for a in (cfg.architecture_config for cfg in configs):
        assert (a.head_dim, a.num_hidden_layers, a.dtype) == (64, a.hidden_size // 64, "bfloat16")
        assert a.intermediate_size % 64 == 0 and 0 <= a.intermediate_size - 8 * a.hidden_size / 3 < 64
    plan = json.loads((given.out / "plan.json").read_text())
    assert [total_steps(TrainingConfig.model_validate(x), RULES) for x in plan["speed"]] == [46, 46]  # two evaluations
    assert min(total_steps(cfg, RULES) for cfg in configs[2:]) >= 90
    assert 0.5 * 0.5 * client.total < result["final_run"]["status"]["used_runtime_seconds"] < 0.5 * client.total


def test_a_budget_that_is_too_small_is_said(tmp_path):
    with pytest.raises(ValueError, match="fewer than least_steps"):
        study.carry_out(args(tmp_path), Local(tmp_path, 200.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"widths": (32, 48, 64)}, "at least 4 different ones"),
        ({"widths": (32, 40, 64, 80)}, "multiple of head_dim 16"),
        ({"final_widths": ()}, "final_widths: must not be empty"),
        ({"rates": (1e-3, 2e-3, 1e-3)}, "3 different ones"),
        ({"name": ""}, "name: must not be empty"),
        ({"forecasts": "f.md"}, "must end in .jsonl"),
    ],
)
def test_arguments_that_cannot_be(tmp_path, change, words):
    if "forecasts" in change:
        change = {"forecasts": tmp_path / change["forecasts"]}
    with pytest.raises(ValueError, match=words):
        args(tmp_path, **change)


def test_a_final_run_that_is_too_long_for_the_server_is_told_at_the_start(tmp_path):
    """Nothing is submitted, where it showed when the final run ended at its server's limit."""

    class Short(Local):
        def rules(self):
            return {**RULES.model_dump(), "final_budgets": 2.0}

    client = Short(tmp_path, 43_200.0)
    with pytest.raises(ValueError, match=r"multiple 4: .* give --multiple 2, or start the server with --final 4"):
        study.carry_out(args(tmp_path), client)
    assert not client.runs and not (tmp_path / "out" / "plan.json").exists()


def test_a_final_run_of_another_study_is_not_taken_for_this_ones(tmp_path):
    """Another study of the key asks for its own between this one's submission and its run."""

    class Shared(Local):
        def start_final_run(self):
            self.final = self.final.model_copy(update={"total_train_tokens": self.final.total_train_tokens // 2})
            super().start_final_run()
            raise Conflict("the final run was asked for already", 409)

    given = args(tmp_path)
    with pytest.raises(ValueError, match="not this study's"):
        study.carry_out(given, Shared(tmp_path, 43_200.0))
    assert [x["kind"] for x in track.read_rows(given.forecasts)] == ["forecast"]


def test_an_answer_that_was_lost_is_no_conflict(tmp_path):
    """The final run was asked for, and the answer did not come: asked for again, it is this study's own."""

    class Lossy(Local):
        def start_final_run(self):
            super().start_final_run()
            raise Conflict("the final run was asked for already", 409)

    given = args(tmp_path)
    study.carry_out(given, Lossy(tmp_path, 43_200.0))
    assert json.loads((given.out / "study.json").read_text())["measured"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    """Each file in turn cannot be written; the same command goes on, and ends as without. Oracle: a study with room."""
    real, full = Path.write_text, set()

    def write_text(path, text, **rest):
        if any(name in path.name for name in full):
            real(path, text[: len(text) // 2], **rest)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, text, **rest)

    def savefig(figure, path, **rest):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_text", write_text)
    (tmp_path / "with").mkdir()
    undisturbed = args(tmp_path / "with")
    study.carry_out(undisturbed, Local(tmp_path / "with", 43_200.0))
    client, given = Local(tmp_path, 43_200.0), args(tmp_path)
    for name in ("plan.json", "f.md", "study.json", "study.md"):
        full = {name}
        with pytest.raises(OSError, match=name):
            study.carry_out(given, client)
        assert not list(tmp_path.rglob(".*.tmp"))
    full = set()
    with monkeypatch.context() as patched:
        patched.setattr("matplotlib.figure.Figure.savefig", savefig)
        with pytest.raises(OSError):
            study.carry_out(given, client)
    assert not list(given.out.glob("*.png")) and not list(given.out.glob(".*"))
    study.carry_out(given, client)
    for name in ("plan.json", "study.json", "study.md", "study.png"):
        assert (given.out / name).read_bytes() == (undisturbed.out / name).read_bytes(), name
    assert "measured" in (tmp_path / "f.md").read_text() and (tmp_path / "f.md").read_text().count("| s |") == 1
    assert len(track.read_rows(given.forecasts)) == 2


def test_a_study_has_its_folder_to_itself_and_wants_a_key(tmp_path, monkeypatch):
    """Two of one OUT would write over each other's plan. Nobody listens at that address."""
    monkeypatch.delenv("PURELM_API_KEY", raising=False)
    flags = f"--name s --out {tmp_path}/out --forecasts {tmp_path}/f.jsonl --url http://127.0.0.1:1".split()
    with locked(tmp_path / "out"):
        done = run_here("experiments.scaling.study", *flags, "--key", "k")
    assert done.returncode == 2 and "give another --out" in done.stderr
    done = run_here("experiments.scaling.study", *flags)
    assert done.returncode == 2 and "set PURELM_API_KEY" in done.stderr
    assert not (tmp_path / "f.jsonl").exists()
