"""Steps that are recorded and kept from call to call, with a stand-in for CUDA graphs on a CPU.

Oracle: generation without a wrapper.
"""

from functools import partial

import pytest
import torch

from purelm import random, tree
from purelm.generate import Stop, batched, generate, graphs, on_graph, reused, stream
from purelm.models import transformer
from purelm.models.transformer import Config
from tests.test_generate_lagging import CFG, KEY, LAGGING, MODEL, PARAMS, of_stream, same


class Recorded:
    """A stand-in for `cuda_graph` on a CPU: donated memory receives the results, and donated tensors are emptied."""

    def __init__(self, f, donate=(), *, n_warmup):
        self.f, self.donate, self.n_calls = f, donate, 0

    def __call__(self, *args):
        self.n_calls += 1
        old = [x for i in self.donate for x in tree.leaves(args[i])]
        assert all(x.numel() or not x.ndim for x in old), "an emptied tensor was given"
        out = self.f(*tree.map(lambda x: x.data, args))
        if not self.donate:
            return tree.map(torch.clone, out)
        results, treedef = tree.flatten(out)
        places = [x.data for x in old]
        for place, x in zip(places, [x.clone() for x in results], strict=True):
            place.copy_(x)
        for x in old:
            x.data = x.new_empty(0)
        return tree.unflatten(treedef, places)


@pytest.fixture
def recorded(monkeypatch):
    """Generation takes the way through recorded steps; a list of these."""
    made = []

    def record(*args, **kwargs):
        made.append(Recorded(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(graphs, "cuda_graph", record)
    monkeypatch.setattr(graphs._Graphed, "many", graphs._Graphed._many)
    monkeypatch.setattr(batched, "found_tokens", LAGGING)
    return made


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11] * 12, [12, 13]]
OPTIONS = dict(max_new_tokens=9, stop=Stop([3, 5, 11]), batch_size=2, n_samples=2)


def test_calls_share_what_was_recorded(recorded):
    """Equal calls, other prompts, an exception between two steps, and one between calls."""
    wrap = reused(on_graph)
    plain = partial(generate, MODEL, PARAMS, max_new_tokens=9, stop=OPTIONS["stop"], n_samples=2)
    for key in (KEY, random.key(4)):
        same(generate(MODEL, PARAMS, PROMPTS, key, wrap_step=wrap, **OPTIONS), plain(PROMPTS, key))
    n = len(recorded)

    def angry(progress):
        raise KeyError(progress.tokens)

    with pytest.raises(KeyError) as held:  # which keeps the frames of generate, and their tensors
        generate(MODEL, PARAMS, PROMPTS, KEY, wrap_step=wrap, progress=angry, **OPTIONS)
    same(generate(MODEL, PARAMS, PROMPTS[::-1], KEY, wrap_step=wrap, **OPTIONS), plain(PROMPTS[::-1], KEY))
    assert held.value.args[0] > 0 and len(recorded) == n

    def broken(*args):
        raise MemoryError

    step, f = next((x, x.f) for x in recorded if x.donate)
    step.f = broken
    with pytest.raises(MemoryError):
        generate(MODEL, PARAMS, PROMPTS, KEY, wrap_step=wrap, **OPTIONS)
    step.f = f
    same(generate(MODEL, PARAMS, PROMPTS, KEY, wrap_step=wrap, **OPTIONS), plain(PROMPTS, KEY))


def test_parameters_in_place_elsewhere_and_donated(recorded):
    """Only parameters that lie elsewhere are recorded anew."""
    wrap = reused(on_graph)
    params = tree.map(torch.clone, PARAMS)
    for _ in range(2):
        found = generate(MODEL, params, PROMPTS, KEY, wrap_step=wrap, **OPTIONS)
        same(found, generate(MODEL, params, PROMPTS, KEY, **OPTIONS))
        n = len(recorded)
        tree.map(lambda x: x.mul_(1.5), params)
    elsewhere = generate(MODEL, PARAMS, PROMPTS, KEY, wrap_step=wrap, **OPTIONS)
    same(elsewhere, generate(MODEL, PARAMS, PROMPTS, KEY, **OPTIONS))
    assert len(recorded) == 2 * n
    # A step of training that donates gives others the memory of the parameters, and empties the old tensors.
    old = tree.map(torch.clone, PARAMS)
    generate(MODEL, old, PROMPTS, KEY, wrap_step=wrap, **OPTIONS)
    n = len(recorded)
    new = tree.map(lambda x: x.data, old)
    for x in tree.leaves(old):
        x.data = x.new_empty(0)
    few = {**OPTIONS, "batch_size": 3}
    same(generate(MODEL, new, PROMPTS, KEY, wrap_step=wrap, **few), generate(MODEL, new, PROMPTS, KEY, **few))
    assert len(recorded) == n


def test_two_models_and_two_streams_share_a_wrapper(recorded):
    """Streams of two models go on in turns."""
    wrap = reused(on_graph, n_kept=2)
    other = transformer.make(Config(**{**vars(CFG), "window": None, "n_layers": 1}))
    both = [(MODEL, PARAMS), (other, other.init(random.key(1), dtype=torch.float64)), (MODEL, PARAMS)]
    want = [generate(m, p, PROMPTS, random.key(i), **OPTIONS) for i, (m, p) in enumerate(both)]
    for _ in range(2):
        streams = [stream(m, p, PROMPTS, random.key(i), wrap_step=wrap, **OPTIONS) for i, (m, p) in enumerate(both)]
        steps = [[] for _ in both]
        while any([(x := next(s, None)) is not None and not found.append(x) for s, found in zip(streams, steps)]):  # noqa: B905
            pass
        for found, out in zip(steps, want, strict=True):
            assert of_stream(found, len(out.tokens))[0] == [t.tolist() for t in out.tokens]


def test_what_a_wrapper_makes_is_of_its_own_step():
    """By hand: another step is asked for while one is kept, as by another thread."""
    found = []

    class Made:
        def __init__(self, step):
            self.step = step

        def __del__(self):
            if self.step == "first":
                found.append(wrap("other").step)

    wrap = reused(Made, n_kept=1)
    wrap("first")
    assert wrap("second").step == "second" and found == ["other"]
