"""Compare purelm's ids with tiktoken's and Hugging Face's on every file of a folder, for the published vocabularies.

    python -m experiments.check_tokenizer --data FOLDER --vocabularies FOLDER/tokenizers

Every file below the folder is text: .zip members and .gz streams are unpacked, JSON lines are also read string by
string, bytes that are not UTF-8 are decoded with replacement characters. Prints one line for each vocabulary and
engine, and each difference with the characters that explain it: the libraries go by different versions of Unicode (see
purelm.tokenizer.compiled.classes). Exit status 1 if any difference is not explained by such characters.
"""

import gzip
import json
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.console import program
from purelm import tokenizer

NAMES = ("gpt2", "r50k_base", "cl100k_base", "o200k_base")


@dataclass(frozen=True)
class Args:
    """Compare ids on all texts of a folder."""

    data: Path
    """folder whose files are the texts"""
    vocabularies: Path
    """folder with r50k_base.tiktoken, cl100k_base.tiktoken, o200k_base.tiktoken, gpt2_vocab.json, gpt2_merges.txt"""
    names: tuple[str, ...] = NAMES
    engines: tuple[str, ...] = ("numba", "python")
    huggingface: bool = True
    """compare with the tokenizers library too (reads the tokenizer.json that purelm writes)"""


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of everything in the folder."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for member in sorted(archive.namelist()):
                    if not member.endswith("/"):
                        yield f"{name}:{member}", archive.read(member).decode("utf-8", "replace")
            continue
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8", "replace")
        yield name, text
        if ".jsonl" in path.name:
            for number, line in enumerate(filter(None, text.split("\n"))):
                for key, value in _strings(json.loads(line)):
                    yield f"{name}:{number}:{key}", value


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, f"{key}.{name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _strings(item, f"{key}.{number}")


def load(name: str, folder: Path) -> tokenizer.BPE:
    if name == "gpt2":
        return tokenizer.load_gpt2(folder / "gpt2_vocab.json", folder / "gpt2_merges.txt")
    return tokenizer.load(folder / f"{name}.tiktoken")


def tiktoken_encoding(bpe: tokenizer.BPE, name: str) -> Any:
    """tiktoken's Encoding of a BPE that was loaded from tiktoken's own file (ids in the order of merges)."""
    import tiktoken

    special = {text: next(i for i, t in bpe.vocab.items() if t == text.encode()) for text in bpe.special_tokens}
    ordinary = {token: i for i, token in bpe.vocab.items() if i not in special.values()}
    return tiktoken.Encoding(name, pat_str=bpe.pattern, mergeable_ranks=ordinary, special_tokens=special)


def disputed_characters(folder: Path, name: str) -> frozenset[str]:
    """Characters that `regex` and tiktoken's library put into different classes."""
    import regex

    bpe = load(name, folder)
    every = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    found: set[str] = set()
    for pattern in (r"\p{L}", r"\p{N}", r"\s", r"\p{M}", r"\p{Lu}", r"\p{Ll}", r"\p{Lt}", r"\p{Lm}", r"\p{Lo}"):
        encoding = tiktoken_encoding(tokenizer.BPE(bpe.vocab, bpe.merges, bpe.special_tokens, pattern), "classes")
        theirs = encoding.decode(encoding.encode_ordinary(every))
        found |= set(regex.findall(pattern, every)) ^ set(theirs)
    return frozenset(found)


def compare(
    name: str, ours: Callable[[str], np.ndarray], theirs: Callable[[str], Any], folder: Path, disputed: frozenset[str]
) -> int:
    """Compare on all texts and print the result; returns the number of texts whose difference is unexplained."""
    n_texts = n_bytes = n_ids = 0
    explained: list[str] = []
    unexplained: list[str] = []
    start = time.process_time()
    for where, text in texts(folder):
        expected = theirs(text)
        ids = ours(text)
        n_texts, n_bytes, n_ids = n_texts + 1, n_bytes + len(text.encode()), n_ids + len(expected)
        if len(ids) != len(expected) or not np.array_equal(ids, expected):
            marks = sorted(disputed & set(text))
            (explained if marks else unexplained).append(f"{where} ({' '.join(f'U+{ord(c):04X}' for c in marks)})")
    seconds = time.process_time() - start
    print(
        f"{name}: {n_texts:,} texts, {n_bytes / 1e6:,.1f} MB, {n_ids:,} ids: {len(unexplained)} differ, "
        f"{len(explained)} more differ over disputed characters ({seconds:.0f} s CPU)",
        flush=True,
    )
    for label, found in (("DIFFERS", unexplained), ("disputed", explained)):
        for where in found[:20]:
            print(f"    {label}: {where}")
    return len(unexplained)


@program
def main(args: Args) -> None:
    import tokenizers

    for given, allowed, what in ((args.names, NAMES, "names"), (args.engines, ("numba", "python"), "engines")):
        if not given or not set(given) <= set(allowed):
            raise ValueError(f"{what}={given}: allowed are {', '.join(allowed)}")
    for path, what in ((args.data, "data"), (args.vocabularies, "vocabularies")):
        if not path.is_dir():
            raise ValueError(f"{what} {path}: no such folder")
    if not any(file.is_file() for file in args.data.rglob("*")):
        raise ValueError(f"data {args.data}: holds no file")
    disputed = disputed_characters(args.vocabularies, "r50k_base")
    print(f"{len(disputed):,} characters are classed differently by regex and tiktoken")
    failures = 0
    for name in args.names:
        bpe = load(name, args.vocabularies)
        encoding = tiktoken_encoding(bpe, name)
        for engine in args.engines:

            def ours(text: str, bpe=bpe, engine=engine) -> np.ndarray:
                return tokenizer.encode(bpe, text, None, engine=engine)

            def theirs(text: str, encoding=encoding) -> np.ndarray:
                return encoding.encode_to_numpy(text, disallowed_special=())

            failures += compare(f"{name}, {engine} and tiktoken", ours, theirs, args.data, disputed)
        if args.huggingface:
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save(bpe, Path(folder) / "tokenizer.json")
                peer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")

            def with_specials(text: str, bpe=bpe) -> np.ndarray:
                return tokenizer.encode(bpe, text, engine="numba" if "numba" in args.engines else "python")

            def huggingface(text: str, peer=peer) -> list[int]:
                return peer.encode(text).ids

            failures += compare(
                f"{name}, specials too, and Hugging Face", with_specials, huggingface, args.data, disputed
            )
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Args))
