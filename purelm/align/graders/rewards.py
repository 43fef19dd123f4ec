"""Rewards of responses, as {format_reward, answer_reward, reward}."""

from collections.abc import Callable, Sequence

from purelm.align.graders.equality import equal
from purelm.align.graders.extract import answer_tag, boxed, gsm8k_gold, last_number
from purelm.align.graders.policy import Verdict

__all__ = ["Gold", "gsm8k", "question_only", "r1_zero", "rewards"]

Gold = str | int | float | Sequence[str | int | float]
Grade = Callable[[str, str], Verdict]
OPENING = "</think> <answer>"


def rewards(form: bool, right: bool) -> dict[str, float]:
    """The dictionary: form alone pays nothing.

    >>> rewards(True, False)
    {'format_reward': 1.0, 'answer_reward': 0.0, 'reward': 0.0}
    """
    value = float(form and right)
    return {"format_reward": float(form), "answer_reward": value, "reward": value}


def r1_zero(response: str, gold: Gold, grade: Grade = equal) -> dict[str, float]:
    r"""Reward of "... </think> <answer>...</answer>", CS336's r1_zero format.

    format_reward is 1 if `</think> <answer>`, with exactly one space, occurs and `</answer>` after its last one. The
    answer is what is between; if it has \boxed, what the last box holds. It is right if it is equal to gold, or to one
    of several. grade: `equal`, a Grader's, or `functools.partial(equal, policy=...)`.

    As in the course's grader (drgrpo_grader.py): one space in the format; text after </answer> makes the answer wrong
    (stop at </answer>, and keep it); format alone pays 0; "She sold 5 clips." is not 5; \boxed 5 and a box that is not
    closed are wrong with a format_reward of 1.

    Other than there: the tags must be in order (there, `</answer> </think> <answer>5` has full marks); fractions that
    can be reduced, powers, percent, units and 3\times 10^5 are compared by value (\frac{10}{2} is 5, where the course's
    grader has 0); different units are not equal; gold None is a ValueError (there, an UnboundLocalError); there is no
    time limit by signals, which work in the main thread alone.

    >>> r1_zero("6 - 1 </think> <answer> 5 </answer>", "5")["reward"]
    1.0
    """
    golds = _golds(gold)
    head, opened, inside = response.rpartition("<answer>")
    if not (opened and (head + opened).endswith(OPENING) and "</answer>" in inside):
        return rewards(False, False)
    answer = answer_tag(response)
    if answer is not None and "\\boxed" in answer:
        answer = boxed(answer)
    return rewards(True, answer is not None and any(grade(answer, g).equal for g in golds))


def question_only(response: str, gold: Gold, grade: Grade = equal) -> dict[str, float]:
    r"""Reward of a response whose answer is in \boxed{...}; the last box counts.

    format_reward is 1 if that box is closed (also if it is empty). \fbox{5}, \boxed 5 and a bare 5 are no boxes. As in
    the course's grader, but for what is compared by value (`r1_zero`).

    >>> question_only(r"so it is \boxed{x = 5}", 5)["reward"]
    1.0
    """
    golds = _golds(gold)
    answer = boxed(response)
    return rewards(answer is not None, answer is not None and any(grade(answer, g).equal for g in golds))


def gsm8k(response: str, gold: str) -> Verdict:
    """Whether the last number of the response is the gold one: that after ####, or `gold` if it is a number alone.

    >>> gsm8k("So it is $18.00.", "16 - 3 - 4 = 9, 9 * 2 = 18\\n#### 18").equal
    True
    """
    target = gsm8k_gold(gold) if "####" in gold else last_number(gold)
    if target is None:
        raise ValueError(f"gold is {gold[:80]!r}: allowed is a text with #### and a number, or a number")
    number = last_number(response)
    return Verdict(False, "no number") if number is None else equal(number, target)


def _golds(gold: Gold) -> list[str]:
    several = isinstance(gold, Sequence) and not isinstance(gold, str)
    golds = list(gold) if several else [gold]  # type: ignore[arg-type]
    for g in golds:
        if not isinstance(g, str | int | float) or isinstance(g, bool):
            raise ValueError(f"gold is {gold!r}: allowed are a str, an int, a float, and a sequence of these")
    if not golds:
        raise ValueError("gold is empty: allowed are sequences of one and more")
    return [str(g) for g in golds]
