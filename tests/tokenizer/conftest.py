"""Tokenizers that the tests share: random small ones, the published ones, and tiktoken's Encoding of a BPE."""

import random

import pytest

from purelm.tokenizer import load, load_gpt2, make, train


@pytest.fixture(scope="session")
def random_bpe():
    """random_bpe(seed, ...): merges of a few letters, in random order, with random ids: not like trained ones."""

    def build(seed, n_merges=40, letters="ab c", special_tokens=(), pattern="gpt2", ignore_merges=False):
        rng = random.Random(seed)
        tokens = [bytes([value]) for value in range(256)]
        pool = [letter.encode() for letter in letters]
        merges = {}
        while len(merges) < n_merges:
            left, right = rng.choice(pool), rng.choice(pool)
            if len(left + right) <= 12 and (left, right) not in merges:
                merges[left, right] = None
                if left + right not in tokens:
                    tokens.append(left + right)
                    pool.append(left + right)
        merges = list(merges)
        rng.shuffle(merges)  # a merge may come before the one that makes its part
        ids = rng.sample(range(3 * len(tokens)), len(tokens))
        vocab = dict(zip(ids, tokens, strict=True))
        return make(vocab, merges, special_tokens, pattern, ignore_merges=ignore_merges)

    return build


@pytest.fixture(scope="session")
def published(shared_data):
    """published(name) -> BPE of a published vocabulary, loaded once."""
    folder = shared_data / "tokenizers"
    kept = {}

    def get(name):
        if name not in kept:
            if name == "gpt2":
                kept[name] = load_gpt2(folder / "gpt2_vocab.json", folder / "gpt2_merges.txt")
            else:
                kept[name] = load(folder / f"{name}.tiktoken")
        return kept[name]

    return get


@pytest.fixture(scope="session")
def tiktoken_of():
    """tiktoken_of(bpe) -> tiktoken.Encoding with the same tokens, ids as ranks."""
    tiktoken = pytest.importorskip("tiktoken")

    def build(bpe):
        special = {name: i for i, t in bpe.vocab.items() for name in bpe.special_tokens if t == name.encode()}
        ranks = {token: i for i, token in bpe.vocab.items() if i not in special.values()}
        return tiktoken.Encoding("test", pat_str=bpe.pattern, mergeable_ranks=ranks, special_tokens=special)

    return build


@pytest.fixture(scope="session")
def trained():
    """trained(pattern) -> BPE of 400 tokens with two special tokens, the first of them with id 0."""
    rng = random.Random(0)
    words = "the that then cat hat sat mat caf\u00e9 \u4e2d\u6587 at on 12 345 we'll THAT \U0001f600".split()
    text = " ".join(rng.choices(words, k=4000))

    def build(pattern="gpt2"):
        return train([text], 400, ["<|endoftext|>", "<|pad|>"], pattern=pattern)

    return build
