r"""Hugging Face's tokenizer.json, read and written for byte-level BPE.

Written: model BPE, pre-tokenizer ByteLevel (GPT-2's pattern) or Split(pattern) and ByteLevel, decoder ByteLevel, and
every special token as an added token, which the library cuts out first wherever it appears, as `encode` does with
allowed_special="all". Read: the same, and what other programs write of it. What would change ids and is not supported
is refused: normalizers, prefix spaces, dropout, subword marks, byte fallback, added tokens that strip or match whole
words, regular expressions that the library (whose are Oniguruma's) reads differently (see `dialect`), and what it does
to the ids of a text afterwards: truncation, padding, a post-processor that adds tokens. These three are left out where
the caller says text_only: then the ids are the library's encode(text, add_special_tokens=False) without them.
The decoder is not read: ids are decoded as what they are, bytes.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from purelm.tokenizer.added import added_tokens
from purelm.tokenizer.alphabet import from_unicode, to_unicode
from purelm.tokenizer.bpe import BPE, LONE_SURROGATE, make
from purelm.tokenizer.dialect import check_dialect
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
    added = [
        {
            "id": vocab[name],
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for name in sorted(bpe.special_tokens, key=vocab.__getitem__)
    ]
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
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
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


def vocab_to_json(bpe: BPE) -> dict[str, int]:
    """Tokens in the printable alphabet, special tokens as they are, to ids; in the order of the ids."""
    special = {name.encode(): name for name in bpe.special_tokens}
    merged = {left + right for left, right in bpe.merges}
    entries: dict[str, int] = {}
    for token_id, token in sorted(bpe.vocab.items()):
        text = special[token] if token in special else to_unicode(token)
        if token in special and text != to_unicode(token) and (token in merged or len(token) == 1):
            raise ValueError(f"the special token {text!r} is an ordinary token too; these files cannot hold both")
        if text in entries:
            raise ValueError(f"the special token {text!r} reads as the ordinary token {entries[text]} in such a file")
        entries[text] = token_id
    return entries


def vocab_from_json(entries: Mapping[str, Any], special_tokens: Iterable[str], name: str) -> dict[int, bytes]:
    """The vocab of what `vocab_to_json` writes; errors begin with `name`."""
    special = frozenset(special_tokens)
    vocab: dict[int, bytes] = {}
    for text, token_id in entries.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise ValueError(f"{name}: the id of {text!r} is {token_id!r}, not an int")
        if token_id in vocab:
            raise ValueError(f"{name}: {text!r} and {vocab[token_id]!r} both have id {token_id}")
        if text in special and LONE_SURROGATE.search(text):
            raise ValueError(f"{name}: the special token {text!r} holds a lone surrogate, which UTF-8 cannot hold")
        vocab[token_id] = text.encode() if text in special else from_unicode(text, name)
    return vocab


def parse_json(text: str, name: str) -> Any:
    """json.loads, with a ValueError that names the file, and the line and the column where there is one."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name}, line {error.lineno}, column {error.colno}: {error.msg}; the file is damaged or cut short"
        ) from None
    except RecursionError:
        raise ValueError(f"{name}: its JSON is nested too deeply; the file is damaged") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{name}: {error}") from None
