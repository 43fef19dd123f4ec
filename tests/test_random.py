"""Random: known answers of Threefry, jax.random as the oracle of every draw, shards, vmap, compile, moments."""

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import random, tree
from purelm.random import threefry

M = 0xFFFFFFFF
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def threefry_by_hand(key, counter):
    """Threefry-2x32-20 on Python integers, from the paper's definition: rounds, with a key injection every fourth."""
    k = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x = [(counter[0] + k[0]) & M, (counter[1] + k[1]) & M]
    for i in range(20):
        r = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
        x[0] = (x[0] + x[1]) & M
        x[1] = (x[1] << r & M | x[1] >> 32 - r) ^ x[0]
        if i % 4 == 3:
            s = i // 4 + 1
            x = [(x[0] + k[s % 3]) & M, (x[1] + k[(s + 1) % 3] + s) & M]
    return tuple(x)


def words(*values):
    return [torch.tensor(np.array(v, dtype=np.uint32).view(np.int32)) for v in values]


@pytest.mark.parametrize(
    ("key", "counter", "answer"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((M, M), (M, M), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_known_answers(key, counter, answer):
    """Oracle: Random123's file of known answers (kat_vectors, threefry2x32 20)."""
    out = threefry.threefry2x32(*words(*key), *words(*counter))
    assert tuple(int(x) & M for x in out) == answer == threefry_by_hand(key, counter)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**63 - 2))
def test_bits_of_any_key_and_counter(seed, index):
    """Oracle: Threefry on Python integers; the counter's high word counts from 2**32 on."""
    key = random.key(seed)
    out = random.bits(key, (2,), index=index)
    for i in range(2):
        a, b = threefry_by_hand(key.tolist(), ((index + i) >> 32, (index + i) & M))
        assert out[i].item() == a ^ b
    assert random.fold_in(key, index).tolist() == list(threefry_by_hand(key.tolist(), (index >> 32, index & M)))


def test_bits_cross_two_to_the_thirty_two():
    """Oracle: Threefry on Python integers, on both sides of the counter's carry, in one draw and in explicit form."""
    key, start = random.key(5), 2**32 - 3
    out = random.bits(key, (6,), index=start)
    hand = [threefry_by_hand((0, 5), ((start + i) >> 32, (start + i) & M)) for i in range(6)]
    assert out.tolist() == [a ^ b for a, b in hand]
    assert torch.equal(random.bits(key, (6,), index=torch.arange(6) + start), out)
    assert torch.equal(random.bits(key, (6,), index=torch.tensor(start)), out)


# What jax draws ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jax():
    jax = pytest.importorskip("jax")
    assert jax.config.jax_threefry_partitionable and jax.config.jax_default_prng_impl == "threefry2x32"
    return jax


@pytest.fixture
def jax64(jax):
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield jax
    jax.config.update("jax_enable_x64", before)


SHAPES = [(), (1,), (7,), (3, 0, 2), (123, 7), (40000,)]  # the last is longer than one pass on a CPU
SEEDS = [0, 1, 42, 2**31, 2**32 - 1]


def equal(theirs, ours):
    theirs = np.asarray(theirs).astype(np.float64)
    return theirs.shape == tuple(ours.shape) and np.array_equal(theirs, ours.double().numpy())


@pytest.mark.parametrize("seed", SEEDS)
def test_keys_equal_jax(jax, seed):
    """Oracle: jax.random's key data; split in its shapes, fold_in of several numbers."""
    theirs, ours = jax.random.PRNGKey(seed), random.key(seed)
    assert equal(theirs, ours)
    assert ours.dtype == torch.int64 and ours.shape == (2,)
    assert equal(jax.random.key_data(jax.random.key(seed)), ours)
    for n in (1, 2, 5, (2, 3), (4, 0)):
        assert equal(jax.random.split(theirs, n), random.split(ours, n))
    for data in (0, 1, 1000, 2**32 - 1):
        assert equal(jax.random.fold_in(theirs, data), random.fold_in(ours, data))
        assert equal(jax.random.fold_in(theirs, data), random.fold_in(ours, torch.tensor(data)))
    assert torch.equal(random.split(ours, 5)[3], random.fold_in(ours, 3))


@pytest.mark.parametrize("seed", [0, 2**32, 2**32 + 5, 2**62 + 7, 2**63 - 1, -1, -(2**40), -(2**63)])
def test_seeds_of_64_bits_equal_jax_with_x64(jax64, seed):
    """Oracle: jax with jax_enable_x64. Without it jax drops the high word."""
    assert equal(jax64.random.PRNGKey(seed), random.key(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_and_uniforms_equal_jax_exactly(jax, shape):
    """Oracle: jax.random; bits and the floats made of them by exact arithmetic."""
    theirs, ours = jax.random.PRNGKey(42), random.key(42)
    assert equal(jax.random.bits(theirs, shape), random.bits(ours, shape))
    assert equal(jax.random.uniform(theirs, shape), random.uniform(ours, shape))
    assert equal(jax.random.uniform(theirs, shape, minval=-1, maxval=1), random.uniform(ours, shape, -1.0, 1.0))
    for name in ("bfloat16", "float16"):
        theirs_half = jax.random.uniform(theirs, shape, getattr(jax.numpy, name))
        assert equal(theirs_half, random.uniform(ours, shape, dtype=getattr(torch, name)))


@pytest.mark.parametrize("shape", SHAPES)
def test_floats_equal_jax_to_rounding(jax, shape):
    """Oracle: jax.random in float32. Its erf_inv and log round to a few ulp (more beside 0 and the bounds)."""
    theirs, ours = jax.random.PRNGKey(3), random.key(3)

    def close(a, b, atol):
        assert b.dtype == torch.float32 and tuple(b.shape) == a.shape
        np.testing.assert_allclose(np.asarray(a), b.numpy(), rtol=1e-5, atol=atol)

    # An ulp of a bound (6e-8) at the end of erf_inv's range, where its slope is about 250 (3 sigma): 2e-5.
    close(jax.random.normal(theirs, shape), random.normal(ours, shape), 1e-6)
    close(jax.random.truncated_normal(theirs, -3, 3, shape), random.truncated_normal(ours, shape, -3, 3), 2e-5)
    close(jax.random.truncated_normal(theirs, -0.5, 2, shape), random.truncated_normal(ours, shape, -0.5, 2), 2e-6)
    close(jax.random.gumbel(theirs, shape), random.gumbel(ours, shape), 1e-6)
    close(jax.random.uniform(theirs, shape, minval=1e-3, maxval=1.7), random.uniform(ours, shape, 1e-3, 1.7), 2e-7)


def test_double_floats_equal_jax(jax64):
    """Oracle: jax.random in float64: 64 bits an element; uniforms exactly, normals to 1e-12 of rounding."""
    theirs, ours = jax64.random.PRNGKey(42), random.key(42)
    shape = (50, 21)
    assert equal(jax64.random.uniform(theirs, shape, "float64"), random.uniform(ours, shape, dtype=torch.float64))
    for a, b in (
        (jax64.random.normal(theirs, shape, "float64"), random.normal(ours, shape, torch.float64)),
        (jax64.random.gumbel(theirs, shape, "float64"), random.gumbel(ours, shape, torch.float64)),
    ):
        np.testing.assert_allclose(np.asarray(a), b.numpy(), rtol=1e-11, atol=1e-12)


def test_half_floats_equal_jax_to_rounding(jax):
    """Oracle: jax.random in half precision, to two ulp (jax rounds between operations, purelm once)."""
    theirs, ours = jax.random.PRNGKey(7), random.key(7)
    for name, ulp in (("bfloat16", 2.0**-8), ("float16", 2.0**-11)):
        dtype = getattr(torch, name)
        b = random.normal(ours, (500,), dtype)
        a = np.asarray(jax.random.normal(theirs, (500,), getattr(jax.numpy, name))).astype(np.float32)
        assert b.dtype == dtype
        np.testing.assert_allclose(a, b.float().numpy(), rtol=4 * ulp, atol=4 * ulp)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 10), (-5, 1000), (0, 2**16), (0, 70000), (-(2**31), 2**31 - 1), (0, 2**31 - 1), (5, 6), (-3, 0)],
)
def test_randint_equals_jax(jax, low, high):
    """Oracle: jax.random.randint in int32, modulo bias and all."""
    theirs, ours = jax.random.PRNGKey(42), random.key(42)
    out = random.randint(ours, (77, 13), low, high)
    assert equal(jax.random.randint(theirs, (77, 13), low, high), out)
    assert out.dtype == torch.int64 and out.min() >= low and out.max() < high


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 10), (-5, 2**40), (0, 2**33 + 1), (0, 2**32), (-(2**60), 2**61), (0, 2**62), (2**61, 2**61 + 3), (-7, 70000)],
)
def test_randint_of_64_bits_equals_jax(jax64, low, high):
    """Oracle: jax.random.randint in int64 (uint64 arithmetic, which torch has not)."""
    theirs, ours = jax64.random.PRNGKey(42), random.key(42)
    out = random.randint(ours, (301,), low, high, n_bits=64)
    assert np.array_equal(np.asarray(jax64.random.randint(theirs, (301,), low, high, dtype="int64")), out.numpy())
    if not -(2**31) <= low <= high <= 2**31:
        assert torch.equal(random.randint(ours, (301,), low, high), out)


@pytest.mark.parametrize("n", [0, 1, 2, 10, 1000, 3001])
def test_permutation_equals_jax(jax, n):
    """Oracle: jax.random.permutation."""
    out = random.permutation(random.key(9), n)
    assert equal(jax.random.permutation(jax.random.PRNGKey(9), n), out)
    assert out.sort().values.tolist() == list(range(n))


def test_categorical_bernoulli_choice_equal_jax(jax):
    """Oracle: jax.random; discrete results, equal although their floats agree only to rounding."""
    theirs, ours = jax.random.PRNGKey(1), random.key(1)
    logits = np.random.default_rng(0).normal(size=(300, 33)).astype(np.float32)
    for axis in (-1, 0, 1):
        out = random.categorical(ours, torch.from_numpy(logits), axis=axis)
        assert equal(jax.random.categorical(theirs, logits, axis=axis), out)
    assert equal(jax.random.bernoulli(theirs, 0.3, (500,)), random.bernoulli(ours, 0.3, (500,)))
    assert equal(jax.random.bernoulli(theirs), random.bernoulli(ours))
    p = np.linspace(0, 1, 101, dtype=np.float32)
    assert equal(jax.random.bernoulli(theirs, p), random.bernoulli(ours, torch.from_numpy(p)))
    weights = np.array([0.1, 0.5, 0.0, 0.4], np.float32)
    values = np.array([[1, 2], [3, 4], [5, 6], [7, 8]])
    for replace in (True, False):
        for a in (4, values):
            for p in (None, weights):
                mine = random.choice(
                    ours,
                    a if isinstance(a, int) else torch.from_numpy(a),
                    (3,),
                    replace,
                    None if p is None else torch.from_numpy(p),
                )
                assert equal(jax.random.choice(theirs, a, (3,), replace, p), mine)


# Shards, transformations --------------------------------------------------------------------------------------------

DRAWS = {
    "bits": random.bits,
    "uniform": lambda key, shape, **kw: random.uniform(key, shape, -2.0, 3.0, **kw),
    "uniform64": lambda key, shape, **kw: random.uniform(key, shape, dtype=torch.float64, **kw),
    "normal": random.normal,
    "truncated_normal": lambda key, shape, **kw: random.truncated_normal(key, shape, -3.0, 3.0, **kw),
    "gumbel": random.gumbel,
    "bernoulli": lambda key, shape, **kw: random.bernoulli(key, 0.3, shape, **kw),
    "randint": lambda key, shape, **kw: random.randint(key, shape, -4, 10**6, **kw),
    "randint64": lambda key, shape, **kw: random.randint(key, shape, -4, 10**12, **kw),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_shard_draws_its_part_of_the_whole(name):
    """Oracle: slicing the whole draw. Rows by their first index, any block by block_index."""
    draw, key = DRAWS[name], random.key(11)
    whole = draw(key, (12, 10))
    assert torch.equal(draw(key, (4, 10), index=40), whole[4:8])
    assert torch.equal(draw(key, (4, 10), index=torch.tensor(40)), whole[4:8])
    block = random.block_index((12, 10), (3, 5), (6, 4))
    assert torch.equal(draw(key, (6, 4), index=block), whole[3:9, 5:9])
    assert torch.equal(draw(key, (), index=17), whole.reshape(-1)[17])


@given(st.data())
def test_block_index_is_a_slice_of_arange(data):
    """Oracle: slicing arange."""
    whole = data.draw(st.lists(st.integers(1, 5), max_size=3))
    start = [data.draw(st.integers(0, n - 1)) for n in whole]
    shape = [data.draw(st.integers(0, n - s)) for n, s in zip(whole, start, strict=True)]
    expected = torch.arange(math.prod(whole)).reshape(whole)
    for axis, (s, n) in enumerate(zip(start, shape, strict=True)):
        expected = expected.narrow(axis, s, n)
    assert torch.equal(random.block_index(whole, start, shape), expected)


@pytest.mark.parametrize("name", ["bits", "normal"])
def test_passes_of_a_long_draw_join(name, monkeypatch):
    """Oracle: the same draw in one pass; sizes around the multiples of a pass."""
    draw, key = DRAWS[name], random.key(2)
    long = draw(key, (1000,))
    monkeypatch.setattr(threefry, "CHUNK_CPU", 64)
    for n in (63, 64, 65, 128, 1000):
        assert torch.equal(draw(key, (n,)), long[:n])
        assert torch.equal(draw(key, (n,), index=torch.arange(n)), long[:n])
    assert torch.equal(draw(key, (8, 125)), long.reshape(8, 125))


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("name", DRAWS)
def test_vmap_over_keys_equals_a_loop(name, chunk, monkeypatch):
    """Oracle: a Python loop over keys. With passes of 16 the draw takes several, under vmap too."""
    if chunk:
        monkeypatch.setattr(threefry, "CHUNK_CPU", chunk)
    draw = DRAWS[name]
    keys = random.split(random.key(0), 3)
    batched = torch.func.vmap(lambda k: draw(k, (5, 7)))(keys)
    assert torch.equal(batched, torch.stack([draw(k, (5, 7)) for k in keys]))


def test_vmap_of_keys_categorical_permutation():
    """Oracle: a Python loop over keys; a row's sample depends on its own key and logits alone."""
    keys = random.split(random.key(0), 4)
    assert torch.equal(torch.func.vmap(random.split)(keys), torch.stack([random.split(k) for k in keys]))
    steps = torch.arange(4)
    folded = torch.func.vmap(random.fold_in)(keys, steps)
    assert torch.equal(folded, torch.stack([random.fold_in(k, i) for i, k in enumerate(keys)]))
    logits = random.normal(random.key(1), (4, 9))
    rows = torch.func.vmap(random.categorical)(keys, logits)
    assert rows.tolist() == [random.categorical(k, x).item() for k, x in zip(keys, logits, strict=True)]
    orders = torch.func.vmap(lambda k: random.permutation(k, 6))(keys)
    assert torch.equal(orders, torch.stack([random.permutation(k, 6) for k in keys]))


@pytest.mark.compile
def test_compiled_draws_equal_eager_ones():
    """Oracle: eager mode. Bits and uniforms exactly; floats through fp64 to one ulp, where libraries of maths differ.

    The lengths are no multiple of a vector's width, and longer than a pass.
    """
    n = 2**15 + 3

    def f(key, step):
        k1, k2 = random.split(random.fold_in(key, step))
        return {
            "bits": random.bits(k1, (n,), index=step),
            "uniform": random.uniform(k1, (3, 5), -1.0, 2.0),
            "normal": random.normal(k2, (1003,)),
            "gumbel": random.gumbel(k2, (7,)),
        }

    key, step = random.key(4), torch.tensor(3)
    eager, compiled = f(key, step), torch.compile(f, fullgraph=True)(key, step)
    for name in ("bits", "uniform"):
        assert torch.equal(compiled[name], eager[name]), name
    for name in ("normal", "gumbel"):
        torch.testing.assert_close(compiled[name], eager[name], rtol=2.4e-7, atol=1e-7)


@pytest.mark.compile
def test_every_draw_traces_into_one_graph():
    """Oracle: eager mode; under vmap inside the compiled function too."""

    def f(key):
        k1, k2 = random.split(key)
        names = ("uniform64", "truncated_normal", "randint64")
        out = {name: DRAWS[name](k1, (11,)) for name in names}
        out["order"] = random.permutation(k1, 5)
        out["class"] = torch.func.vmap(random.categorical)(random.split(k2, 3), out["uniform64"][:9].reshape(3, 3))
        return out

    eager, compiled = f(random.key(4)), torch.compile(f, fullgraph=True, backend="aot_eager")(random.key(4))
    assert all(torch.equal(compiled[name], x) for name, x in eager.items())


# Distributions and contracts ----------------------------------------------------------------------------------------


def test_moments():
    """Oracle: closed forms; 2**18 draws, bounds of five standard errors."""
    n, key = 2**18, random.key(123)
    u, z = random.uniform(key, (n,)).double(), random.normal(key, (n,)).double()
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * n) and abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    assert abs(z.mean()) < 5 / math.sqrt(n) and abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    g = random.gumbel(key, (n,)).double()
    assert abs(g.mean() - 0.5772156649) < 5 * math.pi / math.sqrt(6 * n)
    assert abs(random.bernoulli(key, 0.2, (n,)).double().mean() - 0.2) < 5 * math.sqrt(0.16 / n)
    # Variance of the normal truncated at +-3: 1 - 6 phi(3) / (Phi(3) - Phi(-3)) = 0.97334.
    t = random.truncated_normal(key, (n,), -3, 3).double()
    assert abs(t.mean()) < 5 / math.sqrt(n) and abs(t.var() - 0.97334) < 5 * math.sqrt(2 / n)
    counts = torch.bincount(random.randint(key, (n,), 0, 7), minlength=7)
    assert (counts - n / 7).abs().max() < 5 * math.sqrt(n * 6 / 49)
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    counts = torch.bincount(random.categorical(key, logits.expand(n, 3)), minlength=3) / n
    assert (counts - logits.exp()).abs().max() < 5 * math.sqrt(0.25 / n)


@pytest.mark.parametrize("dtype", FLOATS)
def test_ranges(dtype):
    """Uniforms lie in [low, high), truncated normals strictly inside, all finite."""
    key, n = random.key(0), 5000
    u = random.uniform(key, (n,), dtype=dtype)
    assert u.dtype == dtype and u.min() >= 0 and u.max() < 1
    v = random.uniform(key, (n,), 3.0, 4.0, dtype)
    assert v.min() >= 3 and v.max() <= 4  # rounding may reach high in half precision, as in jax
    t = random.truncated_normal(key, (n,), -0.25, 0.5, dtype)
    assert t.dtype == dtype and t.min() > -0.25 and t.max() < 0.5
    for draw in (random.normal, random.gumbel):
        x = draw(key, (n,), dtype)
        assert x.dtype == dtype and torch.isfinite(x).all()


def test_a_far_tail_stays_inside():
    """(6, 7) standard deviations: erf rounds both bounds to 1 in float32, and erfinv(1) is inf."""
    t = random.truncated_normal(random.key(0), (100,), 6.0, 7.0, torch.float64)
    assert t.min() > 6 and t.max() < 7


def test_streams_of_different_keys_are_not_correlated():
    """Oracle: independence; correlation of 2**16 draws within five standard errors."""
    k1, k2 = random.split(random.key(0))
    n = 2**16
    x = [random.normal(k, (n,)) for k in (k1, k2, random.fold_in(k1, 0), random.fold_in(k1, 1), random.key(0))]
    r = torch.corrcoef(torch.stack(x))
    assert (r - torch.eye(len(x))).abs().max() < 5 / math.sqrt(n)


def test_half_precision_logits_are_sampled_in_float32():
    """Oracle: the same logits in float32."""
    logits = random.normal(random.key(1), (64, 50)).bfloat16()
    assert torch.equal(random.categorical(random.key(2), logits), random.categorical(random.key(2), logits.float()))
    assert random.categorical(random.key(2), torch.tensor([-math.inf, 0.0, -math.inf])).item() == 1


def test_nothing_touches_the_global_generator_or_the_key():
    before, key = torch.get_rng_state(), random.key(3)
    for draw in DRAWS.values():
        draw(key, (10,))
    random.permutation(key, 10)
    random.split(random.fold_in(key, 1))
    assert torch.equal(torch.get_rng_state(), before) and key.tolist() == [0, 3]


def test_draws_follow_the_device_of_the_key():
    """The meta device: shapes without numbers, as for building a model's structure."""
    key = random.key(0, device="meta")
    assert random.normal(random.split(key)[0], (3, 4)).device.type == "meta"
    assert random.truncated_normal(key, (2**40,), -3, 3).shape == (2**40,)


def test_split_like_folds_in_each_path():
    """Oracle: fold_in of the path's crc32, which is how models draw their parameters (`leaf_key`)."""
    from purelm.models.leaves import leaf_key

    key = random.key(7)
    params = {"layers": [{"w": torch.zeros(2)}, {"w": torch.zeros(3), "none": None}], "b": (1.0, 2)}
    keys = random.split_like(key, params)
    assert tree.structure(keys) == tree.structure(params)
    for path, found in zip(tree.paths(keys), tree.leaves(keys), strict=True):
        assert torch.equal(found, random.fold_in(key, zlib.crc32(path.encode())))
        assert torch.equal(found, leaf_key(key, path))
    assert random.split_like(key, {}) == {} and random.split_like(key, None) is None


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(), min_size=2, max_size=8), st.integers(0, 9)
)
def test_split_like_of_fewer_leaves(t, seed):
    """Law: removing a leaf changes no other key; no key stands twice."""
    keys = random.split_like(random.key(seed), t)
    assert len({tuple(k.tolist()) for k in tree.leaves(keys)}) == len(tree.leaves(t))
    fewer = dict(list(t.items())[1:])
    for name, k in random.split_like(random.key(seed), fewer).items():
        assert k is keys[name] is None or torch.equal(k, keys[name])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: random.key(2**63), "seed is 9223372036854775808"),
        (lambda k: random.key(1.5), "seed is 1.5"),
        (lambda k: random.fold_in(k, -1), "data is -1"),
        (lambda k: random.fold_in(k, torch.zeros(2, dtype=torch.int64)), r"data has shape \(2,\)"),
        (lambda k: random.fold_in(k, torch.tensor(1.0)), "torch.float32"),
        (lambda k: random.normal(3, (2,)), r"normal: key is 3; .*: random.key\(3\) makes one"),
        (lambda k: random.normal(None, (2,)), "normal: key is None"),
        (lambda k: random.normal(k, 3), r"shape is 3; a sequence of integers .* as \(3,\)"),
        (lambda k: random.uniform(k, (2, -1)), r"shape is \(2, -1\)"),
        (lambda k: random.randint(k, (2.0,), 0, 3), r"shape is \(2.0,\)"),
        (lambda k: random.choice(k, 5, 2), "shape is 2"),
        (lambda k: random.normal(random.split(k), (2,)), r"shape \(2, 2\)"),
        (lambda k: random.uniform(k.int(), (2,)), "torch.int32"),
        (lambda k: random.uniform(k, (2,), dtype=torch.int64), "dtype is torch.int64"),
        (lambda k: random.uniform(k, (2,), index=-1), "index is -1"),
        (lambda k: random.uniform(k, (2,), index=torch.zeros(3, dtype=torch.int64)), r"shape \(3,\)"),
        (lambda k: random.truncated_normal(k, (2,), 1.0, 1.0), "lower 1.0 must be below upper 1.0"),
        (lambda k: random.randint(k, (2,), 3, 3), "low 3 must be below high 3"),
        (lambda k: random.randint(k, (2,), 0, 2**63), "must lie in"),
        (lambda k: random.randint(k, (2,), 0, 9, n_bits=16), "n_bits is 16"),
        (lambda k: random.bernoulli(k, torch.tensor([1])), "dtype is torch.int64"),
        (lambda k: random.categorical(k, torch.tensor([1, 2])), "dtype is torch.int64"),
        (lambda k: random.choice(k, 0), "0 elements"),
        (lambda k: random.choice(k, 3, (4,), replace=False), "4 draws without replacement from 3"),
        (lambda k: random.choice(k, 3, (4,), p=torch.ones(2)), r"p has shape \(2,\)"),
        (lambda k: random.split_like(3, {}), "split_like: key is 3"),
        (lambda k: random.split_like(k, {"a.b": 1, "a": {"b": 2}}), r"the paths 'a\.b' and 'a\.b' of two leaves give"),
        (
            lambda k: random.split_like(k, {"buckeroo": 1, "plumless": 2}),
            "'buckeroo' and 'plumless' of two leaves",
        ),
        (lambda k: random.block_index((4,), (2,), (3,)), r"\[2, 5\)"),
        (lambda k: random.block_index((4,), (2, 1), (3,)), "1 axes of whole, 2 of start"),
    ],
)
def test_errors_name_what_was_given(call, message):
    with pytest.raises(ValueError, match=message):
        call(random.key(0))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda key: random.categorical(key, torch.tensor([[0.0, 1.0], [math.nan, 0.0]])), "categorical: logits"),
        (lambda key: random.categorical(key, torch.tensor([math.inf, 0.0])), "categorical: logits"),
        (lambda key: random.categorical(key, torch.tensor([-math.inf, -math.inf])), "categorical: logits"),
        (lambda key: random.choice(key, 2, p=torch.tensor([0.5, math.nan])), "choice: p must be at least 0"),
        (lambda key: random.choice(key, 2, p=torch.tensor([1.5, -0.5])), "choice: p must be at least 0"),
        (lambda key: random.choice(key, 2, p=torch.zeros(2)), "choice: p must be .* above 0 somewhere"),
        (
            lambda key: random.choice(key, 3, (2,), replace=False, p=torch.tensor([0.0, 1.0, 0.0])),
            "choice: 2 draws without replacement, but p is above 0 for 1 elements",
        ),
        (lambda key: random.bernoulli(key, 1.5), r"bernoulli: p must be in \[0, 1\], got 1.5"),
        (lambda key: random.bernoulli(key, torch.tensor([0.5, math.nan])), "bernoulli: p must be in"),
    ],
)
def test_what_is_no_distribution_is_refused(draw, message):
    """Oracle: the definition. argmax of NaN is the NaN's place, a plausible class."""
    with pytest.raises(ValueError, match=message):
        draw(random.key(0))
    assert int(random.categorical(random.key(0), torch.tensor([-math.inf, 0.0]))) == 1
