"""MinHash and clusters. Oracles: sets of word tuples, all pairs by brute force, the binomial spread of an estimate."""

import itertools
import math
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.curate.external import near_duplicates_of_files
from purelm.curate.minhash import MinHash, band_keys, match_probability, signature, signatures
from purelm.curate.near_duplicates import cluster, find, near_duplicates
from purelm.curate.normalise import folded
from purelm.curate.shingles import BLOCK, jaccard, shingles

WORDS = st.lists(st.sampled_from(["a", "bb", "c", "dd", "e1", "f"]), max_size=14).map(" ".join)


def grams(text, n):
    words = text.split()
    runs = {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))}
    return runs if words else set()


def similarity(a, b, n):
    return share(grams(a, n), grams(b, n))


def share(x, y):
    return len(x & y) / len(x | y) if x | y else 1.0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ""), (" \n\t ", ""), ("Hello,  World!\nagain", "hello world again"), ("ÀÉÎõü ñ", "aeiou n"),
        ("don't stop-it", "dont stopit"), ("ﬁne ½", "ﬁne ½"), ("日本 語。", "日本 語"), ("a\u00a0b", "a b"),
    ],
)  # fmt: skip
def test_folded(text, wanted):
    assert folded(text) == wanted and folded(wanted) == wanted


def test_texts_of_signs_alone_are_not_all_alike(tmp_path):
    """Oracle: they are duplicates where their words are equal; in memory and in files."""
    texts = ["!!!", "\U0001f600 \U0001f600", "", " !!!\n", "?? ..", "\n", "word"]
    expected = [0, 1, 2, 0, 4, 2, 6]
    assert near_duplicates(texts, MinHash()).tolist() == expected
    np.save(tmp_path / "a.npy", signatures(texts, MinHash()))
    found = near_duplicates_of_files([tmp_path / "a.npy"], texts.__getitem__, MinHash(), tmp_path, 1 << 20)
    assert found.tolist() == expected


@given(WORDS, WORDS, st.integers(1, 4))
def test_shingles_are_runs_of_words(a, b, n):
    """Oracle: sets of tuples of words; equal runs have equal hashes wherever they stand."""
    x, y = shingles(a, n), shingles(b, n)
    assert len(set(x.tolist())) == len(grams(a, n))
    assert len(set(x.tolist()) & set(y.tolist())) == len(grams(a, n) & grams(b, n))
    assert jaccard(x, y) == similarity(a, b, n)


def test_shingles_of_long_and_odd_texts():
    """A run deep in a text longer than the kept powers has the hash that it has alone; lone surrogates are bytes."""
    run = "some five words stand here"
    long = "x " * 600_000 + run + " y" * 10
    assert int(shingles(run, 5)[0]) in set(shingles(long, 5).tolist())
    assert len(shingles("\ud800 a \U0001f600", 1)) == 3
    with pytest.raises(ValueError, match="n must be at least 1 word"):
        shingles("a", 0)


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 2])
def test_shingles_across_blocks(size):
    """Oracle: each run by itself. Runs begin, end and lie across where blocks do; memory is that of a few blocks."""
    words = ["x" * (size - 12), "a", "bb", "c", "d" * BLOCK, "e", "f"]
    for n in (1, 2, 3, 8):
        runs = [" ".join(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))]
        assert shingles(" ".join(words), n).tolist() == [int(shingles(run, n)[0]) for run in runs]
    text = "long " * (2 * BLOCK)
    tracemalloc.start()
    shingles(text.strip(), 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25 * len(text)  # 60 bytes a word; sums of all bytes at once took 50 a byte


def test_a_signature_estimates_similarity():
    """The share of equal numbers is binomial with mean J: within 4 standard deviations for K 4096."""
    rng = random.Random(0)
    cfg = MinHash(n_hashes=4096, n_bands=1, ngram=1)
    for part in (0.1, 0.5, 0.9):
        common = [f"c{i}" for i in range(int(300 * part))]
        a, b = ([*common, *(f"{x}{i}" for i in range(300 - len(common)))] for x in "ab")
        rng.shuffle(b)
        J = similarity(" ".join(a), " ".join(b), 1)
        x, y = signatures([" ".join(a), " ".join(b)], cfg)
        assert abs(float((x == y).mean()) - J) < 4 * math.sqrt(J * (1 - J) / 4096)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40, unique=True), st.integers(0, 5))
@settings(max_examples=30)
def test_a_signature_is_a_minimum(hashes, seed):
    """Order and repetition do not matter; that of a union is the least of both; of many at a time as of few."""
    cfg = MinHash(n_hashes=8, n_bands=2, seed=seed)
    x = np.array(hashes, np.uint64)
    whole = signature(x, cfg)
    assert (signature(np.concatenate([x[::-1], x]), cfg) == whole).all()
    assert (np.minimum(signature(x[:3], cfg), signature(x[3:], cfg)) == whole).all()
    assert (signature(np.tile(x, 100), cfg) == whole).all()
    assert (signature(x[:0], cfg) == 2**32 - 1).all()


def test_keys_agree_where_bands_do():
    cfg = MinHash(n_hashes=6, n_bands=3)
    one = np.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 5, 6], [2, 1, 3, 4, 6, 5]], np.uint32)
    keys = band_keys(one, cfg)
    assert (keys[0] == keys[1]).tolist() == [True, False, True]
    assert (keys[0] == keys[2]).tolist() == [False, True, False]


def brute(texts, cfg):
    """Roots by all pairs."""
    root, sets = np.arange(len(texts)), [grams(folded(text), cfg.ngram) for text in texts]
    for i, j in itertools.combinations(range(len(texts)), 2):
        if share(sets[i], sets[j]) >= cfg.jaccard:
            a, b = find(root, i), find(root, j)
            root[max(a, b)] = min(a, b)
    return [find(root, i) for i in range(len(texts))]


@given(st.lists(WORDS, max_size=12), st.sampled_from([0.3, 0.5, 1.0]), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_clusters_are_those_of_all_pairs(texts, least, n):
    """Oracle: brute force. With one number a band and 256 bands every pair that is the same shares one, near surely."""
    cfg = MinHash(n_hashes=256, n_bands=256, ngram=n, jaccard=least)
    assert near_duplicates(texts, cfg).tolist() == brute(texts, cfg)


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_duplicates(seed):
    """60 of 200 are changed copies. Precision 1; recall as the bands promise, less 4 standard deviations."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(5000)]
    originals = [" ".join(rng.choices(words, k=200)) for _ in range(140)]
    texts, planted = list(originals), []
    for i in range(60):
        copy = originals[i].split()
        for _ in range(rng.randrange(4)):
            copy[rng.randrange(200)] = "changed"
        planted.append((i, len(texts)))
        texts.append(" ".join(copy).upper() + "!")
    cfg = MinHash(seed=seed)
    found = near_duplicates(texts, cfg)
    wanted = brute(texts, cfg)
    assert all(wanted[i] == found[i] or found[i] == i for i in range(200))
    true = [(i, j) for i, j in planted if wanted[j] == i]
    chances = [match_probability(similarity(folded(texts[i]), folded(texts[j]), 5), cfg) for i, j in true]
    spread = math.sqrt(sum(p * (1 - p) for p in chances))
    assert len(true) > 40 and sum(found[j] == i for i, j in true) >= sum(chances) - 4 * spread - 1e-9
    assert near_duplicates(texts, cfg).tolist() == found.tolist()


def test_the_fewest_questions_are_asked():
    """A thousand equal documents in one bucket: each is compared once, though they share all bands."""
    asked = []

    def same(i, j):
        asked.append((i, j))
        return True

    keys = np.zeros((1000, 5), np.uint64)
    assert cluster(keys, same).tolist() == [0] * 1000 and len(asked) == 999
    assert cluster(np.arange(10, dtype=np.uint64).reshape(5, 2), same).tolist() == [0, 1, 2, 3, 4]
    assert near_duplicates([], MinHash()).tolist() == []
    assert near_duplicates(["", " ", "a"], MinHash()).tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_hashes": 0}, "n_hashes=0"), ({"n_bands": 5}, "n_bands must divide"), ({"ngram": 0}, "ngram=0"),
        ({"jaccard": 0.0}, "jaccard=0.0"), ({"jaccard": 1.1}, "jaccard=1.1"), ({"seed": -1}, "seed=-1"),
        ({"n_hashes": True}, "n_hashes=True"), ({"jaccard": "0.8"}, "jaccard='0.8'"),
        ({"jaccard": True}, "jaccard=True"),
    ],
)  # fmt: skip
def test_wrong_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        MinHash(**options)
