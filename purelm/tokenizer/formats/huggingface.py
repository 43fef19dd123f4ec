r"""Hugging Face's tokenizer.json, read and written for byte-level BPE.

Written: model BPE, pre-tokenizer ByteLevel (GPT-2's pattern) or Split(pattern) and ByteLevel, decoder ByteLevel. Every
special token is an added token, which the library cuts out first wherever it appears, like `encode` with
allowed_special="all".

Read: the same, and what other programs write of it. Refused is all that would change ids: normalizers, prefix spaces,
dropout, subword marks, byte fallback, added tokens that strip or match whole words, and regular expressions that the
library's engine, Oniguruma, reads differently (see `dialect`). Refused too, unless the caller says text_only, is what
changes the ids of a text afterwards: truncation, padding, a post-processor that adds tokens. The decoder is not read:
decoding ids into bytes needs none.
"""

import json
from typing import Any

from purelm.tokenizer.bpe import BPE, make
from purelm.tokenizer.formats.added import added_tokens
from purelm.tokenizer.formats.alphabet import from_unicode, to_unicode, vocab_from_json, vocab_to_json
from purelm.tokenizer.formats.dialect import check_dialect
from purelm.tokenizer.formats.text import parse_json
from purelm.tokenizer.patterns import CL100K, GPT2, resolve

# Oniguruma reads {1,3}+ as a repetition of {1,3}; the plain form matches the same pieces here.
_SPELLINGS = {CL100K: CL100K.replace("{1,3}+", "{1,3}")}
_READ_AS = {spelling: pattern for pattern, spelling in _SPELLINGS.items()}


def to_json(bpe: BPE) -> str:
    """The text of a tokenizer.json; ValueError for a pattern that Hugging Face's library would read differently."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if bpe.pattern == GPT2:
        pre_tokenizer: dict[str, Any] = {**byte_level, "use_regex": True}
    else:
        pattern = _SPELLINGS.get(bpe.pattern, bpe.pattern)
        try:
            check_dialect(pattern)
        except ValueError as error:
            raise ValueError(f"bpe.pattern cannot be saved in a tokenizer.json: {error}") from None
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    vocab = vocab_to_json(bpe)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special_tokens = sorted(bpe.special_tokens, key=vocab.__getitem__)
    added = [{"id": vocab[name], "content": name, **flags} for name in special_tokens]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
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
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise ValueError(f"{name}: model.{key} is {model[key]!r}; not supported")
    if content.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
        kind = content["normalizer"].get("type") if isinstance(content["normalizer"], dict) else "damaged"
        raise ValueError(f"{name}: the normalizer {kind} changes the text; not supported")
    pattern = _pattern(content.get("pre_tokenizer"), name)
    if not text_only:
        _check_afterwards(content, name)
    special_tokens = added_tokens(content.get("added_tokens") or [], model["vocab"], name)
    vocab = vocab_from_json(model["vocab"], special_tokens, name)
    merges = [_merge(merge, rank, name) for rank, merge in enumerate(model["merges"])]
    try:
        return make(vocab, merges, special_tokens, pattern, ignore_merges=bool(model.get("ignore_merges", False)))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _merge(merge: Any, rank: int, name: str) -> tuple[bytes, bytes]:
    """A merge in its old form "a b" or its new one ["a", "b"]."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise ValueError(f"{name}: model.merges[{rank}] is {merge!r}, not two tokens")
    where = f"{name}: model.merges[{rank}]"
    return from_unicode(parts[0], where), from_unicode(parts[1], where)


def _pattern(pre_tokenizer: Any, name: str) -> str:
    """The regex of ByteLevel (GPT-2's), or of a Split followed by ByteLevel without its own."""
    steps = [pre_tokenizer]
    if isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "Sequence":
        steps = pre_tokenizer.get("pretokenizers", [])
    kinds = [step.get("type") if isinstance(step, dict) else None for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise ValueError(f"{name}: the pre-tokenizer is {kinds}; supported are ByteLevel, and Split before ByteLevel")
    byte_level = steps[-1]
    if byte_level.get("add_prefix_space", True):
        raise ValueError(f"{name}: ByteLevel with add_prefix_space puts a space before the text; not supported")
    if len(steps) == 1:
        if not byte_level.get("use_regex", True):
            return r"[\s\S]+"
        return GPT2
    if byte_level.get("use_regex", True):
        raise ValueError(f"{name}: Split and then ByteLevel with use_regex splits twice; not supported")
    split = steps[0]
    pattern = split.get("pattern")
    if not isinstance(pattern, dict) or not isinstance(pattern.get("Regex"), str):
        raise ValueError(f"{name}: Split by {pattern!r}; only a Regex is supported")
    if split.get("behavior") != "Isolated" or split.get("invert"):
        raise ValueError(
            f"{name}: Split with behavior {split.get('behavior')!r} and invert {split.get('invert')!r}; "
            "only Isolated without invert is supported"
        )
    regex = pattern["Regex"]
    if regex in _READ_AS:
        return _READ_AS[regex]
    try:
        check_dialect(regex)  # before `regex` compiles it, which takes gigabytes for some
        return resolve(regex)
    except ValueError as error:
        raise ValueError(f"{name}: Split: {error}") from None


def _check_afterwards(content: dict[str, Any], name: str) -> None:
    """Refuse what changes the ids of a text after it was encoded."""
    advice = "give text_only=True for the ids of the text without it"
    for key in ("truncation", "padding"):
        if content.get(key) is not None:
            raise ValueError(f"{name}: has {key}, which changes the ids of a text; {advice}")
    if _adds_tokens(content.get("post_processor")):
        kind = content["post_processor"].get("type") if isinstance(content["post_processor"], dict) else "damaged"
        raise ValueError(f"{name}: the post-processor {kind} adds tokens around a text; {advice}")


def _adds_tokens(processor: Any) -> bool:
    if processor is None:
        return False
    kind = processor.get("type") if isinstance(processor, dict) else None
    if kind == "Sequence" and isinstance(processor.get("processors"), list):
        return any(map(_adds_tokens, processor["processors"]))
    if kind == "TemplateProcessing" and isinstance(processor.get("single"), list):
        return not (len(processor["single"]) == 1 and "Sequence" in processor["single"][0])
    return kind != "ByteLevel"
