"""Extraction and rewards. Oracle: the rules as they are stated, case by case; Python's own arithmetic for countdown."""

import ast
import json
from fractions import Fraction
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.align.graders import (
    Policy,
    answer_tag,
    boxed,
    check_countdown,
    countdown,
    equal,
    gsm8k,
    gsm8k_gold,
    last_number,
    mmlu_letter,
    question_only,
    r1_zero,
)

NOTHING = {"format_reward": 0.0, "answer_reward": 0.0, "reward": 0.0}
FORM = {**NOTHING, "format_reward": 1.0}
RIGHT = dict.fromkeys(NOTHING, 1.0)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{3} and \boxed{4}", "4"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed {5}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1}", r"\left\{1"),  # an escaped brace is text
        (r"\boxed 5", None),
        (r"\boxed{5", None),
        (r"\boxed{4} \boxed{5", None),
        (r"\fbox{5}", None),
        ("5", None),
        ("", None),
    ],
)
def test_boxed(text, inside):
    assert boxed(text) == inside


@given(st.recursive(st.sampled_from(["1", "x+y", r"\{", r"\}", ""]), lambda x: st.builds("{{{}}}{}".format, x, x)))
def test_a_box_holds_what_was_put_in(inside):
    assert boxed(f"so \\boxed{{1}} or \\boxed{{{inside}}} and {{more") == inside


def test_answer_tag():
    assert answer_tag("<answer>4</answer> <answer> 5 </answer>\n") == " 5 "
    for text in ("5", "<answer>5", "5</answer>", "</answer>5<answer>", "<answer>5</answer> is it"):
        assert answer_tag(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72 clips, altogether.", "72"),
        ("$1,234.50.", "1234.50"),
        ("18.00", "18.00"),
        ("between 3-5", "5"),
        ("it is -5", "-5"),
        ("it is \u22125", "-5"),
        ("lost -$5", "-5"),
        ("lost $-5", "-5"),
        ("x-5", "5"),
        ("3,4", "4"),
        ("12,345,678 people", "12345678"),
        ("1,23", "23"),
        ("about .5", "0.5"),
        ("5%", "5"),
        ("(5)", "5"),
        ("no digit", None),
        ("", None),
        # known false reads
        ("10^3", "3"),
        ("the 2nd", "2"),
        ("3/4", "4"),
        ("The answer is 5.\n\nQuestion: Tom has 7 pens", "7"),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


@given(
    x=st.decimals(-(10**9), 10**9, places=2),
    before=st.sampled_from(["It is ", "so $", "= ", "4 and ", ""]),
    after=st.sampled_from([".", " dollars.", ",", "\n", ""]),
)
def test_last_number_reads_what_python_writes(x, before, after):
    found = last_number(f"{before}{x:,}{after}")
    assert Fraction(found) == Fraction(x)


def test_gsm8k_gold_and_verdict():
    gold = "5 * 2 = <<5*2=10>>10\n#### 1,210"
    assert gsm8k_gold(gold) == "1210" and gsm8k_gold("#### -3") == "-3" and gsm8k_gold("1210") is None
    assert gsm8k("The answer is $1,210.00.", gold).equal and gsm8k("1210", "1,210").equal
    assert not gsm8k("It is 1,211", gold).equal and gsm8k("none", gold).reason == "no number"
    assert not gsm8k("9" * 10**5, gold).equal
    with pytest.raises(ValueError, match=r"gold is 'none': allowed is a text with ####"):
        gsm8k("5", "none")


def test_gsm8k_on_its_own_answers(shared_data):
    """Counts of the test set: 1319 rows, 14 with commas, 2 negative, none with decimals."""
    path = shared_data / "math" / "gsm8k-test.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}")
    answers = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    golds = [gsm8k_gold(answer) for answer in answers]
    written = [answer.rpartition("####")[2] for answer in answers]
    assert len(golds) == 1319 and None not in golds
    assert [sum(sign in text for text in written) for sign in (",", "-", ".")] == [14, 2, 0]
    for answer, gold in zip(answers, golds, strict=True):
        assert gsm8k(answer, answer).equal and gsm8k(f"So it is ${int(gold):,}.00.", answer).equal
        assert not gsm8k(f"{int(gold) + 1}", answer).equal


THINK = "2 + 3 = 5 </think> <answer>"


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        (THINK + "5</answer>", "5", RIGHT),
        (THINK + "5.</answer>", "5", RIGHT),
        (THINK + " 5 </answer>\n", 5, RIGHT),
        (THINK + "$5$</answer>", 5.0, RIGHT),
        (THINK + r"\fbox{5}</answer>", "5", RIGHT),
        (THINK + r"it is \boxed{x=5}</answer>", "5", RIGHT),
        (THINK + "5</answer>", ["4", 5], RIGHT),
        (THINK + r"\frac{10}{2}</answer>", "5", RIGHT),  # the course's grader: wrong
        (THINK + "6</answer>", "5", FORM),
        (THINK + "</answer>", "5", FORM),
        (THINK + "She sold 5 clips.</answer>", "5", FORM),
        (THINK + r"\boxed 5</answer>", "5", FORM),
        (THINK + r"\boxed{5</answer>", "5", FORM),
        (THINK + "5</answer> or 6", "5", FORM),
        (THINK + "5</answer></answer>", "5", FORM),
        (THINK.replace("> <", "><") + "5</answer>", "5", NOTHING),
        (THINK.replace("> <", ">\n<") + "5</answer>", "5", NOTHING),
        (THINK.replace("> <", ">  <") + "5</answer>", "5", NOTHING),
        (THINK + "5", "5", NOTHING),  # cut off
        ("<answer>5</answer>", "5", NOTHING),
        ("</answer> </think> <answer>5", "5", NOTHING),  # the course's grader: right
        ("5", "5", NOTHING),
        ("", "5", NOTHING),
    ],
)
def test_r1_zero(response, gold, expected):
    assert r1_zero(response, gold) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"so \boxed{5}", RIGHT),
        (r"\boxed{4}, no, \boxed{5}", RIGHT),
        (r"\boxed{5}, no, \boxed{4}", FORM),
        (r"\boxed{\boxed{5}}", RIGHT),
        (r"\boxed{}", FORM),
        (r"\fbox{5}", NOTHING),
        (r"\boxed 5", NOTHING),
        (r"\boxed{5", NOTHING),
        ("5", NOTHING),
    ],
)
def test_question_only(response, expected):
    assert question_only(response, "5") == expected


def test_golds_and_other_graders():
    for gold in (None, [None], True, [], {}):
        with pytest.raises(ValueError, match=r"gold is .*allowed are"):
            r1_zero(THINK + "5</answer>", gold)
    loose = partial(equal, policy=Policy(float_tolerance=0.1))
    assert question_only(r"\boxed{0.333}", "1/3", loose) == RIGHT and question_only(r"\boxed{0.333}", "1/3") == FORM


@pytest.mark.parametrize(
    ("text", "options", "letter"),
    [
        ("The correct answer is B. There is only one...", None, "B"),
        ("The correct answer is 10000 polyomaviruses.", ["1", "10", "100", "1000"], None),
        ("The correct answer is 10.", ["1", "10", "100", "1000"], "B"),
        ("the correct answer is: (C)", None, "C"),
        ("Answer: **D**", None, "D"),
        ("The answer is option A.", None, "A"),
        ("The correct answer is A because it is.", None, "A"),
        ("The answer is A virus of birds.", None, None),
        ("A group is a set with a product.", None, None),
        (r"So \boxed{\text{(B)}}", None, "B"),
        ("B", None, "B"),
        ("B. Because", None, "B"),
        ("(B)", None, "B"),
        ("Bees", None, None),
        ("The correct answer is E.", None, None),
        ("The correct answer is E.", ["v", "w", "x", "y", "z"], "E"),
        ("the correct answer is b", None, None),
        ("I do not know.", None, None),
        ("", None, None),
    ],
)
def test_mmlu_letter(text, options, letter):
    assert mmlu_letter(text, options) == letter


def test_mmlu_options_are_counted():
    with pytest.raises(ValueError, match="options has 1 entries: allowed are 2 to 26"):
        mmlu_letter("A", ["x"])


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("(8-4)*(7-1)", "right"),
        ("(8 - 4) \u00d7 (7 \u2212 1) = 24", "right"),
        (r"\left(8-4\right) \times (7-1)", "right"),
        ("[8-4]*(7-1)", "right"),
        ("(8-4)*(7-1) = 25", "says = 25, not 24"),
        ("(8-4)*(7-1) = 24 = 24", "not read: '=' after an expression"),
        ("8*4-7-1", "right"),
        ("8*3", "uses [3, 8], not each of [1, 4, 7, 8] once"),
        ("8+8+8", "uses [8, 8, 8], not each of [1, 4, 7, 8] once"),
        ("(8-4)*(7+1)", "is 32, not 24"),
        ("8**4", "not read: '*' where a number is expected"),
        ("9**9**9", "not read: '*' where a number is expected"),
        ("8 4 7 1", "not read: '4' after an expression"),
        ("1/(8-8)", "not read: division by zero"),
        ("24", "uses [24], not each of [1, 4, 7, 8] once"),
        ("8//4", "not read: '/' where a number is expected"),
        ("8.0", "not read: '.0' is no part of an expression"),
        ("__import__('os')", "not read: '__import__' is no part of an expression"),
        ("(" * 100, "not read: more than 32 brackets"),
        ("1+" * 400, "not read: more than 512 characters"),
        ("9" * 100, "not read: a number of more than 12 digits"),
        ("", "not read: '' where a number is expected"),
    ],
)
def test_check_countdown(expression, reason):
    verdict = check_countdown(expression, [1, 4, 7, 8], 24)
    assert verdict == (reason == "right", reason)


def test_countdown_rules():
    tags = "</think> <answer>{}</answer>".format
    assert countdown(tags("(8 - 4)\n* (7 - 1)"), [8, 4, 7, 1], 24) == RIGHT
    assert countdown(tags("8 * 4"), [8, 4, 7, 1], 32) == FORM
    assert countdown(tags("8 * 4"), [8, 4, 7, 1], 32, use_all=False) == RIGHT
    assert countdown(tags("8 * 4 * 8"), [8, 4, 7, 1], 256, use_all=False) == FORM
    assert countdown(tags("8 * 4 = 32"), [8, 4], 32, equation_tail=False) == NOTHING
    assert countdown(tags("eight times four"), [8, 4], 32) == NOTHING
    assert countdown(tags("8 * 4") + " it is", [8, 4], 32) == NOTHING
    assert countdown(r"so \boxed{8 \cdot 4}", [8, 4], 32) == RIGHT
    assert countdown(tags("1/3 * 3"), [1, 3, 3], 1) == RIGHT  # exact


@given(
    numbers=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    signs=st.lists(st.sampled_from("+-*/"), min_size=4, max_size=4),
    cuts=st.lists(st.integers(0, 9), min_size=4, max_size=4),
)
def test_countdown_has_the_value_of_python(numbers, signs, cuts):
    """Oracle: Python's ast, with Fractions in place of its numbers."""
    parts = [str(n) for n in numbers]
    for sign, cut in zip(signs, cuts, strict=True):
        if len(parts) > 1:
            k = cut % (len(parts) - 1)
            joined = f"{parts[k]} {sign} {parts[k + 1]}"
            parts[k : k + 2] = [f"({joined})" if cut % 2 else joined]
    (text,) = parts[:1] if len(parts) == 1 else (" + ".join(parts),)
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        for name, child in ast.iter_fields(node):
            if isinstance(child, ast.Constant):
                call = ast.Call(ast.Name("F", ast.Load()), [child], [])
                setattr(node, name, call)
    try:
        value = eval(compile(ast.fix_missing_locations(tree), "", "eval"), {"F": Fraction})
    except ZeroDivisionError:
        assert check_countdown(text, numbers, 1).reason == "not read: division by zero"
        return
    assert check_countdown(text, numbers, value).equal
    assert not check_countdown(text, numbers, value + 1).equal
    assert not check_countdown(text, [*numbers, 1], value).equal


MUTANTS = {
    "first box": ("boxed", lambda text: text.split(r"\boxed{", 1)[1].split("}")[0] if r"\boxed{" in text else None),
    "no end": ("answer_tag", lambda text: text.rpartition("<answer>")[2].partition("</answer>")[0]),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_extraction_change_a_reward(monkeypatch, name):
    from purelm.align.graders import rewards

    monkeypatch.setattr(rewards, *MUTANTS[name])
    cases = [(question_only, r"\boxed{4}, no, \boxed{5}", RIGHT), (r1_zero, THINK + "5</answer> or 6", FORM)]
    assert [f(text, "5") == expected for f, text, expected in cases] == [name == "no end", name == "first box"]


def test_every_row_of_last_number_is_needed():
    """Without the rule of commas, of signs or of the end on a digit, a stated case is read wrongly."""
    import re

    weaker = {"commas": (r"[-]?[0-9][0-9,]*", "3,4"), "sign": (r"-?[0-9.]+", "3-5"), "end": (r"[0-9.,]+", "18.")}
    for pattern, text in weaker.values():
        assert re.findall(pattern, text)[-1] != last_number(text)
