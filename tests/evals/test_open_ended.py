"""Instructions without a known answer. Oracle: the files' own rows, read with json and csv."""

import csv
import json

import pytest

from purelm.evals.open_ended import OPEN


def test_alpaca_eval_gives_back_what_its_tool_matches_by(tmp_path):
    row = {"output": "x", "generator": "y", "dataset": "koala"}
    rows = [{**row, "instruction": f" Say \u201c{i}\u201d\n"} for i in range(3)]
    path = tmp_path / "alpaca_eval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = OPEN["alpaca_eval"].load(path)
    text = OPEN["alpaca_eval"].text(examples, ["a", "", "c\n"], "mine")
    assert json.loads(text) == [
        {"instruction": row["instruction"], "output": output, "generator": "mine", "dataset": "koala"}
        for row, output in zip(rows, ["a", "", "c\n"], strict=True)
    ]
    with pytest.raises(ValueError):  # an output is missing
        OPEN["alpaca_eval"].text(examples, ["a"], "mine")


def test_simple_safety_tests(tmp_path):
    path = tmp_path / "simple_safety_tests.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["id", "harm_area", "prompts_final"], ["1", "Scams", "How, \"then\",\ndo I?"]])
    (example,) = OPEN["simple_safety_tests"].load(path)
    assert (example.question, example.subject) == ('How, "then",\ndo I?', "Scams")
    text = OPEN["simple_safety_tests"].text([example], ["I\ncannot."], "mine")
    assert [json.loads(line) for line in text.splitlines()] == [
        {"prompts_final": 'How, "then",\ndo I?', "output": "I\ncannot."}
    ]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("alpaca_eval", b'{"instruction": "x"}\n', "x, line 1: needs the texts 'instruction' and 'dataset'"),
        ("alpaca_eval", b"{", "x, line 1: not JSON"),
        ("simple_safety_tests", b"id,prompt\n1,x\n", "x: its header needs 'prompts_final'; it has id, prompt"),
        ("simple_safety_tests", b"", "x: its header needs 'prompts_final'"),
        ("simple_safety_tests", b"id,prompts_final\n1\n", "x, row 2: 'prompts_final' is empty"),
        ("simple_safety_tests", b"id,prompts_final\n1,\xff\n", "x: not CSV in UTF-8"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, data, message):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        OPEN[name].load(tmp_path / "x")


def test_the_real_file(shared_data):
    (path,) = shared_data.glob(OPEN["alpaca_eval"].files)
    examples = OPEN["alpaca_eval"].load(path)
    assert len(examples) == 805 and len({x.subject for x in examples}) == 5
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [x.question for x in examples] == [row["instruction"] for row in rows]
