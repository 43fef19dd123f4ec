"""Worked examples. Oracles: the sets' own rows and graders; hand-made pools."""

import pytest

from purelm.evals.shots import choose, few_shot, few_shot_turns
from purelm.evals.tasks import TASKS, Example


def test_the_question_itself_and_other_subjects_are_left_out():
    pool = [
        Example("0", "Which hat?", "A", "hats", ("a", "b", "c", "d")),
        Example("1", "Which hat?", "A", "hats", ("e", "b", "c", "d")),
        Example("2", "Which shoe?", "A", "shoes", ("a", "b", "c", "d")),
        Example("3", "Which cap?", "B", "hats", ("a", "b", "c", "d")),
    ]
    asked = Example("x", " which\nHAT? ", "A", "hats", ("A", "b", "c", "d"))
    assert [x.id for x in choose(pool, asked, 2)] == ["1", "3"]
    assert [x.id for x in choose(pool, asked, 9)] == ["1", "3"]
    assert [x.id for x in choose(pool, asked._replace(question="Who?"), 2)] == ["0", "1"]
    assert choose(pool, asked, 0) == []
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        choose(pool, asked, -1)


def test_text_and_turns():
    task = TASKS["mawps"]
    one, asked = Example("0", "One and one?", "2"), Example("x", "How many?", "3")
    shots = [(one, "The answer is 2.")]
    assert few_shot(task, shots, asked) == "One and one?\nAnswer: The answer is 2.\n\nHow many?\nAnswer:"
    assert few_shot_turns(task, shots, asked) == [
        {"role": "user", "content": "One and one?\nAnswer:"},
        {"role": "assistant", "content": "The answer is 2."},
        {"role": "user", "content": "How many?\nAnswer:"},
    ]
    assert few_shot(task, [], asked) == task.prompt(asked)


def test_worked_responses_are_right_by_their_own_grader(shared_data):
    """Every row of every split of worked examples that is there, and the responses' form."""
    seen = {}
    for name, task in TASKS.items():
        pool = [x for file in sorted(shared_data.glob(task.shot_files or "-")) for x in task.load(file)]
        responses = [task.response(x) for x in pool]
        assert all(task.grade(response, x) == (x.gold, True) for x, response in zip(pool, responses, strict=True))
        end = "The correct answer is " if name == "mmlu" else "The answer is "
        assert all(y.endswith(f"{end}{x.gold}.") and "<<" not in y and "####" not in y
                   for x, y in zip(pool, responses, strict=True))  # fmt: skip
        seen[name] = len(pool)
    assert seen["gsm8k"] == 7473 and seen["mmlu"] == 20


def test_gsm8k_keeps_the_way_to_the_answer(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "How many?", "answer": "She sold 48/2 = <<48/2=24>>24 clips.\\n#### 1,024"}\n')
    (example,) = TASKS["gsm8k"].load(path)
    assert TASKS["gsm8k"].response(example) == "She sold 48/2 = 24 clips. The answer is 1024."
