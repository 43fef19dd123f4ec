"""Duplicates out of core. Oracles: the same functions in memory; lists sorted by Python."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.curate import external_sort
from purelm.curate.exact import first_of
from purelm.curate.external import digests, first_of_digests, near_duplicates_of_files
from purelm.curate.external_sort import in_groups, least_memory, read_rows, sort_file, sorted_blocks, sorted_rows
from purelm.curate.minhash import MinHash, band_keys, signatures
from purelm.curate.near_duplicates import near_duplicates
from purelm.tokenizer.engine import has_numba

ENGINES = ["python", *(["numba"] if has_numba() else [])]

NUMBERS = st.one_of(st.integers(0, 2), st.integers(2**64 - 3, 2**64 - 1), st.integers(0, 2**64 - 1))


@st.composite
def some_blocks(draw):
    columns = draw(st.integers(1, 3))
    row = st.tuples(*[NUMBERS] * columns)
    return columns, draw(st.lists(st.lists(row, max_size=30), max_size=8))


def arrays(columns, blocks):
    return [np.array(block, np.uint64).reshape(-1, columns) for block in blocks]


@given(some_blocks(), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_sorted_blocks(tmp_path_factory, drawn, more):
    """Oracle: sorted() of tuples. Eight rows and a few fit, so up to 240 make many runs and rounds of merging."""
    columns, blocks = drawn
    folder = tmp_path_factory.mktemp("sort")
    memory = least_memory(columns) + 40 * more
    given_blocks = arrays(columns, blocks)
    before = [block.copy() for block in given_blocks]
    found = list(sorted_blocks(given_blocks, columns, folder, memory))
    assert [tuple(row) for block in found for row in block.tolist()] == sorted(row for block in blocks for row in block)
    assert all(0 < len(block) <= memory // (32 * columns + 24) for block in found)
    assert all((a == b).all() for a, b in zip(given_blocks, before, strict=True)) and not list(folder.iterdir())


@pytest.mark.parametrize("engine", ENGINES)
@given(drawn=some_blocks())
@settings(deadline=None)
def test_sorted_rows(engine, drawn):
    columns, blocks = drawn
    rows = np.concatenate([np.zeros((0, columns), np.uint64), *arrays(columns, blocks)])
    before = rows.copy()
    assert [tuple(row) for row in sorted_rows(rows, engine).tolist()] == sorted(map(tuple, rows.tolist()))
    assert (rows == before).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("most", [1, 2, 300, 2**16, 2**63])
@pytest.mark.parametrize("columns", [1, 3])
def test_many_sorted_rows(engine, most, columns):
    """Oracle: sorted(). Numbers that many rows share, and bits in all places; rows of a column of another array."""
    rng = np.random.default_rng(0)
    rows = np.asfortranarray(rng.integers(0, most, (5000, columns)).astype(np.uint64)) << np.uint64(1)
    rows[:40, 0] = 2**64 - 1 - (np.arange(40, dtype=np.uint64) % np.uint64(3))
    assert [tuple(row) for row in sorted_rows(rows, engine).tolist()] == sorted(map(tuple, rows.tolist()))


def test_many_runs_at_a_time(tmp_path, monkeypatch):
    """Merges of 2 to 128 runs, each with many blocks, give the order of np.lexsort."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 50, (12_000, 2)).astype(np.uint64)
    wanted = rows[np.lexsort(rows.T[::-1])]
    for merged_rows in (1, 16, 200):
        monkeypatch.setattr(external_sort, "MERGED_ROWS", merged_rows)
        n = sort_file(np.array_split(rows, 7), tmp_path / "out", 2, 88 * 240)
        assert n == 12_000 and (np.concatenate(list(read_rows(tmp_path / "out", 2, 999))) == wanted).all()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "out").write_bytes(b"old")

    def blocks():
        yield np.ones((100, 2), np.uint64)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        sort_file(blocks(), tmp_path / "out", 2, least_memory(2))
    ordered = sorted_blocks([np.ones((100, 2), np.uint64)], 2, tmp_path, least_memory(2))
    next(ordered)
    assert len(list(tmp_path.iterdir())) == 2
    ordered.close()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out", b"old")]


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="memory=703: allowed is 704 or more"):
        sorted_blocks([], 2, tmp_path, 703)
    for block in (np.ones((2, 3), np.uint64), np.ones((2, 2), np.int64), np.ones(2, np.uint64)):
        with pytest.raises(ValueError, match=r"blocks must be uint64 \(n, 2\)"):
            list(sorted_blocks([block], 2, tmp_path, 10_000))
    (tmp_path / "odd").write_bytes(bytes(17))
    with pytest.raises(ValueError, match="17 bytes are no whole number of rows of 16"):
        list(read_rows(tmp_path / "odd", 2, 5))
    for wrong in (np.zeros((3, 111), np.uint32), np.zeros((3, 112), np.uint64)):
        np.save(tmp_path / "wrong.npy", wrong)
        with pytest.raises(ValueError, match=r"signatures are uint32 \(documents, 112\)"):
            near_duplicates_of_files([tmp_path / "wrong.npy"], str, MinHash(), tmp_path, 10_000)


@given(st.lists(st.text("ab", max_size=3), max_size=60), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_exact_duplicates(tmp_path_factory, texts, n):
    """Oracle: first_of."""
    blocks = [digests(texts[i : i + n]) for i in range(0, len(texts), n)]
    found = first_of_digests(blocks, tmp_path_factory.mktemp("exact"), least_memory(3))
    assert found.tolist() == first_of(texts)


def corpus(seed, n_words, n):
    """Texts some of which are changed copies of earlier ones, with chains of copies."""
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        words = [f"w{rng.randrange(n_words)}" for _ in range(rng.randrange(60))]
        if texts and rng.random() < 0.6:
            words = rng.choice(texts).split()
            for _ in range(min(rng.randrange(4), len(words))):
                words[rng.randrange(len(words))] = "changed"
        texts.append(" ".join(words))
    return texts


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cfg", [MinHash(), MinHash(n_hashes=12, n_bands=12, ngram=1, jaccard=0.6)])
def test_near_duplicates(tmp_path, seed, cfg):
    """Oracle: near_duplicates, in memory. Four times as many records as memory has room for; shards of all sizes."""
    texts = corpus(seed, 5000 if cfg.ngram > 1 else 30, 100)
    cuts = [0, 0, 1, 40, 40, 100]
    files = []
    for i, (start, end) in enumerate(itertools.pairwise(cuts)):
        files.append(tmp_path / f"{i}.npy")
        np.save(files[-1], signatures(texts[start:end], cfg))
    asked = []

    def text_of(i):
        asked.append(i)
        return texts[i]

    found = near_duplicates_of_files(files, text_of, cfg, tmp_path / "work", 6 * least_memory(2))
    assert found.tolist() == near_duplicates(texts, cfg).tolist()
    assert len(set(found.tolist())) < 100
    assert cfg.ngram == 1 or {*asked} < {*range(100)}  # with few words, all texts share a band with another
    assert not (tmp_path / "work").exists()
    few = len(asked)
    near_duplicates_of_files(files, text_of, cfg, tmp_path / "work", 1 << 24)
    assert len(asked) - few <= min(few, 100)  # with room for all shingles, each text is asked for once at most


def test_those_that_equal_one_before_go_with_it(tmp_path):
    """Oracle: near_duplicates of the firsts alone. The texts of the others, not equal here, are not asked for."""
    cfg = MinHash(n_hashes=12, n_bands=12, ngram=1, jaccard=0.6)
    texts = corpus(0, 30, 60)
    np.save(tmp_path / "a.npy", signatures(texts, cfg))
    firsts = np.array([i if i % 3 else i // 2 - i // 2 % 3 + (1 if i else 0) for i in range(60)])
    firsts[0], before = 0, firsts.copy()
    left = np.flatnonzero(firsts == np.arange(60))
    near = left[near_duplicates([texts[i] for i in left], cfg)]
    wanted, asked, prepared = np.arange(60), set(), []
    wanted[left] = near

    def text_of(i):
        assert prepared[0][i]
        asked.add(i)
        return texts[i]

    options = {"firsts": firsts, "prepare": prepared.append}
    found = near_duplicates_of_files([tmp_path / "a.npy"], text_of, cfg, tmp_path, 1 << 20, **options)
    assert found.tolist() == wanted[firsts].tolist() and (firsts == before).all()
    assert 20 < len(left) < 50 and asked <= set(left.tolist()) and len(prepared) == 1
    keys = band_keys(signatures([texts[i] for i in left], cfg), cfg)
    shared = {int(left[i]) for column in keys.T for i in range(len(left)) if (column == column[i]).sum() > 1}
    assert set(np.flatnonzero(prepared[0]).tolist()) == shared
    for wrong in (firsts.astype(np.int32), firsts[:-1], firsts[::-1], np.append(firsts[:-1], 0)[::-1], firsts - 1):
        with pytest.raises(ValueError, match="firsts must be"):
            near_duplicates_of_files([tmp_path / "a.npy"], text_of, cfg, tmp_path, 1 << 20, firsts=wrong)


def test_a_chain_of_bands(tmp_path):
    """Pairs (2, 3), (1, 2), (0, 1), one after the other: each root is found over those of its root."""
    signed = np.array([[0, 1, 9], [2, 8, 9], [7, 8, 3], [7, 4, 5]], np.uint32)
    np.save(tmp_path / "a.npy", signed)
    cfg = MinHash(n_hashes=3, n_bands=3)
    assert near_duplicates_of_files([tmp_path / "a.npy"], lambda i: "same", cfg, tmp_path, 10_000).tolist() == [0] * 4


@pytest.mark.parametrize("rows_at_once", [1, 2, 1 << 16])
@given(st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=5), st.integers(1, 2))
def test_groups(rows_at_once, blocks, n_keys):
    """Oracle: itertools.groupby."""
    flat = sorted((a // 2, a % 2, i) for i, a in enumerate(a for block in blocks for a in block))
    rows = np.array(flat, np.uint64).reshape(-1, 3)
    cuts = np.cumsum([len(block) for block in blocks])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external_sort, "GROUPED_ROWS", rows_at_once)
        parts = list(in_groups(np.split(rows, cuts[:-1]) if blocks else [], n_keys))
    wanted = []
    for _, group in itertools.groupby(flat, lambda row: row[:n_keys]):
        group = list(group)
        wanted += [(*row, group[0][2], min(i, 2)) for i, row in enumerate(group)]
    found = [(*a, b, c) for part in parts for a, b, c in zip(*(x.tolist() for x in part), strict=True)]
    assert found == wanted


def test_no_documents(tmp_path):
    assert near_duplicates_of_files([], str, MinHash(), tmp_path, 10_000).tolist() == []
    assert first_of_digests([], tmp_path, 10_000).tolist() == []
