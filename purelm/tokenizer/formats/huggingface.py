r"""Hugging Face's tokenizer.json, read and written for byte-level BPE.

Written: model BPE, a Unicode normal form where the BPE has one, the pre-tokenizer (see `pretokenizers`), decoder
ByteLevel. Every special token is an added token, which the library cuts out first wherever it appears, like `encode`
with allowed_special="all".

Read: the same, and what other programs write of it. Refused is all that would change ids: other normalizers, prefix
spaces, dropout, subword marks, byte fallback, added tokens that strip or match whole words, and regular expressions
that the library's engine, Oniguruma, reads differently (see `dialect`). Refused too, unless the caller says text_only,
is what changes the ids of a text afterwards: truncation, padding, a post-processor that adds tokens (`added_around`
tells which). One error names all that is refused. The decoder is not read: decoding ids into bytes needs none.

A vocab that lacks some of the 256 bytes is read where the file has no unk_token: the library drops such bytes, and so
does `encode`.
"""

import json
from typing import Any

from purelm.tokenizer.bpe import BPE, make
from purelm.tokenizer.formats.added import added_tokens
from purelm.tokenizer.formats.alphabet import byte_characters, from_unicode, to_unicode, vocab_from_json, vocab_to_json
from purelm.tokenizer.formats.normalizers import normalizer_from_json, normalizer_to_json
from purelm.tokenizer.formats.pretokenizers import pattern_from_json, pattern_to_json
from purelm.tokenizer.formats.text import parse_json

_MODEL_KEYS = (
    "type", "vocab", "merges", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
    "byte_fallback", "ignore_merges",
)  # fmt: skip


def to_json(bpe: BPE) -> str:
    """The text of a tokenizer.json; ValueError for a pattern that Hugging Face's library would read differently."""
    pre_tokenizer = pattern_to_json(bpe.pattern)
    vocab = vocab_to_json(bpe)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "special": True}
    special_tokens = sorted(bpe.special_tokens, key=vocab.__getitem__)
    added = [
        {"id": vocab[name], "content": name, "normalized": name in bpe.normalized_tokens, **flags}
        for name in special_tokens
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer_to_json(bpe.normalizer),
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": bpe.ignore_merges,
            "vocab": vocab,
            "merges": [(to_unicode(left), to_unicode(right)) for left, right in bpe.merges],
        },
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def from_json(text: str, name: str, text_only: bool = False) -> BPE:
    """The BPE of the text of a tokenizer.json; errors begin with `name`. text_only: see the top of this file."""
    content = parse_json(text, name)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise ValueError(f"{name}: not a tokenizer.json (no model with a vocab)")
    kind = model.get("type", "BPE")
    if kind != "BPE" or not isinstance(model["vocab"], dict) or not isinstance(model.get("merges"), list):
        raise ValueError(f"{name}: the model is {kind}; only BPE is supported")
    problems: list[str] = []
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            problems.append(f"model.{key} is {model[key]!r}; not supported")
    for key in sorted(set(model) - set(_MODEL_KEYS)):
        problems.append(f"model.{key} is not known")
    missing = [character for character in byte_characters() if character not in model["vocab"]]
    if missing and model.get("unk_token"):
        problems.append(
            f"model.unk_token is {model['unk_token']!r}, and the vocab lacks {len(missing)} of the 256 single bytes, "
            "which would become it; not supported"
        )
    normalizer = normalizer_from_json(content.get("normalizer"), problems)
    pattern = pattern_from_json(content.get("pre_tokenizer"), problems)
    if not text_only:
        _check_afterwards(content, problems)
    special_tokens, second = added_tokens(content.get("added_tokens") or [], model["vocab"], problems)
    if problems:
        raise ValueError(f"{name}: {'; '.join(problems)}")
    vocab = vocab_from_json(model["vocab"], special_tokens, name)
    merges = [_merge(merge, rank, name) for rank, merge in enumerate(model["merges"])]
    try:
        return make(
            vocab, merges, special_tokens, pattern, ignore_merges=bool(model.get("ignore_merges", False)),
            normalizer=normalizer, normalized_tokens=second, drop_missing_bytes=True,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _merge(merge: Any, rank: int, name: str) -> tuple[bytes, bytes]:
    """A merge in its old form "a b" or its new one ["a", "b"]."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise ValueError(f"{name}: model.merges[{rank}] is {merge!r}, not two tokens")
    where = f"{name}: model.merges[{rank}]"
    return from_unicode(parts[0], where), from_unicode(parts[1], where)


def _check_afterwards(content: dict[str, Any], problems: list[str]) -> None:
    """Note what changes the ids of a text after it was encoded."""
    advice = "give text_only=True for the ids of the text without it"
    for key in ("truncation", "padding"):
        if content.get(key) is not None:
            problems.append(f"has {key}, which changes the ids of a text; {advice}")
    if _adds_tokens(content.get("post_processor")):
        kind = content["post_processor"].get("type") if isinstance(content["post_processor"], dict) else "damaged"
        problems.append(f"the post-processor {kind} adds tokens around a text; {advice}")


def _adds_tokens(processor: Any) -> bool:
    if processor is None:
        return False
    kind = processor.get("type") if isinstance(processor, dict) else None
    if kind == "Sequence" and isinstance(processor.get("processors"), list):
        return any(map(_adds_tokens, processor["processors"]))
    if kind == "TemplateProcessing" and isinstance(processor.get("single"), list):
        return not (len(processor["single"]) == 1 and "Sequence" in processor["single"][0])
    return kind != "ByteLevel"


def added_around(text: str, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ids before, ids behind) the ids of a text, which the post-processor of a tokenizer.json adds."""
    content = parse_json(text, name)
    if not isinstance(content, dict):
        raise ValueError(f"{name}: not a tokenizer.json")
    before, behind = _around(content.get("post_processor"), name)
    return tuple(before), tuple(behind)


def _around(processor: Any, name: str) -> tuple[list[int], list[int]]:
    if not _adds_tokens(processor):
        return [], []
    kind = processor.get("type") if isinstance(processor, dict) else None
    if kind == "Sequence":
        before: list[int] = []
        behind: list[int] = []
        for one in processor["processors"]:  # each goes around the result of the one before
            more_before, more_behind = _around(one, name)
            before, behind = more_before + before, behind + more_behind
        return before, behind
    try:
        if kind in ("BertProcessing", "RobertaProcessing"):
            return [int(processor["cls"][1])], [int(processor["sep"][1])]
        if kind == "TemplateProcessing":
            parts: list[list[int]] = [[]]
            for item in processor["single"]:
                if "Sequence" in item:
                    parts.append([])
                else:
                    parts[-1] += map(int, processor["special_tokens"][item["SpecialToken"]["id"]]["ids"])
            if len(parts) == 2:
                return parts[0], parts[1]
    except (KeyError, TypeError, IndexError, ValueError):
        pass
    raise ValueError(f"{name}: the post-processor {kind} is damaged or not supported")
