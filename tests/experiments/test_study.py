"""experiments.curate.study: what its variants hold. Oracles: their rules by hand; for the page, a made-up table."""

import json
import random
import statistics
from hashlib import blake2b

import pytest

from experiments.curate import board, study
from experiments.curate.files import read_json, rows_in
from experiments.curate.study_page import differences, write
from purelm.curate.classes import scorer
from purelm.data import open_tokens
from tests.experiments.curate_runs import write_rows
from tests.programs import run_here

NOUNS = "house river garden teacher winter letter market village window bridge kitchen forest doctor island mountain"
VERBS = "crossed visited remembered painted followed described opened watched carried finished"
ENDS = ("before the rain began", "after a long and quiet morning", "with some help from the neighbours",
        "because nobody else had been there", "and that was enough for them", "in spite of the cold wind",
        "to find what they have lost", "as it had been promised")  # fmt: skip


def english(seed, n=14):
    """Sentences; the rules keep some of such texts, and drop others that repeat themselves."""
    draw = random.Random(seed)
    kinds = [NOUNS.split(), NOUNS.split(), VERBS.split(), ["a", "the", "that"], NOUNS.split(), ENDS]
    return " ".join("The {} of the {} {} {} {} {}.".format(*map(draw.choice, kinds)) for _ in range(n))


def russian(seed):
    draw = random.Random(seed)
    words = "дом река который после ночью город когда письмо стояла они вечером".split()
    return " ".join(draw.choice(words) for _ in range(60))


def made_up_row(args):
    """In the place of a judgement, which tests of the board are about: figures by name and seed."""
    values = [len(args.name) + seed / 10 for seed in args.seeds]
    figure = {"mean": statistics.mean(values), "sd": statistics.stdev(values), "values": values}
    names = [path.name for path in args.reference]
    return {"name": args.name, "version": 1, "size": args.size, "tokenizer": "abc", "seeds": list(args.seeds),
            "reference": dict.fromkeys(names, "1"), "mean": figure, "bits_per_byte": dict.fromkeys(names, figure),
            "reference_counts": {path.name: {"bytes": path.stat().st_size} for path in args.reference},
            "parameters": 5, "budget": 6, "n_tokens": len(open_tokens(args.tokens)), "epochs": 2.0,
            "shared": dict.fromkeys(names, 0.5)}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, what was judged, the flags)."""
    folder = tmp_path_factory.mktemp("study")
    texts = [{"id": f"e{i}", "url": "", "text": english(i)} for i in range(90)]
    again = next(x for x in texts if not study._set_aside(x["text"]))
    texts += [again | {"id": "again"}, *({"id": f"r{i}", "url": "", "text": russian(i)} for i in range(20))]
    write_rows(folder / "a.jsonl.gz", texts)
    (folder / "clean.txt").write_text("\n\n".join(english(1000 + i, 8).replace("The", "Our") for i in range(30)))
    (folder / "speeches.txt").write_text(english(2000, 20))
    given = {"input": folder / "a.jsonl.gz", "positive": folder / "clean.txt", "reference": folder / "speeches.txt",
             "work": folder / "work", "results": folder / "results", "vocab-size": 280, "size": "smoke",
             "reference-bytes": 500, "conclusion": "So it is.", "device": "cpu"}  # fmt: skip
    flags, judged = [x for name, value in given.items() for x in (f"--{name}", value)], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board, "judged", lambda args: [judged.append(args), made_up_row(args)][1])
        found = run_here("experiments.curate.study", *flags, "--seeds", 3, 4)
        assert found.returncode == 0, found.stderr
        yield folder, judged, flags


def texts_of(folder, name):
    return [row["text"] for path in sorted((folder / "work" / name / "text").iterdir()) for row in rows_in(path)]


def test_what_is_in_the_variants(done):
    folder, judged, _ = done
    every = [row["text"] for row in rows_in(folder / "a.jsonl.gz")]
    aside = [x for x in every if int.from_bytes(blake2b(x.encode(), digest_size=8).digest(), "big") % 3 == 0]
    pool = [x for x in every if x not in aside]
    assert [json.loads(x)["text"] for x in (folder / "work" / "aside.jsonl").read_text().splitlines()] == aside
    found = {name: texts_of(folder, study._folder(name)) for name in study.VARIANTS}
    assert sorted(found["raw"]) == sorted(pool) and len(set(pool)) == len(pool) - 1
    assert sorted(found["deduplicated"]) == sorted(set(pool))
    assert sorted(found["english"]) == sorted(x for x in pool if x.startswith("The "))
    assert set(found["rules"]) < set(found["english"]) and len(found["rules"]) > 3
    size = {name: sum(map(len, texts)) for name, texts in found.items()}
    # As many characters as rules has, or one document more: the best by the classifier, the first of raw's order.
    find = scorer(folder / "work" / "quality.safetensors", "positive")
    score = {text: find(text)[1] for text in found["english"]}
    best = sorted(set(found["english"]), key=score.__getitem__, reverse=True)
    assert set(found["classifier"]) == set(best[: len(set(found["classifier"]))])
    assert size["classifier"] >= size["rules"] > size["classifier"] - len(min(found["classifier"], key=score.get)) * 2
    part = [json.loads(x)["text"] for x in (folder / "work" / "part.jsonl").read_text().splitlines()]
    assert part == found["raw"][: len(part)] and sorted(part) == sorted(found["raw, cut"])
    assert size["raw, cut"] >= size["rules"] > size["raw, cut"] - len(part[-1])
    assert [args.name for args in judged[:6]] == list(study.VARIANTS)
    for args in judged[:6]:
        assert args.tokens == folder / "work" / study._folder(args.name) / "tokens" and args.seeds == (3, 4)
        assert args.tokenizer == folder / "work" / "tokenizer.json" and args.epochs == 20 and args.most_shared == 0.01
    variants = read_json(folder / "results" / "data_study.json")["variants"]
    for name, texts in found.items():
        assert (variants[name]["documents"], variants[name]["characters"]) == (len(texts), size[name])
        assert variants[name]["duplicates"] == (name == "deduplicated")


def test_the_negatives_are_no_part_of_what_is_scored(done):
    folder, _, _ = done
    negatives = [json.loads(x)["text"] for x in (folder / "work" / "negative.jsonl").read_text().splitlines()]
    assert negatives and not set(negatives) & set(texts_of(folder, "variant-raw"))
    assert all(x.startswith("The ") for x in negatives)  # the English ones


def test_a_study_goes_on(done):
    """Nothing is judged again, nor made again; the page is as before."""
    folder, judged, flags = done
    page = (folder / "results" / "data_study.md").read_text()
    assert "So it is." in page and all(f"\n| {name} | {what[0]} |" in page for name, what in study.VARIANTS.items())
    before = {x: x.stat().st_mtime_ns for x in (folder / "work").rglob("*.npy")}
    again = run_here("experiments.curate.study", *flags, "--seeds", 3, 4, "--only", "raw", "rules")
    assert again.returncode == 0 and len(judged) == 6 and "rules: is in" in again.stderr
    assert (folder / "results" / "data_study.md").read_text() == page
    assert {x: x.stat().st_mtime_ns for x in (folder / "work").rglob("*.npy")} == before
    table = folder / "results" / "board.jsonl"
    table.write_text("".join(x + "\n" for x in table.read_text().splitlines() if '"raw, cut"' not in x))
    assert run_here("experiments.curate.study", *flags, "--seeds", 3, 4).returncode == 0
    assert [args.name for args in judged[6:]] == ["raw, cut"]
    bad = run_here("experiments.curate.study", *flags, "--only", "raws")
    assert bad.returncode == 2 and "only: 'raws' is no variant" in bad.stderr


@pytest.mark.parametrize("text", ["Words of a line. " * 30, "Größe über Maß. " * 30, "x" * 700, "一 二 三 " * 90])
def test_a_reference_is_cut(tmp_path, text):
    """Within the bytes that are asked for, at a blank, and never within a character."""
    (tmp_path / "a.b.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in ("First.", text, "Never.")))
    args = study.Args(("x",), (), (), work=tmp_path, reference_bytes=400)
    path = study._cut(args, tmp_path / "a.b.jsonl")
    found = [json.loads(x)["text"] for x in path.read_text().splitlines()]
    assert path.name == "a.jsonl" and found[0] == "First."
    assert sum(len(x.encode()) for x in found) <= 400
    assert len(found) == 2 and text.startswith(found[1]) and sum(len(x.encode()) for x in found) > 380
    assert " " not in text or text.startswith(f"{found[1]} ")


def some_row(name, values):
    names = ("a.jsonl", "b.jsonl")
    figure = {"mean": statistics.mean(values.values()), "sd": 0.1, "values": list(values.values())}
    return {"name": name, "version": 1, "size": "cpu", "tokenizer": "abc", "reference": dict.fromkeys(names, "1"),
            "mean": figure, "bits_per_byte": dict.fromkeys(names, figure), "seeds": list(values), "parameters": 5,
            "reference_counts": {name: {"bytes": 7} for name in names}, "budget": 6, "n_tokens": 1000, "epochs": 2.0,
            "shared": dict.fromkeys(names, 0.5)}  # fmt: skip


def test_differences_are_seed_by_seed():
    table = [some_row("raw", {0: 2.0, 1: 3.0, 2: 4.0}), some_row("x", {2: 3.5, 1: 3.25, 7: 0.0}), some_row("y", {9: 1})]
    assert differences(table) == {"x": {"mean": -0.125, "low": -0.5, "high": 0.25, "seeds": 2}}
    assert differences(table[1:]) == {} and list(differences(table, "x")) == ["raw"]


def test_the_page(tmp_path):
    table = [some_row("raw", {0: 2.0, 1: 3.0}), some_row("cut", {0: 1.0, 1: 2.5})]
    told = {name: {"documents": 1234, "characters": 5, "duplicates": 6} for name in ("raw", "cut", "not judged")}
    write(tmp_path, table, {name: f"what {name} is" for name in told}, told, "")
    page = (tmp_path / "data_study.md").read_text()
    assert "| cut | -0.7500 | -1.0000, -0.5000 |" in page and page.index("| cut | 1.75") < page.index("| raw | 2.5")
    assert "| not judged | what not judged is | 1,234 | 5 | 6 |" in page and page.count("\n# ") == 0
    assert (tmp_path / "data_study.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(x.name for x in tmp_path.iterdir()) == [f"data_study.{x}" for x in ("json", "md", "png")]
    assert read_json(tmp_path / "data_study.json")["rows"] == table
