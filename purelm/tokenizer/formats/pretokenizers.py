r"""The pre-tokenizers of a tokenizer.json as a pattern, and back.

Read: ByteLevel, or a Sequence of Split and Digits steps before it, each of which splits the pieces of the one before.
A Split has a Regex that means the same to both libraries (see `dialect`) or a String, and a behavior. With P the
expression, and pieces as `splitting.split` makes them (matches, and what lies between them):

    Isolated              P                                     invert makes no difference
    Contiguous            (?:(?>P))++                           nor here
    MergedWithPrevious    [\s\S]*?(?>P)|[\s\S]+                 inverted it is MergedWithNext
    MergedWithNext        (?>P)(?:(?!P)[\s\S])*+                inverted it is MergedWithPrevious
    Removed               Removed(P), inverted Removed(P, True)

Digits is \p{N} or \p{N}+ (Hugging Face's library asks Rust's tables there, whose Unicode version may differ from that
of `regex`: characters assigned since are no numbers to the older one).
"""

import json
from typing import Any

from purelm.tokenizer.formats.dialect import check_dialect
from purelm.tokenizer.patterns import CL100K, GPT2, SMOLLM, Pattern, Removed, Step, resolve

# Oniguruma reads {1,3}+ as a repetition of {1,3}; the plain form matches the same pieces here.
_SPELLINGS = {CL100K: CL100K.replace("{1,3}+", "{1,3}")}
_READ_AS = {spelling: pattern for pattern, spelling in _SPELLINGS.items()}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_KEYS = {
    "Split": {"pattern", "behavior", "invert"},
    "Digits": {"individual_digits"},
    "ByteLevel": {"add_prefix_space", "trim_offsets", "use_regex"},
}
_WHOLE = r"[\s\S]+"
_NEWLINES = frozenset(("[\r\n]", r"[\r\n]"))  # steps behind which a newline is a piece of its own


def pattern_to_json(pattern: Pattern) -> dict[str, Any]:
    """The pre-tokenizer for `pattern`; ValueError for one that Hugging Face's library would read differently."""
    if pattern == SMOLLM:
        return _sequence({"type": "Digits", "individual_digits": True}, {**_BYTE_LEVEL, "use_regex": True})
    steps = list(pattern) if isinstance(pattern, tuple) else [pattern]
    last = steps.pop() if steps[-1] == GPT2 else None
    byte_level = {**_BYTE_LEVEL, "use_regex": last is not None}
    if not steps:
        return byte_level
    return _sequence(*map(_split_to_json, steps), byte_level)


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split_to_json(step: Step) -> dict[str, Any]:
    removed, invert = isinstance(step, Removed), isinstance(step, Removed) and step.invert
    regex = step.pattern if isinstance(step, Removed) else step
    if regex == GPT2:
        regex = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    regex = _SPELLINGS.get(regex, regex)
    try:
        check_dialect(regex)
    except ValueError as error:
        raise ValueError(f"bpe.pattern cannot be saved in a tokenizer.json: {error}") from None
    behavior = "Removed" if removed else "Isolated"
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def pattern_from_json(pre_tokenizer: Any, problems: list[str]) -> Pattern:
    """The pattern of a pre-tokenizer; what is not supported is added to `problems`, and it then means nothing."""
    steps = _flat(pre_tokenizer)
    kinds = [step.get("type") if isinstance(step, dict) else None for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or not set(kinds[:-1]) <= {"Split", "Digits"}:
        problems.append(
            f"the pre-tokenizer is {kinds}; supported are ByteLevel, and Split and Digits steps before ByteLevel"
        )
    known = [step for step, kind in zip(steps, kinds, strict=True) if kind in _KEYS]
    result: list[Step] = []
    for number, step in enumerate(known):
        kind = step["type"]
        for key in sorted(set(step) - _KEYS[kind] - {"type"}):
            problems.append(f"the pre-tokenizer {kind} has {key} {step[key]!r}, which is not known")
        if kind == "Split":
            result += _split(step, result, problems)
        elif kind == "Digits":
            result.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        else:
            if step.get("add_prefix_space", True):
                problems.append("ByteLevel with add_prefix_space puts a space before the text; not supported")
            if step.get("use_regex", True):
                result.append(GPT2)
        if kind == "ByteLevel" and number < len(known) - 1:
            problems.append(
                f"{known[number + 1]['type']} after ByteLevel splits its characters for bytes; not supported"
            )
    return resolve(tuple(result)) if result else _WHOLE


def _flat(pre_tokenizer: Any) -> list[Any]:
    """The steps of a pre-tokenizer, Sequences in Sequences included."""
    if isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "Sequence":
        steps = pre_tokenizer.get("pretokenizers")
        return [one for step in steps for one in _flat(step)] if isinstance(steps, list) else [None]
    return [pre_tokenizer]


def _split(split: dict[str, Any], before: list[Step], problems: list[str]) -> list[Step]:
    """The step of a Split behind others, in a list that is empty where it is not supported."""
    pattern = split.get("pattern")
    text = pattern.get("Regex") if isinstance(pattern, dict) else None
    if isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
        text = "".join("\\" + c if c in r"\.^$*+?{}[]|()-&~" else c for c in pattern["String"])
    behavior, invert = split.get("behavior"), split.get("invert") or False
    if behavior not in ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        problems.append(f"Split with behavior {behavior!r}; not supported")
    if not isinstance(invert, bool):
        problems.append(f"Split with invert {invert!r}; not supported")
    if not isinstance(text, str):
        problems.append(f"Split by {json.dumps(pattern)}; supported are a Regex and a String")
        return []
    try:
        if text in _READ_AS:
            found = _READ_AS[text]
        elif text == r"\s+$" and _NEWLINES.intersection(before):
            found = r"\s++$"  # no piece holds a newline and something else: the end of a line is that of the piece
        else:
            check_dialect(text)  # before `regex` compiles it, which takes gigabytes for some
            found = text if text.isalnum() else str(resolve(text))  # a word alone is refused by `resolve` as a name
            if text.isalnum():
                found = f"(?:{text})"
        return [_behave(found, str(behavior), bool(invert))]
    except ValueError as error:
        problems.append(f"Split: {error}")
        return []


def _behave(regex: str, behavior: str, invert: bool) -> Step:
    """A step that splits as the behavior says, see the top of this file."""
    if behavior == "Removed":
        return Removed(regex, invert)
    if behavior == "Contiguous":
        return f"(?:(?>{regex}))++"
    if behavior in ("MergedWithPrevious", "MergedWithNext"):
        if (behavior == "MergedWithPrevious") != invert:
            return rf"[\s\S]*?(?>{regex})|[\s\S]+"
        return rf"(?>{regex})(?:(?!{regex})[\s\S])*+"
    return regex
