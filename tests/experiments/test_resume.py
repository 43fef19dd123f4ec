"""What goes on from a checkpoint. Oracles: the uninterrupted run, and hashes of every file before and after."""

import dataclasses
import json
import shutil

import pytest
import torch

from experiments import loop, resume
from experiments.config import Pretrain, config_json
from experiments.loop import train
from experiments.setup import start
from purelm import checkpoint, track, tree
from purelm.data import open_tokens
from purelm.models.config import RopeScaling
from purelm.tokenizer import fingerprint, save
from purelm.tokenizer import train as train_tokenizer
from tests.experiments.small import MODEL, completed, contents, rows, small, token_file, trained


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of four steps that is complete."""
    folder = tmp_path_factory.mktemp("resume")
    completed(small(folder))
    return folder


@pytest.fixture
def copy(done, tmp_path):
    """The same, which may be changed."""
    shutil.copytree(done, tmp_path / "copy")
    return tmp_path / "copy"


def again(folder, **changes):
    return small(folder, **{"steps": 6, "resume": True, **changes})


def changed(config, name):
    """A configuration as JSON with another value in one place."""
    head, _, rest = name.partition(".")
    return {**config, head: changed(config[head], rest) if rest else "another"}


def test_every_setting_is_refused_by_name_or_is_in_the_list(done):
    """Oracle: the names in MAY_CHANGE, for each setting of Pretrain, its model's, optimizer's and processes'."""
    step, saved = resume.newest(done / "run")
    names = [name for name, _ in resume.flat(saved["config"])]
    assert {"batch_size", "seed", "order", "compute", "optim.lr", "model.n_layers", "parallel.wire"} <= set(names)
    for name in set(names) - {"steps"}:
        config = changed(saved["config"], name)
        if resume.may_change(name):
            assert resume.check(saved, step, config, saved["fingerprints"]) == []
            continue
        with pytest.raises(ValueError, match=f"--resume: {name} 'another' is not that of .* --resume-anyway"):
            resume.check(saved, step, config, saved["fingerprints"])
        (line,) = resume.check(saved, step, config, saved["fingerprints"], anyway=True)
        assert line.startswith(f"{name} 'another' is not that of the checkpoint, ")
    fields = {field.name for field in dataclasses.fields(Pretrain)}
    assert {name.split(".")[0] for name in (*resume.MAY_CHANGE, *resume.MAY_DIFFER)} <= fields


def test_steps_go_upward(done):
    """From a checkpoint of step 4 of 8: 8 and 9 pass, 4 to 7 are refused or forced, 3 cannot be."""
    _, saved = resume.newest(done / "run")
    saved = {**saved, "config": {**saved["config"], "steps": 8}}

    def lines(steps, anyway=False):
        return resume.check(saved, 4, {**saved["config"], "steps": steps}, saved["fingerprints"], anyway=anyway)

    assert lines(8) == lines(9) == []
    for steps in range(4, 8):
        with pytest.raises(ValueError, match=f"steps {steps} is not that of the checkpoint, 8"):
            lines(steps)
        assert lines(steps, True) == [f"steps {steps} is not that of the checkpoint, 8"]
    with pytest.raises(ValueError, match="steps must be at least 4, those of the checkpoint that is resumed, got 3"):
        lines(3, True)


def test_a_field_of_several_parts_is_compared_where_one_side_lacks_it(done):
    step, saved = resume.newest(done / "run")
    model = dataclasses.replace(MODEL, vocab_size=32, rope_scaling=RopeScaling("linear", 2.0))
    with pytest.raises(ValueError, match=r"model.rope_scaling.factor 2.0 is not that of the checkpoint, None"):
        resume.check(saved, step, config_json(again(done), model), {})
    # What a checkpoint of before does not know is not compared.
    before = {"config": {k: v for k, v in saved["config"].items() if k != "seed"}, "seed": 0}
    assert resume.check(before, step, saved["config"], {"train": "anything"}) == []


REFUSED = {
    "batch_size 2 is not that of the checkpoint, 4": {"batch_size": 2},
    "seed 1 is not that": {"seed": 1},
    "order 'shuffled' is not that": {"order": "shuffled"},
    "model.n_heads 4 is not that of the checkpoint, 2": {"model": dataclasses.replace(MODEL, n_heads=4)},
    "model.window 1 is not that": {"model": dataclasses.replace(MODEL, window=1)},
    "model.d_model 32 is not that": {"model": dataclasses.replace(MODEL, d_model=32)},
    "steps must be at least 4": {"steps": 3},
    "steps must be at least 4, those": {"steps": 3, "resume_anyway": True},
    "keep_last must be at least 1": {"keep_last": 0},
    "batch of 100,000,000,000,000 sequences": {"batch_size": 10**14},
    "has a checkpoint of step 4": {"resume": False},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_refused_run_changes_no_file(copy, message):
    before = contents(copy)
    with pytest.raises(ValueError, match=message):
        trained(again(copy, **REFUSED[message]))
    assert contents(copy) == before


def test_another_token_file_of_the_same_size_is_refused_and_the_same_one_elsewhere_is_not(copy):
    before = contents(copy)
    token_file(copy / "other.bin", 7, 400)
    with pytest.raises(ValueError, match=r"train \(its content\) '\w{32}' is not that of the checkpoint, '\w{32}'"):
        start(again(copy, train=copy / "other.bin"))
    with pytest.raises(ValueError, match=r"heldout \(its content\)"):
        start(again(copy, heldout=copy / "other.bin"))
    for path in copy.glob("other.*"):
        path.unlink()
    assert contents(copy) == before
    for suffix in ("bin", "json"):
        (copy / f"train.{suffix}").rename(copy / f"elsewhere.{suffix}")
    cfg = again(copy)  # makes train.bin again: the same ids
    assert start(dataclasses.replace(cfg, train=copy / "elsewhere.bin")).done == 4


def test_content_is_that_of_the_ids_whatever_the_shards(tmp_path, monkeypatch):
    from purelm.data import TokenWriter

    ids = torch.randint(0, 32, (1000,)).numpy()
    with TokenWriter(tmp_path / "whole.bin", vocab_size=32) as writer:
        writer.append(ids)
    with TokenWriter(tmp_path / "cut.bin", vocab_size=32, shard_tokens=300) as writer:
        writer.append(ids)
    found = {resume.content(open_tokens(tmp_path / f"{name}.bin")) for name in ("whole", "cut")}
    monkeypatch.setattr(resume, "BLOCK", 7)
    found |= {resume.content(open_tokens(tmp_path / f"{name}.bin")) for name in ("whole", "cut")}
    assert len(found) == 1 and resume.content(None) == resume.ABSENT
    ids[999] ^= 1
    with TokenWriter(tmp_path / "whole.bin", vocab_size=32) as writer:
        writer.append(ids)
    assert resume.content(open_tokens(tmp_path / "whole.bin")) not in found


def test_a_damaged_checkpoint_changes_no_file(copy):
    path = copy / "run" / "checkpoints" / "step-00000004" / "params.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00\x01"[:1])
    with open(path, "ab") as file:
        file.write(b"x")
    before = contents(copy)
    with pytest.raises(ValueError, match=r"params\.safetensors"):
        trained(again(copy))
    assert contents(copy) == before


def test_a_checkpoint_that_says_it_is_not_finite_is_not_gone_on_from(copy):
    path = copy / "run" / "checkpoints" / "step-00000004" / "manifest.json"
    manifest = {**json.loads(path.read_text()), "finite": False}
    path.write_text(json.dumps({**manifest, "sha256": checkpoint.folder._seal(manifest)}))
    with pytest.raises(ValueError, match="step-00000004: holds inf or nan, so nothing can go on from it"):
        start(again(copy))


def test_another_tokenizer_of_the_same_size(tmp_path):
    """Refused by start, with tokenizer.json as it was; and in a new run's folder that has one already."""
    one, two = (train_tokenizer([text], 258) for text in ("ababab", "cdcdcd"))
    save(one, tmp_path / "one.json")
    save(two, tmp_path / "two.json")
    cfg = small(tmp_path, tokenizer=tmp_path / "one.json", model=dataclasses.replace(MODEL, vocab_size=258))
    trained(cfg)
    assert checkpoint.read_manifest(cfg.run / "checkpoints")["meta"]["fingerprints"]["tokenizer"] == fingerprint(one)
    before = contents(cfg.run)
    with pytest.raises(ValueError, match=r"tokenizer \(its content\)"):
        start(dataclasses.replace(cfg, tokenizer=tmp_path / "two.json", resume=True))
    shutil.rmtree(cfg.run / "checkpoints")
    with pytest.raises(ValueError, match=r"has another tokenizer.json than .*two.json"):
        start(dataclasses.replace(cfg, tokenizer=tmp_path / "two.json"))
    shutil.rmtree(cfg.run)
    cfg.run.mkdir()
    (cfg.run / "config.json").write_text('{"architectures": ["of another program"]}')
    with pytest.raises(ValueError, match=r"its config\.json is not that of a run"):
        start(cfg)
    assert before["tokenizer.json"] == contents(tmp_path)["one.json"]


def test_more_steps_go_on_as_if_they_had_been_asked_for_at_once(copy, tmp_path):
    """A constant schedule; the rows of both, but for the evaluation at the end of the first."""
    (tmp_path / "whole").mkdir()
    whole = small(tmp_path / "whole", steps=8)
    trained(whole)
    cfg = again(copy, steps=8, save_every=3, log_every=1, keep_last=1, microbatches=2, remat=True)
    trained(dataclasses.replace(cfg, microbatches=1, remat=False))
    a, b = (checkpoint.load(run / "checkpoints")[0] for run in (whole.run, cfg.run))
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))
    found = [row for row in rows(cfg.run) if row["step"] != 4 or "loss" in row]
    assert found == rows(whole.run)


def test_what_is_forced_is_written_down(copy, capsys):
    optim = dataclasses.replace(small(copy).optim, lr=0.5)
    cfg = again(copy, resume=False, resume_anyway=True, batch_size=2, optim=optim)
    trained(cfg)
    lines = ["batch_size 2 is not that of the checkpoint, 4", "optim.lr 0.5 is not that of the checkpoint, 0.001"]
    forced = [row for row in track.read_rows(cfg.run / "metrics.jsonl") if "resumed_anyway" in row]
    assert forced == [{"step": 4, "resumed_anyway": lines}]
    assert all(f"anyway: {line}" in capsys.readouterr().err for line in lines[:1])
    assert checkpoint.read_manifest(cfg.run / "checkpoints")["meta"]["config"]["batch_size"] == 2
    assert start(dataclasses.replace(cfg, resume_anyway=False, resume=True)).forced == []  # it is the run's own now


def test_a_finished_run_is_said_to_be(copy, capsys):
    from experiments import pretrain

    before = contents(copy)
    assert start(again(copy, steps=4)).finished
    pretrain.main(again(copy, steps=4))
    assert "is finished: 4 of 4 steps" in capsys.readouterr().err
    assert contents(copy) == before


def test_a_run_that_ended_before_its_report_evaluates_once(copy):
    """Oracle: the rows of the run that did not end. Its last evaluation is there already, or it is not."""
    run, expected = copy / "run", rows(copy / "run")
    saved = contents(run / "checkpoints")
    for cut in (False, True):
        (run / "summary.json").unlink()
        if cut:
            track.drop_rows(run / "metrics.jsonl", lambda row: "heldout_loss" in row)
        assert not start(again(copy, steps=4)).finished
        completed(again(copy, steps=4))
        assert rows(run) == expected and contents(run / "checkpoints") == saved


@pytest.mark.parametrize("which", ["params", "opt_state"])
def test_what_is_not_finite_is_never_saved_over_what_is(tmp_path, monkeypatch, which):
    """A nan after step 3 of a run that saves at each step and keeps one."""
    cfg = small(tmp_path, save_every=1, keep_last=1, log_every=20)
    ready = start(cfg)

    def poisoned(state, batch):
        state, metrics = ready.run.step(state, batch)
        if int(state.step) == 3:
            bad = tree.map(lambda x: x * float("nan") if x.is_floating_point() else x, getattr(state, which))
            state = state._replace(**{which: bad})
        return state, metrics

    with pytest.raises(ValueError) as error:
        train(cfg, ready._replace(run=ready.run._replace(step=poisoned)))
    assert f"{which} hold inf or nan after step 3: nothing is saved; lower optim.lr (0.001)" in str(error.value)
    assert "newest checkpoint: 2" in str(error.value)
    assert checkpoint.steps(cfg.run / "checkpoints") == [2]
    assert bool(tree.all_finite(checkpoint.load(cfg.run / "checkpoints")[0]))


def test_the_clock_leaves_out_what_is_paused():
    """Oracle: a clock that stands still but where it is moved."""
    now = [100.0]
    clock = loop.Clock(7.0, 10, now=lambda: now[0])
    now[0] += 2
    assert clock.steps_per_second(14) == 2.0
    now[0] += 3
    with clock.paused():
        now[0] += 1000
        assert clock.worked() == 5.0 and clock.steps_per_second(17) == 1.0  # read within an evaluation
    now[0] += 0.5
    assert clock.steps_per_second(18) == 2.0
    now[0] += 4
    assert clock.steps_per_second(20, at=clock.worked() - 2) == 1.0  # done two seconds ago
    assert clock.total() == 7 + 2 + 3 + 1000 + 0.5 + 4


def test_rates_of_a_run_are_those_of_its_steps(tmp_path, monkeypatch):
    """A step takes a second, an evaluation and a save an hour: 64 tokens per second in every row."""
    now = [0.0]
    monkeypatch.setattr(loop.Clock.__init__, "__defaults__", (lambda: now[0],))
    cfg = small(tmp_path, steps=9, save_every=3, eval_every=2, log_every=2)
    ready = start(cfg)

    def step(state, batch):
        now[0] += 1
        return ready.run.step(state, batch)

    def evaluate(params, limit):
        now[0] += 3600
        return ready.evaluate(params, limit)

    def slow_save(*args, **kwargs):
        now[0] += 3600
        return ready.run.save(*args, **kwargs)

    train(cfg, ready._replace(evaluate=evaluate, run=ready.run._replace(step=step, save=slow_save)))
    found = [row for row in track.read_rows(cfg.run / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in found] == [1, 2, 4, 6, 8, 9]
    assert {row["tokens_per_second"] for row in found} == {64.0}
