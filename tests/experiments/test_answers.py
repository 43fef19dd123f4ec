"""Prompts with worked examples, and where answers end. Oracles: the library's text and turns of the same examples."""

import json

import pytest

from experiments import answers
from experiments.answers import Answering, prompt_ids
from experiments.eval_sets import NO_SHOTS, read_set, read_shots, shots_of
from purelm import generate, random
from purelm.evals.shots import few_shot, few_shot_turns
from purelm.evals.tasks import TASKS, Example
from purelm.models import transformer
from purelm.tokenizer import decode, encode, make
from purelm.tokenizer.chat import Chat, encode_chat

END = "<|endoftext|>"
BPE = make({i: bytes([i]) for i in range(256)}, [], [END])
CHAT = Chat("{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}<assistant>")


def answering(chat=None, template="{prompt}"):
    model = transformer.make(transformer.Config(257, 256, 8, 1, 2))
    plain = generate.Sampling(temperature=0.0)
    return Answering(model, model.init(random.key(0)), BPE, chat, template, 1, plain, generate.Stop(), 4, 8, 0)


@pytest.fixture
def data(tmp_path):
    """mmlu/ of two subjects and svamp, each with another split."""
    (tmp_path / "mmlu").mkdir()
    for subject in ("hats", "old_caps"):
        rows = "".join(f"Which {subject} {i}?,a{i},b,c,d,B\n" for i in range(5))
        (tmp_path / f"mmlu/{subject}_dev.csv").write_text(rows)
        (tmp_path / f"mmlu/{subject}_test.csv").write_text(f"Which {subject} 1?,a1,b,c,d,B\nWho?,a,b,c,d,A\n")
    rows = [json.dumps({"Body": "So.", "Question": f"How many {i}?", "Answer": i}) for i in range(30)]
    (tmp_path / "svamp.train.jsonl").write_text("\n".join(rows[:20]))
    (tmp_path / "svamp.test.jsonl").write_text("\n".join(rows[10:]))
    return tmp_path


def asked(data, name, n=2, seed=None, given=NO_SHOTS):
    return read_set(name, data, None, n, seed, given)


def test_prompts_are_the_librarys(data):
    task, found = TASKS["mmlu"], asked(data, "mmlu")
    expected = {"mmlu-hats-0": [0, 2], "mmlu-hats-1": [0, 1], "mmlu-old_caps-0": [0, 2], "mmlu-old_caps-1": [0, 1]}
    assert {x.id for x in found.examples} == {*expected}
    for example in found.examples:
        shots = shots_of(found, example)
        texts = [f"Which {example.subject.replace(' ', '_')} {i}?" for i in expected[example.id]]
        assert [x.question for x, _ in shots] == texts
        assert {response for _, response in shots} == {"The correct answer is B."}
        ids = prompt_ids(answering(), found, example, shots)
        assert ids.tolist() == encode(BPE, few_shot(task, shots, example)).tolist()
        ids = prompt_ids(answering(CHAT), found, example, shots)
        assert ids.tolist() == encode_chat(BPE, CHAT, few_shot_turns(task, shots, example)).tolist()
        assert ids.tolist().count(256) == 5


def test_a_template_is_around_each_question_and_its_special_tokens_are_its_own(data):
    found = asked(data, "svamp", 1)
    example = found.examples[-1]._replace(question=f"Who {END}?")
    shots = [(Example("0", f"A {END}", "1"), f"One {END}")]
    ids = prompt_ids(answering(template=f"Q {{question}}{END}"), found, example, shots)
    assert decode(BPE, ids) == f"Q A {END}{END} One {END}\n\nQ Who {END}?{END}"
    assert ids.tolist().count(256) == 2


def test_a_seed_chooses_others(data):
    found = [asked(data, "svamp", 8, seed) for seed in (None, 0, 0, 1)]
    chosen = [[x.question for x, _ in shots_of(a, a.examples[-1])] for a in found]
    assert chosen[0] == [f"So. How many {i}?" for i in range(8)]
    assert chosen[1] == chosen[2] and len({*map(tuple, chosen)}) == 3
    assert all({*some} <= {f"So. How many {i}?" for i in range(20)} and len({*some}) == 8 for some in chosen)


def test_examples_of_ones_own(data, tmp_path):
    """Those without a subject fit every question, with its subject in the prompt."""
    path = tmp_path / "shots"
    options = {"options": ["e", "f", "g", "h"]}
    rows = [{"question": "A?", "response": "The correct answer is C.", **options},
            {"question": "B?", "response": "The correct answer is D.", **options, "subject": "hats"}]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    found = asked(data, "mmlu", 0, None, read_shots(path))
    by_subject = {x.subject: shots_of(found, x) for x in found.examples}
    assert [x.question for x, _ in by_subject["hats"]] == ["A?", "B?"]
    ((x, response),) = by_subject["old caps"]
    assert response == "The correct answer is C." and "about old caps." in TASKS["mmlu"].prompt(x)
    rows[0].pop("options")
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="shots, line 1: mmlu: a multiple choice question has 4 options, got 0"):
        asked(data, "mmlu", 0, None, read_shots(path))
    for text, message in (
        ('{"question": "A?"}', "shots, line 1: needs the texts 'question' and 'response'; its fields are question"),
        ('{"question": "A?", "response": 4}', "shots, line 1: needs the texts"),
        ("", "shots: has no rows"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_shots(path)


def test_an_answer_after_worked_examples_ends_at_an_empty_line(data, tmp_path, monkeypatch):
    """Not in a conversation, not without examples, and not where an example's own response has one."""
    stops = []

    def spy(*args, stop, **kwargs):
        stops.append(stop.strings)
        return type("Out", (), {"texts": ["1"] * len(args[2])})

    monkeypatch.setattr(answers.generate, "generate", spy)
    (tmp_path / "s").write_text('{"question": "A?", "response": "One\\n\\nTwo"}')
    found = asked(data, "svamp")
    cases = [(answering(), found), (answering(CHAT), found), (answering(), found._replace(shots=NO_SHOTS)),
             (answering(), found._replace(shots=read_shots(tmp_path / "s")))]  # fmt: skip
    for i, (how, one) in enumerate(cases):
        answers.answer(how, one._replace(examples=one.examples[:1]), tmp_path / f"out{i}", data)
    assert stops == [("\n\n",), (), (), ()]


def test_fewer_examples_are_said(data, tmp_path, capfd):
    """A question that is one of as many examples as there are."""
    found = asked(data, "mmlu", 5)
    rows = answers.answer(answering(), found, tmp_path / "out", data)
    assert "mmlu: 2 questions are among the worked examples, and have fewer" in capfd.readouterr().err
    assert len({row["shots"] for row in rows}) == 4
