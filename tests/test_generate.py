"""Generation: against a loop without a cache, independence of rows, log-probabilities, stops, limits, streaming."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import purelm.generate
from purelm import random
from purelm.generate import Sampling, Stop
from purelm.generate.sampling import distribution, forbid, pick
from purelm.generate.stops import stopped, text_of
from purelm.models import transformer
from purelm.models.transformer import Config, apply
from purelm.ops import REFERENCE

CFG = Config(
    vocab_size=29, context_length=40, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=40, window=(6, None)
)
PARAMS = transformer.init(random.key(0), CFG, dtype=torch.float64)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
KEY = random.key(7)
SETTINGS = dict(temperature=0.9, top_k=20, top_p=0.95, min_p=0.01)


def _called(function, params, prompts, cfg, key, *, max_new_tokens, ops=REFERENCE, decode_fn=None, **options):
    """With the fields of Sampling and Stop as plain keywords."""
    stops = {name: options.pop(key) for name, key in STOPS.items() if key in options}
    return function(
        transformer.make(cfg, ops),
        params,
        prompts,
        key,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(**options),
        stop=Stop(**stops),
        decode_fn=decode_fn,
    )


STOPS = {"ids": "stop_ids", "strings": "stop_strings", "min_new_tokens": "min_new_tokens"}
generate = partial(_called, purelm.generate.generate)
stream = partial(_called, purelm.generate.stream)


def decode_fn(ids):
    """Bytes: id i is the letter a + i, but 26, 27 and 28 are the three bytes of a euro sign."""
    pieces = [bytes([97 + i]) if i < 26 else b"\xe2\x82\xac"[i - 26 : i - 25] for i in ids]
    return b"".join(pieces).decode("utf-8", errors="replace")


def slow(prompt, key, n, *, params=PARAMS, cfg=CFG, stop_ids=(), min_new_tokens=0, **settings):
    """The oracle: the whole model for each token, one row, no cache; the uniform of the token's own position."""
    ids, logprobs = list(prompt), []
    while len(ids) < min(len(prompt) + n, cfg.context_length):
        logits = apply(params, torch.tensor([ids]), cfg)[:, -1]
        if len(logprobs) < min_new_tokens:
            logits = forbid(logits, stop_ids)
        log_probs = distribution(logits, **settings)
        u = random.uniform(key, (len(ids) + 1,), dtype=torch.float64)[-1:]
        token = int(pick(log_probs, u))
        ids.append(token)
        logprobs.append(log_probs[0, token].item())
        if token in stop_ids:
            break
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize("settings", [SETTINGS, dict(temperature=0.0), dict(temperature=1.0)], ids=str)
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_equals_a_loop_without_a_cache(settings, position):
    """Oracle: `slow` for each row of a batch of different lengths: same tokens, same log-probabilities."""
    cfg = replace(CFG, position=position)
    params = transformer.init(random.key(0), cfg, dtype=torch.float64)
    out = generate(params, PROMPTS, cfg, KEY, max_new_tokens=12, **settings)
    for i, prompt in enumerate(PROMPTS):
        tokens, logprobs = slow(prompt, random.fold_in(KEY, i), 12, params=params, cfg=cfg, **settings)
        assert out.tokens[i].tolist() == tokens
        torch.testing.assert_close(out.logprobs[i], torch.tensor(logprobs))
    assert out.finish_reasons == ["length"] * 3
    assert out.texts is None
    if settings["temperature"] == 0.0:
        assert all(bool((x == 0).all()) for x in out.logprobs)


@given(st.lists(st.lists(st.integers(0, 28), min_size=1, max_size=9), min_size=1, max_size=4), st.integers(0, 2**31))
def test_a_row_does_not_depend_on_its_neighbours(prompts, seed):
    """Law: each row alone, with its key, gives the tokens that it gives in the batch; so does the batch reversed."""
    keys = random.split(random.key(seed), len(prompts))
    batch = generate(PARAMS, prompts, CFG, keys, max_new_tokens=6, **SETTINGS)
    backwards = generate(PARAMS, prompts[::-1], CFG, keys.flip(0), max_new_tokens=6, **SETTINGS)
    for i, prompt in enumerate(prompts):
        alone = generate(PARAMS, [prompt], CFG, keys[i : i + 1], max_new_tokens=6, **SETTINGS)
        assert torch.equal(alone.tokens[0], batch.tokens[i])
        assert torch.equal(backwards.tokens[-1 - i], batch.tokens[i])
        torch.testing.assert_close(alone.logprobs[0], batch.logprobs[i])


def test_going_on_from_what_was_generated_gives_the_same():
    """Law: a position's number decides its token, so a prompt that holds the first tokens continues alike."""
    key = KEY[None]
    long = generate(PARAMS, [[1, 2]], CFG, key, max_new_tokens=10).tokens[0].tolist()
    rest = generate(PARAMS, [[1, 2, *long[:4]]], CFG, key, max_new_tokens=6).tokens[0].tolist()
    assert long[4:] == rest


def test_keys():
    """One key: row i takes fold_in(key, i). Other keys, other samples."""
    folded = torch.stack([random.fold_in(KEY, i) for i in range(3)])
    a, b, c = (generate(PARAMS, PROMPTS, CFG, k, max_new_tokens=8).tokens for k in (KEY, folded, random.key(8)))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a, c, strict=True))


def test_stop_ids():
    """Oracle: `slow` with the same stop ids; the stop id is kept and rows end on their own."""
    stops = [3, 5, 11, 17]
    out = generate(PARAMS, PROMPTS, CFG, KEY, max_new_tokens=20, stop_ids=stops, decode_fn=decode_fn)
    lengths = set()
    for i, prompt in enumerate(PROMPTS):
        tokens, _ = slow(prompt, random.fold_in(KEY, i), 20, stop_ids=stops)
        assert out.tokens[i].tolist() == tokens
        lengths.add(len(tokens))
        stopped = tokens[-1] in stops
        assert out.finish_reasons[i] == ("stop_id" if stopped else "length")
        assert out.texts[i] == decode_fn(tokens[:-1] if stopped else tokens)
    assert len(lengths) == 3  # the seed is such that rows end at different times


def test_min_new_tokens():
    """Oracle: `slow`, where stop ids have probability 0 until then."""
    stops = list(range(20))
    out = generate(PARAMS, PROMPTS, CFG, KEY, max_new_tokens=9, stop_ids=stops, min_new_tokens=4)
    for i, prompt in enumerate(PROMPTS):
        tokens, logprobs = slow(prompt, random.fold_in(KEY, i), 9, stop_ids=stops, min_new_tokens=4)
        assert out.tokens[i].tolist() == tokens
        assert not set(tokens[:4]) & set(stops)
        torch.testing.assert_close(out.logprobs[i], torch.tensor(logprobs))


def script(monkeypatch, *rows):
    """Makes the model say these tokens, whatever it thinks."""
    cursor = iter(zip(*rows, strict=True))
    monkeypatch.setattr("purelm.generate.sampling.pick", lambda log_probs, u: torch.tensor(next(cursor)))


@pytest.mark.parametrize(
    ("ids", "stops", "n", "text"),
    [
        ([1, 2, 3, 4], ["c"], 2, "bc"),  # a token of its own
        ([1, 2, 3, 4], ["cd"], 3, "bcd"),  # spans two tokens
        ([1, 2, 3, 4], ["bcde", "xx"], 4, "bcde"),  # from the first token to the last
        ([1, 2, 3, 4], ["bc", "b"], 1, "b"),  # the first that is complete
        ([1, 26, 27, 28, 4], ["\u20ac"], 4, "b\u20ac"),  # three tokens make one character
        ([1, 26, 27, 28, 4], ["b\u20ac"], 4, "b\u20ac"),
        ([1, 26, 1, 2, 3], ["bc"], 4, "b\ufffdbc"),  # after bytes that are no character
        ([1, 2, 3, 4], ["z"], None, "bcde"),
    ],
)
def test_stop_strings(monkeypatch, ids, stops, n, text):
    """Oracle: by hand. The token that completes the string is the last; text after the string is cut."""
    script(monkeypatch, ids)
    out = generate(PARAMS, [[0]], CFG, KEY, max_new_tokens=len(ids), stop_strings=stops, decode_fn=decode_fn)
    assert out.tokens[0].tolist() == ids[:n]
    assert out.finish_reasons == ["length" if n is None else "stop_string"]
    assert out.texts == [text]


def test_text_after_the_stop_string_is_cut(monkeypatch):
    """Tokens of several letters: the stop string ends inside the last one, and another stop later in it."""
    words = {0: "one ", 1: "two\n\nQ", 2: "uestion\n\n"}
    script(monkeypatch, [0, 1, 2])
    out = generate(
        PARAMS, [[0]], CFG, KEY, max_new_tokens=3, stop_strings=["\n\n", "Q"],
        decode_fn=lambda ids: "".join(words[i] for i in ids),
    )  # fmt: skip
    assert out.tokens[0].tolist() == [0, 1]
    assert out.texts == ["one two\n\n"]


@pytest.mark.parametrize(
    ("ids", "min_new_tokens", "n"),
    [
        ([2, 1, 1, 1, 2, 1], 3, 5),  # too early, and again later
        ([1, 2, 2, 1], 3, 3),  # the third token is in time, the second is not
        ([1, 1, 2, 1, 1], 4, 5),  # complete before the fourth token: not the fourth's doing
    ],
)
def test_stop_strings_before_min_new_tokens_do_not_count(monkeypatch, ids, min_new_tokens, n):
    """By hand: an occurrence that was complete before min_new_tokens neither stops nor cuts; a later one does."""
    script(monkeypatch, ids)
    out = generate(
        PARAMS, [[0]], CFG, KEY, max_new_tokens=len(ids), min_new_tokens=min_new_tokens, stop_strings=["c"],
        decode_fn=decode_fn,
    )  # fmt: skip
    assert out.tokens[0].tolist() == ids[:n]
    assert out.texts == [decode_fn(ids[:n])]


@example(list("b" + "a" * 20 + "b"), "a" * 20 + "b")
@example(["a", *[""] * 20, "b"], "ab")
@given(st.lists(st.text("ab", max_size=3), max_size=40), st.text("ab", min_size=1, max_size=12))
def test_stop_string_found_at_once(pieces, stop):
    """Oracle: str.find. Whatever window of tokens (some are empty) is decoded, generation stops at the token that
    completes the first occurrence, and the text is cut there."""

    def decode(ids):
        return "".join(pieces[i] for i in ids)

    text = decode(range(len(pieces)))
    found = next((n for n in range(1, len(pieces) + 1) if stopped(decode, list(range(n)), [stop])), None)
    if stop not in text:
        assert found is None
        return
    end = text.find(stop) + len(stop)
    assert found == next(n for n in range(len(pieces) + 1) if len(decode(range(n))) >= end)
    assert text_of(decode, list(range(found)), "stop_string", [stop]) == text[:end]


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_context_limit(position):
    """Rows end where the context ends, each at its own place; a full prompt has room for nothing."""
    cfg = replace(CFG, context_length=8, position=position)
    params = transformer.init(random.key(0), cfg, dtype=torch.float64)
    prompts = [[1] * 3, [2] * 8, [3] * 7]
    out = generate(params, prompts, cfg, KEY, max_new_tokens=100)
    assert [len(t) for t in out.tokens] == [5, 0, 1]
    assert out.finish_reasons == ["length"] * 3
    for i, prompt in enumerate(prompts):
        assert out.tokens[i].tolist() == slow(prompt, random.fold_in(KEY, i), 100, params=params, cfg=cfg)[0]
    nothing = generate(params, [[2] * 8], cfg, KEY, max_new_tokens=3, decode_fn=decode_fn)
    assert nothing.texts == [""]
    assert generate(params, prompts, cfg, KEY, max_new_tokens=0).tokens[0].numel() == 0


def test_stream():
    """Oracle: generate; a row that has finished yields None."""
    stops = [3, 5, 11, 17]
    whole = generate(PARAMS, PROMPTS, CFG, KEY, max_new_tokens=20, stop_ids=stops)
    steps = list(stream(PARAMS, PROMPTS, CFG, KEY, max_new_tokens=20, stop_ids=stops))
    for i in range(3):
        tokens = [s.tokens[i] for s in steps]
        n = len(whole.tokens[i])
        assert tokens == whole.tokens[i].tolist() + [None] * (len(steps) - n)
        assert [s.finish_reasons[i] for s in steps[:n]] == [None] * (n - 1) + [whole.finish_reasons[i]]
        assert [s.logprobs[i] for s in steps[n:]] == [None] * (len(steps) - n)
    assert len(steps) == max(len(t) for t in whole.tokens)


def test_stream_does_no_more_than_is_asked_for():
    """Taking two tokens runs the model once over the prompt and once more."""
    calls = []

    def counted(x, w):
        calls.append(x.shape)
        return REFERENCE.embedding(x, w)

    ops = REFERENCE._replace(embedding=counted)
    steps = stream(PARAMS, [[1, 2, 3]], CFG, KEY, max_new_tokens=20, ops=ops)
    assert not calls
    next(steps), next(steps)
    assert [tuple(s) for s in calls] == [(1, 3), (1, 1)]


def test_prompts_of_every_kind():
    """Lists, tensors of any integer dtype and a matrix are the same prompts."""
    import numpy as np

    rows = [[1, 2], [3, 4]]
    kinds = [rows, torch.tensor(rows), [np.array(r, dtype=np.uint16) for r in rows], [torch.tensor(r) for r in rows]]
    outs = [generate(PARAMS, kind, CFG, KEY, max_new_tokens=4).tokens for kind in kinds]
    assert all(torch.equal(x, y) for out in outs for x, y in zip(out, outs[0], strict=True))


def test_no_gradient_and_no_global_generator():
    """Exact: parameters that require gradients do not make a graph; the global generator is not read."""
    params = {**PARAMS, "lm_head": {"weight": PARAMS["lm_head"]["weight"].clone().requires_grad_()}}
    state = torch.random.get_rng_state()
    needs = []

    def spy(x, w, b=None):
        y = REFERENCE.linear(x, w, b)
        needs.append(y.requires_grad)
        return y

    ops = REFERENCE._replace(linear=spy)
    out = generate(params, [[1]], CFG, KEY, max_new_tokens=3, ops=ops)
    assert not any(needs)
    assert not out.logprobs[0].requires_grad
    assert torch.equal(state, torch.random.get_rng_state())


def test_bf16_parameters():
    """The cache takes the parameters' dtype; log-probabilities are fp32."""
    from purelm import tree

    out = generate(tree.cast(PARAMS, torch.bfloat16), PROMPTS, CFG, KEY, max_new_tokens=4)
    assert all(x.dtype == torch.float32 and bool((x <= 0).all()) for x in out.logprobs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(prompts=[]), "prompts must hold at least one row"),
        (dict(prompts=[[1], []]), r"prompts\[1\] must be 1..40 token ids \(context_length\), got shape \(0,\)"),
        (dict(prompts=[[0] * 41]), r"prompts\[0\] must be 1..40 token ids \(context_length\), got shape \(41,\)"),
        (dict(prompts=[[1], [2, 29]]), r"prompts\[1\]: id 29 at position 1 is outside the vocabulary \(0..28\)"),
        (dict(prompts=[[1.5]]), r"prompts\[0\] must hold integers"),
        (dict(max_new_tokens=-1), "max_new_tokens must be an integer of at least 0, got -1"),
        (dict(min_new_tokens=4), r"min_new_tokens must be in 0..max_new_tokens 3, got 4"),
        (dict(stop_strings=["x"]), r"decode_fn \(ids -> text\) must be given with stop.strings"),
        (dict(stop_strings=[""], decode_fn=decode_fn), "stop.strings must be strings that are not empty, got ''"),
        (dict(stop_strings="END", decode_fn=decode_fn), r"stop.strings must be a sequence of strings, got 'END': give"),
        (dict(stop_strings=[3], decode_fn=decode_fn), "stop.strings must be strings that are not empty, got 3"),
        (dict(stop_ids=5), "stop.ids must be a sequence of token ids, got 5"),
        (dict(stop_ids=[1.5]), "stop.ids must be integers, got 1.5"),
        (dict(prompts="text"), "prompts must be rows of token ids, got 'text'"),
        (dict(prompts=["text"]), r"prompts\[0\] must be token ids, got 'text'"),
        (dict(max_new_tokens=2.0), "max_new_tokens must be an integer of at least 0, got 2.0"),
        (dict(stop_ids=[30]), "stop.ids: id 30 at position 0 is outside the vocabulary"),
        (dict(stop_ids=range(29), min_new_tokens=1), "stop.ids must leave a token"),
        (dict(key=random.split(KEY, 3)), "key must be one key, or one for each of 1 rows"),
        (dict(top_k=0), "top_k must be an integer of at least 1"),
        (dict(temperature=-0.5), "temperature must be 0 .greedy., or finite"),
    ],
)
def test_bad_arguments(kwargs, message):
    """Raised at the call, also by stream, whose tokens nobody has asked for."""
    kwargs = {"prompts": [[1]], "key": KEY, "max_new_tokens": 3, **kwargs}
    prompts, key = kwargs.pop("prompts"), kwargs.pop("key")
    with pytest.raises(ValueError, match=message):
        generate(PARAMS, prompts, CFG, key, **kwargs)
    with pytest.raises(ValueError, match=message):
        stream(PARAMS, prompts, CFG, key, **kwargs)


def test_what_can_be_read_once_is_read_once():
    """Oracle: lists. A generator that a second look finds empty would stop nothing."""
    lists = dict(stop_ids=[3, 4, 5], stop_strings=["b", "cd"], min_new_tokens=1)
    right = generate(PARAMS, PROMPTS, CFG, KEY, max_new_tokens=12, decode_fn=decode_fn, **lists)
    assert {"stop_id", "stop_string"} & set(right.finish_reasons)
    once = {name: iter(x) if isinstance(x, list) else x for name, x in lists.items()}
    found = generate(PARAMS, iter(PROMPTS), CFG, KEY, max_new_tokens=12, decode_fn=decode_fn, **once)
    assert found.texts == right.texts and found.finish_reasons == right.finish_reasons
    assert [t.tolist() for t in found.tokens] == [t.tolist() for t in right.tokens]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_named(value, temperature):
    """Oracle: the definition: there is no distribution. Only rows that are still open count."""
    params = transformer.init(random.key(0), CFG)
    params["lm_head"]["weight"][3, :] = value  # inf - inf, of a state with both signs, is NaN too
    with pytest.raises(ValueError, match=r"logits are not finite \(NaN or inf\) in rows 0, 1 after 0 new tokens"):
        generate(params, [[1], [2, 3]], CFG, KEY, max_new_tokens=3, temperature=temperature)


@pytest.mark.parametrize("prompts", [PROMPTS, [[4], list(range(1, 21))]], ids=["short", "one is long"])
def test_dynamic_rope_does_not_look_at_neighbours(prompts):
    """Oracle: the row alone. The base that dynamic_ntk takes by a length was that of the longest row and the limit."""
    cfg = replace(CFG, rope_scaling=transformer.RopeScaling("dynamic_ntk", 4.0, 8))
    together = generate(PARAMS, prompts, cfg, KEY, max_new_tokens=12)
    for i, prompt in enumerate(prompts):
        alone = generate(PARAMS, [prompt], cfg, random.fold_in(KEY, i)[None], max_new_tokens=6)
        assert alone.tokens[0].tolist() == together.tokens[i][:6].tolist()
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[i][:6], rtol=1e-6, atol=1e-6)
