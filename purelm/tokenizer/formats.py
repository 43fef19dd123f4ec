r"""Tokenizer files: the neighbours' formats, read strictly and written atomically.

| file | holds | reads in |
|---|---|---|
| tokenizer.json | everything (the native format: `save`, `load`) | Hugging Face tokenizers, transformers |
| NAME.tiktoken | ranks of the ordinary tokens; the pattern and special tokens come from arguments | tiktoken |
| vocab.json, merges.txt | ids and merges; the pattern is GPT-2's unless an argument says otherwise | GPT-2 |

A file that is cut short or damaged gives one ValueError that names it and, where there is one, the line. A file is
written beside its name and then renamed, so what was there before stays whole until the new one is complete.
"""

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path

from purelm.tokenizer import huggingface, tables
from purelm.tokenizer.alphabet import from_unicode, read_text, to_unicode, write_atomic
from purelm.tokenizer.bpe import BPE, make
from purelm.tokenizer.patterns import CL100K, GPT2, O200K
from purelm.tokenizer.recover import every_split, recover_merges

Specials = Sequence[str] | Mapping[str, int]

# What belongs to the published .tiktoken files beside their ranks: number of ranks, pattern, special tokens.
# Source: tiktoken 0.14, openai_public.py.
PUBLISHED = {
    "r50k_base": (50256, GPT2, {"<|endoftext|>": 50256}),
    "p50k_base": (50280, GPT2, {"<|endoftext|>": 50256}),
    "cl100k_base": (
        100256,
        CL100K,
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": (199998, O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}


def save(bpe: BPE, path: str | os.PathLike) -> None:
    """Write `bpe` to a .json (tokenizer.json of Hugging Face, lossless) or .tiktoken file (ranks only)."""
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
    pattern: str | None = None,
    special_tokens: Specials | None = None,
    text_only: bool = False,
) -> BPE:
    """Read a .json (tokenizer.json of Hugging Face) or .tiktoken file, or a folder.

    A folder holds tokenizer.json, or vocab.json and merges.txt. pattern, special_tokens: for the formats that lack
    them, see `load_tiktoken` and `load_gpt2`; a tokenizer.json has its own, and giving them is an error.
    text_only: take a tokenizer.json that also truncates, pads, or adds tokens around a text (Llama's begin of text) for
    what it makes of the text alone, its encode(text, add_special_tokens=False); otherwise such a file is refused, as
    is everything in it that would give other ids than Hugging Face's library.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "tokenizer.json").exists() and (path / "vocab.json").exists():
            return load_gpt2(
                path / "vocab.json", path / "merges.txt", special_tokens=special_tokens, pattern=pattern or "gpt2"
            )
        path = path / "tokenizer.json"
    if path.suffix == ".tiktoken":
        return load_tiktoken(path, pattern=pattern, special_tokens=special_tokens)
    if path.suffix != ".json":
        raise ValueError(f"path is {os.fspath(path)!r}; a tokenizer's file ends in .json or .tiktoken")
    if pattern is not None or special_tokens is not None:
        raise ValueError(f"{path} has its own pattern and special tokens; leave these arguments out")
    return huggingface.from_json(read_text(path), os.fspath(path), text_only)


def load_tiktoken(
    path: str | os.PathLike, *, pattern: str | None = None, special_tokens: Specials | None = None
) -> BPE:
    """Read a .tiktoken file; ids are its ranks, and encoding is tiktoken's, id for id (see `recover`).

    The file has neither pattern nor special tokens. For files named as OpenAI publishes them (r50k_base, p50k_base,
    cl100k_base, o200k_base) both are known, and the number of lines is checked; for others `pattern` must be given.
    """
    name = os.fspath(path)
    published = PUBLISHED.get(Path(path).stem)
    ranks: dict[bytes, int] = {}
    taken: dict[int, int] = {}  # rank -> line
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line:
            continue
        try:
            encoded, digits = line.split(" ")
            token, rank = base64.b64decode(encoded, validate=True), int(digits)
        except (ValueError, binascii.Error):
            raise ValueError(f"{name}, line {number}: {line[:80]!r} is not a base64 token and its rank") from None
        if token in ranks or rank in taken:
            what = f"rank {rank}" if rank in taken else f"token {token!r}"
            raise ValueError(f"{name}, line {number}: {what} is there twice (is the file cut short?)")
        ranks[token] = rank
        taken[rank] = number
    if published and pattern is None:
        if len(ranks) != published[0]:
            raise ValueError(f"{name} has {len(ranks)} ranks; the published file has {published[0]} (is it cut short?)")
        pattern = published[1]
        special_tokens = published[2] if special_tokens is None else special_tokens
    if pattern is None:
        raise ValueError(f"{name} holds no pattern and is no published name ({', '.join(PUBLISHED)}): give pattern")
    try:
        missing = [value for value in range(256) if bytes([value]) not in ranks]
        merges, ignore_merges = ([], False) if missing else recover_merges(ranks)
        vocab = {rank: token for token, rank in ranks.items()}
        return make(vocab, merges, special_tokens or (), pattern, ignore_merges=ignore_merges)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def save_tiktoken(bpe: BPE, path: str | os.PathLike) -> None:
    """Write the ordinary tokens and their ids as ranks, as tiktoken reads them; it is told the rest by its caller.

    Raises ValueError where tiktoken would not give the same ids: its ranks are ids, so ids must rise along the merges,
    and it merges any two neighbours whose union is a token (see `recover`).
    """
    name = os.fspath(path)
    special = {token.encode() for token in bpe.special_tokens} - {left + right for left, right in bpe.merges}
    ranks = {t: i for i, t in sorted(bpe.vocab.items()) if len(t) == 1 or t not in special}
    results = [result for result, _ in groupby(left + right for left, right in bpe.merges)]
    for earlier, later in pairwise(results):
        if ranks[later] <= ranks[earlier]:
            raise ValueError(
                f"{name}: .tiktoken ranks are ids, but {later!r}, id {ranks[later]}, is made by a later merge than "
                f"{earlier!r}, id {ranks[earlier]}"
            )
    if bpe.ignore_merges:
        same = set(bpe.merges) == set(every_split(ranks))
    else:
        same = recover_merges(ranks) == (list(bpe.merges), False)
    if not same:
        raise ValueError(f"{name}: the merges are not those that tiktoken would make of these tokens")
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    write_atomic({path: "".join(lines)})


def load_gpt2(
    vocab_path: str | os.PathLike,
    merges_path: str | os.PathLike,
    *,
    special_tokens: Specials | None = None,
    pattern: str = "gpt2",
) -> BPE:
    """Read GPT-2's pair of files, vocab.json (token -> id) and merges.txt (two parts a line, in rank order).

    special_tokens: by default "<|endoftext|>" where the vocab has it. Every entry of the vocab must be a single byte,
    the result of a merge, or a special token: an entry that is none of them says that merges.txt is cut short.
    """
    name = os.fspath(vocab_path)
    entries = huggingface.parse_json(read_text(vocab_path), name)
    if not isinstance(entries, dict):
        raise ValueError(f"{name}: not a mapping from tokens to ids")
    if special_tokens is None:
        special_tokens = ("<|endoftext|>",) if "<|endoftext|>" in entries else ()
    merges, merges_name = [], os.fspath(merges_path)
    for number, line in enumerate(read_text(merges_path).split("\n"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"{merges_name}, line {number}: {line[:80]!r} is not two tokens (is the file cut short?)")
        where = f"{merges_name}, line {number}"
        merges.append((from_unicode(parts[0], where), from_unicode(parts[1], where)))
    vocab = huggingface.vocab_from_json(entries, special_tokens, name)
    made = {left + right for left, right in merges} | {special.encode() for special in special_tokens}
    unmade = [token for token in vocab.values() if len(token) > 1 and token not in made]
    if unmade:
        raise ValueError(
            f"{name} has {len(unmade)} tokens that no line of {merges_name} makes, as {unmade[0]!r}: "
            "the merges are cut short, or these belong into special_tokens"
        )
    try:
        return make(vocab, merges, special_tokens, pattern)
    except ValueError as error:
        raise ValueError(f"{name} and {merges_name}: {error}") from None


def save_gpt2(bpe: BPE, vocab_path: str | os.PathLike, merges_path: str | os.PathLike) -> None:
    """Write GPT-2's pair of files. They hold neither the pattern nor which tokens are special: tell their reader."""
    if bpe.ignore_merges:
        raise ValueError("bpe.ignore_merges is True, which merges.txt cannot say: use tokenizer.json")
    entries = huggingface.vocab_to_json(bpe)
    lines = [f"{to_unicode(left)} {to_unicode(right)}\n" for left, right in bpe.merges]
    write_atomic(
        {
            vocab_path: json.dumps(entries, ensure_ascii=False) + "\n",
            merges_path: "#version: 0.2\n" + "".join(lines),
        }
    )


def fingerprint(bpe: BPE) -> str:
    """sha256, hex, of all that decides ids: equal for two BPEs exactly when vocab, merges, specials and pattern are.

    The order of the special tokens and of the vocab's entries decides nothing and is left out.
    """
    return tables.once(bpe, "fingerprint", _fingerprint)


def _fingerprint(bpe: BPE) -> str:
    digest = hashlib.sha256(b"purelm BPE 1\n")
    special = sorted(bpe.special_tokens)
    header = [bpe.pattern, special, bool(bpe.ignore_merges), len(bpe.vocab), len(bpe.merges)]
    digest.update(json.dumps(header).encode() + b"\n")
    parts: list[bytes] = []
    for token_id, token in sorted(bpe.vocab.items()):
        parts.append(b"%d %d " % (token_id, len(token)) + token)
    for left, right in bpe.merges:
        parts.append(b"%d %d " % (len(left), len(right)) + left + right)
    digest.update(b"".join(parts))
    return digest.hexdigest()
