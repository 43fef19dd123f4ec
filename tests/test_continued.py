"""A row that goes on from a past. Oracle: `generate` of the whole prompt with the same key, which knows of no past."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import random, tree
from purelm.generate import Sampling, Stop, continued, empty_past, generate
from purelm.models import transformer
from purelm.models.cache import Cache
from purelm.models.cache_rows import shortened

CFG = transformer.Config(
    vocab_size=29, context_length=40, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=40, window=(6, None)
)
PARAMS = transformer.init(random.key(0), CFG, dtype=torch.float64)  # rounding decides between no two tokens
MODEL = transformer.make(CFG)
KEY = random.key(7)
SAMPLING = Sampling(0.9, 20, 0.95, 0.01)


def letters(ids):
    return "".join(chr(97 + i) for i in ids)


def whole(prompt, key=KEY, **options):
    """The oracle: (tokens, log-probabilities, the model's, reason)."""
    out = generate(MODEL, PARAMS, [prompt], key, **options)
    return out.tokens[0].tolist(), out.logprobs[0], out.model_logprobs[0], out.finish_reasons[0]


def row(prompt, key=KEY, past=None, model=MODEL, **options):
    """(what `whole` gives, the last past)."""
    new = list(continued(model, PARAMS, prompt, key, past, **options))
    reasons = [x.finish_reason for x in new]
    assert reasons[:-1] == [None] * (len(new) - 1)
    logprobs = torch.tensor([(x.logprob, x.model_logprob) for x in new], dtype=torch.float32)
    return ([x.token for x in new], *logprobs.T, reasons[-1]), new[-1].past


def same(found, expected):
    assert (found[0], found[3]) == (expected[0], expected[3])
    torch.testing.assert_close(found[1:3], expected[1:3])  # fp32 in generate's answer


@pytest.fixture
def counted():
    """(the model, the numbers of tokens that its prefills take)."""
    lengths = []

    def prefill(params, tokens, cache, **options):
        lengths.append(tokens.shape[1])
        return MODEL.prefill(params, tokens, cache, **options)

    return MODEL._replace(prefill=prefill), lengths


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampling": Sampling(temperature=0.0)},
        {"sampling": SAMPLING},
        {"sampling": SAMPLING, "stop": Stop([3, 4, 5, 6, 7])},
        {"sampling": SAMPLING, "stop": Stop([3, 4, 5, 6, 7], min_new_tokens=9)},
        {"stop": Stop(strings=["a", "b", "c", "d"]), "decode_fn": letters},
        {"stop": Stop([0, 1], strings=["a", "b", "c"], min_new_tokens=2), "decode_fn": letters},
        {"stop": Stop(strings=[*letters(range(26))], min_new_tokens=4), "decode_fn": letters},
        {"stop": Stop(range(13), strings=[*letters(range(13))]), "decode_fn": letters},
        {"key": random.split(KEY, 1)},
    ],
)
def test_without_a_past(options):
    for prompt in ([1], [5, 6, 7, 8, 9, 10], torch.tensor([2, 3])):
        found, past = row(prompt, **{"max_new_tokens": 12, **options})
        same(found, whole(prompt, **{"max_new_tokens": 12, **options}))
        assert list(past.ids) == [*map(int, prompt), *found[0][:-1]]


@given(
    first=st.lists(st.integers(0, 28), min_size=1, max_size=8),
    keep=st.integers(0, 16),
    more=st.lists(st.integers(0, 28), min_size=1, max_size=6),
)
def test_with_a_past(first, keep, more):
    """The next prompt keeps all, some or nothing of what was computed, or is a part of it."""
    before, past = row(first, past=empty_past(MODEL, PARAMS), max_new_tokens=6)
    prompt = [*[*first, *before[0], *more][:keep], *more]
    for key in (KEY, random.key(8)):  # twice from one past, which stays as it was
        same(row(prompt, key, past, max_new_tokens=5, sampling=SAMPLING)[0],
             whole(prompt, key, max_new_tokens=5, sampling=SAMPLING))  # fmt: skip


def test_only_what_is_new_is_computed(counted):
    """Lengths of prefills, by hand: past.ids is the prompt and all new tokens but the last."""
    model, lengths = counted
    found, past = row([1, 2, 3, 4], past=empty_past(model, PARAMS), model=model, max_new_tokens=3)
    talk = [1, 2, 3, 4, *found[0]]
    row([*talk, 9], past=past, model=model, max_new_tokens=2)
    row([*talk[:5], (talk[5] + 1) % 29, 9, 9], past=past, model=model, max_new_tokens=2)
    row(talk[:6], past=past, model=model, max_new_tokens=2)
    row([(talk[0] + 1) % 29], past=past, model=model, max_new_tokens=2)
    assert lengths == [4, 2, 3, 1, 1]


def test_every_past_stays_valid():
    """Of each new token; oracle: the cache's leaves before and after others went on, and generate."""
    new = list(continued(MODEL, PARAMS, [1, 2, 3], KEY, empty_past(MODEL, PARAMS), max_new_tokens=6))
    for x in new:
        n = len(x.past.ids)
        before = [leaf[:, :n].clone() for leaf in tree.leaves(x.past.cache.layers)]
        prompt = [*x.past.ids, 11, 12]
        same(row(prompt, past=x.past, max_new_tokens=4)[0], whole(prompt, max_new_tokens=4))
        after = [leaf[:, :n] for leaf in tree.leaves(x.past.cache.layers)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_cache_that_cannot_forget_is_made_anew(counted):
    """A state without an axis of slots, as of a recurrence, and a cache that is no `Cache`."""
    cache = MODEL.init_cache(1, 8)
    assert shortened(cache, 3).length == 3 and shortened(cache.layers, 3) is None
    assert shortened(Cache((torch.zeros(1, 4),), cache.slots, cache.length), 3) is None
    model, lengths = counted

    class Opaque(Cache):
        def shortened(self, n):
            return None

    def init_cache(*args):
        return Opaque(*MODEL.init_cache(*args))

    model = model._replace(init_cache=init_cache)
    _, past = row([1, 2, 3, 4], past=empty_past(model, PARAMS), model=model, max_new_tokens=3)
    past = past._replace(cache=Opaque(*past.cache))
    same(row([1, 2, 9, 9], past=past, model=model, max_new_tokens=4)[0], whole([1, 2, 9, 9], max_new_tokens=4))
    longer = [*past.ids, 5]
    same(row(longer, past=past, model=model, max_new_tokens=4)[0], whole(longer, max_new_tokens=4))
    assert lengths == [4, 4, 1]


def test_the_end_of_the_slots_and_of_the_context():
    """By hand: a row of n slots has room for n processed tokens and one more."""
    found, _ = row([1, 2, 3], past=empty_past(MODEL, PARAMS, 8), max_new_tokens=30)
    assert len(found[0]) == 6 and found[3] == "length"
    same(row([1] * 35, max_new_tokens=30)[0], whole([1] * 35, max_new_tokens=30))
    assert not list(continued(MODEL, PARAMS, [1] * 40, KEY, max_new_tokens=3))
    assert not list(continued(MODEL, PARAMS, [1], KEY, max_new_tokens=0))
    with pytest.raises(ValueError, match="prompt: 9 ids do not fit into the past's 8 slots"):
        continued(MODEL, PARAMS, [1] * 9, KEY, empty_past(MODEL, PARAMS, 8), max_new_tokens=1)


def test_dynamic_positions():
    """Their scale depends on a length: that of the context, whatever the slots and the chunks."""
    scaled = transformer.Config(
        29, 64, 24, 2, 4, rope_scaling=transformer.RopeScaling("dynamic_ntk", factor=2.0, original_length=16)
    )
    model, params = transformer.make(scaled), transformer.init(random.key(1), scaled, dtype=torch.float64)
    new = list(continued(model, params, [1, 2, 3], KEY, empty_past(model, params, 50), max_new_tokens=20))
    prompt = [1, 2, 3, *(x.token for x in new), 4]
    found = list(continued(model, params, prompt, KEY, new[-1].past, max_new_tokens=20))
    out = generate(model, params, [prompt], KEY, max_new_tokens=20)
    assert [x.token for x in found] == out.tokens[0].tolist()
    torch.testing.assert_close(torch.tensor([x.logprob for x in found]), out.logprobs[0], rtol=1e-6, atol=1e-6)


def test_what_is_refused():
    """Arguments at the call; logits that are not finite at their token."""
    bad = tree.map(lambda x: x * torch.nan, PARAMS)
    with pytest.raises(ValueError, match=r"not finite .* in rows 0 after 0 new tokens"):
        next(continued(MODEL, bad, [1], KEY, max_new_tokens=2))
    cases = [
        ({"prompt": []}, r"prompts\[0\] must be 1..40"),
        ({"prompt": [29]}, "29"),
        ({"max_new_tokens": -1}, "max_new_tokens must be"),
        ({"key": random.split(KEY, 2)}, "key must be one key"),
        ({"stop": Stop(strings=["a"])}, "decode_fn"),
    ]
    for options, message in cases:
        options = {"prompt": [1], "key": KEY, "max_new_tokens": 2, **options}
        with pytest.raises(ValueError, match=message):
            continued(MODEL, PARAMS, **options)
