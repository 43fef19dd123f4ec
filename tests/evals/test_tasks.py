"""Question sets. Oracles: the files' own rows, counted and read by hand; closed forms for intervals and pass@k."""

import itertools
import json

import pytest

from purelm.evals.accuracy import majority, pass_at_k, powers, wilson
from purelm.evals.shots import few_shot
from purelm.evals.tasks import TASKS


def written(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


ROWS = {
    "gsm8k": ({"question": " Two and two? ", "answer": "2+2=<<2+2=4>>4\n#### 1,004"}, "Two and two?", "1004"),
    "svamp": ({"Body": "Ann has 3 hats", "Question": "How many?", "Answer": 3.0}, "Ann has 3 hats. How many?", "3"),
    "asdiv": ({"body": "Ann has 3.", "question": "How many?", "answer": "3 (hats)"}, "Ann has 3. How many?", "3"),
    "mawps": ({"input": "How much is half?", "target": 0.5}, "How much is half?", "0.5"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_prompts_and_grades(name, tmp_path):
    row, question, gold = ROWS[name]
    task = TASKS[name]
    (example,) = task.load(written(tmp_path / "x.jsonl", [row]))
    assert (example.question, example.gold) == (question, gold)
    assert task.prompt(example) == f"{question}\nAnswer:"
    assert few_shot(task, [(example, "4.")], example) == f"{question}\nAnswer: 4.\n\n{question}\nAnswer:"
    assert task.grade(f"It is 7, no: {gold}.", example) == (gold, True)
    assert task.grade(f"It is {gold}, no: 7.", example) == ("7", False)
    assert task.grade("I do not know.", example) == (None, False)


def test_mmlu(tmp_path):
    """Quoted commas and new lines; the subject is in the file's name."""
    path = tmp_path / "world_religions_test.csv"
    path.write_text('"What is\nthis, then?",one,"two, or so",3,4,B\n')
    (example,) = TASKS["mmlu"].load(path)
    assert example[:4] == ("mmlu-world_religions-0", "What is\nthis, then?", "B", "world religions")
    assert example.options == ("one", "two, or so", "3", "4")
    prompt = TASKS["mmlu"].prompt(example)
    assert "about world religions." in prompt and prompt.endswith("A. one\nB. two, or so\nC. 3\nD. 4\nAnswer:")
    assert TASKS["mmlu"].grade("The correct answer is B. Because", example) == ("B", True)
    assert TASKS["mmlu"].grade("C", example) == ("C", False)
    with pytest.raises(ValueError, match="a multiple choice question has 4 options, got 0"):
        TASKS["mmlu"].prompt(example._replace(options=()))
    path.write_bytes(b"\xff,b,c\n")
    with pytest.raises(ValueError, match=r"religions_test.csv: not CSV in UTF-8"):
        TASKS["mmlu"].load(path)
    path.write_text("a,b,c\n")
    with pytest.raises(ValueError, match=r"religions_test.csv, row 1: needs a question, four options and A, B, C or D"):
        TASKS["mmlu"].load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "x.jsonl, line 2: not JSON"),
        ("[1]", "x.jsonl, line 2: not a JSON object"),
        ('{"question": "x"}', "x.jsonl, line 2: lacks 'answer'; its fields are question"),
        ('{"question": "x", "answer": "4"}', "x.jsonl, line 2: its answer has no '#### number'"),
    ],
)
def test_a_bad_row_is_named(tmp_path, text, message):
    path = written(tmp_path / "x.jsonl", [ROWS["gsm8k"][0]])
    path.write_text(path.read_text() + text + "\n")
    with pytest.raises(ValueError, match=message):
        TASKS["gsm8k"].load(path)


COUNTS = {"gsm8k": 1319, "svamp": 1000, "mawps": 2065}


def test_the_real_files(shared_data):
    """As many examples as lines; every gold answer is right by its own grader; ids are unique."""
    for name, task in TASKS.items():
        if name == "countdown":  # made, not read
            continue
        files = sorted(shared_data.glob(task.files))
        assert files, name
        examples = [x for file in files for x in task.load(file)]
        assert len({x.id for x in examples}) == len(examples) >= COUNTS.get(name, 400)
        if name in COUNTS:
            assert len(examples) == COUNTS[name]
        said = "The correct answer is {}." if name == "mmlu" else "So it is {}."
        wrong = [x for x in examples if not task.grade(said.format(x.gold), x).right]
        assert not wrong, (name, wrong[:3])


def test_wilson():
    """Closed form: p solves (p - r/n)^2 = z^2 p (1 - p) / n at both ends."""
    for right, n in [(0, 40), (1, 7), (20, 40), (40, 40), (3, 1319)]:
        for p in wilson(right, n):
            assert (p - right / n) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-12)
    with pytest.raises(ValueError, match=r"right must be in 0..n and n at least 1, got 3 and 2"):
        wilson(3, 2)


def test_pass_at_k():
    """Oracle: all subsets counted."""
    for n in range(1, 6):
        for right, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))
            share = sum(any(i < right for i in subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, right, k) == pytest.approx(share)
    with pytest.raises(ValueError, match="needs 1 <= k <= n"):
        pass_at_k(2, 1, 3)


def test_powers():
    """Oracle: the definition, counted."""
    for k in range(1, 70):
        assert powers(k) == [j for j in range(1, k + 1) if j == k or bin(j).count("1") == 1]
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        powers(0)


def test_majority_by_value():
    """Oracle: votes counted by float."""
    for answers in itertools.product(["4", "4.0", "5", None], repeat=4):
        votes = [float(x) for x in answers if x is not None]
        got = majority(answers, float)
        if not votes:
            assert got is None
            continue
        most = max(map(votes.count, votes))
        first = next(x for x in answers if x is not None and votes.count(float(x)) == most)
        assert got == first


def test_majority():
    assert majority([None, "1", "2", "2"]) == "2" and majority(["1", "2"]) == "1" and majority([None]) is None
