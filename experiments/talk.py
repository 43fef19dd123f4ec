"""A conversation with a model, as a value: what was said, and what the model has computed of it.

    talk, ids = fitted(voice, talk, "What is the capital of France?")
    for said in speak(voice, talk, "What is the capital of France?", ids):
        print(said.piece, end="")
    talk = said.talk

Each turn is rendered anew, and the model computes what differs from its `Past`: so a template that rewrites earlier
turns, and an answer whose text has other ids than were sampled, cost time and not correctness.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from purelm import random
from purelm.generate import Past, Sampling, Stop, continued, empty_past
from purelm.generate.types import PLAIN
from purelm.models.model import Model
from purelm.tokenizer import BPE, Chat, decode_next, encode, encode_chat

__all__ = ["Said", "Talk", "Voice", "fitted", "ids_of", "messages_of", "speak", "undone"]


@dataclass(frozen=True)
class Voice:
    """Who answers, and how."""

    model: Model
    params: Any
    bpe: BPE
    chat: Chat | None  # None: what is said is one text, which the model continues
    begin: tuple[int, ...] = ()  # ids before such a text
    ends: tuple[int, ...] = ()  # ids that end an answer
    sampling: Sampling = PLAIN
    max_new_tokens: int = 512
    context: int = 4096  # the most tokens of a conversation, the answer included
    seed: int = 0

    @property
    def room(self) -> int:
        """The most tokens before an answer: max_new_tokens stay free, but not more than half of the context."""
        return self.context - min(self.max_new_tokens, self.context // 2)


@dataclass(frozen=True)
class Talk:
    """What was said; a turn is (your text, the answer)."""

    system: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    number: int = 0  # turns so far, those dropped included: with `attempt` it chooses the random key
    attempt: int = 0
    past: Past | None = None


class Said(NamedTuple):
    """One new token: the characters that it completes, and the conversation with the answer so far."""

    piece: str
    talk: Talk
    finish_reason: str | None


def messages_of(talk: Talk, text: str | None = None) -> list[dict[str, str]]:
    """The conversation, and `text` as the newest message, in the form that templates take."""
    messages = [{"role": "system", "content": talk.system}] if talk.system else []
    for yours, answer in talk.turns:
        messages += [{"role": "user", "content": yours}, {"role": "assistant", "content": answer}]
    return messages if text is None else [*messages, {"role": "user", "content": text}]


def ids_of(voice: Voice, talk: Talk, text: str) -> list[int]:
    """The ids that the answer to `text` continues. Special tokens are the template's alone.

    Without a template they are those of one text: each message goes on where the answer before it ended, in a new line.
    """
    if voice.chat is not None:
        return encode_chat(voice.bpe, voice.chat, messages_of(talk, text)).tolist()
    lines = ([talk.system] if talk.system else []) + [yours + answer for yours, answer in talk.turns] + [text]
    return [*voice.begin, *encode(voice.bpe, "\n".join(lines), "none").tolist()]


def fitted(voice: Voice, talk: Talk, text: str) -> tuple[Talk, list[int]]:
    """(the conversation without the oldest turns that have no room, its ids with `text`).

    The system text and `text` are always kept; ValueError where they alone are more than voice.room.
    """
    while len(ids := ids_of(voice, talk, text)) > voice.room:
        if not talk.turns:
            raise ValueError(
                f"the message and the system text are {len(ids):,} tokens, and {voice.room:,} fit before an answer: "
                f"the context is {voice.context:,}, max_new_tokens {voice.max_new_tokens:,}"
            )
        talk = replace(talk, turns=talk.turns[1:])
    return talk, ids


def speak(voice: Voice, talk: Talk, text: str, ids: list[int]) -> Iterator[Said]:
    """The answer to `text`, a token at a time; talk and ids are those that `fitted` gives."""
    key = random.fold_in(random.fold_in(random.key(voice.seed), talk.number), talk.attempt)
    past = talk.past or empty_past(voice.model, voice.params, voice.context)
    steps = continued(
        voice.model,
        voice.params,
        ids,
        key.to(voice.model.unembedding(voice.params).device),
        past,
        max_new_tokens=min(voice.max_new_tokens, voice.context - len(ids)),
        sampling=voice.sampling,
        stop=Stop(voice.ends),
    )
    answer, held = "", b""
    for step in steps:
        # No text: the token that ends the answer, and rows of the model beyond the tokenizer's.
        shown = step.token not in voice.ends and step.token in voice.bpe.vocab
        final = step.finish_reason is not None
        piece, held = decode_next(voice.bpe, [step.token] if shown else [], held, final=final)
        answer += piece
        turns = (*talk.turns, (text, answer))
        after = replace(talk, turns=turns, number=talk.number + 1, attempt=0, past=step.past)
        yield Said(piece, after, step.finish_reason)


def undone(talk: Talk) -> tuple[Talk, str]:
    """(the conversation before the last turn, what you said there)."""
    if not talk.turns:
        raise ValueError("there is no turn to take back")
    return replace(talk, turns=talk.turns[:-1], number=talk.number - 1), talk.turns[-1][0]
