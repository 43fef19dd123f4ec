"""Worked examples before a question (few-shot), as text to be continued and as turns of a conversation.

    pool = [x for file in files for x in task.load(file)]          # of another split than the question's
    chosen = [(x, task.response(x)) for x in choose(pool, example, 5)]
    prompt = few_shot(task, chosen, example)                       # or few_shot_turns, for a chat template
"""

from collections.abc import Iterable, Sequence
from itertools import islice

from purelm.evals.tasks import Example, Task

__all__ = ["choose", "few_shot", "few_shot_turns"]


def choose(pool: Iterable[Example], example: Example, n: int) -> list[Example]:
    """The first n of the pool that are of the example's subject and are not its own question.

    Questions are equal if their words and options are, whatever their case and white space: with the answer to the
    question before it, the question would measure nothing. Fewer than n where the pool has no more.

    >>> pool = [Example("a", "One and one?", "2"), Example("b", "Two and two?", "4"), Example("c", "How many?", "3")]
    >>> [x.id for x in choose(pool, Example("d", "two  and two?", "4"), 2)]
    ['a', 'c']
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    asked = _words(example)
    return list(islice((x for x in pool if x.subject == example.subject and _words(x) != asked), n))


def few_shot(task: Task, shots: Sequence[tuple[Example, str]], example: Example) -> str:
    """The prompt after worked examples, (example, response) each, with an empty line between."""
    return "\n\n".join([*(f"{task.prompt(shot)} {response}" for shot, response in shots), task.prompt(example)])


def few_shot_turns(task: Task, shots: Sequence[tuple[Example, str]], example: Example) -> list[dict[str, str]]:
    """The messages of a user who asks each worked example, of the assistant who answers it, and the question."""
    turns = [(("user", task.prompt(shot)), ("assistant", response)) for shot, response in shots]
    said = [*(turn for pair in turns for turn in pair), ("user", task.prompt(example))]
    return [{"role": role, "content": content} for role, content in said]


def _words(example: Example) -> list[list[str]]:
    return [text.casefold().split() for text in (example.question, *example.options)]
