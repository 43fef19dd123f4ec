"""Tokenizer files, read strictly and written atomically.

| file | holds | also read by |
|---|---|---|
| tokenizer.json | everything: the format of `save` and `load` | Hugging Face tokenizers, transformers |
| NAME.tiktoken | ranks of the ordinary tokens; pattern and special tokens are arguments | tiktoken |
| NAME.gguf | everything, the pattern by name; read only (extra `gguf`) | llama.cpp |
| vocab.json, merges.txt | ids and merges; the pattern is GPT-2's unless an argument says otherwise | GPT-2 |

A file that is cut short or damaged gives one ValueError that names it and, where there is one, the line. A file is
written beside its name and then renamed, so what was there before stays whole until the new one is complete.
"""

import os
from pathlib import Path

from purelm.tokenizer.bpe import BPE, Specials
from purelm.tokenizer.formats import huggingface
from purelm.tokenizer.formats.gguf import from_gguf, load_gguf
from purelm.tokenizer.formats.gpt2 import load_gpt2, save_gpt2
from purelm.tokenizer.formats.text import read_text, write_atomic
from purelm.tokenizer.formats.tiktoken import load_tiktoken, save_tiktoken
from purelm.tokenizer.patterns import Pattern

__all__ = [
    "added_around",
    "from_gguf",
    "load",
    "load_gguf",
    "load_gpt2",
    "load_tiktoken",
    "save",
    "save_gpt2",
    "save_tiktoken",
]


def save(bpe: BPE, path: str | os.PathLike) -> None:
    """Write `bpe` to a .json file (Hugging Face's tokenizer.json, lossless) or a .tiktoken file (ranks only)."""
    suffix = Path(path).suffix
    if suffix == ".json":
        write_atomic({path: huggingface.to_json(bpe)})
    elif suffix == ".tiktoken":
        save_tiktoken(bpe, path)
    else:
        raise ValueError(f"path is {os.fspath(path)!r}; a tokenizer's file ends in .json or .tiktoken")


def load(
    path: str | os.PathLike,
    *,
    pattern: Pattern | None = None,
    special_tokens: Specials | None = None,
    text_only: bool = False,
) -> BPE:
    """Read a .json file (Hugging Face's tokenizer.json), a .tiktoken file, a .gguf file, or a folder.

    A folder holds tokenizer.json, or vocab.json and merges.txt.

    Args:
        pattern, special_tokens: for the formats that lack them, see `load_tiktoken` and `load_gpt2`. A tokenizer.json
            has its own; giving them with it is an error.
        text_only: some tokenizer.json files also truncate, pad, or add tokens around a text (Llama's begin of text).
            By default such a file is refused, like everything in it that would give other ids than Hugging Face's
            library. With text_only=True these three are ignored, and the ids are those of the text alone: the
            library's encode(text, add_special_tokens=False). `added_around` gives the tokens around it.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "tokenizer.json").exists() and (path / "vocab.json").exists():
            return load_gpt2(
                path / "vocab.json", path / "merges.txt", special_tokens=special_tokens, pattern=pattern or "gpt2"
            )
        path = path / "tokenizer.json"
    if path.suffix == ".gguf":
        if pattern is not None or special_tokens is not None:
            raise ValueError(f"{path} has its own pattern and special tokens; leave these arguments out")
        return load_gguf(path)
    if path.suffix == ".tiktoken":
        return load_tiktoken(path, pattern=pattern, special_tokens=special_tokens)
    if path.suffix != ".json":
        raise ValueError(f"path is {os.fspath(path)!r}; a tokenizer's file ends in .json, .tiktoken or .gguf")
    if pattern is not None or special_tokens is not None:
        raise ValueError(f"{path} has its own pattern and special tokens; leave these arguments out")
    return huggingface.from_json(read_text(path), os.fspath(path), text_only)


def added_around(path: str | os.PathLike) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ids before, ids behind) those of a text, which a tokenizer.json adds (Llama's begin of text, say).

    encode(load(path, text_only=True), text) between them is the library's encode(text).
    """
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    return huggingface.added_around(read_text(path), os.fspath(path))
