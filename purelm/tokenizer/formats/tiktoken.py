"""NAME.tiktoken: one line a token, its bytes in base64 and its rank. Reading one means finding the merges again.

tiktoken merges any two neighbours whose union is a token, lowest rank first, and a piece that is a token is that token
without merging. Call a token *consistent* when these rules, with ranks below its own, turn its bytes into exactly two
tokens; these two are its merge. If all tokens are consistent, merging by the recovered pairs alone gives tiktoken's ids
on every text. Proof: take a stretch of text that spells token X. As long as no merge crosses its ends, it goes through
the same states as the bytes of X alone. So just before the rank of X it is either the recovered pair, or a merge has
crossed one of its ends; no other pair that spells X can come up. All tokens of r50k_base, cl100k_base and o200k_base
are consistent.
"""

import base64
import binascii
import os
from collections.abc import Mapping
from itertools import groupby, pairwise
from pathlib import Path

from purelm.tokenizer import tables
from purelm.tokenizer.bpe import BPE, Specials, listed_specials, make
from purelm.tokenizer.encoding import merge
from purelm.tokenizer.formats.text import read_text, write_atomic
from purelm.tokenizer.patterns import CL100K, GPT2, O200K, Pattern

# What belongs to the published .tiktoken files beside their ranks: number of ranks, pattern, special tokens.
# Source: tiktoken 0.14, openai_public.py.
PUBLISHED = {
    "r50k_base": (50256, GPT2, {"<|endoftext|>": 50256}),
    "p50k_base": (50280, GPT2, {"<|endoftext|>": 50256}),
    "cl100k_base": (100256, CL100K, {
        "<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
        "<|endofprompt|>": 100276,
    }),
    "o200k_base": (199998, O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}  # fmt: skip


def load_tiktoken(
    path: str | os.PathLike, *, pattern: Pattern | None = None, special_tokens: Specials | None = None
) -> BPE:
    """Read a .tiktoken file; ids are its ranks, and encoding is tiktoken's, id for id.

    The file has neither pattern nor special tokens. For files named as OpenAI publishes them (r50k_base, p50k_base,
    cl100k_base, o200k_base) both are known, and the number of lines is checked; for others `pattern` must be given.
    """
    name = os.fspath(path)
    if special_tokens is not None:
        special_tokens = listed_specials(special_tokens)
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
    """Write the ordinary tokens, their ids as ranks. The file holds neither the pattern nor the special tokens.

    Raises ValueError where tiktoken would not give the same ids: its ranks are ids, so ids must rise along the merges,
    and the merges must be those that tiktoken finds (see the top of this file).
    """
    name = os.fspath(path)
    if bpe.normalizer is not None or bpe.normalized_tokens:
        raise ValueError(f"{name}: bpe.normalizer is {bpe.normalizer}, which a .tiktoken file cannot say")
    missing = [value for value in range(256) if tables.byte_ids(bpe)[value] < 0]
    if missing:
        raise ValueError(f"{name}: {len(missing)} of the 256 single bytes have no token; tiktoken needs all of them")
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


def recover_merges(ranks: Mapping[bytes, int]) -> tuple[list[tuple[bytes, bytes]], bool]:
    """(merges in rank order, ignore_merges) that give tiktoken's ids; `ranks` has the 256 single bytes.

    One merge a token where all are consistent. Otherwise every split of every token into two tokens, in rank order, and
    ignore_merges=True, which is tiktoken's rule word for word.
    """
    ordered = sorted((rank, token) for token, rank in ranks.items() if len(token) > 1)
    pairs: dict[tuple[int, int], int] = {}
    tokens = {rank: token for token, rank in ranks.items()}
    byte_ranks = [ranks[bytes([value])] for value in range(256)]
    merges = []
    for rank, token in ordered:
        # The pairs so far are all of lower rank. By the proof above no others are needed.
        parts = merge([byte_ranks[value] for value in token], pairs)
        if len(parts) != 2:
            return every_split(ranks), True
        pairs[parts[0], parts[1]] = rank << 32 | rank
        merges.append((tokens[parts[0]], tokens[parts[1]]))
    return merges, False


def every_split(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every way to make a token of two tokens, in the order of the ranks."""
    ordered = sorted(ranks, key=ranks.__getitem__)
    splits = ((token[:k], token[k:]) for token in ordered for k in range(1, len(token)))
    return [(left, right) for left, right in splits if left in ranks and right in ranks]
