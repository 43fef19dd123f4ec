"""fastText models. Oracles: loops in plain Python over files made here; the library's own predictions where it is."""

import heapq
import math
import struct
import zipfile
from functools import partial

import numpy as np
import pytest

from purelm.curate.document import Document, Drop
from purelm.curate.fasttext import HIERARCHICAL, ONE_VS_ALL, SOFTMAX, label_of, load_fasttext, scores_of
from purelm.curate.language import KeepLanguage, keep_language

DIM, BUCKET = 3, 50
WORDS, COUNTS = ["</s>", "one", "two"], [90, 40, 20, 8, 1]
LABELS = ["__label__a", "__label__b", "__label__c", "__label__d", "__label__e"]


def model_file(path, loss=SOFTMAX, word_ngrams=2, maxn=3):
    """A .bin file by fastText's own order of fields, and its matrices."""
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(len(WORDS) + BUCKET, DIM)).astype("<f4")
    output = draw.normal(size=(len(LABELS), DIM)).astype("<f4")
    data = struct.pack("<2i12id", 793712314, 12, DIM, 5, 5, 1, 5, word_ngrams, loss, 3, BUCKET, 2, maxn, 100, 1e-4)
    data += struct.pack("<iiiqq", len(WORDS) + len(LABELS), len(WORDS), len(LABELS), 99, -1)
    for i, word in enumerate(WORDS + LABELS):
        count = COUNTS[i - len(WORDS)] if i >= len(WORDS) else 5
        data += word.encode() + b"\0" + struct.pack("<qb", count, i >= len(WORDS))
    for matrix in (rows, output):
        data += b"\0" + struct.pack("<qq", *matrix.shape) + matrix.tobytes()
    path.write_bytes(data)
    return data, rows.astype(float), output.astype(float)


def fnv(piece):
    h = 2166136261
    for byte in piece:
        h = ((h ^ (byte if byte < 128 else byte | 0xFFFFFF00)) * 16777619) & 0xFFFFFFFF
    return h


def row_numbers(text, word_ngrams, maxn):
    found, hashes = [], []
    for word in [*text.split(), "</s>"]:
        hashes.append(fnv(word.encode()))
        found += [WORDS.index(word)] if word in WORDS else []
        if word != "</s>":
            marked = f"<{word}>"
            grams = [marked[i : i + n] for n in range(2, maxn + 1) for i in range(len(marked) - n + 1)]
            found += [len(WORDS) + fnv(g.encode()) % BUCKET for g in grams]
    signed = [h - (1 << 32) if h >> 31 else h for h in hashes]
    for i in range(len(signed)):
        h = signed[i]
        for other in signed[i + 1 : i + word_ngrams]:
            h = (h * 116049371 + other) % (1 << 64)
            found.append(len(WORDS) + h % BUCKET)
    return found


def huffman(logits):
    """Labels' probabilities by a tree built with a heap: of COUNTS, without ties, there is one but for its sides."""
    heap = [(count, {i: []}) for i, count in enumerate(COUNTS)]
    heapq.heapify(heap)
    node = 0
    while len(heap) > 1:
        (c0, left), (c1, right) = heapq.heappop(heap), heapq.heappop(heap)
        up = sigmoid(logits[node])
        tree = {i: [*p, 1 - up] for i, p in left.items()} | {i: [*p, up] for i, p in right.items()}
        heapq.heappush(heap, (c0 + c1, tree))
        node += 1
    return [math.prod(heap[0][1][i]) for i in range(len(COUNTS))]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("loss", [SOFTMAX, ONE_VS_ALL, HIERARCHICAL])
@pytest.mark.parametrize(("word_ngrams", "maxn"), [(1, 3), (2, 3), (3, 0)])
def test_scores(tmp_path, loss, word_ngrams, maxn):
    _, rows, output = model_file(tmp_path / "m.bin", loss, word_ngrams, maxn)
    model = load_fasttext(tmp_path / "m.bin")
    for text in ("one two", "one", "", "new \u00fcber two\none \u65e5\u672c", "two two  two"):
        x = np.mean([rows[i] for i in row_numbers(text, word_ngrams, maxn)], 0)
        logits = output @ x
        want = {
            SOFTMAX: np.exp(logits) / np.exp(logits).sum(), ONE_VS_ALL: [sigmoid(v) for v in logits],
            HIERARCHICAL: huffman(logits),
        }[loss]  # fmt: skip
        np.testing.assert_allclose(scores_of(model, text), want, rtol=1e-5)
        assert label_of(model, text)[0] == "abcde"[int(np.argmax(want))]


def test_step(tmp_path):
    model_file(tmp_path / "m.bin")
    model = load_fasttext(tmp_path / "m.bin")
    label, score = label_of(model, "one")
    settings = KeepLanguage([label], 0.0, identify=partial(label_of, model))
    assert keep_language(Document("1", "one"), settings).meta["language_score"] == score
    assert isinstance(keep_language(Document("1", "two new words"), settings), Document | Drop)
    assert label_of(model, "one two", 3) == label_of(model, "one")


def test_damaged_files(tmp_path):
    data, _, _ = model_file(tmp_path / "m.bin")
    for cut in range(0, len(data), 7):
        (tmp_path / "cut.bin").write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"cut\.bin: (truncated|damaged)"):
            load_fasttext(tmp_path / "cut.bin")
    (tmp_path / "png.bin").write_bytes(b"\x89PNG" * 99)
    with pytest.raises(ValueError, match="not a fastText model"):
        load_fasttext(tmp_path / "png.bin")
    (tmp_path / "vectors.bin").write_bytes(data[:36] + struct.pack("<i", 2) + data[40:])
    with pytest.raises(ValueError, match="word vectors"):
        load_fasttext(tmp_path / "vectors.bin")
    with pytest.raises(ValueError, match="no such file"):
        load_fasttext(tmp_path / "none.ftz")


@pytest.fixture(scope="module")
def lid(shared_data):
    path = shared_data / "lang" / "lid.176.ftz"
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


def test_lid_176(lid):
    model = load_fasttext(lid)
    assert len(model.labels) == 176 and scores_of(model, "Hello").sum() == pytest.approx(1)
    for text, code in (("Bonjour tout le monde", "fr"), ("\u6b22\u8fce\u6765\u5230", "zh"), ("Guten Morgen", "de")):
        found, score = label_of(model, text)
        assert found == code and score > 0.3


def test_lid_176_as_the_library(lid, shared_data):
    """The first lines of each declaration of human rights: labels equal, scores to 2e-4 (it adds 1e-5 to sigmoids)."""
    fasttext = pytest.importorskip("fasttext")
    theirs, model = fasttext.load_model(str(lid)), load_fasttext(lid)
    with zipfile.ZipFile(shared_data / "multilingual" / "udhr2.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".txt")][::4]
        texts = [archive.read(name).decode("utf-8-sig") for name in names]
    for line in (line.strip() for text in texts for line in text.splitlines()[:4]):
        if line:
            (label,), (score,) = theirs.predict(line)
            found, ours = label_of(model, line, 1 << 20)
            assert (f"__label__{found}", ours) == (label, pytest.approx(float(score), abs=2e-4))
