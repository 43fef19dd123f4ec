"""experiments.prepare_sft. Oracles: the files that it reads, row by row; the library's own steps; a killed process."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.pairs import read_pairs, text_of
from experiments.prepare_sft import Args, main
from purelm.align.data.countdown import Game
from purelm.tokenizer import make, save
from tests.dist.processes import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
GSM8K = [
    {"question": f"Ann has {i} hats and buys {i} more of them in the shop next to the old mill. How many?",
     "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"} for i in range(1, 6)
]  # fmt: skip
OPENR1 = {
    "problem": "What is 2 + 2?", "answer": "4", "generations": ["four", "it is 4", "5"],
    "is_reasoning_complete": [True, True, True], "correctness_math_verify": [True, True, False],
}  # fmt: skip


def written(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def prepared(tmp_path, *inputs, **options):
    out = options.pop("out", tmp_path / "out.jsonl")
    main(Args(inputs, out, **options))
    return rows_of(out), json.loads(Path(f"{out}.provenance.json").read_text())


def test_all_kinds_become_rows_that_sft_reads(tmp_path, capsys):
    """The kinds are known by their fields. The same command gives the same bytes; the hashes are the files'."""
    inputs = [
        written(tmp_path / "gsm.jsonl", GSM8K),
        written(tmp_path / "alpaca.jsonl", [{"instruction": "Say yes.", "input": "", "output": "yes"}]),
        written(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "Hi"},
                                                        {"role": "assistant", "content": "Ho"}]}]),
        written(tmp_path / "pairs.jsonl", [{"prompt": "a", "response": "b\u2028\u00e9", "x": "\ud800"}] * 2),
        "countdown:3",
    ]  # fmt: skip
    rows, told = prepared(tmp_path, *inputs)
    assert len(rows) == 5 + 1 + 1 + 1 + 3 == told["rows"]
    assert rows[0]["response"] == "1+1=2\n#### 2" and rows[5]["prompt"].endswith("### Response:\n")
    assert [x["kind"] for x in told["inputs"]] == ["gsm8k", "alpaca", "chat", "pairs", "countdown"]
    assert told["counts"] == [{"step": "unique", "n_in": 12, "n_out": 11, "removed": {"duplicate": 1}}]
    assert told["sha256"] == hashlib.sha256((tmp_path / "out.jsonl").read_bytes()).hexdigest()
    assert told["inputs"][0]["sha256"] == hashlib.sha256(Path(inputs[0]).read_bytes()).hexdigest()
    pairs = read_pairs(tmp_path / "out.jsonl", "{prompt}", "{response}")
    assert [(text_of(x.prompt), text_of(x.response)) for x in pairs] == [(x["prompt"], x["response"]) for x in rows]
    assert prepared(tmp_path, *inputs, out=tmp_path / "again.jsonl") == (rows, told)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    said = capsys.readouterr()
    assert "unique         12      11        1  duplicate 1" in said.out and "11 rows" in said.out
    assert not [x for x in tmp_path.iterdir() if x.name.startswith(".")]


def test_steps(tmp_path):
    """Each argument by what it removes, told row by row."""
    train = written(tmp_path / "train.jsonl", [*GSM8K, {"question": "2?", "answer": "#### 2"}])
    written(tmp_path / "gsm8k-test.jsonl", [GSM8K[2] | {"question": f"Now: {GSM8K[2]['question']}"}])
    tokenizer = tmp_path / "tokenizer.json"
    save(make({i: bytes([i]) for i in range(256)}, [], []), tokenizer)
    rows, told = prepared(
        tmp_path, train, decontaminate=(tmp_path,), ngram=8, ratio=0.6, tokenizer=tokenizer, min_tokens=12,
        verifiable=True, removed=True, calculator=True,
    )  # fmt: skip
    assert [row["answer"] for row in rows] == ["2", "4", "8", "10"] and "<<1+1=2>>" in rows[0]["response"]
    assert [x["step"] for x in told["counts"]] == ["unique", "decontaminated", "verifiable", "length"]
    assert [x["name"] for x in told["decontaminate"]] == [str(tmp_path / "gsm8k-test.jsonl")]
    gone = rows_of(tmp_path / "out.jsonl.removed.jsonl")
    assert [(x["step"], x["reason"]) for x in gone] == [("decontaminated", "contaminated"), ("length", "too short")]
    assert gone[0]["detail"].startswith("gsm8k-0 (") and gone[0]["row"]["answer"] == "6"
    assert gone[1]["detail"] == "8 tokens"  # "2?" and "#### 2", a token a byte
    test = tmp_path / "gsm8k-test.jsonl"
    one, _ = prepared(tmp_path, train, decontaminate=(test,), ngram=8, out=tmp_path / "b.jsonl")
    assert [row["answer"] for row in one] == ["2"]  # a run of 8 words is in all of them


def test_duplicates(tmp_path):
    train = written(tmp_path / "x.jsonl", [{"prompt": p, "response": r} for p, r in ("aa", "aa", "Aa", "ab")])
    found = {
        flags: ["".join((x["prompt"], x["response"])) for x in
                prepared(tmp_path, train, dedupe=flags[0], dedupe_prompts=flags[1], out=tmp_path / f"{i}.jsonl")[0]]
        for i, flags in enumerate([("none", False), ("exact", False), ("normalised", False), ("exact", True)])
    }  # fmt: skip
    assert [*found.values()] == [["aa", "aa", "Aa", "ab"], ["aa", "Aa", "ab"], ["aa", "ab"], ["aa", "Aa"]]


def test_openr1(tmp_path):
    source = written(tmp_path / "x.jsonl", [OPENR1, OPENR1 | {"correctness_math_verify": [False] * 3, "answer": "9"}])
    for options, wanted in (
        ({}, ["four"]),
        ({"generations": "all"}, ["four", "it is 4"]),
        ({"unchecked": True, "generations": "shortest"}, ["5", "5"]),
        ({"pass_rate": (0.5, 0.7), "verifiable": True}, ["four"]),
    ):
        out = tmp_path / f"{len([*tmp_path.iterdir()])}.jsonl"
        rows, _ = prepared(tmp_path, source, out=out, dedupe="none", **options)
        assert [row["response"] for row in rows] == wanted, options
        assert {row["pass_rate"] for row in rows} <= {2 / 3, 0.0}


def test_bad_rows_are_dropped_and_counted(tmp_path, capsys):
    source = written(tmp_path / "x.jsonl", [GSM8K[0], {"question": "x"}, GSM8K[1]])
    rows, told = prepared(tmp_path, source, bad="drop", limit=5)
    assert len(rows) == 2 and told["counts"][0] == {"step": "read", "n_in": 3, "n_out": 2, "removed": {"refused": 1}}
    assert "1 rows lack what they need, the first: " in capsys.readouterr().err


def test_countdown_in_parts(tmp_path):
    """Ranges of one seed are disjoint parts of one sequence."""
    whole, _ = prepared(tmp_path, "countdown:20", seed=5)
    first, _ = prepared(tmp_path, "countdown:0:8", seed=5, out=tmp_path / "a.jsonl")
    rest, _ = prepared(tmp_path, "countdown:8:20", seed=5, out=tmp_path / "b.jsonl")
    assert first + rest == whole
    small, told = prepared(tmp_path, "countdown:9", game=Game(n_numbers=(2, 2)), out=tmp_path / "c.jsonl")
    assert {len(row["numbers"]) for row in small} == {2} and told["settings"]["game"]["n_numbers"] == [2, 2]


def test_what_is_wrong_is_one_line_and_nothing_is_written(tmp_path, capsys):
    train, other = written(tmp_path / "x.jsonl", GSM8K), written(tmp_path / "y.jsonl", [{"text": "x"}])
    bad = written(tmp_path / "bad.jsonl", [GSM8K[0], {"question": "x"}])
    math = written(tmp_path / "m.jsonl", [OPENR1])
    (tmp_path / "there.jsonl").write_text("mine")
    (tmp_path / "p.parquet").write_bytes(b"x")
    before = {x.name: x.read_bytes() for x in tmp_path.iterdir()}
    for inputs, options, message in (
        ((bad,), {}, "bad.jsonl, line 2: lacks 'answer'; its fields are question"),
        ((other,), {}, "y.jsonl, line 1: has the fields text; kinds are alpaca (instruction, output)"),
        ((str(tmp_path / "none"),), {}, "none: no such file or folder"),
        ((str(tmp_path),), {"limit": 1}, "cannot be read" if has("datasets") else "needs datasets"),
        ((train,), {"out": tmp_path / "there.jsonl"}, "there.jsonl: exists; remove it first, or write elsewhere"),
        ((train,), {"out": Path(train)}, "is an input"),
        ((train,), {"out": tmp_path / "o.txt"}, "must end in .jsonl"),
        ((train,), {"max_tokens": 5}, "max_tokens, min_tokens: need --tokenizer"),
        ((train,), {"pass_rate": (0.1, 0.2)}, "pass_rate: only OpenR1's rows have one"),
        ((train, math), {}, "OpenR1's rows go through steps of their own"),
        ((train,), {"decontaminate": (tmp_path / "none",)}, "none: no such file or folder"),
        ((train,), {"decontaminate": (Path(train),)}, "no row is left; nothing is written:"),
        (("countdown:5:2",), {}, "countdown:5:2: has no problem"),
        (("countdown:x",), {}, "allowed is countdown:N or countdown:FIRST:LAST"),
        ((), {}, "inputs: give at least one"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(Args(inputs, options.pop("out", tmp_path / "new" / "o.jsonl"), **options))
        said = capsys.readouterr().err
        assert ended.value.code == 2 and "error: " in said and message in said, said
        assert {x.name: x.read_bytes() for x in tmp_path.iterdir()} == before


def has(name):
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_killed_while_it_writes(tmp_path):
    """Nothing lies there under the name, and the next run removes what the killed one left."""
    command = [sys.executable, "-m", "experiments.prepare_sft", "countdown:9999999", "--out", str(tmp_path / "o.jsonl")]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE)
    try:
        while not any(x.stat().st_size for x in tmp_path.glob(".new-*/o.jsonl")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".new-")
    prepared(tmp_path, "countdown:5", out=tmp_path / "o.jsonl")
    assert {x.name for x in tmp_path.iterdir()} == {"o.jsonl", "o.jsonl.provenance.json"}


def test_the_real_files(tmp_path, shared_data):
    """GSM8K's training part against the test sets beside it: few rows are gone, and each has what it matched."""
    rows, told = prepared(
        tmp_path, str(shared_data / "math/gsm8k-train.jsonl"), decontaminate=(shared_data / "math",), removed=True
    )
    assert len(rows) == 7473 - told["counts"][1]["removed"]["contaminated"] >= 7440
    assert len(told["decontaminate"]) == 4
    assert len(rows_of(tmp_path / "out.jsonl.removed.jsonl")) == 7473 - len(rows)
