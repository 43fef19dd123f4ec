"""What the strategies of tensors and trees draw, and what all refuse. Oracles: torch, counts over many draws.

Coverage is exact: every choice that a strategy lists is drawn, which many derandomised draws show. What a strategy
shrinks to is what `find` finds.
"""

import collections
import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import random, tree
from purelm.models.transformer import Config
from purelm.testing import strategies as plm
from purelm.testing.laws import assert_trees_equal
from purelm.testing.strategies.batch import KINDS
from purelm.testing.strategies.tensor import LAYOUTS, VALUES, drawn
from tests.testing.drawing import draws, reached, simplest

CFG = Config(vocab_size=11, context_length=9, d_model=8, n_layers=1, n_heads=2)


# ---- Shapes, tensors, keys


def test_shapes_reach_every_size():
    found = draws(plm.shapes(max_dims=3, max_side=9))
    assert {len(s) for s in found} == {0, 1, 2, 3}
    assert {n for s in found for n in s} == set(range(10))
    sizes = collections.Counter(n for s in found for n in s)
    assert min(sizes[1], sizes[3], sizes[7]) > max(sizes[n] for n in (2, 4, 5, 6, 8, 9))
    assert 0 not in {n for s in draws(plm.shapes(allow_empty=False)) for n in s}
    assert {len(s) for s in draws(plm.shapes(2, 2))} == {2}
    assert simplest(plm.shapes()) == () and simplest(plm.shapes(2, 4)) == (1, 1)
    assert simplest(plm.shapes(), lambda s: math.prod(s) > 4) == (5,)
    assert simplest(plm.shapes(), lambda s: 0 in s) == (0,)


@pytest.mark.parametrize("dtype", [*plm.FLOATS, *plm.INTEGERS], ids=str)
def test_tensors_of_each_dtype(dtype):
    """Each kind and layout; what is not special is finite; twice the same seed gives the same bits."""
    for x in draws(plm.tensors(dtype=dtype, values=VALUES[:3], layouts=LAYOUTS), 200):
        assert x.dtype == dtype and bool(torch.isfinite(x).all())
        assert x.dtype != torch.uint8 or int(x.max() if x.numel() else 0) <= 255
    for kind in VALUES:
        once, again, other = (drawn(kind, seed, 3, (4, 5), dtype) for seed in (6, 6, 7))
        assert_trees_equal(once, again)
        assert not torch.equal(once, other) and not torch.equal(once, drawn(kind, 6, 4, (4, 5), dtype))


@pytest.mark.parametrize("dtype", plm.FLOATS, ids=str)
def test_kinds_of_floating_values(dtype):
    """Oracles: the sets and moments in the docstring; torch.finfo."""
    info, many = torch.finfo(dtype), (4000,)
    small = {float(v) for seed in range(2, 40) for v in drawn("small", seed, 0, (10,), dtype)}
    assert small == {float(n) for n in range(-4, 5)}
    assert not drawn("small", 0, 1, (9,), dtype).any() and bool((drawn("small", 1, 1, (9,), dtype) == 1).all())
    normal = drawn("normal", 5, 0, many, dtype).double()
    assert abs(float(normal.mean())) < 0.06 and abs(float(normal.std()) - 1.0) < 0.05  # 4 and 5 standard errors
    least, most = math.frexp(info.tiny)[1], math.frexp(info.max)[1]
    wide = drawn("extreme", 1, 0, (20_000,), dtype)
    exponents = torch.frexp(wide.double()).exponent
    assert {*exponents.tolist()} == {*range(least, most + 1)}
    assert bool((wide > 0).any()) and bool((wide < 0).any())
    one_power = [torch.frexp(drawn("extreme", seed, 0, (50,), dtype).double()).exponent for seed in range(2, 400, 2)]
    assert all(int(e.max() - e.min()) <= 1 for e in one_power)  # 1: a mantissa that rounds up to 2
    assert min(int(e.min()) for e in one_power) < least + 12 and max(int(e.max()) for e in one_power) > most - 12
    special = drawn("special", 3, 0, many, dtype)
    shown = {
        "nan": special.isnan(), "inf": special == math.inf, "-inf": special == -math.inf,
        "0": (special == 0) & ~special.signbit(), "-0": (special == 0) & special.signbit(),
        "least": special == info.tiny * info.eps, "-least": special == -info.tiny * info.eps,
        "tiny": special == info.tiny, "-tiny": special == -info.tiny,
        "max": special == info.max, "-max": special == info.min,
    }  # fmt: skip
    assert all(0.01 < float(where.float().mean()) < 0.04 for where in shown.values())  # each 1 / 44, on average
    for seed in range(50):
        one = drawn("special", seed, 0, (), dtype)
        assert not bool(one.isfinite()) or abs(float(one)) in (0.0, info.tiny * info.eps, info.tiny, info.max)


@pytest.mark.parametrize("dtype", plm.INTEGERS, ids=str)
def test_kinds_of_integers(dtype):
    values = {kind: {int(v) for s in range(200) for v in drawn(kind, s, 0, (50,), dtype)} for kind in VALUES}
    if dtype == torch.bool:
        assert all(found == {0, 1} for found in values.values())
        return
    info, signed = torch.iinfo(dtype), dtype != torch.uint8
    assert values["small"] == ({*range(-4, 5)} if signed else {*range(5)})
    assert values["normal"] == ({*range(-100, 101)} if signed else {*range(101)})
    assert values["special"] == values["small"] | {info.min, info.max}
    assert max(values["extreme"]) > 0.9 * info.max and min(values["extreme"]) <= 0.9 * info.min
    assert values["extreme"] & {*range(5)}, "small ones, too"


def test_layouts():
    """Oracles: torch's strides and offsets; the elements between are seen where memory is read as if contiguous."""
    shape = st.just((3, 4, 5))
    (x,) = draws(plm.tensors((3, 4, 5), layouts="transposed"), 1)
    assert x.shape == (3, 4, 5) and x.stride() == (1, 3, 12)
    for x in draws(plm.tensors(shape, layouts="sliced"), 5):
        assert x.storage_offset() == 99 + 11 + 1 and x.stride() == (198, 22, 2)
        assert bool(torch.as_strided(x, (3, 4, 5), (20, 5, 1), 0).isnan().any()) and bool(torch.isfinite(x).all())
    expanded = draws(plm.tensors(shape, layouts="expanded", values="normal"), 100)
    assert {x.stride().index(0) for x in expanded} == {0, 1, 2}
    for x in expanded:
        axis = x.stride().index(0)
        assert x.shape == (3, 4, 5) and torch.equal(x, x.narrow(axis, 0, 1).expand(x.shape)) and bool(x.any())
    scalars = draws(plm.tensors((), layouts=LAYOUTS), 200)
    assert {x.storage_offset() for x in scalars} == {0, 1} and {x.shape for x in scalars} == {torch.Size()}
    for x in draws(plm.tensors(plm.shapes(min_dims=2), layouts=("transposed", "sliced")), 200):
        assert x.numel() <= 1 or 1 in x.shape or not x.is_contiguous()
    for layout in LAYOUTS:
        (x,) = draws(plm.tensors((2, 0), layouts=layout), 1)
        assert x.shape == (2, 0)


def test_all_combinations_of_tensors():
    def features(x):
        kind = "small" if not (x.double() % 1).any() else "other"
        yield x.dtype, kind, "contiguous" if x.is_contiguous() else "strided"

    strategy = plm.tensors((4, 5), plm.FLOATS, values=VALUES[:2], layouts=LAYOUTS[:2])
    seen = reached(strategy, features, itertools.product(plm.FLOATS, ("small", "other"), ("contiguous", "strided")))
    assert len(seen) == 16


def test_tensors_shrink_to_zeros_and_to_the_first_choices():
    assert_trees_equal(simplest(plm.tensors()), torch.zeros(()))
    x = simplest(plm.tensors(dtype=plm.FLOATS, values=VALUES, layouts=LAYOUTS), lambda x: x.numel() > 2)
    assert_trees_equal(x, torch.zeros(3))
    assert_trees_equal(simplest(plm.tensors(), lambda x: bool(x.any())), torch.ones(()))
    x = simplest(plm.tensors((2, 2), values=VALUES), lambda x: bool(x.isnan().any()))
    assert bool(x.isnan().any()) and x.is_contiguous()


def test_keys_have_all_bits():
    found = torch.stack(draws(plm.keys()))
    assert found.shape[1:] == (2,) and found.dtype == torch.int64
    for bit in range(32):
        assert bool(((found >> bit) & 1 == 1).any(0).all()) and bool(((found >> bit) & 1 == 0).any(0).all())
    assert bool((found >= 0).all()) and bool((found < 2**32).all())
    assert torch.equal(simplest(plm.keys()), random.key(0))
    assert torch.equal(simplest(plm.keys(), lambda key: not key[0] and int(key[1]) > 9), random.key(10))


# ---- Trees


def parts(t):
    """What occurs in a tree."""
    if isinstance(t, dict | list | tuple):
        yield type(t).__name__ if t else f"empty {type(t).__name__}"
        for child in t.values() if isinstance(t, dict) else t:
            yield from parts(child)
    else:
        yield "None" if t is None else "leaf"
        if t is not None:
            yield t.dtype
            yield "empty tensor" if not t.numel() else t.ndim


def test_trees_have_every_part():
    kinds = {"dict", "list", "tuple", "Pair", "empty dict", "empty list", "empty tuple", "None", "leaf", *plm.FLOATS}
    kinds |= {0, 1, 2, "empty tensor"}
    more = {"bare leaf", "bare None", "mixed dtypes", "many leaves", "nested"}

    def features(t):
        yield from parts(t)
        if isinstance(t, torch.Tensor) or t is None:
            yield "bare None" if t is None else "bare leaf"
        if len({x.dtype for x in tree.leaves(t)}) > 2:
            yield "mixed dtypes"
        if len(tree.leaves(t)) > 6:
            yield "many leaves"
        if any(path.count(".") > 1 for path in tree.paths(t)):
            yield "nested"

    assert reached(plm.trees(), features, kinds | more) == kinds | more


def test_options_of_trees():
    full = draws(plm.trees(none=False, empty=False), 100)
    assert all(tree.leaves(t) for t in full)
    assert {part for t in full for part in parts(t) if str(part).startswith(("None", "empty"))} == {"empty tensor"}
    some = draws(plm.trees(st.integers(), containers=("list", "dict"), names=st.sampled_from(["w.0", "b"])), 100)
    names = {name for t in some for path in tree.paths(t) for name in path.replace("w.0", "w").split(".")}
    assert names >= {"w", "b", "0", "1"} and all(isinstance(x, int) for t in some for x in tree.leaves(t))
    assert not any("tuple" in str(tree.structure(t)) or "Pair" in str(tree.structure(t)) for t in some)
    assert max(len(tree.leaves(t)) for t in draws(plm.trees(max_leaves=2), 100)) <= 2


def test_trees_shrink():
    assert simplest(plm.trees(), lambda t: isinstance(t, dict)) == {}
    three = simplest(plm.trees(), lambda t: isinstance(t, list) and len(tree.leaves(t)) == 3)
    assert all(torch.equal(x, torch.zeros(())) for x in tree.leaves(three))


@given(plm.trees(), st.data())
def test_like(example, data):
    """Oracle: the example, leaf by leaf."""
    other = data.draw(plm.like(example, values=VALUES, layouts=LAYOUTS))
    assert tree.structure(other) == tree.structure(example)
    narrow = data.draw(plm.like(example, dtype=torch.bfloat16))
    for x, y, z in zip(tree.leaves(example), tree.leaves(other), tree.leaves(narrow), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype) and (x.shape, torch.bfloat16) == (z.shape, z.dtype)


def test_like_keeps_what_is_no_floating_tensor():
    example = {"ids": torch.tensor([3, 4]), "w": torch.ones(9), "v": torch.ones(9), "name": "adam", "none": None}
    for other in draws(plm.like(example, values="normal"), 20):
        assert other["ids"] is example["ids"] and other["name"] == "adam" and other["none"] is None
        assert not torch.equal(other["w"], example["w"]) and not torch.equal(other["w"], other["v"])
    assert torch.equal(example["w"], torch.ones(9))
    assert not simplest(plm.like(example))["w"].any()


def test_alike():
    for n in (1, 2, 3):
        for several in draws(plm.alike(plm.trees(), n), 50):
            assert len(several) == n and len({str(tree.structure(t)) for t in several}) == 1
    pairs = draws(plm.alike(plm.trees(none=False, empty=False), values="normal"), 100)
    differ = [any(not torch.equal(x, y) for x, y in zip(*map(tree.leaves, pair), strict=True)) for pair in pairs]
    assert sum(differ) > 80  # others have only leaves without elements
    first, second = simplest(plm.alike(plm.tensors(plm.shapes(1, 1))), lambda p: bool(p[1].any()))
    assert_trees_equal((first, second), (torch.zeros(1), torch.ones(1)))


# ---- All of them


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plm.shapes(-1), "min_dims=-1: allowed is 0 or more"),
        (lambda: plm.shapes(3, 2), "max_dims=2: allowed is 3 or more"),
        (lambda: plm.shapes(max_side=0), "max_side=0: allowed is 1 or more"),
        (lambda: plm.tensors(dtype=torch.complex64), "dtype must be one or some of torch.float32, .*; got torch.comp"),
        (lambda: plm.tensors(dtype=[]), r"dtype must be one or some of .*; got \[\]"),
        (lambda: plm.tensors(values="large"), "values must be .* small, normal, extreme, special; got 'large'"),
        (lambda: plm.tensors(layouts=("sliced", "x")), r"layouts must be .*; got \('sliced', 'x'\)"),
        (lambda: plm.trees(containers="set"), "containers must be .* dict, list, tuple, namedtuple; got 'set'"),
        (lambda: plm.trees(max_leaves=0), "max_leaves=0: allowed is 1 or more"),
        (lambda: plm.like({}, dtype=torch.int64), "dtype must be .*; got torch.int64"),
        (lambda: plm.like({}, values=()), r"values must be .*; got \(\)"),
        (lambda: plm.alike(plm.trees(), 0), "n=0: allowed is 1 or more"),
        (lambda: plm.alike(plm.trees(), values="x"), "values must be .*; got 'x'"),
        (lambda: plm.rope_scalings("cubic"), "kinds must be .* linear, ntk, dynamic_ntk, llama3, yarn; got 'cubic'"),
        (lambda: plm.configs(normm="rms"), "configs: Config has no fields normm; it has vocab_size, "),
        (lambda: plm.configs(d_model="24"), "configs: d_model='24': allowed is 1 or more"),
        (lambda: plm.configs(n_heads=None), "configs: n_heads=None: allowed is 1 or more"),
        (lambda: simplest(plm.configs(norm="batch")), "Config.norm must be one of rms, layer, none, got 'batch'"),
        (lambda: simplest(plm.configs(d_model=7, n_heads=2, head_dim=None)), "Config.n_heads must divide d_model 7"),
        (lambda: plm.batches("gpt2"), "of must be a Config, a Model or the size of the vocabulary, got 'gpt2'"),
        (lambda: plm.batches(0), "of=0: allowed is 1 or more"),
        (lambda: plm.batches(True), "of=True: allowed is 1 or more"),
        (lambda: plm.batches(5, "sparse"), "kinds must be .* full, padded, packed, masked; got 'sparse'"),
        (lambda: plm.batches(5, fields="mask"), "fields must be .* weights, segment_ids, denominator; got 'mask'"),
        (lambda: plm.batches(5, "packed", fields="weights"), "kinds: 'packed' needs the fields segment_ids"),
        (lambda: plm.batches(5, "padded", max_length=1), "kinds: 'padded' needs max_length 2 or more"),
        (lambda: plm.batches(5, "masked", max_rows=1), "kinds: 'masked' needs max_rows 2 or more, or nothing=True"),
        (lambda: plm.batches(CFG, max_length=10), "max_length=10: allowed is 1 to 9"),
        (lambda: plm.texts("<s>"), "special_tokens must be a sequence of strings that are not empty, got '<s>'"),
        (lambda: plm.texts([""]), r"special_tokens must be .*, got \[''\]"),
        (lambda: plm.texts(kinds="words"), "kinds must be one or some of letters, .*, any; got 'words'"),
        (lambda: plm.texts((), kinds="special"), "kinds: 'special' needs special_tokens, got none"),
        (lambda: plm.texts(max_run=1), "max_run=1: allowed is 2 or more"),
        (lambda: plm.byte_strings(0), "max_pieces=0: allowed is 1 or more"),
    ],
)  # fmt: skip
def test_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_draws_leave_the_global_generator_alone():
    """Law: torch's own generator is neither read nor written, and the same draws come whatever it holds.

    (hypothesis itself seeds it around each example, so values are formed here without it.)
    """

    def every():
        return [drawn(kind, 9, 2, (5,), dtype) for kind in VALUES for dtype in (*plm.FLOATS, *plm.INTEGERS)]

    before = torch.random.get_rng_state()
    once = every()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(1234)
    assert_trees_equal(once, every())


def test_absent_hypothesis_is_an_error_that_names_the_extra():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import purelm.testing\n"
        "try: import purelm.testing.strategies\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = "purelm.testing.strategies needs hypothesis: pip install 'purelm[testing]'"
    assert done.stdout.strip() == message, done.stderr


def test_kinds_are_listed_once():
    """The names in the docstrings are those of the code."""
    for names, function in [(VALUES, plm.tensors), (LAYOUTS[1:], plm.tensors), (KINDS, plm.batches)]:
        for name in names:
            assert f"{name}:" in function.__doc__, name
    assert all(kind in plm.texts.__doc__ for kind in plm.PIECES)
