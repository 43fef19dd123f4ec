"""Generation as a GPU has it, on a CPU: readings that lag behind the steps, late prompts of padded lengths.

Oracle: the plain loop, which reads after every step, each row alone with its key.
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm import random
from purelm.generate import Sampling, Stop, batched, engine, generate, on_graph, stream
from purelm.models import transformer
from purelm.models.transformer import Config
from purelm.ops import REFERENCE

CFG = Config(vocab_size=23, context_length=24, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, window=(5, None))
MODEL = transformer.make(CFG)
PARAMS = MODEL.init(random.key(0), dtype=torch.float64)
KEY = random.key(3)
LAGGING = partial(engine.found_tokens, lags=True)


def letters(ids):
    return "".join(chr(97 + i) for i in ids)


def same(a, b):
    assert [t.tolist() for t in a.tokens] == [t.tolist() for t in b.tokens]
    assert a.finish_reasons == b.finish_reasons and a.texts == b.texts
    for name in ("logprobs", "model_logprobs"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name))


def of_stream(steps, n_rows):
    """(tokens, finish reasons) of each row; the reason comes with the last token."""
    tokens, reasons = [[] for _ in range(n_rows)], [None] * n_rows
    for step in steps:
        for row, (token, reason) in enumerate(zip(step.tokens, step.finish_reasons, strict=True)):
            assert reasons[row] is None or token is None
            tokens[row] += [] if token is None else [token]
            reasons[row] = reason or reasons[row]
    return tokens, reasons


def reason_by_hand(tokens, stop, limit):
    """Why a row with one letter a token ends; no earlier token may have ended it."""
    for k in range(1, len(tokens) + 1):
        reason = "length" if k == limit else None
        if k >= stop.min_new_tokens and any(letters(tokens[:k]).endswith(s) for s in stop.strings):
            reason = "stop_string"
        if tokens[k - 1] in stop.ids:
            reason = "stop_id"
        if reason is not None:
            assert k == len(tokens)
            return reason
    assert limit == 0
    return "length"


def case(draw):
    """Arguments of generate: prompts up to the whole context, limits, stops, how rows are batched and read."""
    prompts = draw(st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=24), min_size=1, max_size=7))
    n = draw(st.integers(0, 12))
    ids = draw(st.lists(st.integers(0, 22), max_size=3))
    strings = draw(st.lists(st.text("abcdefgh", min_size=1, max_size=2), max_size=2))
    if ids and draw(st.booleans()):
        strings = [*strings, letters(ids[:1])]  # completed by a stop id, which is then the reason
    stop = Stop(ids, strings, draw(st.integers(0, min(n, 4))))
    sampling = draw(st.sampled_from([Sampling(), Sampling(0.0), Sampling(0.7, top_k=9, top_p=0.9)]))
    plain = dict(max_new_tokens=n, stop=stop, sampling=sampling, n_samples=draw(st.integers(1, 4)), decode_fn=letters)
    batches = {"batch_size": draw(st.none() | st.integers(1, 20)), "read_every": draw(st.none() | st.integers(1, 15))}
    return prompts, plain, batches


@pytest.mark.parametrize("wrap_step", [None, on_graph], ids=["plain", "graph"])
@settings(max_examples=30)
@given(st.data(), st.booleans())
def test_rows_do_not_depend_on_when_they_are_read(wrap_step, data, lags):
    prompts, plain, batches = case(data.draw)
    want = generate(MODEL, PARAMS, prompts, KEY, **plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batched, "found_tokens", partial(engine.found_tokens, lags=lags))
        same(generate(MODEL, PARAMS, prompts, KEY, wrap_step=wrap_step, **batches, **plain), want)
        steps = stream(MODEL, PARAMS, prompts, KEY, wrap_step=wrap_step, **batches, **plain)
        tokens, reasons = of_stream(steps, len(want.tokens))
    assert tokens == [t.tolist() for t in want.tokens]
    assert reasons == [r if len(t) else None for r, t in zip(want.finish_reasons, want.tokens, strict=True)]
    for row, (ids, reason) in enumerate(zip(want.tokens, want.finish_reasons, strict=True)):
        limit = min(plain["max_new_tokens"], CFG.context_length - len(prompts[row // plain["n_samples"]]))
        assert reason == reason_by_hand(ids.tolist(), plain["stop"], limit)


@pytest.mark.parametrize("wrap_step", [None, on_graph], ids=["plain", "graph"])
def test_late_prompts_are_padded_to_a_few_numbers(monkeypatch, wrap_step):
    """Oracle: all at once. Of 40 places prompts come in by threes; 47 prompts do not divide so."""
    prompts = [[i % 23] * (1 + i % 9) for i in range(47)]
    options = dict(max_new_tokens=6, stop=Stop([3, 5, 11]))
    want = generate(MODEL, PARAMS, prompts, KEY, **options)
    monkeypatch.setattr(batched, "found_tokens", LAGGING)
    same(generate(MODEL, PARAMS, prompts, KEY, batch_size=40, wrap_step=wrap_step, **options), want)


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_padding_stays_within_the_context(monkeypatch, position):
    """Counted: a context of 100 has slots up to 128 in a recorded step, and no position beyond 99."""
    widths = []

    def embedding(ids, weight):
        widths.append(ids.shape[1])
        return REFERENCE.embedding(ids, weight)

    cfg = Config(vocab_size=23, context_length=100, d_model=8, n_layers=1, n_heads=1, position=position)
    model = transformer.make(cfg, REFERENCE._replace(embedding=embedding))
    params = model.init(random.key(0), dtype=torch.float64)
    prompts = [[1] * 70, [2] * 3, [3] * 66, [4] * 97, [5]]
    want = generate(model, params, prompts, KEY, max_new_tokens=5)
    monkeypatch.setattr(batched, "found_tokens", LAGGING)
    del widths[:]
    same(generate(model, params, prompts, KEY, max_new_tokens=5, batch_size=2, wrap_step=on_graph), want)
    assert max(widths) == 100 and 64 in widths


@pytest.mark.parametrize("read_every", [1, 3, 7])
def test_logits_that_are_not_finite(monkeypatch, read_every):
    """By hand: position 6 is NaN, so row 0 fails after 4 tokens; with a stop string before that, it has ended."""
    model = transformer.make(Config(**{**vars(CFG), "position": "learned"}))
    params = model.init(random.key(0), dtype=torch.float64)
    params["position_embeddings"]["weight"][6] = torch.nan
    monkeypatch.setattr(batched, "found_tokens", LAGGING)
    options = dict(max_new_tokens=9, read_every=read_every, batch_size=1, decode_fn=letters)
    with pytest.raises(ValueError, match=r"not finite .NaN or inf. in rows 0 after 4 new tokens"):
        generate(model, params, [[1, 2, 3], [4]], KEY, **options)
    first = generate(model, params, [[1, 2, 3]], KEY, **{**options, "max_new_tokens": 4})
    stop = Stop(strings=[first.texts[0][2]])  # the third token's letter, or an earlier one that is the same
    ended = generate(model, params, [[1, 2, 3]], KEY, stop=stop, **options)
    assert ended.finish_reasons == ["stop_string"] and first.texts[0].startswith(ended.texts[0])
