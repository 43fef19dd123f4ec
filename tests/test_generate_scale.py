"""Generation of more rows than fit at a time: refilling, samples of one prompt, compiled steps, progress."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm import random
from purelm.generate import Progress, Sample, Sampling, Stop, generate, on_graph, stream
from purelm.generate.rows import begin, draw, make_step, uniforms
from purelm.models import transformer
from purelm.models.transformer import Config
from purelm.ops import REFERENCE
from tests.testing import foreign

CFG = Config(
    vocab_size=29, context_length=40, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=40, window=(6, None)
)
MODEL = transformer.make(CFG)
PARAMS = MODEL.init(random.key(0), dtype=torch.float64)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11] * 12, [12, 13], [14] * 39, [15] * 40, [16, 17, 18], [19]]
KEY = random.key(7)
SETTINGS = Sampling(temperature=0.9, top_k=20, top_p=0.95)
STOP = Stop(ids=[3, 5, 11, 17])  # rows end at different times


def letters(ids):
    return "".join(chr(97 + i) for i in ids)


def same(a, b):
    assert [t.tolist() for t in a.tokens] == [t.tolist() for t in b.tokens]
    assert a.finish_reasons == b.finish_reasons and a.texts == b.texts
    for name in ("logprobs", "model_logprobs"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("strings", [(), ("b", "cd")], ids=["ids", "strings"])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_rows_do_not_depend_on_batch_size(position, strings):
    """Oracle: all rows at once, and each row alone with its key."""
    model = transformer.make(Config(**{**vars(CFG), "position": position}))
    params = model.init(random.key(0), dtype=torch.float64)
    options = dict(
        max_new_tokens=15, sampling=SETTINGS, stop=Stop(STOP.ids, strings, min_new_tokens=2), decode_fn=letters
    )
    whole = generate(model, params, PROMPTS, KEY, **options)
    assert len({len(t) for t in whole.tokens}) > 3
    assert len(whole.tokens[6]) == 0  # its prompt fills the context
    for batch_size, read_every in ((1, 1), (2, 1), (3, 4), (4, 1), (100, 7)):
        same(whole, generate(model, params, PROMPTS, KEY, batch_size=batch_size, read_every=read_every, **options))
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model, params, [prompt], random.fold_in(KEY, i)[None], **options)
        assert alone.tokens[0].tolist() == whole.tokens[i].tolist()


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 3))
def test_samples_of_a_prompt(n_samples, batch_size, read_every):
    """Oracle: the prompts repeated, row for row with the same keys."""
    prompts = PROMPTS[:4]
    repeated = [p for p in prompts for _ in range(n_samples)]
    options = dict(max_new_tokens=5, sampling=SETTINGS, stop=STOP)
    found = generate(
        MODEL, PARAMS, prompts, KEY, n_samples=n_samples, batch_size=batch_size, read_every=read_every, **options
    )
    same(found, generate(MODEL, PARAMS, repeated, KEY, **options))


def counted(calls):
    """The model whose embedding notes the shapes of its tokens."""

    def embedding(ids, weight):
        calls.append(tuple(ids.shape))
        return REFERENCE.embedding(ids, weight)

    return transformer.make(CFG, REFERENCE._replace(embedding=embedding))


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 5])
def test_a_prompt_is_computed_once(batch_size):
    """Oracle: counted. Whatever comes in when, each prompt is in one prefill, and steps have batch_size rows."""
    calls = []
    generate(counted(calls), PARAMS, [[1] * 5, [2] * 7], KEY, n_samples=4, batch_size=batch_size, max_new_tokens=3)
    assert sum(b for b, t in calls if t > 1) == 2
    assert {b for b, t in calls if t == 1} == {batch_size or 8}


def test_free_places_are_filled_at_once():
    """Oracle: counted. Three rows of 9, 3 and 3 tokens, two at a time, take the 8 steps of the longest."""
    calls = []
    prompts = [[1] * 31, [2] * 37, [3] * 37]  # the context ends after 9, 3 and 3
    out = generate(counted(calls), PARAMS, prompts, KEY, batch_size=2, max_new_tokens=20)
    assert [len(t) for t in out.tokens] == [9, 3, 3]
    assert calls.count((2, 1)) == 8
    assert [c for c in calls if c[1] > 1] == [(2, 37), (1, 37)]


def test_model_logprobs():
    """Oracle: log_softmax of apply; logprobs are those after temperature and filters."""
    options = dict(max_new_tokens=8, stop=Stop(range(10), min_new_tokens=3))
    for sampling in (Sampling(), SETTINGS, Sampling(temperature=0.0)):
        out = generate(MODEL, PARAMS, PROMPTS[:3], KEY, sampling=sampling, **options)
        for prompt, tokens, logprobs in zip(PROMPTS, out.tokens, out.model_logprobs, strict=False):
            full = MODEL.apply(PARAMS, torch.tensor([[*prompt, *tokens.tolist()]]))[0].log_softmax(-1)
            expected = full[len(prompt) - 1 : -1].gather(-1, tokens[:, None])[:, 0]
            torch.testing.assert_close(logprobs, expected.float())
        if sampling.temperature == 0.0:
            assert all(bool((x == 0).all()) for x in out.logprobs)


def test_stream_of_more_rows_than_places():
    """Oracle: generate. Each row's entries, without None, are its tokens; in order of the rows' beginnings."""
    options = dict(max_new_tokens=12, sampling=SETTINGS, stop=STOP, batch_size=2)
    whole = generate(MODEL, PARAMS, PROMPTS, KEY, **options)
    for read_every in (1, 5):
        steps = list(stream(MODEL, PARAMS, PROMPTS, KEY, read_every=read_every, **options))
        for i, tokens in enumerate(whole.tokens):
            assert [s.tokens[i] for s in steps if s.tokens[i] is not None] == tokens.tolist()
            found = [s.model_logprobs[i] for s in steps if s.model_logprobs[i] is not None]
            torch.testing.assert_close(torch.tensor(found), whole.model_logprobs[i])
            ends = [s.finish_reasons[i] for s in steps if s.finish_reasons[i] is not None]
            assert ends == ([whole.finish_reasons[i]] if len(tokens) else [])
        assert all(any(t is not None for t in s.tokens) for s in steps)


@pytest.mark.parametrize("read_every", [2, 3, 16])
def test_tokens_after_a_stop_string_are_dropped(monkeypatch, read_every):
    """By hand: steps run on until the host reads, and what they bring does not count."""
    says = iter([1, 2, 3, 4, 5, 6, 7, 8])
    monkeypatch.setattr("purelm.generate.sampling.pick", lambda log_probs, u: torch.tensor([next(says)]))
    out = generate(
        MODEL, PARAMS, [[0]], KEY, max_new_tokens=8, read_every=read_every, stop=Stop([5], ["d"]), decode_fn=letters
    )
    assert out.tokens[0].tolist() == [1, 2, 3] and out.texts == ["bcd"] and out.finish_reasons == ["stop_string"]


def test_a_foreign_model():
    """Law: a model whose cache is a state without slots generates as it does alone, refilled too."""
    model = foreign.recurrent()
    params = model.init(random.key(0), torch.float64)
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    whole = generate(model, params, prompts, KEY, max_new_tokens=5, stop=Stop([3]))
    same(whole, generate(model, params, prompts, KEY, max_new_tokens=5, stop=Stop([3]), batch_size=2))
    ids = list(prompts[1])
    greedy = generate(model, params, prompts, KEY, max_new_tokens=5, sampling=Sampling(0.0), batch_size=3).tokens[1]
    for _ in range(5):
        ids.append(int(model.apply(params, torch.tensor([ids]))[0, -1].argmax()))
    assert greedy.tolist() == ids[1:]


def test_progress():
    """Oracle: counted by hand from the result."""
    seen = []
    out = generate(MODEL, PARAMS, PROMPTS, KEY, max_new_tokens=6, stop=STOP, batch_size=2, progress=seen.append)
    last = seen[-1]
    assert isinstance(last, Progress)
    assert (last.tokens, last.rows_done, last.rows) == (sum(map(len, out.tokens)), 9, 9)
    assert last.tokens_per_second == last.tokens / last.seconds
    for a, b in pairwise(seen):
        assert a.tokens < b.tokens and a.rows_done <= b.rows_done and a.seconds <= b.seconds
    assert seen[0].rows_done >= 1  # the prompt that fills the context


def test_sample_is_generate_without_the_model():
    """Types and call: partial(generate, model) serves where a Sample is asked for."""
    sample: Sample = partial(generate, MODEL)
    same(
        sample(PARAMS, PROMPTS, KEY, max_new_tokens=3, n_samples=2),
        generate(MODEL, PARAMS, PROMPTS, KEY, max_new_tokens=3, n_samples=2),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=0), "batch_size must be an integer of at least 1 or None, got 0"),
        (dict(batch_size=2.0), "batch_size must be an integer of at least 1 or None, got 2.0"),
        (dict(n_samples=0), "n_samples must be an integer of at least 1, got 0"),
        (dict(n_samples=None), "n_samples must be an integer of at least 1, got None"),
        (dict(read_every=True), "read_every must be an integer of at least 1 or None, got True"),
        (dict(n_samples=2, key=random.split(KEY, 9)), "key must be one key, or one for each of 18 rows, got shape"),
        (dict(prompts=[[1], [0] * 41]), r"prompts\[1\] must be 1..40 token ids"),
        (dict(prompts=[[29]]), r"prompts\[0\]: id 29 at position 0 is outside the vocabulary"),
        (dict(prompts=[]), "prompts must hold at least one row, got none"),
    ],
)
def test_bad_arguments(options, message):
    options = {"prompts": PROMPTS, "key": KEY, "max_new_tokens": 3, **options}
    with pytest.raises(ValueError, match=message):
        generate(MODEL, PARAMS, **options)
    with pytest.raises(ValueError, match=message):
        stream(MODEL, PARAMS, **options)


@pytest.mark.parametrize(("batch_size", "read_every"), [(None, 1), (2, 1), (2, 5)])
def test_logits_that_are_not_finite_later(batch_size, read_every):
    """By hand: position 6 has an embedding of NaN, so rows 0 and 3 of length 3 fail after 4 new tokens."""
    model = transformer.make(Config(**{**vars(CFG), "position": "learned"}))
    params = model.init(random.key(0), dtype=torch.float64)
    params["position_embeddings"]["weight"][6] = torch.nan
    options = dict(max_new_tokens=9, batch_size=batch_size, read_every=read_every)
    where = "rows 0, 3 after 4 new tokens; rows 2 after 5 new tokens" if read_every > 4 and batch_size is None else ""
    where = where or ("rows 0 after 4 new tokens" if batch_size else "rows 0, 3 after 4 new tokens: its")
    with pytest.raises(ValueError, match=f"not finite .NaN or inf. in {where}"):
        generate(model, params, [[1, 2, 3], [4] * 1, [5, 6], [1, 1, 1]], KEY, **options)
    short = generate(model, params, [[1, 2, 3], [4]], KEY, **{**options, "max_new_tokens": 4})
    assert [len(t) for t in short.tokens] == [4, 4]


def test_the_keys_are_folded():
    """Oracle: random.fold_in; and uniforms of a loop over rows."""
    keys = torch.stack([random.fold_in(KEY, i) for i in range(3)])
    found = uniforms(keys, [5, 0, 17], 4)
    for k, start, row in zip(keys, (5, 0, 17), found, strict=True):
        assert torch.equal(row, random.uniform(k, (start + 4,), dtype=torch.float64)[start:])


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_one_compilation_for_all_lengths_and_refills():
    """Oracle: eager. The step is compiled once, as one graph; rows come and go as values."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    options = dict(max_new_tokens=9, sampling=SETTINGS, stop=Stop(STOP.ids, min_new_tokens=2), batch_size=3)

    def wrap(step):
        return torch.compile(step, fullgraph=True, backend=counter)

    for read_every in (1, 4):
        found = generate(MODEL, PARAMS, PROMPTS, KEY, wrap_step=wrap, read_every=read_every, **options)
        same(found, generate(MODEL, PARAMS, PROMPTS, KEY, **options))
    same(
        generate(MODEL, PARAMS, PROMPTS[:4], KEY, wrap_step=on_graph, n_samples=3, **options),
        generate(MODEL, PARAMS, PROMPTS[:4], KEY, n_samples=3, **options),
    )
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_a_step_changes_no_row_it_was_given():
    """Exact: rows are values, and a finished row stays as it is."""
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    logits, cache = MODEL.prefill(PARAMS, prompts, MODEL.init_cache(2, 8, torch.float64), n_positions=40)
    stops = torch.zeros(29, dtype=torch.bool)
    rows = begin([1, 3], uniforms(random.split(KEY, 2), [3, 3], 3))
    rows = draw(logits, rows, Sampling(), Stop(), stops)
    assert rows.open_B.tolist() == [False, True] and rows.n_B.tolist() == [1, 1]
    before = [x.clone() for x in rows]
    after, cache = make_step(MODEL, Sampling(), Stop(), stops)(PARAMS, rows, cache)
    assert all(map(torch.equal, before, rows))
    assert after.n_B.tolist() == [1, 2] and cache.length.tolist() == [1, 4]
    assert torch.equal(after.tokens_BN[0], before[7][0])
