"""experiments.curate.board. Oracles: experiments.pretrain with the same flags and score_text; sets of tuples of words;
statistics; sums."""

import json
import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import pretrain
from experiments.curate import board
from experiments.curate.board_page import render
from experiments.curate.overlap import pieces, shared
from experiments.eval_text import score_text
from purelm import checkpoint, track
from purelm.data import DELIMITER, TokenWriter
from purelm.models import transformer
from purelm.tokenizer import encode, fingerprint, load, save, train
from purelm.tokenizer.files import encode_documents
from tests.experiments.curate_runs import WORDS, sentences
from tests.programs import run_here

PROGRAM = "experiments.curate.board"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    bpe = train([" ".join(WORDS)], 300, [DELIMITER])
    save(bpe, folder / "tokenizer.json")
    encode_documents(bpe, [sentences(i, 40) for i in range(60)], folder / "train.bin", n_workers=1)
    (folder / "a.txt").write_text(DELIMITER.join(sentences(1000 + i) for i in range(4)))
    (folder / "b.jsonl").write_text(json.dumps({"text": sentences(2000)}) + "\n")
    return folder


def flags(data, where, **more):
    given = {"tokens": data / "train.bin", "tokenizer": data / "tokenizer.json", "name": "one", "size": "smoke",
             "table": where, "device": "cpu", "reference": [data / "a.txt", data / "b.jsonl"], **more}  # fmt: skip
    return [x for name, value in given.items() for x in (f"--{name}", *np.atleast_1d(value).tolist())]


def test_the_figures_are_those_of_a_training_run(data, tmp_path, monkeypatch):
    table = tmp_path / "board.jsonl"
    table.write_text('{"name": "cut sho')  # a killed write
    done = run_here(PROGRAM, *flags(data, table, seeds=[3, 5]))
    assert done.returncode == 0, done.stderr
    (row,) = track.read_rows(table)
    size, seed = board.SIZES["smoke"], 5  # the second one; the first is judged alone below
    optim = [x for name in ("lr", "adamw_lr_ratio", "lr_min_ratio", "warmup_steps")
             for x in (f"--optim.{name.replace('_', '-')}", getattr(size.optim, name))]  # fmt: skip
    monkeypatch.setattr(pretrain, "finish", lambda *args, **more: None)  # no curves and no page
    trained = run_here(
        "experiments.pretrain", "--run", tmp_path / "run", "--train", data / "train.bin", "--model.d-model",
        size.d_model, "--model.n-layers", size.n_layers, "--model.n-heads", size.n_heads, "--model.context-length",
        size.context_length, "--batch-size", size.batch_size, "--steps", size.steps, "--order", "shuffled",
        "--seed", seed, "--optim.name", size.optim.name, *optim, "--device", "cpu", "--compile", "no",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    trees, meta = checkpoint.load(tmp_path / "run" / "checkpoints")
    model = transformer.make(transformer.Config(**meta["config"]["model"]))
    bpe = load(data / "tokenizer.json")
    for name in ("a.txt", "b.jsonl"):
        want = score_text(model, trees["params"], bpe, data / name, tmp_path / name, window=16, stride=8,
                          begin=DELIMITER)  # fmt: skip
        assert row["bits_per_byte"][name]["values"][1] == pytest.approx(want["bits per byte"], rel=1e-5)
        assert row["reference_counts"][name] == {x: want[x] for x in ("documents", "bytes", "tokens")}
    for values in row["bits_per_byte"].values():
        assert values["values"][0] != values["values"][1]
        assert values["mean"] == statistics.mean(values["values"])
        assert values["sd"] == pytest.approx(abs(values["values"][0] - values["values"][1]) / 2**0.5)
    both = [row["bits_per_byte"][name]["values"] for name in ("a.txt", "b.jsonl")]
    assert row["mean"]["values"] == pytest.approx([(both[0][i] + both[1][i]) / 2 for i in range(2)])
    assert row["budget"] == 4 * 16 * 20 and row["n_tokens"] == len(np.fromfile(data / "train.bin", np.uint16))
    assert row["epochs"] == 80 / ((row["n_tokens"] - 1) // 16) and row["tokenizer"] == fingerprint(bpe)
    again = run_here(PROGRAM, *flags(data, table, seeds=[3]))
    assert again.returncode == 2 and "name 'one': is in" in again.stderr and len(track.read_rows(table)) == 1
    other = run_here(PROGRAM, *flags(data, table, seeds=[3], name="two|x"))
    assert other.returncode == 0 and not track.read_rows(table)[1]["bits_per_byte"]["a.txt"]["sd"]
    for name, values in track.read_rows(table)[1]["bits_per_byte"].items():
        assert values["values"] == row["bits_per_byte"][name]["values"][:1]
    page = table.with_suffix(".md").read_text()
    table.with_suffix(".md").unlink()
    assert run_here(PROGRAM, "--table", table).returncode == 0 and table.with_suffix(".md").read_text() == page
    assert "two\\|x" in page


def test_what_is_refused(data, tmp_path):
    table = tmp_path / "board.jsonl"
    save(train(["other words are here"], 290, [DELIMITER]), tmp_path / "other.json")
    save(train([" ".join(WORDS)], 300, []), tmp_path / "endless.json")
    bpe = load(data / "tokenizer.json")
    with TokenWriter(tmp_path / "few.bin", 300, tokenizer_sha256=fingerprint(bpe)) as writer:
        writer.append(np.fromfile(data / "train.bin", np.uint16)[:800])
    with TokenWriter(tmp_path / "unsaid.bin", 300) as writer:
        writer.append(np.fromfile(data / "train.bin", np.uint16))
    (tmp_path / "a.txt").write_text("A second file of this name, and it has more than eight words.")
    (tmp_path / "seen.txt").write_text(sentences(7, 40) + DELIMITER + sentences(2000))
    (tmp_path / "short.txt").write_text("Short.")
    cases = [
        ({"tokenizer": tmp_path / "other.json"}, "made with the tokenizer of sha256"),
        ({"tokenizer": tmp_path / "endless.json"}, "is no special token of it"),
        ({"tokens": tmp_path / "unsaid.bin"}, "does not say with which tokenizer"),
        ({"tokens": tmp_path / "few.bin"}, "800 tokens; the budget of size smoke, 1,280, goes over them 1.63 times"),
        ({"tokens": tmp_path / "none.bin"}, "no such token file"),
        ({"reference": [data / "a.txt", tmp_path / "a.txt"]}, "several files are called a.txt"),
        ({"reference": [tmp_path / "seen.txt"]}, "reference seen.txt: 36.84 % of its runs of words stand in"),
        ({"reference": [tmp_path / "short.txt"]}, "no document of it has 8 words"),
        ({"reference": [tmp_path / "none.txt"]}, "none.txt"),
        ({"table": tmp_path / "board.txt"}, "must end in .jsonl"),
        ({"table": tmp_path / "no" / "board.jsonl"}, "its folder must be there"),
        ({"table": data / "b.jsonl"}, "would be written over an input"),
        ({"seeds": [1, 1]}, "one is there twice"),
        ({"name": ""}, "name: must be given"),
        ({"epochs": 0}, "epochs must be above 0"),
    ]
    before = {path: path.read_bytes() for path in data.iterdir()}
    for change, message in cases:
        done = run_here(PROGRAM, *flags(data, table, **change))
        assert done.returncode == 2 and message in done.stderr, (change, done.stderr)
    done = run_here(PROGRAM, "--table", table, "--name", "x")
    assert done.returncode == 2 and "name: is of a judgement" in done.stderr
    assert run_here(PROGRAM, "--table", table).returncode == 2
    assert not table.exists() and {path: path.read_bytes() for path in data.iterdir()} == before
    args = board.Args(table, tmp_path / "few.bin", data / "tokenizer.json", (data / "a.txt",), "few", "smoke", (0,),
                      device="cpu")  # fmt: skip
    assert board.judged(replace(args, epochs=1.64))["epochs"] == pytest.approx(80 / 49)
    seen = board.judged(replace(args, reference=(tmp_path / "seen.txt",), most_shared=0.5, tokens=data / "train.bin"))
    assert seen["shared"]["seen.txt"] == pytest.approx(28 / 76)


def runs(text, n):
    words = "".join(x for x in text if x != ".").split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_the_share_that_is_held(mine, theirs):
    """Against sets of tuples; documents 0 to 3 are of 10 words, looked for whole, the others of 20 to 25."""
    bpe = bytes_alone()
    text = {i: sentences(i, 10 if i < 4 else 16 + i) for i in range(10)}
    stream = "".join(text[i] + DELIMITER for i in mine)
    ids = encoded(bpe, stream)
    wanted = {run for i in theirs for run in runs(text[i], 10 if i < 4 else 13)}
    have = {run for i in mine for n in (10, 13) for run in runs(text[i], n)}
    found = shared({"x": [text[i] for i in theirs]}, ids, bpe, DELIMITER)
    assert found == {"x": pytest.approx(len(wanted & have) / len(wanted))}


def bytes_alone():
    return train(["ab"], 257, [DELIMITER])


def encoded(bpe, text):
    return np.array(encode(bpe, text))


@given(st.lists(st.integers(0, 400), max_size=5), st.integers(1, 700), st.booleans())
def test_pieces_are_the_documents_and_overlap_where_they_are_cut(sizes, block, ended):
    bpe = bytes_alone()
    texts = ["".join(chr(97 + (i * 7 + j) % 26) for j in range(size)) for i, size in enumerate(sizes)]
    stream = DELIMITER.join(texts) + (DELIMITER if ended else "")
    found = [text for text, _ in pieces(encoded(bpe, stream), bpe, DELIMITER, block)]
    long = max([0, *sizes])
    if block >= long:
        want = texts if ended else texts[:-1] + [x for x in texts[-1:] if x]
        assert found == (want if texts else ([""] if ended else []))
    for text in texts:  # each stretch of 100 characters is in a piece
        assert all(any(text[i : i + 100] in piece for piece in found) for i in range(0, max(0, len(text) - 100), 9))


def row(name, mean, size="cpu", **more):
    figure = {"mean": mean, "sd": 0.01, "values": [mean]}
    return {"name": name, "version": 1, "size": size, "tokenizer": "abc", "reference": {"x": "1"}, "mean": figure,
            "bits_per_byte": {"x": figure}, "reference_counts": {"x": {"bytes": 7}}, "parameters": 5, "budget": 6,
            "n_tokens": 1000, "epochs": 2.0, "seeds": [0], "shared": {"x": 0.5}, **more}  # fmt: skip


def test_the_table_has_a_section_for_what_compares():
    rows = [row("bad", 2.0), row("good", 1.0), row("other", 0.5, "gpu"), row("same", 1.5), row("text", 0.1,
            reference={"x": "2"}), row("rule", 0.2, version=2)]  # fmt: skip
    sections = render(rows).split("## ")[1:]
    assert [x.splitlines()[0] for x in sections] == [
        "Size cpu, version 1", "Size gpu, version 1", "Size cpu, version 1", "Size cpu, version 2"
    ]  # fmt: skip
    names = [line.split("|")[1].strip() for line in sections[0].splitlines() if line.startswith("| ")]
    assert names == ["data", "good", "same", "bad"]
    assert "| good | 1.0000 +- 0.0100 | 1.0000 +- 0.0100 | 1,000 | 2.00 | 1 | 50.000 % |" in sections[0]


def test_a_version_stands_for_its_numbers():
    """Where one of these changes, VERSION must too: rows of both would else stand in one table."""
    told = {name: [*map(str, (x.d_model, x.n_layers, x.n_heads, x.context_length, x.batch_size, x.steps))]
            for name, x in board.SIZES.items()}  # fmt: skip
    assert (board.VERSION, told) == (1, {
        "smoke": ["16", "1", "2", "16", "4", "20"], "cpu": ["128", "3", "4", "128", "16", "200"],
        "gpu": ["768", "12", "12", "512", "256", "19000"],
    })  # fmt: skip
    lrs = {name: (x.optim.name, x.optim.lr, x.optim.warmup_steps, x.budget) for name, x in board.SIZES.items()}
    assert lrs == {"smoke": ("muon", 0.01, 2, 1280), "cpu": ("muon", 0.004, 20, 409_600),
                   "gpu": ("adamw", 0.001, 400, 2_490_368_000)}  # fmt: skip
