"""Optional steps of experiments.curate. Oracles: the classifier and the matchers one text at a time; a run without."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.curate import run, work
from experiments.curate.config import Classes, Curate, Decontaminate, Dedup, Filter, Final, stage_settings
from experiments.curate.evaluations import decontamination
from experiments.curate.files import read_json
from experiments.curate.plan import Input, Task
from purelm.curate import decon
from purelm.curate.classifier import Classifier, Config, classify
from purelm.curate.classifier_files import save_classifier
from purelm.curate.decontaminate import GPT3, PALM, TULU3, decontaminated, index
from purelm.curate.document import Document
from purelm.curate.features import Features
from tests.experiments.curate_runs import crawl, final, sentences, tree, write_rows

PLAIN = Filter(languages=("all",), rules="none", pii=False)


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    return crawl(tmp_path_factory.mktemp("steps") / "crawl")


@pytest.fixture(scope="module")
def whole(web, tmp_path_factory):
    output = tmp_path_factory.mktemp("steps") / "whole"
    run.curate(config(web, output))
    return output


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    save_classifier(path, classifier(0))
    return path


def classifier(seed):
    rows = torch.from_numpy(np.random.default_rng(seed).normal(size=(64, 2)).astype(np.float32))
    return Classifier({"rows": rows, "bias": torch.zeros(2)}, Config(("good", "bad"), Features(64, 1)))


def config(web, output, filter=PLAIN):
    return Curate((f"{web}/*",), output, filter, Dedup("none"), Final(0.003), seed=3, examples=50)


def texts(output):
    return sorted(row["text"] for row in final(output))


@pytest.mark.parametrize("name, kept", [("quality", True), ("toxicity", False), ("nsfw", False)])
def test_a_model_keeps_or_drops_its_class(web, whole, model, tmp_path, name, kept):
    step = Classes(model, "good", 0.3)
    run.curate(config(web, tmp_path / "out", replace(PLAIN, **{name: step})))
    every = texts(whole)
    score = {text: classify(classifier(0), text, "good")[1] for text in every}
    wanted = [text for text in every if (score[text] >= 0.3) == kept]
    assert texts(tmp_path / "out") == wanted and 0 < len(wanted) < len(every)
    for row in final(tmp_path / "out"):
        assert row["meta"][name] == "good" and row["meta"][f"{name}_score"] == pytest.approx(score[row["text"]])
    funnel = read_json(tmp_path / "out" / "counts.json")["funnel"][name]
    reason = f"{name}: below least" if kept else f"{name}: good"
    assert funnel["dropped"] == {reason: len(every) - len(wanted)}
    assert f"<td>{name}<td>{reason}<td" in (tmp_path / "out" / "report.html").read_text()


def test_the_content_of_a_model_is_in_the_markers(web, model, tmp_path):
    own = tmp_path / "m.safetensors"
    own.write_bytes(model.read_bytes())
    cfg = config(web, tmp_path / "out", replace(PLAIN, quality=Classes(own, "good", 0.3)))
    run.curate(cfg)
    before = tree(cfg.output)
    run.curate(cfg)
    assert tree(cfg.output) == before
    save_classifier(own, classifier(1))
    with pytest.raises(ValueError, match=r"filter/00000: was made with quality.model's content '\w{32}', now it is"):
        run.curate(cfg)
    with pytest.raises(ValueError, match=r"filter.quality.least 0\.3, now it is 0\.4"):
        run.curate(replace(cfg, filter=replace(PLAIN, quality=Classes(own, "good", 0.4))))
    run.curate(replace(cfg, redo=True))
    assert texts(cfg.output) == [x for x in texts_of(web) if classify(classifier(1), x, "good")[1] >= 0.3]


def texts_of(web):
    """All texts, by a run of nothing but extraction, sorted."""
    run.curate(config(web, web.parent / "again"))
    return texts(web.parent / "again")


def test_a_model_that_changes_while_a_run_goes_on_is_noticed(web, model, tmp_path):
    own = tmp_path / "m.safetensors"
    own.write_bytes(model.read_bytes())
    cfg = config(web, tmp_path / "out", replace(PLAIN, toxicity=Classes(own, "bad", 0.5)))
    settings = run.checked(cfg)["filter"]
    path = next(web.glob("c*"))
    source = Input(str(path), path.stat().st_size, path.stat().st_mtime_ns)
    task = Task(cfg, "filter", 0, {"settings": settings}, (source,))
    save_classifier(own, classifier(2))
    assert "toxicity.model's content has changed since the run began" in str(work.attempt(task).error)
    assert not (tmp_path / "out" / "stages" / "filter" / "00000").exists()


def test_steps_that_are_off_are_not_in_the_markers(web):
    """What was made before there were such steps is still done."""
    names = set(stage_settings(config(web, Path("out")))["filter"])
    assert not any("quality" in x or "decontaminate" in x or "toxicity" in x or "nsfw" in x for x in names)
    on = replace(PLAIN, nsfw=Classes(Path("x")), decontaminate=Decontaminate((Path("y"),)))
    settings = stage_settings(config(web, Path("out"), on))["filter"]
    assert settings["filter.nsfw.model"] == "x" and settings["filter.decontaminate.files"] == ["y"]
    assert set(settings) - names == {
        *(f"filter.nsfw.{x}" for x in ("model", "label", "least")),
        *(f"filter.decontaminate.{x}" for x in ("files", "preset", "n", "share", "action")),
    }  # fmt: skip
    json.dumps(settings)


def test_steps_that_cannot_be(web, model, tmp_path):
    short, other = tmp_path / "short.txt", tmp_path / "odd.jsonl"
    short.write_text("Three words here.")
    other.write_text('{"nothing": 1}\n')
    for change, message in [
        ({"quality": Classes(label="good")}, "filter.quality: quality: no model is given and none comes with"),
        ({"toxicity": Classes(least=0.4)}, "filter.toxicity: toxicity: no model is given"),
        ({"nsfw": Classes(label="x", least=0.4)}, "filter.nsfw: nsfw: no model is given"),
        ({"quality": Classes(model, "good")}, "filter.quality.least: must be given with a label"),
        ({"quality": Classes(model)}, "filter.quality: .*has no label 'hq'; it has good, bad"),
        ({"quality": Classes(tmp_path / "none.bin")}, "none.bin: no such file"),
        ({"quality": Classes(short)}, "models end in .safetensors"),
        ({"decontaminate": Decontaminate(preset="palm")}, "filter.decontaminate: no evaluation set is given"),
        ({"decontaminate": Decontaminate((tmp_path / "none",))}, "no such file or folder"),
        ({"decontaminate": Decontaminate((short,))}, "none of their 1 texts is long enough"),
        ({"decontaminate": Decontaminate((short,), "decon")}, "none of their 1 texts is long enough"),
        ({"decontaminate": Decontaminate((short,), "decon", action="cut")}, "decon only drops"),
        ({"decontaminate": Decontaminate((short,), "decon", share=0.0)}, "filter.decontaminate: least=0.0"),
        ({"decontaminate": Decontaminate((other,))}, "odd.jsonl"),
    ]:
        with pytest.raises(ValueError, match=message):
            run.curate(config(web, tmp_path / "out", replace(PLAIN, **change)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("preset", ["palm", "decon", None])
def test_documents_with_questions_are_dropped(tmp_path, preset):
    tests = tmp_path / "tests.jsonl"
    questions = [sentences(900 + i, 30) for i in range(3)]
    rows = [{"question": x, "answer": "It is so. #### 7"} for x in [*questions, "Too short."]]
    tests.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "crawl").mkdir()
    found = [sentences(i, 200) for i in range(6)]
    found[1] += " " + questions[0]
    found[4] = questions[2] + " " + found[4]
    found[5] += " " + " ".join(questions[1].split()[:15])  # one run of 13, and less than 70 % of the runs
    write_rows(tmp_path / "crawl" / "x.jsonl.gz", [{"text": text} for text in found])
    cfg = config(tmp_path / "crawl", tmp_path / "out", replace(PLAIN, decontaminate=Decontaminate((tests,), preset)))
    run.curate(cfg)
    counts = read_json(cfg.output / "counts.json")
    if preset == "decon":
        built = decon.index({"tests.jsonl": [decon.Example(str(i), x) for i, x in enumerate(questions)]})
        made = [decon.cleared(Document("", text), built) for text in found]
    else:
        settings = PALM if preset == "palm" else GPT3
        built = index({"tests.jsonl": [(str(i), x) for i, x in enumerate(questions)]}, settings.n)
        made = [decontaminated(Document("", text), built, settings) for text in found]
    assert texts(cfg.output) == sorted(x.text for x in made if isinstance(x, Document))
    dropped = counts["funnel"]["decontaminate"]["dropped"]
    if preset is None:  # cut
        assert any(x.text not in found for x in made) and not dropped
    else:
        assert texts(cfg.output) == sorted(found[i] for i in (0, 2, 3, 5))
        assert dropped == {"contaminated: tests.jsonl": 2}
    assert counts["evaluation texts"] == {"looked for": 3, "too short": 1}
    assert "looked for 3 evaluation texts; 1 more" in (cfg.output / "report.html").read_text()
    before = tree(cfg.output)
    tests.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match=r"was made with decontaminate .*tests.jsonl's content"):
        run.curate(cfg)
    assert tree(cfg.output) == before


def test_settings_in_the_place_of_the_preset(tmp_path):
    tests = tmp_path / "a.txt"
    tests.write_text(f"{sentences(1, 20)}<|endoftext|>{sentences(2, 20)}")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt").write_text(sentences(3, 20))
    step = decontamination(Decontaminate((tests, tmp_path / "b" / "a.txt"), "tulu3", n=6, share=0.9, action="note"))
    assert step.keywords["settings"] == replace(TULU3, n=6, share=0.9, action="note")
    assert step.keywords["tests"].n == 6 and step.keywords["tests"].sets == (str(tests), str(tmp_path / "b" / "a.txt"))
    assert step(Document("", sentences(2, 20))).meta["contaminated"]["id"] == "a.txt document 1"
    step = decontamination(Decontaminate((tests,), "decon", n=9, share=0.5))
    assert step.keywords["tests"].settings == decon.Decon(n=9, least=0.5, least_words=9)
