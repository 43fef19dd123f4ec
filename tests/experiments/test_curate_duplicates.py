"""The stage duplicates out of core. Oracle: `plain`, the same by dictionaries and arrays of all documents."""

import json
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.curate import duplicates as stage
from experiments.curate.config import Curate, Dedup
from experiments.curate.duplicates import duplicates, find_duplicates
from experiments.curate.files import append_packed, rows_at, write_json
from experiments.curate.shard import min_hash
from purelm.curate import external, external_sort
from purelm.curate.exact import digest
from purelm.curate.minhash import MinHash, band_keys, signatures
from purelm.curate.near_duplicates import cluster
from purelm.curate.normalise import comparable
from purelm.curate.shingles import jaccard, shingles

SHORT = MinHash(n_hashes=12, n_bands=12, ngram=1, jaccard=0.6)


def write_shards(folder, shards, cfg):
    """What stage 1 leaves of lists of texts."""
    paths = []
    for number, texts in enumerate(shards):
        path = folder / f"{number:05d}"
        path.mkdir()
        with open(path / "kept.jsonl.gz", "wb") as file, append_packed(file, "gz") as lines:
            for i, text in enumerate(texts):
                lines.write(json.dumps({"id": f"{number}-{i}", "url": f"u{i}", "text": text}).encode() + b"\n")
        digests = b"".join(map(digest, texts))
        np.save(path / "digests.npy", np.frombuffer(digests, np.uint8).reshape(-1, 16))
        if cfg is not None:
            np.save(path / "signatures.npy", signatures(texts, cfg))
        paths.append(path)
    return paths


def plain(texts, cfg):
    """(roots, exact): all in memory."""
    seen = {}
    roots = np.array([seen.setdefault(text, i) for i, text in enumerate(texts)], np.int64)
    exact = roots != np.arange(len(texts))
    if cfg is None:
        return roots, exact
    left = np.flatnonzero(~exact)
    bands = band_keys(signatures([texts[i] for i in left], cfg), cfg)
    sets = [np.unique(shingles(comparable(texts[i]), cfg.ngram)) for i in left]
    root_of = np.arange(len(texts))
    root_of[left] = left[cluster(bands, lambda i, j: jaccard(sets[i], sets[j]) >= cfg.jaccard)]
    return root_of[roots], exact


def plain_report(shards, roots, exact):
    """clusters.json."""
    rows = [(f"{n}-{i}", f"u{i}", text) for n, texts in enumerate(shards) for i, text in enumerate(texts)]
    near = [root != i and not same for i, (root, same) in enumerate(zip(roots.tolist(), exact, strict=True))]
    members = {}
    for i, root in enumerate(roots.tolist()):
        members.setdefault(root, []).append(i)
    several = {root: some for root, some in members.items() if len(some) > 1}
    largest = sorted(several, key=lambda root: (-len(several[root]), root))[:20]
    shown = {
        root: [dict(zip(("id", "url", "text"), rows[i], strict=True)) for i in several[root][:4]] for root in largest
    }
    return {
        "documents": len(rows), "exact": int(sum(exact)), "near": sum(near),
        "clusters": {str(k): n for k, n in sorted(Counter(map(len, several.values())).items())},
        "largest": [
            {"documents": len(several[root]), "members": [x | {"text": x["text"][:400]} for x in some]}
            for root, some in shown.items()
        ],
    }  # fmt: skip


@st.composite
def some_shards(draw):
    """Lists of texts, empty ones too: some anew, some as before, some a word away."""
    numbers = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(0, 9)), max_size=14)
    texts, shards = [], []
    for one in draw(st.lists(numbers, max_size=5)):
        shards.append([])
        for kind, i, j in one:
            words = [f"w{(i * 7 + k * k) % 29}" for k in range(8 + j)]
            if texts and kind:
                words = texts[i % len(texts)].split()
                if kind == 2 and words:
                    words[j % len(words)] = "é"
            texts.append(" ".join(words))
            shards[-1].append(texts[-1])
    return shards


@given(some_shards(), st.sampled_from(["near", "exact", "none"]), st.sampled_from([1, 3, 1 << 16]))
@settings(max_examples=60)
def test_files_of_the_stage(tmp_path_factory, shards, kind, at_once):
    """Byte for byte; with room for a dozen rows, and with blocks of one, three and all documents."""
    folder = tmp_path_factory.mktemp("stage")
    cfg = Curate(("x",), folder, dedup=Dedup(kind, 12, 12, 1, 0.6, memory_megabytes=0.002), compression="gz")
    near = min_hash(cfg) if kind == "near" else None
    paths = write_shards(folder, shards, near)
    texts = [text for part in shards for text in part]
    for name in ("out", "wanted"):
        (folder / name).mkdir()
    told = []
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (stage, "AT_ONCE"), (external, "READ_AT_ONCE"), (external, "SIGNED_AT_ONCE"),
            (external_sort, "GROUPED_ROWS"),
        ):  # fmt: skip
            patch.setattr(module, name, at_once)
        find_duplicates(cfg, paths, folder / "out", lambda *more: told.append(more))
    roots, exact = plain(texts, near) if kind != "none" else (np.arange(len(texts)), np.zeros(len(texts), bool))
    keep = np.array([0 if root == i else 1 if exact[i] else 2 for i, root in enumerate(roots)], np.uint8)
    np.save(folder / "wanted" / "keep.npy", keep)
    np.save(folder / "wanted" / "starts.npy", np.cumsum([0, *map(len, shards)], dtype=np.int64))
    write_json(folder / "wanted" / "clusters.json", plain_report(shards, roots, exact))
    assert told == [(len(texts), 0)]
    files = [{x.name: x.read_bytes() for x in (folder / name).iterdir()} for name in ("out", "wanted")]
    assert files[0] == files[1]


@pytest.mark.parametrize("memory", [1500, 1 << 24])
def test_many_documents(tmp_path, memory):
    """With the usual settings of MinHash, in many runs of the sort, and in memory."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(400):
        words = [f"w{i}" for i in rng.integers(0, 900, rng.integers(0, 80))]
        if texts and rng.random() < 0.6:
            words = texts[rng.integers(len(texts))].split()
            for _ in range(rng.integers(3)):
                words[len(words) // 2 : len(words) // 2 + 1] = [f"x{rng.integers(9)}"]
        texts.append(" ".join(words))
    shards = [texts[:1], [], texts[1:250], texts[250:], []]
    paths = write_shards(tmp_path, shards, MinHash())
    found = duplicates(paths, MinHash(), "gz", tmp_path / "work", memory)
    roots, exact = plain(texts, MinHash())
    assert (found.roots == roots).all() and (found.exact == exact).all()
    assert found.sizes.tolist() == [1, 0, 249, 150, 0] and not (tmp_path / "work").exists()
    assert 50 < exact.sum() < (roots != np.arange(400)).sum() < 300


def test_memory_is_bounded(tmp_path):
    """Oracle: the arrays that numpy makes, in all. 300,000 documents: 18 bytes each, and blocks that do not grow."""
    n, near = 300_000, MinHash(n_hashes=16, n_bands=4)
    rng = np.random.default_rng(0)
    paths = []
    for number in range(6):
        paths.append(tmp_path / str(number))
        paths[-1].mkdir()
        np.save(paths[-1] / "digests.npy", rng.integers(0, 256, (n // 6, 16), np.uint8))
        np.save(paths[-1] / "signatures.npy", rng.integers(0, 1 << 32, (n // 6, 16), np.uint32))
    tracemalloc.start()
    try:
        found = duplicates(paths, near, "gz", tmp_path / "work", 1 << 20)
        report = stage._report(found, np.zeros(n, np.uint8), paths, "gz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found.roots == np.arange(n)).all() and report["documents"] == n and not report["clusters"]
    assert peak < 18 * n + (10 << 20) < n * (16 + 4 * 16 + 8 * 4) / 2  # half of all digests, signatures and keys


def test_signatures_that_do_not_fit(tmp_path):
    paths = write_shards(tmp_path, [["a b c"], ["d e f", "g"]], SHORT)
    np.save(paths[1] / "signatures.npy", np.zeros((1, 12), np.uint32))
    with pytest.raises(ValueError, match=r"00001/signatures.npy: 1 signatures for 2 documents"):
        duplicates(paths, SHORT, "gz", tmp_path / "work", 10_000)


def test_rows_at(tmp_path):
    (path,) = write_shards(tmp_path, [["zero", "one", "two"]], None)
    path /= "kept.jsonl.gz"
    assert [(i, row["text"]) for i, row in rows_at(path, np.array([0, 2]))] == [(0, "zero"), (2, "two")]
    assert list(rows_at(tmp_path / "none", np.array([], np.int64))) == []
    with pytest.raises(ValueError, match="has no line 3"):
        list(rows_at(path, np.array([1, 3])))
