r"""Pairs of answers, of which one was chosen and one rejected: Anthropic's HH-RLHF, UltraFeedback, one's own.

    rows = read("harmless-base/train.jsonl.gz", transcripts)
    kept, counts = clean(rows, [last_answers(turns="one")])  # {"prompt", "chosen", "rejected", "messages", "source"}
    print(table(counts))                                     # what was left out, by reason

`transcripts` reads any of these forms as two chats, "chosen" and "rejected"; `last_answers` divides each such pair into
what both have in common and the two last answers.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from purelm.align.data.cleaning import Removed, Row, Step, filtered
from purelm.align.data.examples import Message, dialogue, messages_of, text

__all__ = ["last_answers", "transcripts"]

SIDES = ("chosen", "rejected")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def transcripts(given: dict[str, Any]) -> list[Row]:
    r"""{"chosen": messages, "rejected": messages}, whole chats; other fields are kept.

    Read are, each with "chosen" and "rejected":

    - texts without a prompt, as in HH-RLHF: turns that begin with "\n\nHuman:" and "\n\nAssistant:", in any order.
      White space around a turn's words is no part of it. (A turn whose words hold such a mark is two turns.)
    - "prompt" and texts that answer it; the prompt may be a list of messages, which may be called "messages" too.
    - lists of messages, whole chats as in ultrafeedback_binarized (a "prompt" beside them is then not looked at), or
      the answer alone, an assistant's, after a prompt.

    ValueError says what is missing. Chats of the pair may differ anywhere: `last_answers` looks at that.

    >>> transcripts({"prompt": "Hi", "chosen": "Ho", "rejected": ""})[0]["chosen"]
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Ho'}]
    """
    rest = {key: value for key, value in given.items() if key not in (*SIDES, "messages", "prompt")}
    return [{**rest, **{side: _transcript(given, side) for side in SIDES}}]


def last_answers(render: Callable[[Sequence[Message]], str] = dialogue, turns: Literal["any", "one"] = "any") -> Step:
    """Two chats as {"prompt", "chosen", "rejected", "messages"}: what they share, rendered and as messages, and what
    the assistant said last in each.

    Reasons for removal: "prompts differ" (what comes before the last messages), "no answer" (the last message is not
    the assistant's), "empty answer", "equal answers", "several turns" (turns="one": anything but one message of the
    user's before the answer, and those of the system).

    Args:
        render: messages -> prompt, as for `chat`.
        turns: "one" leaves out chats of several turns, as CS336's assignment does with HH-RLHF.
    """
    if turns not in ("any", "one"):
        raise ValueError(f"turns must be any or one, got {turns!r}")

    def look(row: Row) -> Row | Removed:
        a, b = row["chosen"], row["rejected"]
        if not a or not b or a[-1]["role"] != "assistant" or b[-1]["role"] != "assistant":
            return Removed(row, "no answer")
        shared = a[:-1]
        if shared != b[:-1]:
            return Removed(row, "prompts differ")
        chosen, rejected = a[-1]["content"], b[-1]["content"]
        if not chosen.strip() or not rejected.strip():
            return Removed(row, "empty answer")
        if chosen == rejected:
            return Removed(row, "equal answers")
        if turns == "one" and [m["role"] for m in shared if m["role"] != "system"] != ["user"]:
            return Removed(row, "several turns")
        return {**row, "prompt": render(shared), "chosen": chosen, "rejected": rejected, "messages": shared}

    return filtered("last answers", look)


def _transcript(given: dict[str, Any], side: str) -> list[Message]:
    if isinstance(given.get(side), list):
        said = messages_of(given, side)
        return said if any(m["role"] == "user" for m in said) else [*_prompt(given), *said]
    answer = text(given, side, empty=True)
    if "prompt" in given or "messages" in given:
        return [*_prompt(given), {"role": "assistant", "content": answer}]
    return _turns(answer, side)


def _prompt(given: dict[str, Any]) -> list[Message]:
    name = "prompt" if "prompt" in given else "messages"
    if isinstance(given.get(name), list):
        return messages_of(given, name)
    return [{"role": "user", "content": text(given, name, empty=True)}]


def _turns(transcript: str, side: str) -> list[Message]:
    before, *parts = _TURN.split(transcript)
    if before.strip() or not parts:
        raise ValueError(
            f"its {side!r} does not begin with a turn, '\\n\\nHuman:' or '\\n\\nAssistant:', and there is no 'prompt'"
        )
    return [{"role": _ROLE[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]
