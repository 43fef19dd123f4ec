"""Files of examples as rows {"prompt", "response", ...}: Alpaca's, chats, pairs, GSM8K.

    rows = read("alpaca_data.json", alpaca)
    rows = read("chats.jsonl.gz", partial(chat, every_turn=True))

A converter is a function from one object of a file to its rows, which raises a ValueError that says what it lacks;
`read` adds where. One's own is passed in the same way.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from purelm.align.data.cleaning import Row
from purelm.align.graders import gsm8k_gold
from purelm.data.tables import table_rows

__all__ = [
    "ALPACA_INPUT", "ALPACA_PLAIN", "alpaca", "alpaca_prompt", "chat", "dialogue", "gsm8k",
    "messages_of", "pairs", "read", "text", "without_calculator",
]  # fmt: skip

# Stanford Alpaca, train.py, PROMPT_DICT: with an input, and without.
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:"
)
ALPACA_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
Convert = Callable[[dict[str, Any]], list[Row]]
Message = dict[str, str]
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def read(source: str | Path, convert: Convert, bad: Callable[[str], None] | None = None) -> Iterator[Row]:
    """The rows of a file: JSON lines, or a JSON array in a .json file; .gz and .zst are unpacked. Or of parquet files
    or a set of the hub, as `data.tables.table_rows` reads them.

    Each row has "source", which names its file and line. An object that `convert` refuses is a ValueError that names
    them, or, if `bad` is given, is left out, and `bad` is called with that text. What is no JSON is always an error.
    """
    for where, given in table_rows(source):
        try:
            rows = convert(given)
        except ValueError as error:
            if bad is None:
                raise ValueError(f"{where}: {error}") from None
            bad(f"{where}: {error}")
            continue
        for row in rows:
            yield {**row, "source": where}


def alpaca_prompt(instruction: str, given: str = "", end: str = "\n") -> str:
    """The instruction in Alpaca's words, with an input if `given` is not empty.

    end: what follows "### Response:", where Alpaca itself has nothing, and CS336 a new line.
    """
    template = ALPACA_INPUT if given else ALPACA_PLAIN
    parts = {"instruction": instruction, "input": given}
    # str.format would take braces in a template's end for fields, but in values it does not look for any.
    return template.format(**parts) + end


def alpaca(given: dict[str, Any], prompt: Callable[[str, str], str] = alpaca_prompt) -> list[Row]:
    """{"instruction", "input", "output"} as a row; the input may be empty or absent. prompt: (instruction, input).

    "question" is both without the template.

    >>> alpaca({"instruction": "Add.", "input": "1, 2", "output": "3"}, lambda task, given: f"{task} {given} =")
    [{'prompt': 'Add. 1, 2 =', 'response': '3', 'question': 'Add.\\n1, 2'}]
    """
    instruction, output = text(given, "instruction"), text(given, "output")
    extra = text(given, "input", empty=True) if given.get("input") is not None else ""
    question = f"{instruction}\n{extra}" if extra else instruction
    return [{"prompt": prompt(instruction, extra), "response": output, "question": question}]


def pairs(given: dict[str, Any]) -> list[Row]:
    """{"prompt", "response"}, or "completion" in place of "response"; other fields are kept, but for messages."""
    if not isinstance(given.get("prompt"), str) and isinstance(given.get("prompt"), list):
        raise ValueError("its 'prompt' is a list; give a text, or a chat as 'messages'")
    name = "completion" if "response" not in given and "completion" in given else "response"
    rest = {key: value for key, value in given.items() if key not in (name, "messages")}
    if "question" in rest:
        text(rest, "question")
    return [{**rest, "prompt": text(given, "prompt", empty=True), "response": text(given, name)}]


def without_calculator(answer: str) -> str:
    """An answer of GSM8K without the calculator's annotations.

    >>> without_calculator("She sold 48/2 = <<48/2=24>>24 clips.")
    'She sold 48/2 = 24 clips.'
    """
    return _CALCULATOR.sub("", answer)


def gsm8k(given: dict[str, Any], solution: Callable[[str], str] = without_calculator) -> list[Row]:
    """{"question", "answer"} of GSM8K: the worked answer as response, and the number after #### as "answer".

    solution: the response from the worked answer; `str` keeps the calculator's annotations.
    """
    question, worked = text(given, "question").strip(), text(given, "answer")
    gold = gsm8k_gold(worked)
    if gold is None:
        raise ValueError("its 'answer' has no '#### number'")
    return [{"prompt": question, "response": solution(worked), "answer": gold}]


def dialogue(messages: Sequence[Message]) -> str:
    r"""Messages before an answer as plain text: one of the user's by itself, else each under the name of its role.

    A system message and a single user's are joined by an empty line.

    >>> dialogue([{"role": "user", "content": "Hi."}])
    'Hi.'
    >>> turns = [("user", "Hi."), ("assistant", "Hello."), ("user", "Who?")]
    >>> dialogue([{"role": role, "content": content} for role, content in turns])
    'User:\nHi.\n\nAssistant:\nHello.\n\nUser:\nWho?\n\nAssistant:\n'
    """
    if [m["role"] for m in messages if m["role"] != "system"] == ["user"]:
        return "\n\n".join(m["content"] for m in messages)
    turns = [m["content"] if m["role"] == "system" else f"{m['role'].title()}:\n{m['content']}" for m in messages]
    return "\n\n".join([*turns, "Assistant:\n"])


def chat(
    given: dict[str, Any], render: Callable[[Sequence[Message]], str] = dialogue, every_turn: bool = False
) -> list[Row]:
    """A chat as a row: its last answer is the response, and what was said before, rendered, the prompt.

    given: {"messages": [{"role", "content"}]}, or ShareGPT's {"conversations": [{"from", "value"}]}, where human is the
    user and gpt the assistant; a "system" beside them comes first. Messages after the last answer are left out. An
    answer that follows no message of a user is no response (it stays part of the prompt of a later one).

    Args:
        render: the messages before an answer -> prompt; a model's chat template is `partial(render, chat)` of
            `purelm.tokenizer.chat`, but in a row's text its special tokens are ordinary text.
        every_turn: a row for each answer.

    Each row keeps "messages", those of its prompt and its response, in the first form.
    """
    messages = _messages(given)
    ends = [
        i for i, message in enumerate(messages)
        if message["role"] == "assistant" and any(m["role"] == "user" for m in messages[:i])
    ]  # fmt: skip
    if not ends:
        raise ValueError("no message of an assistant follows one of a user")
    rows = []
    for i in ends if every_turn else ends[-1:]:
        if not messages[i]["content"].strip():
            raise ValueError(f"message {i} of the assistant is empty")
        rows.append(
            {"prompt": render(messages[:i]), "response": messages[i]["content"], "messages": messages[: i + 1]}
        )
    return rows


def _messages(given: dict[str, Any]) -> list[Message]:
    name = next((name for name in ("messages", "conversations") if name in given), None)
    if name is None:
        raise ValueError(f"lacks 'messages' or 'conversations'; its fields are {', '.join(given)}")
    system: list[Message] = []
    if isinstance(given.get("system"), str) and given["system"]:
        system.append({"role": "system", "content": given["system"]})
    return system + messages_of(given, name)


def messages_of(given: dict[str, Any], name: str) -> list[Message]:
    """The messages in a field, of either form; ValueError names the first that is none."""
    if not isinstance(given[name], list):
        raise ValueError(f"its {name!r} is a {type(given[name]).__name__}, not a list")
    found: list[Message] = []
    for number, message in enumerate(given[name]):
        what = f"message {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{what} is a {type(message).__name__}, not an object")
        who, said = ("from", "value") if "from" in message else ("role", "content")
        try:
            role, content = text(message, who), text(message, said, empty=True)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
        if role not in ROLES:
            raise ValueError(f"{what} is of {role!r}; allowed are {', '.join(ROLES)}")
        found.append({"role": ROLES[role], "content": content})
    return found


def text(given: dict[str, Any], name: str, empty: bool = False) -> str:
    """The text in a field; ValueError where there is none, or, unless allowed, an empty one."""
    if name not in given:
        raise ValueError(f"lacks {name!r}; its fields are {', '.join(given) or 'none'}")
    if not isinstance(given[name], str):
        raise ValueError(f"its {name!r} is a {type(given[name]).__name__}, not a text")
    if not empty and not given[name].strip():
        raise ValueError(f"its {name!r} is empty")
    try:  # JSON can write half of a surrogate pair
        given[name].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"its {name!r} is no valid Unicode: {error.reason} at character {error.start}") from None
    return given[name]
