"""fastText's classifiers (.bin and .ftz), read and applied in numpy: no fastText needed, nothing downloaded.

    model = load_fasttext("lid.176.ftz")
    label_of(model, "Bonjour tout le monde")      # ("fr", 0.98...)
    KeepLanguage(["fr"], identify=partial(label_of, model))

A text is the mean of the rows of its words and of their character n-grams, x = mean_i A[i]; the scores of the labels
are softmax(B x), sigmoid(B x), or the products of sigmoids along a Huffman tree (Joulin et al. 2016, section 2). In a
.ftz file A is a product quantiser's (Joulin et al. 2016, "FastText.zip"). Format 12, as fastText 0.9 writes it.
"""

import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["FastText", "label_of", "load_fasttext", "scores_of"]

MAGIC, VERSION = 793712314, 12
SUPERVISED = 3
HIERARCHICAL, NEGATIVE, SOFTMAX, ONE_VS_ALL = 1, 2, 3, 4
KSUB = 256  # centroids of a quantiser
FNV_START, FNV_PRIME = np.uint32(2166136261), np.uint32(16777619)
SPACE = re.compile(r"[ \n\r\t\v\f\0]+")
END, LABEL = "</s>", "__label__"


class Quantised(NamedTuple):
    """A matrix by product quantisation: row = norm * concatenated centroids."""

    codes: np.ndarray  # (rows, parts) uint8
    centroids: tuple[np.ndarray, ...]  # of each part (256, width)
    norms: np.ndarray | None  # (rows,)

    def rows(self, index: np.ndarray) -> np.ndarray:
        """The rows of an index, float32."""
        codes = self.codes[index]
        found = np.concatenate([c[codes[:, i]] for i, c in enumerate(self.centroids)], 1)
        return found if self.norms is None else found * self.norms[index, None]


class FastText(NamedTuple):
    """A supervised model."""

    labels: tuple[str, ...]  # without LABEL
    words: Mapping[str, int]  # row of each word
    ngram_rows: Mapping[int, int] | None  # bucket -> row of those kept; None: all are
    bucket: int
    minn: int
    maxn: int
    word_ngrams: int
    loss: int
    rows: np.ndarray | Quantised
    output: np.ndarray  # (labels, or nodes of the tree, dim)
    paths: tuple[tuple[np.ndarray, np.ndarray], ...]  # of each label its nodes and turns, for the hierarchical loss


class _Reader:
    def __init__(self, data: bytes, name: str):
        self.data, self.at, self.name = data, 0, name

    def take(self, form: str) -> tuple:
        size = struct.calcsize(f"<{form}")
        self.need(size)
        self.at += size
        return struct.unpack_from(f"<{form}", self.data, self.at - size)

    def array(self, dtype: str, count: int) -> np.ndarray:
        size = count * np.dtype(dtype).itemsize
        if count < 0:
            raise ValueError(f"{self.name}: damaged: a size of {count}")
        self.need(size)
        self.at += size
        return np.frombuffer(self.data, dtype, count, self.at - size)

    def word(self) -> str:
        end = self.data.find(b"\0", self.at)
        if end < 0:
            raise ValueError(f"{self.name}: truncated: a word without end")
        found = self.data[self.at : end].decode("utf-8", "replace")
        self.at = end + 1
        return found

    def need(self, size: int) -> None:
        if self.at + size > len(self.data):
            raise ValueError(f"{self.name}: truncated: {len(self.data)} bytes, {self.at + size} needed")

    def quantiser(self) -> tuple[np.ndarray, ...]:
        dim, parts, width, last = self.take("4i")
        if min(dim, parts, width, last) < 1 or (parts - 1) * width + last != dim:
            raise ValueError(f"{self.name}: damaged: a quantiser of {parts} parts of {width} for {dim}")
        flat = self.array("<f4", dim * KSUB)
        cut = (parts - 1) * KSUB * width
        return (*flat[:cut].reshape(parts - 1, KSUB, width), flat[cut:].reshape(KSUB, last))

    def quantised(self) -> Quantised:
        has_norms, m, _, size = self.take("?qqi")
        codes = self.array("u1", size)
        centroids = self.quantiser()
        if m * len(centroids) != size:
            raise ValueError(f"{self.name}: damaged: {size} codes for {m} rows of {len(centroids)}")
        norms = None
        if has_norms:
            norm_codes = self.array("u1", m)
            norms = self.quantiser()[0][norm_codes, 0]
        return Quantised(codes.reshape(m, -1), centroids, norms)

    def dense(self) -> np.ndarray:
        m, n = self.take("qq")
        return self.array("<f4", m * n).reshape(m, n)


def load_fasttext(path: str | os.PathLike) -> FastText:
    """A classifier from a .bin or .ftz file; ValueError for a damaged one and for one that is no classifier."""
    name = os.fspath(path)
    if not Path(name).is_file():
        raise ValueError(f"{name}: no such file; give a fastText model such as lid.176.ftz")
    reader = _Reader(Path(name).read_bytes(), name)
    magic, version = reader.take("ii")
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"{name}: not a fastText model of format {VERSION}")
    dim, _, _, _, _, word_ngrams, loss, kind, bucket, minn, maxn, _ = reader.take("12i")
    reader.take("d")
    if kind != SUPERVISED or loss not in (HIERARCHICAL, NEGATIVE, SOFTMAX, ONE_VS_ALL):
        raise ValueError(f"{name}: word vectors; a classifier (fasttext supervised) is needed")
    size, n_words, n_labels, _, n_pruned = reader.take("iiiqq")
    words, labels, counts = {}, [], []
    for i in range(size):
        word = reader.word()
        count, is_label = reader.take("qb")
        if is_label:
            labels.append(word.removeprefix(LABEL))
            counts.append(count)
        else:
            words[word] = i
    if (len(words), len(labels)) != (n_words, n_labels) or not labels or bucket < 0:
        raise ValueError(f"{name}: damaged: {len(words)} words and {len(labels)} labels of {n_words} and {n_labels}")
    pruned = None
    if n_pruned >= 0:
        pairs = reader.array("<i4", 2 * n_pruned).reshape(-1, 2)
        pruned = {int(a): int(b) for a, b in pairs}
        if any(not 0 <= b < n_pruned for b in pruned.values()):
            raise ValueError(f"{name}: damaged: rows of n-grams beyond {n_pruned}")
    is_quantised = reader.take("?")[0]
    rows = reader.quantised() if is_quantised else reader.dense()
    output_quantised = reader.take("?")[0]
    if is_quantised and output_quantised:
        whole = reader.quantised()
        output = whole.rows(np.arange(len(whole.codes)))
    else:
        output = reader.dense()
    n_rows = len(rows.codes) if isinstance(rows, Quantised) else len(rows)
    if output.shape != (n_labels, dim) or n_rows < n_words + (bucket if pruned is None else len(pruned)) * (maxn > 0):
        raise ValueError(
            f"{name}: damaged: matrices of {n_rows} and {output.shape} for {n_words} words, {n_labels} labels"
        )
    paths = _paths(counts) if loss == HIERARCHICAL else ()
    return FastText(
        tuple(labels), words, pruned, bucket, minn, maxn, word_ngrams, loss, rows, output, paths
    )  # fmt: skip


def _paths(counts: list[int]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Each label's way up the Huffman tree: inner nodes, and whether it comes from their right child.

    Counts are sorted, largest first; ties are resolved as in fastText's buildTree, so that the tree is the same.
    """
    n = len(counts)
    count = [*counts, *[10**15] * (n - 1)]
    parent, is_right = [-1] * (2 * n - 1), [False] * (2 * n - 1)
    leaf, node = n - 1, n
    for i in range(n, 2 * n - 1):
        total = 0  # count[i] stays large until both are chosen: a node is no child of itself
        for side in (False, True):
            if leaf >= 0 and count[leaf] < count[node]:
                child, leaf = leaf, leaf - 1
            else:
                child, node = node, node + 1
            parent[child], is_right[child] = i, side
            total += count[child]
        count[i] = total
    paths = []
    for i in range(n):
        nodes, turns = [], []
        while parent[i] != -1:
            nodes.append(parent[i] - n)
            turns.append(is_right[i])
            i = parent[i]
        paths.append((np.array(nodes, int), np.array(turns, bool)))
    return tuple(paths)


def _hashes(pieces: list[bytes]) -> np.ndarray:
    """fastText's FNV-1a of each piece: bytes are signed there, so those from 128 flip the upper bits too."""
    lengths = np.array([len(p) for p in pieces])
    longest = int(lengths.max(initial=0))
    padded = np.frombuffer(b"".join(p.ljust(longest, b"\0") for p in pieces), np.int8).reshape(len(pieces), longest)
    signed = padded.astype(np.int32).astype(np.uint32)
    h = np.full(len(pieces), FNV_START)
    for k in range(longest):
        h = np.where(k < lengths, (h ^ signed[:, k]) * FNV_PRIME, h)
    return h


def _ngrams(word: str, minn: int, maxn: int) -> list[bytes]:
    text = f"<{word}>"
    found = []
    for i in range(len(text)):
        for n in range(max(1, minn), min(maxn, len(text) - i) + 1):
            if not (n == 1 and (i == 0 or i == len(text) - 1)):
                found.append(text[i : i + n].encode("utf-8", "replace"))
    return found


def _rows_of(model: FastText, text: str) -> np.ndarray:
    """The rows whose mean is the text: fastText reads a line, so its end is a word too."""
    words = [*(w for w in SPACE.split(text) if w and not w.startswith(LABEL)), END]
    rows = [model.words[w] for w in words if w in model.words]
    pieces = [p for w in words if w != END for p in _ngrams(w, model.minn, model.maxn)] if model.maxn > 0 else []
    buckets = (_hashes(pieces) % np.uint32(model.bucket)).tolist() if pieces and model.bucket else []
    if model.word_ngrams > 1 and model.bucket:
        known = [w.encode("utf-8", "replace") for w in words]
        signed = _hashes(known).astype(np.int32).astype(np.int64).astype(np.uint64).tolist()
        for i in range(len(signed)):
            h = signed[i]
            for other in signed[i + 1 : i + model.word_ngrams]:
                h = (h * 116049371 + other) % (1 << 64)
                buckets.append(h % model.bucket)
    first = len(model.words)
    if model.ngram_rows is None:
        rows += [first + b for b in buckets]
    else:
        kept = model.ngram_rows
        rows += [first + kept[b] for b in buckets if b in kept]
    return np.array(rows, np.int64)


def scores_of(model: FastText, text: str) -> np.ndarray:
    """The score of each label, float64 in [0, 1]; all 0 for a text of which the model knows nothing.

    They add up to 1 but for the losses by sigmoids (negative sampling, one against all). Differs from fastText, which
    takes sigmoids from a table and adds 1e-5 to each, by about 1e-4.
    """
    index = _rows_of(model, text)
    if not len(index):
        return np.zeros(len(model.labels))
    rows = model.rows.rows(index) if isinstance(model.rows, Quantised) else model.rows[index]
    logits = model.output.astype(np.float64) @ rows.mean(0, dtype=np.float64)
    if model.loss == SOFTMAX:
        e = np.exp(logits - logits.max())
        return e / e.sum()
    sigmoid = 0.5 * (1 + np.tanh(logits / 2))
    if model.loss != HIERARCHICAL:
        return sigmoid
    return np.array([np.where(turn, sigmoid[node], 1 - sigmoid[node]).prod() for node, turn in model.paths])


def label_of(model: FastText, text: str, most_characters: int = 1000) -> tuple[str, float]:
    """The best label and its score, of the first characters of a text; ("und", 0.0) where nothing in it is known."""
    scores = scores_of(model, text[:most_characters])
    best = int(scores.argmax())
    return (model.labels[best], min(1.0, float(scores[best]))) if scores[best] > 0 else ("und", 0.0)
