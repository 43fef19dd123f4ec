"""When a row of generated tokens ends: at a stop id, or when its text contains a stop string."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

__all__ = ["LENGTH", "STOP_ID", "STOP_STRING", "Decode", "Stop", "stop_end", "stop_mask", "stopped", "text_of"]

Decode = Callable[[list[int]], str]  # ids -> text
STOP_ID, STOP_STRING, LENGTH = "stop_id", "stop_string", "length"  # finish reasons


@dataclass(frozen=True)
class Stop:
    """What ends a row before max_new_tokens."""

    ids: Sequence[int] = ()  # a row ends with the first of these ids, which is kept
    # A row ends when the text of its new tokens contains one of these strings, also one that spans several tokens; the
    # prompt is not searched.
    strings: Sequence[str] = ()
    min_new_tokens: int = 0  # before a row has this many new tokens, ids are forbidden and strings are not looked for

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", _checked_ids(self.ids))
        object.__setattr__(self, "strings", _checked_strings(self.strings))
        if not isinstance(self.min_new_tokens, int) or self.min_new_tokens < 0:
            raise ValueError(f"min_new_tokens must be an integer of at least 0, got {self.min_new_tokens!r}")


def _checked_ids(ids: Iterable[int]) -> tuple[int, ...]:
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise ValueError(f"stop.ids must be a sequence of token ids, got {ids!r}")
    ids = tuple(int(i) if isinstance(i, Tensor) else i for i in ids)
    if odd := [i for i in ids if not isinstance(i, Integral)]:
        raise ValueError(f"stop.ids must be integers, got {odd[0]!r}")
    return tuple(int(i) for i in ids)


def _checked_strings(strings: Iterable[str]) -> tuple[str, ...]:
    """The strings as a tuple; ValueError for a single str, which would be taken for a sequence of characters."""
    if isinstance(strings, str | bytes):
        raise ValueError(f"stop.strings must be a sequence of strings, got {strings!r}: give [{strings!r}]")
    strings = tuple(strings)
    if odd := [s for s in strings if not isinstance(s, str) or not s]:
        raise ValueError(f"stop.strings must be strings that are not empty, got {odd[0]!r}")
    return strings


def stop_mask(stop: Stop, vocab_size: int) -> Tensor:
    """(V,) bool: which tokens are stop ids."""
    mask_V = torch.zeros(vocab_size, dtype=torch.bool)
    mask_V[list(stop.ids)] = True
    return mask_V


def stop_end(decode_fn: Decode, ids: list[int], stop_strings: Sequence[str]) -> int | None:
    """The end, in the text of `ids`, of the first stop string that the last token completes; None if there is none."""
    before, text = decode_fn(ids[:-1]), decode_fn(ids)
    # `old` is the length of the common prefix of both texts. It may be less than len(before), since the last token may
    # complete a character whose first bytes were decoded as U+FFFD.
    old = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text)))
    ends = [at + len(s) for s in stop_strings if (at := text.find(s, max(0, old - len(s) + 1))) >= 0]
    return min(ends) if ends else None


def stopped(decode_fn: Decode, ids: list[int], stop_strings: Sequence[str]) -> bool:
    """Whether the last token completes a stop string; decodes only the tokens at the end that can be part of one."""
    if not stop_strings:
        return False
    reach = max(len(s) for s in stop_strings) + 3  # + 3: U+FFFD for up to 3 bytes of a character cut by the window
    window = 8
    while window < len(ids) and len(decode_fn(ids[-window:-1])) < reach:
        window *= 2
    return stop_end(decode_fn, ids[-window:], stop_strings) is not None


def text_of(decode_fn: Decode, ids: list[int], reason: str, stop_strings: Sequence[str]) -> str:
    """Text of a finished row: without its stop id if reason is stop_id, up to the stop string's end if stop_string."""
    if reason == STOP_ID:
        return decode_fn(ids[:-1])
    end = stop_end(decode_fn, ids, stop_strings) if reason == STOP_STRING else None
    return decode_fn(ids)[:end]
