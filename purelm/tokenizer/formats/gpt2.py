"""GPT-2's pair of files: vocab.json (token -> id) and merges.txt (the two parts of a merge a line, in rank order)."""

import json
import os

from purelm.tokenizer.bpe import BPE, Specials, listed_specials, make
from purelm.tokenizer.formats.alphabet import from_unicode, to_unicode, vocab_from_json, vocab_to_json
from purelm.tokenizer.formats.text import parse_json, read_text, write_atomic
from purelm.tokenizer.patterns import Pattern
from purelm.tokenizer.tables import byte_ids


def load_gpt2(
    vocab_path: str | os.PathLike,
    merges_path: str | os.PathLike,
    *,
    special_tokens: Specials | None = None,
    pattern: Pattern = "gpt2",
) -> BPE:
    """Read vocab.json and merges.txt.

    special_tokens: by default "<|endoftext|>" where the vocab has it. Every entry of the vocab must be a single byte,
    the result of a merge, or a special token; any other entry means that merges.txt is cut short.
    """
    name, merges_name = os.fspath(vocab_path), os.fspath(merges_path)
    if special_tokens is not None:
        special_tokens = listed_specials(special_tokens)
    entries = parse_json(read_text(vocab_path), name)
    if not isinstance(entries, dict):
        raise ValueError(f"{name}: not a mapping from tokens to ids")
    if special_tokens is None:
        special_tokens = ("<|endoftext|>",) if "<|endoftext|>" in entries else ()
    merges = []
    for number, line in enumerate(read_text(merges_path).split("\n"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        where = f"{merges_name}, line {number}"
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"{where}: {line[:80]!r} is not two tokens (is the file cut short?)")
        merges.append((from_unicode(parts[0], where), from_unicode(parts[1], where)))
    vocab = vocab_from_json(entries, special_tokens, name)
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
    """Write vocab.json and merges.txt. They hold neither the pattern nor which tokens are special."""
    if bpe.ignore_merges:
        raise ValueError("bpe.ignore_merges is True, which merges.txt cannot say: use tokenizer.json")
    if bpe.normalizer is not None or bpe.normalized_tokens:
        raise ValueError(f"bpe.normalizer is {bpe.normalizer}, which these files cannot say: use tokenizer.json")
    if -1 in byte_ids(bpe):
        raise ValueError("bpe drops bytes that have no token, which these files cannot say: use tokenizer.json")
    lines = [f"{to_unicode(left)} {to_unicode(right)}\n" for left, right in bpe.merges]
    write_atomic(
        {
            vocab_path: json.dumps(vocab_to_json(bpe), ensure_ascii=False) + "\n",
            merges_path: "#version: 0.2\n" + "".join(lines),
        }
    )
