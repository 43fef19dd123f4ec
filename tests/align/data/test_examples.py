"""Files of examples. Oracles: the rows that were written; Stanford Alpaca's train.py, read by hand."""

import gzip
import json
from functools import partial

import pytest

from purelm.align.data import alpaca, alpaca_prompt, chat, dialogue, gsm8k, pairs, read, without_calculator


def written(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_alpaca(tmp_path):
    """A JSON array, as alpaca_data.json is; the input may be empty, null or absent."""
    plain = {"instruction": "Hi", "output": "Ho"}
    rows = [{"instruction": "Add.", "input": "1 {2}", "output": "3"}, plain]
    rows += [plain | {"input": ""}, plain | {"input": None}]
    path = tmp_path / "alpaca_data.json"
    path.write_text(json.dumps(rows, indent=1))
    found = list(read(path, alpaca))
    assert found[0]["prompt"] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 {2}\n\n### Response:\n"
    )
    assert found[1]["prompt"] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nHi\n\n### Response:\n"
    )
    assert [x["response"] for x in found] == ["3", "Ho", "Ho", "Ho"] and found[1]["prompt"] == found[3]["prompt"]
    assert [x["question"] for x in found] == ["Add.\n1 {2}", "Hi", "Hi", "Hi"]
    assert found[2]["source"] == f"{path}, entry 3" and alpaca_prompt("Hi", end="").endswith("### Response:")


CHAT = [("user", "Hi."), ("assistant", "Hello."), ("user", "Who?"), ("assistant", "I."), ("user", "Oh.")]
MESSAGES = [{"role": role, "content": text} for role, text in CHAT]


def test_chat():
    """Both forms give the same rows; what follows the last answer is left out."""
    names = {"user": "human", "assistant": "gpt"}
    other = [{"from": names[role], "value": text} for role, text in CHAT]
    for form in ({"messages": MESSAGES}, {"conversations": other}, {"conversations": MESSAGES}):
        (row,) = chat(form)
        assert row["prompt"] == "User:\nHi.\n\nAssistant:\nHello.\n\nUser:\nWho?\n\nAssistant:\n"
        assert row["response"] == "I." and row["messages"] == MESSAGES[:4]
        first, second = chat(form, every_turn=True)
        assert second == row and (first["prompt"], first["response"]) == ("Hi.", "Hello.")
    (row,) = chat({"system": "Be brief.", "conversations": other[:2]})
    assert row["prompt"] == "Be brief.\n\nHi." and row["messages"][0] == {"role": "system", "content": "Be brief."}
    (row,) = chat({"messages": MESSAGES}, render=lambda messages: f"{len(messages)} messages")
    assert row["prompt"] == "3 messages"
    greeting = [{"role": "assistant", "content": "Welcome."}, *MESSAGES[:2]]
    (row,) = chat({"messages": greeting}, every_turn=True)
    assert row["response"] == "Hello." and row["prompt"].startswith("Assistant:\nWelcome.\n\nUser:\nHi.")
    system = {"role": "system", "content": "S"}
    assert dialogue([system, *MESSAGES[:3]]).startswith("S\n\nUser:\nHi.\n\nAssistant:\nHello.")


def test_pairs_and_gsm8k():
    assert pairs({"prompt": "", "response": " x", "n": 1}) == [{"prompt": "", "response": " x", "n": 1}]
    assert pairs({"prompt": "p", "completion": "c"}) == [{"prompt": "p", "response": "c"}]
    worked = "She sold 48/2 = <<48/2=24>>24, 2<<1+1=2>> < 3.\n#### 1,024"
    assert gsm8k({"question": " How? ", "answer": worked}) == [
        {"prompt": "How?", "response": "She sold 48/2 = 24, 2 < 3.\n#### 1,024", "answer": "1024"}
    ]
    assert gsm8k({"question": "How?", "answer": worked}, str)[0]["response"] == worked


BAD = [
    (alpaca, {"instruction": "x", "input": ""}, "lacks 'output'; its fields are instruction, input"),
    (alpaca, {"instruction": " ", "output": "x"}, "its 'instruction' is empty"),
    (alpaca, {"instruction": "x", "input": 3, "output": "x"}, "its 'input' is a int, not a text"),
    (alpaca, {"instruction": "x", "output": "\ud800"}, "its 'output' is no valid Unicode: .* at character 0"),
    (pairs, {"prompt": "x"}, "lacks 'response'"),
    (pairs, {"prompt": [{"role": "user"}], "response": "x"}, "its 'prompt' is a list; give a text, or a chat"),
    (pairs, {"prompt": "x", "response": "x", "question": 3}, "its 'question' is a int"),
    (gsm8k, {"question": "x", "answer": "4"}, "its 'answer' has no '#### number'"),
    (chat, {"text": "x"}, "lacks 'messages' or 'conversations'; its fields are text"),
    (chat, {"messages": "x"}, "its 'messages' is a str, not a list"),
    (chat, {"messages": ["x"]}, "message 0 is a str, not an object"),
    (chat, {"messages": [{"role": "user"}]}, "message 0: lacks 'content'; its fields are role"),
    (chat, {"messages": [{"role": "tool", "content": "x"}]}, "message 0 is of 'tool'; allowed are system, user"),
    (chat, {"messages": MESSAGES[:1]}, "no message of an assistant follows one of a user"),
    (chat, {"messages": MESSAGES[1:2]}, "no message of an assistant follows one of a user"),
    (chat, {"messages": [MESSAGES[0], {"role": "assistant", "content": " "}]}, "message 1 of the assistant is empty"),
]


@pytest.mark.parametrize(("convert", "row", "message"), BAD)
def test_a_bad_line_is_named(tmp_path, convert, row, message):
    """With file and line; where asked, it is left out and told."""
    good = {"instruction": "x", "output": "x", "prompt": "x", "response": "x", "messages": MESSAGES,
            "question": "x", "answer": "#### 1"}  # fmt: skip
    path = tmp_path / "x.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join(map(json.dumps, (good, row, good))))
    with pytest.raises(ValueError, match=f"x.jsonl.gz, line 2: {message}"):
        list(read(path, convert))
    told = []
    assert [x["source"] for x in read(path, convert, told.append)] == [f"{path}, line 1", f"{path}, line 3"]
    assert len(told) == 1 and told[0].startswith(f"{path}, line 2: ")


def test_what_is_no_json_is_an_error_always(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "response": "b"}\n{')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        list(read(tmp_path / "x.jsonl", pairs, bad=lambda text: None))


def test_the_real_files(shared_data):
    """As many rows as lines; no annotation is left, and the golds are those that the question set reads."""
    from purelm.evals.tasks import TASKS

    train = list(read(shared_data / "math/gsm8k-train.jsonl", gsm8k))
    assert len(train) == 7473 and not any("<<" in row["response"] or ">>" in row["response"] for row in train)
    test = shared_data / "math/gsm8k-test.jsonl"
    golds = [x.gold for x in TASKS["gsm8k"].load(test)]
    assert [row["answer"] for row in read(test, partial(gsm8k, solution=without_calculator))] == golds
    assert len(list(read(shared_data / "eval/alpaca_eval.jsonl", alpaca))) == 805
