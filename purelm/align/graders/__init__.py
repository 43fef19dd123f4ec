"""Graders: whether an answer is right, decided by exact arithmetic, and why.

    equal("\\frac{10}{2}", "5")                    # Verdict(equal=True, reason='exact arithmetic')
    r1_zero(response, gold)                       # {format_reward, answer_reward, reward}
    with Grader() as grader: grader.equal(a, b)   # with sympy, in a process and within a bound of time
    grade_all(pairs, n_workers=8)                 # Verdicts in order

All but a Grader are pure functions that any thread may call. None evaluates text, and all are bounded.
"""

from purelm.align.graders.choices import mmlu_letter
from purelm.align.graders.countdown import check_countdown, countdown
from purelm.align.graders.equality import equal
from purelm.align.graders.extract import answer_tag, boxed, gsm8k_gold, last_number
from purelm.align.graders.grader import Grader, grade_all
from purelm.align.graders.policy import Policy, Verdict
from purelm.align.graders.proof import prove
from purelm.align.graders.rewards import gsm8k, question_only, r1_zero

__all__ = [
    "Grader",
    "Policy",
    "Verdict",
    "answer_tag",
    "boxed",
    "check_countdown",
    "countdown",
    "equal",
    "grade_all",
    "gsm8k",
    "gsm8k_gold",
    "last_number",
    "mmlu_letter",
    "prove",
    "question_only",
    "r1_zero",
]
