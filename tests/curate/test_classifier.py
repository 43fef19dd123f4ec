"""The classifier. Oracles: its definitions in plain Python, sums by loops, brute force over pairs and bins, scipy."""

import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import random
from purelm.curate.calibration import LOWEST, auc, calibration_error, softmax, temperature
from purelm.curate.classifier import (
    NO_CLASS,
    Classifier,
    Config,
    apply,
    batch_of,
    classify,
    init,
    logits_of,
    loss,
    scores,
)
from purelm.curate.classifier_files import load_classifier, save_classifier
from purelm.curate.classifier_fit import Fit, class_weights, fit
from purelm.curate.features import Features, features
from purelm.tokenizer.engine import has_numba

SMALL = Features(buckets=512, word_ngrams=2)
ODD = st.sampled_from("aB\u00e9 .\n\t,\u03a3\u03c2\ud800\u6f22\u0130'\x00")
TEXT = st.text(ODD, max_size=40) | st.text(max_size=40)
FEATURES = [Features(), Features(97, 3, 2, 4), Features(1000, 1, 1, 1), Features(1, 5, 3, 8, 10)]


@pytest.mark.skipif(not has_numba(), reason="needs numba")
@pytest.mark.parametrize("cfg", FEATURES)
@given(text=TEXT)
def test_machine_code_equals_plain_python(cfg, text):
    assert np.array_equal(features(text, cfg, "numba"), features(text, cfg, "python"))


@pytest.mark.parametrize("engine", ["python", "auto"])
def test_features_are_the_ngrams(engine):
    """Oracle: with buckets enough, ids differ just where the n-grams do, as found by a regular expression."""
    text = "The cat, the CAT. the dog! The cat the"
    cfg = Features(1 << 28, 3, 2, 3)
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    marked = [f"<{w}>" for w in words]
    grams = [("c", m[i : i + n]) for m in marked for i in range(len(m)) for n in (2, 3) if i + n <= len(m)]
    grams += [tuple(words[i : i + n]) for i in range(len(words)) for n in (1, 2, 3) if i + n <= len(words)]
    found = features(text, cfg, engine)
    assert sorted(Counter(found.tolist()).values()) == sorted(Counter(grams).values())
    assert found.dtype == np.int64 and 0 <= found.min() and found.max() < 1 << 28


def test_ids_are_the_same_in_every_process_and_version():
    """Oracle: FNV-1a and splitmix64 by hand for one word."""
    h = 0xCBF29CE484222325
    for byte in b"cat":
        h = (h ^ byte) * 0x100000001B3 % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        h = (h ^ (h >> shift)) * factor % 2**64
    assert features("Cat", Features(1 << 20)).tolist() == [h % (1 << 20)]
    assert len(features("word " * 100, Features(most_text=50, word_ngrams=1))) == 10


def test_words_and_their_order_matter_and_buckets_bound():
    a, b = features("dog bites man", SMALL), features("man bites dog", SMALL)
    assert sorted(a.tolist()) != sorted(b.tolist())
    one = Features(512, 1)
    assert sorted(features("dog bites man", one).tolist()) == sorted(features("man bites dog", one).tolist())
    assert set(features("a b c", Features(1))) == {0} and not len(features(" \n", SMALL))


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"buckets": 0}, "buckets=0"), ({"word_ngrams": 6}, "word_ngrams=6"), ({"most_text": 0}, "most_text=0"),
        ({"least_characters": 1}, "least_characters=1"), ({"most_characters": 3}, "least_characters=0"),
        ({"least_characters": 4, "most_characters": 3}, "least_characters=4"), ({"buckets": 1.5}, "buckets=1.5"),
    ],
)  # fmt: skip
def test_ranges_of_features(bad, message):
    with pytest.raises(ValueError, match=message):
        Features(**bad)


def test_ranges_of_the_rest():
    for bad in (("a",), ("a", "a"), ("a", ""), ["a", "b"], ("a", 1)):
        with pytest.raises(ValueError, match="labels="):
            Config(bad)
    with pytest.raises(ValueError, match="dimension=-1"):
        Config(("a", "b"), dimension=-1)
    for bad in ({"lr": 0}, {"lr": math.nan}, {"epochs": 0}, {"batch": 0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Fit(**bad)
    with pytest.raises(ValueError, match="engine='c'"):
        features("a", SMALL, "c")
    ids, cfg = [features(text, SMALL) for text in ("a b", "c")], Config(("a", "b"), SMALL)
    for labels, weights, message in [
        ([0, 1, 0], None, "labels: one for each of 2"), ([0], None, "labels: one for each of 2"),
        ([0, 2], None, r"labels\[1\]=2"), ([0, -1], None, r"labels\[1\]=-1"), ([0, 0.7], None, r"labels\[1\]=0.7"),
        ([0, 1], [0, 0], "weights"), ([0, 1], [1, -1], "weights"), ([0, 1], [1, math.nan], "weights"),
        ([0, 1], [1], "weights"), ([0, 1], [], "weights"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            fit(ids, labels, cfg, random.key(0), weights=weights)
    with pytest.raises(ValueError, match=r"labels\[0\]=0.5"):
        class_weights([0.5, 1], 2)
    few = Fit(epochs=2)
    lists, arrays = (
        fit(ids, kind([0, 1]), cfg, random.key(0), few, weights=kind([1.0, 2.0])) for kind in (list, np.array)
    )
    assert all(torch.equal(lists[name], arrays[name]) for name in lists)
    with pytest.raises(ValueError, match="class 1"):
        class_weights([0, 0], 2)
    with pytest.raises(ValueError, match="one for each of 1"):
        batch_of([np.zeros(1, np.int64)], [0, 1])


def drawn(cfg, seed=0):
    draw = np.random.default_rng(seed)
    return {k: torch.from_numpy(draw.normal(size=v.shape).astype("f4")) for k, v in init(cfg, random.key(0)).items()}


@pytest.mark.parametrize("dimension", [0, 3])
def test_logits_are_the_formula(dimension):
    """Oracle: sums by loops in float64; fp32 sums of some ten numbers of order 1."""
    cfg = Config(("a", "b", "c"), SMALL, dimension)
    params = drawn(cfg)
    texts = ["one two three", "", "four", "one one one."]
    ids = [features(t, SMALL) for t in texts]
    expected = []
    for x in ids:
        total = [0.0] * (dimension or 3)
        for i in x:
            total = [t + float(r) for t, r in zip(total, params["rows"][i], strict=True)]
        total = [t / math.sqrt(max(1, len(x))) for t in total]
        if dimension:
            total = [sum(t * float(o) for t, o in zip(total, params["output"][:, k], strict=True)) for k in range(3)]
        expected.append([t + float(b) for t, b in zip(total, params["bias"], strict=True)])
    found = apply(params, batch_of(ids, [0, 1, 2, 0]))
    assert np.allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert np.allclose(logits_of(params, ids), expected, rtol=1e-6, atol=1e-6)
    model = Classifier(params, cfg, 2.0)
    p = np.exp(np.array(expected[0]) / 2)
    assert np.allclose(scores(model, texts[0]), p / p.sum())
    best = int(p.argmax())
    assert classify(model, texts[0]) == ("abc"[best], pytest.approx(p[best] / p.sum()))
    assert classify(model, texts[0], "b")[0] == "b"
    assert classify(model, "") == NO_CLASS == classify(model, "", "b")
    with pytest.raises(ValueError, match="label='d'"):
        classify(model, "one", "d")


def test_loss_is_the_weighted_mean_and_its_gradient_closed():
    """Oracle: d loss / d W = sum_b w_b (p - y) counts / sqrt(N) / sum w."""
    cfg = Config(("a", "b"), SMALL)
    params = {k: v.double().requires_grad_() for k, v in drawn(cfg).items()}
    ids, y, w = [features(t, SMALL) for t in ("x y", "y z z", "q")], [0, 1, 1], [1.0, 2.0, 0.5]
    value, metrics = loss(params, batch_of(ids, y, w))
    counts = np.array([np.bincount(x, minlength=512) / math.sqrt(len(x)) for x in ids])
    p = softmax(counts @ params["rows"].detach().numpy() + params["bias"].detach().numpy())
    assert float(value.detach()) == pytest.approx(-(np.array(w) * np.log(p[range(3), y])).sum() / 3.5, rel=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx((p.argmax(1) == y).mean())
    g = torch.autograd.grad(value, params["rows"])[0].numpy()
    assert np.allclose(g, counts.T @ ((p - np.eye(2)[y]) * np.array(w)[:, None]) / 3.5, atol=1e-6)


def toy(n, seed):
    draw = np.random.default_rng(seed)
    common, marks = [f"w{i}" for i in range(30)], [["sun", "moon"], ["tax", "law"]]
    texts, labels = [], []
    for _ in range(n):
        y = int(draw.integers(2))
        words = list(draw.choice(common, 8)) + list(draw.choice(marks[y if draw.random() < 0.9 else 1 - y], 2))
        texts.append(" ".join(draw.permutation(words)))
        labels.append(y)
    return texts, labels


@pytest.mark.parametrize("dimension, lr", [(0, 0.1), (4, 0.03)])
def test_training_reaches_what_the_noise_allows(dimension, lr):
    """Oracle: a tenth of the texts has the other class's words, so .9 is the best accuracy that there is."""
    texts, labels = toy(600, 1)
    cfg = Config(("a", "b"), Features(4096, 1), dimension)
    ids = [features(t, cfg.features) for t in texts]
    seen = []
    one = fit(ids, labels, cfg, random.key(3), Fit(4, 32, lr), watch=lambda *x: seen.append(x))
    assert len(seen) == 4 * 19 and seen[-1][:2] == (76, 76)
    state = torch.get_rng_state()
    again = fit(ids, labels, cfg, random.key(3), Fit(4, 32, lr))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[k], again[k]) for k in one)
    other = fit(ids, labels, cfg, random.key(4), Fit(4, 32, lr))
    assert not torch.equal(one["rows"], other["rows"])
    more, y = toy(400, 2)
    z = logits_of(one, [features(t, cfg.features) for t in more])
    assert 0.85 < (z.argmax(1) == y).mean() < 0.95


def test_every_epoch_has_an_order_of_its_own(monkeypatch):
    """Oracle: the permutations that are drawn."""
    orders = []
    draw = random.permutation
    monkeypatch.setattr(random, "permutation", lambda *x: orders.append(draw(*x)) or orders[-1])
    texts, labels = toy(20, 1)
    fit([features(t, SMALL) for t in texts], labels, Config(("a", "b"), SMALL), random.key(0), Fit(3, 8))
    assert len(orders) == 3 and len({tuple(x.tolist()) for x in orders}) == 3
    assert all(sorted(x.tolist()) == list(range(20)) for x in orders)


def test_class_weights_make_classes_equal():
    w = class_weights([0, 0, 0, 1], 2)
    assert sum(w[:3]) == pytest.approx(w[3]) and sum(w) == pytest.approx(4)


@given(st.integers(0, 1000))
def test_temperature_is_the_minimum(seed):
    """Oracle: scipy's bounded minimum of the same loss."""
    minimize_scalar = pytest.importorskip("scipy.optimize").minimize_scalar
    draw = np.random.default_rng(seed)
    z = draw.normal(size=(60, 3)) * draw.uniform(0.5, 8)
    y = np.array([draw.choice(3, p=p) for p in softmax(z / draw.uniform(0.5, 4))])

    def nll(log_t):
        return -np.log(softmax(z / np.exp(log_t))[range(60), y]).mean()

    found = temperature(z, y)
    best = minimize_scalar(nll, bounds=(math.log(LOWEST), -math.log(LOWEST)), method="bounded")
    assert nll(math.log(found)) <= best.fun + 1e-9
    assert temperature(z, y, np.full(60, 3.0)) == pytest.approx(found)


def test_temperature_of_texts_that_logits_tell_apart_is_the_lowest():
    assert temperature(np.array([[2.0, 1.0], [0.0, 1.0]]), np.array([0, 1])) == pytest.approx(LOWEST)
    assert temperature(np.ones((3, 2)), np.array([0, 1, 1])) == 1.0
    with pytest.raises(ValueError, match="z, y"):
        temperature(np.zeros((0, 2)), np.zeros(0, int))


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30))
def test_auc_counts_pairs(rows):
    score, positive = [s for s, _ in rows], [p for _, p in rows]
    if all(positive) or not any(positive):
        with pytest.raises(ValueError, match="both classes"):
            auc(score, positive)
        return
    pairs = [(a > b) + (a == b) / 2 for a, p in rows if p for b, q in rows if not q]
    assert auc(score, positive) == pytest.approx(sum(pairs) / len(pairs))


@given(st.lists(st.tuples(st.floats(0.5, 1), st.booleans()), min_size=1, max_size=30), st.integers(1, 12))
def test_calibration_error_by_bins(rows, bins):
    p = np.array([[s, 1 - s] for s, _ in rows])
    best = p.max(1)
    right = [bool((row.argmax() == 0) == ok) for row, (_, ok) in zip(p, rows, strict=True)]
    y = np.array([0 if ok else 1 for _, ok in rows])
    error = 0.0
    for b in range(bins):
        inside = [i for i, s in enumerate(best) if min(bins, max(1, math.ceil(s * bins))) == b + 1]
        if inside:
            error += abs(np.mean([right[i] for i in inside]) - np.mean(best[inside])) * len(inside) / len(rows)
    assert calibration_error(p, y, bins) == pytest.approx(error)


@pytest.mark.parametrize("dimension", [0, 3])
def test_files_hold_the_model_and_refuse_damage(tmp_path, dimension):
    cfg = Config(("good", "bad"), Features(64, 3, 2, 4, 99), dimension)
    model = Classifier(drawn(cfg), cfg, 1.7)
    path = tmp_path / "m.safetensors"
    save_classifier(path, model)
    back = load_classifier(path)
    assert back.cfg == cfg and back.temperature == 1.7
    assert all(torch.equal(back.params[k], v) for k, v in model.params.items())
    assert [x.name for x in tmp_path.iterdir()] == ["m.safetensors"]
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-2] ^= 1
    for bad, message in [
        (data[:-4], "damaged"), (data[:5], "damaged"), (b"", "damaged"), (bytes(flipped), "SHA-256"),
        (data.replace(b"classifier 1", b"classifier 9"), "not a classifier"),
        (data.replace(rb"\"word_ngrams\": 3", rb"\"word_ngrams\": 9"), "word_ngrams=9"),
        (data.replace(b"[", b"{", 1), "damaged"),
        (data.replace(rb"\"temperature\"", rb"\"temperaturf\""), "temperature"),
        (data.replace(rb"\"buckets\": 64", rb"\"buckets\": 63"), "its configuration has"),
    ]:  # fmt: skip
        assert bad != data
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=message) as error:
            load_classifier(path)
        assert "m.safetensors" in str(error.value)
    with pytest.raises(ValueError, match="no such file"):
        load_classifier(tmp_path / "none.safetensors")
    path.write_bytes(data)
    params = {**model.params, "bias": torch.full((2,), math.inf)}
    for worse in (model._replace(temperature=0.0), model._replace(params=params)):
        with pytest.raises(ValueError, match=r"m\.safetensors"):
            save_classifier(path, worse)
    assert path.read_bytes() == data
