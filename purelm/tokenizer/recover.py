"""Merges from ranks: a .tiktoken file lists tokens with their ranks, and not the pairs that made them.

tiktoken merges any two neighbours whose union is a token, lowest rank first, and takes a piece that is a token as it
is. Call a token *consistent* when these rules, with ranks below its own, turn its bytes into exactly two tokens; the
two are its merge. If all tokens are consistent, merging by the recovered pairs alone gives tiktoken's ids on every
text: as long as no merge crosses the ends of a stretch of text that spells token X, the stretch goes through the same
states as the bytes of X alone, so just before the rank of X it is the recovered pair or has been crossed; no other
pair that spells X is ever seen. All tokens of r50k_base, cl100k_base and o200k_base are consistent.
"""

from collections.abc import Mapping

from purelm.tokenizer.merge import merge


def recover_merges(ranks: Mapping[bytes, int]) -> tuple[list[tuple[bytes, bytes]], bool]:
    """(merges in rank order, ignore_merges) that give tiktoken's ids; `ranks` has the 256 single bytes.

    One merge a token where all are consistent. Otherwise every split of every token into two tokens, in rank order, to
    be used with ignore_merges=True, which is tiktoken's rule word for word.
    """
    ordered = sorted((rank, token) for token, rank in ranks.items() if len(token) > 1)
    pairs: dict[tuple[int, int], int] = {}
    tokens = {rank: token for token, rank in ranks.items()}
    byte_ranks = [ranks[bytes([value])] for value in range(256)]
    merges = []
    for rank, token in ordered:
        # The pairs so far are all of lower rank, and by the argument above they are enough.
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
