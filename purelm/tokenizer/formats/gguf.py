r"""Byte-level BPE from the metadata of a GGUF file: tokens, merges, token types and the name of a pre-tokenizer.

`from_gguf` takes the metadata as plain Python values; `load_gguf` reads them by the package gguf (extra `gguf`).

    tokenizer.ggml.model         "gpt2": the only kind that is byte-level BPE
    tokenizer.ggml.pre           the pre-tokenizer, a key of PRE
    tokenizer.ggml.tokens        list of str by id, in GPT-2's printable alphabet; special tokens as they are
    tokenizer.ggml.token_type    list of int: 1 ordinary, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte
    tokenizer.ggml.merges        list of "left right" in rank order

Control, unknown and user-defined tokens become special tokens. A token of type 5 that is no result of a merge stands
for no text and is left out: the ids have a hole there. Bytes without a token are dropped, see `bpe`.

The name is all that a GGUF file says of normalizer and pattern. PRE holds what the tokenizer.json of the model family
that brought the name has, so ids equal Hugging Face's: qwen2 is with NFC, which llama.cpp leaves out. The pattern of
deepseek-coder is llama.cpp's. A name that is not in PRE is refused, not guessed.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from purelm.tokenizer.bpe import BPE, make
from purelm.tokenizer.formats.alphabet import from_unicode
from purelm.tokenizer.patterns import CL100K_V1, DEEPSEEK3, GPT2, O200K, QWEN, SMOLLM, Pattern

_ORDINARY, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)


class Pre(NamedTuple):
    """What the name of a pre-tokenizer means."""

    pattern: Pattern
    normalizer: str | None = None
    ignore_merges: bool = False


# Mistral's tekken: o200k without contractions, one number a piece.
_TEKKEN = O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(r"\p{N}{1,3}", r"\p{N}")
PRE = {
    "gpt-2": Pre(GPT2),
    "smollm": Pre(SMOLLM),
    "starcoder": Pre(SMOLLM),
    "refact": Pre(SMOLLM),
    "llama-bpe": Pre(CL100K_V1, ignore_merges=True),
    "llama3": Pre(CL100K_V1, ignore_merges=True),
    "qwen2": Pre(QWEN, normalizer="NFC"),
    "deepseek-r1-qwen": Pre(QWEN),
    "gpt-4o": Pre(O200K),
    "llama4": Pre(O200K),
    "tekken": Pre(_TEKKEN, ignore_merges=True),
    "deepseek-v3": Pre(DEEPSEEK3),
    "deepseek-coder": Pre(
        ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
    ),
}
_KEY = "tokenizer.ggml."


def open_gguf(path: str | os.PathLike) -> Any:
    """The package gguf's reader of a file; ImportError without the package, ValueError for a file that is no GGUF."""
    try:
        import gguf
    except ImportError:
        raise ImportError("a .gguf file needs gguf, which is not installed: pip install 'purelm[gguf]'") from None
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{os.fspath(path)}: no such file")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader's own errors are of any kind, IndexError for a short file among them
        raise _broken(path, error) from None


def _broken(path: str | os.PathLike, error: Exception) -> ValueError:
    return ValueError(f"{os.fspath(path)}: not a GGUF file, or cut short ({type(error).__name__}: {error})")


def metadata_of(path: str | os.PathLike, keys: Iterable[str]) -> dict[str, Any]:
    """The values of these keys of a GGUF file, as far as it has them; errors as `open_gguf`."""
    fields = open_gguf(path).fields
    try:
        return {key: fields[key].contents() for key in keys if key in fields}
    except Exception as error:
        raise _broken(path, error) from None


def load_gguf(path: str | os.PathLike) -> BPE:
    """The tokenizer of a GGUF file; ImportError without the package gguf, ValueError for what `from_gguf` refuses."""
    keys = (_KEY + key for key in ("model", "pre", "tokens", "token_type", "merges"))
    return from_gguf(metadata_of(path, keys), os.fspath(path))


def from_gguf(metadata: Mapping[str, Any], name: str = "gguf") -> BPE:
    """The BPE of GGUF metadata (see the top of this file); errors begin with `name` and name every key that is wrong.

    >>> from purelm.tokenizer.formats.alphabet import byte_characters
    >>> tokens = [*byte_characters(), "hi", "<|end|>"]
    >>> keys = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [1] * 257 + [3], "merges": ["h i"]}
    >>> bpe = from_gguf({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    >>> bpe.merges, bpe.special_tokens
    (((b'h', b'i'),), ('<|end|>',))
    """
    model, pre, tokens, types, merges = (
        metadata.get(_KEY + key) for key in ("model", "pre", "tokens", "token_type", "merges")
    )
    problems: list[str] = []
    if model != "gpt2":
        problems.append(f"{_KEY}model is {model!r}; supported is 'gpt2', byte-level BPE")
    if pre not in PRE:
        problems.append(f"{_KEY}pre is {pre!r}, no pre-tokenizer that is known: {', '.join(PRE)}")
    for key, value, kind in (("tokens", tokens, str), ("token_type", types, int), ("merges", merges, str)):
        if not isinstance(value, list | tuple) or not all(isinstance(one, kind) for one in value):
            problems.append(f"{_KEY}{key} is {type(value).__name__}; a list of {kind.__name__} is expected")
    if not problems and len(tokens) != len(types):  # type: ignore[arg-type]
        problems.append(f"{_KEY}token_type has {len(types)} entries for {len(tokens)} tokens")  # type: ignore[arg-type]
    if problems:
        raise ValueError(f"{name}: {'; '.join(problems)}")
    assert tokens is not None and types is not None and merges is not None and isinstance(pre, str)
    pairs = [_merge(text, rank, name) for rank, text in enumerate(merges)]
    results = {left + right for left, right in pairs}
    vocab: dict[int, bytes] = {}
    special: dict[str, int] = {}
    for token_id, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        where = f"{name}: {_KEY}tokens[{token_id}]"
        if kind in (_UNKNOWN, _CONTROL, _USER):
            special[text] = token_id
            vocab[token_id] = text.encode()
        elif kind == _ORDINARY:
            vocab[token_id] = from_unicode(text, where)
        elif kind == _UNUSED:
            token = _or_none(text)
            if token in results:
                vocab[token_id] = token  # type: ignore[assignment]
        else:
            raise ValueError(f"{where} has token_type {kind}; supported are 1 to 5")
    found = PRE[pre]
    try:
        return make(
            vocab, pairs, special, found.pattern, ignore_merges=found.ignore_merges, normalizer=found.normalizer,
            drop_missing_bytes=True,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _merge(text: str, rank: int, name: str) -> tuple[bytes, bytes]:
    parts = text.split(" ")
    where = f"{name}: {_KEY}merges[{rank}]"
    if len(parts) != 2 or not all(parts):
        raise ValueError(f"{where} is {text!r:.80}, not two tokens")
    return from_unicode(parts[0], where), from_unicode(parts[1], where)


def _or_none(text: str) -> bytes | None:
    try:
        return from_unicode(text, "")
    except ValueError:
        return None
