"""adamw in one launch: the interpreted kernel against the reference, and the optimizer as a whole.

Oracle: purelm.optim.adamw, which its own tests compare with torch and with Python floats. On the CPU the op is the
same float operations, so results are the same bits; the kernel's may differ by a last bit.
"""


import pytest
import torch

from purelm import tree
from purelm.kernels import adamw as module
from purelm.kernels import adamw_triton
from purelm.kernels.adamw import adamw, adamw_step
from purelm.optim import apply_updates, chain, clip_by_global_norm, is_matrix, partitioned, sgd
from purelm.optim.adamw import AdamWState
from purelm.optim.adamw import adamw as reference
from purelm.transforms import jit

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled here: see tests/gpu")
SHAPES = {"w": (7, 5), "long": (9001,), "wide": (96, 90), "b": (123,), "empty": (0, 3), "scalar": (), "last": (0,)}
VARIANTS = [
    {},
    {"betas": (0.9, 0.95), "weight_decay": 0.1, "mask": is_matrix},
    {"eps_placement": "uncorrected", "eps": 1e-5},
    {"eps_placement": "uncorrected", "decay_order": "after", "eps_root": 1e-3},
    {"decay_order": "after", "weight_decay": 0.3},
    {"betas": (0.0, 0.0), "eps": 1e-3, "eps_root": 1e-2, "weight_decay": 0.0},
    {"dtype": torch.bfloat16},
]


def trees(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    made = {k: torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for k, s in SHAPES.items()}
    return {**made, "frozen": None, "more": [made["b"] * 0.5]}


def run(optimizer, n=3, dtype=torch.float32):
    params = trees(0, dtype)
    state = optimizer.init(params)
    for i in range(n):
        updates, state = optimizer.update(trees(i + 1, dtype), state, params, torch.tensor(0.01 * (i + 1)))
        params = apply_updates(params, updates)
    return params, updates, state


def assert_same_bits(a, b):
    assert tree.structure(a) == tree.structure(b)
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.fixture
def launched(monkeypatch):
    """The op's CUDA implementation on CPU tensors: the launcher, interpreted. Gives the list of its launches."""
    from purelm.kernels import adamw_triton as kernels

    launches = []
    one, width = kernels._launch, kernels.COLUMNS
    monkeypatch.setattr(kernels, "_launch", lambda *args: launches.append(len(args[0]) // width) or one(*args))
    monkeypatch.setattr(module, "_step", kernels.step)
    return launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS, ids=lambda kwargs: "-".join(kwargs) or "defaults")
def test_the_cpu_has_the_bits_of_the_reference(kwargs, dtype):
    """Oracle: purelm.optim.adamw."""
    assert_same_bits(run(adamw(**kwargs), dtype=dtype), run(reference(**kwargs), dtype=dtype))


@INTERPRETED
def test_tables_without_a_copy_from_the_host():
    """As a captured call makes them. Oracle: the numbers."""
    from purelm.kernels.adamw_triton import by_arguments

    rows = [0, 1, 2**31 - 1, 2**31, 2**47 + 12345, 2**63 - 1, *range(2**44, 2**44 + 500 * 4096, 4096)]
    assert by_arguments(rows, torch.device("cpu")).tolist() == rows


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS, ids=lambda kwargs: "-".join(kwargs) or "defaults")
def test_kernel_equals_the_reference(kwargs, dtype, launched):
    """Oracle: purelm.optim.adamw, one step from the same state; 2 ulp of fp32, of the numbers that are added."""
    params, _, state = run(reference(**kwargs), 2, dtype)
    grads, lr = trees(9, dtype), torch.tensor(0.02)
    expected = reference(**kwargs).update(grads, state, params, lr)
    updates, new = adamw(**kwargs).update(grads, state, params, lr)
    assert tree.structure((updates, new)) == tree.structure(expected)
    assert sorted(launched) == [3, 5]  # leaves of a multiple of 16 (some of them empty), and the others
    for a, b, p in zip(*(tree.leaves(t) for t in (updates, expected[0], params)), strict=True):
        assert a.dtype == b.dtype == torch.float32
        scale = p.double().abs().clamp(min=1.0) if kwargs.get("weight_decay", 0.01) else b.abs()
        assert ((a - b).abs() <= 2.4e-7 * scale).all()
    for a, b in zip(tree.leaves(new), tree.leaves(expected[1]), strict=True):
        assert a.dtype == b.dtype
        # Moments are sums of numbers up to 4. The interpreter cuts bf16 off where torch rounds: a whole ulp of bf16.
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 2.4e-7, atol=2.4e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS, ids=lambda kwargs: "-".join(kwargs) or "defaults")
def test_step_is_update_and_apply_on_the_cpu(kwargs, dtype):
    """Oracle: the reference's update, then apply_updates, to the bit."""
    params, _, state = run(reference(**kwargs), 2, dtype)
    grads, lr = trees(9, dtype), torch.tensor(0.02)
    grads["b"] = None  # keeps its value and moments
    updates, expected = reference(**kwargs).update(grads, state, params, lr)
    got = adamw_step(**kwargs)(grads, state, params, lr)
    assert_same_bits(got, (apply_updates(params, updates), expected))


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS, ids=lambda kwargs: "-".join(kwargs) or "defaults")
def test_step_is_update_and_apply_in_the_kernel(kwargs, dtype, launched):
    """Oracle: the kernel's own update, then apply_updates, to the bit. (bf16: the interpreter does not round it.)"""
    params, _, state = run(reference(**kwargs), 2, dtype)
    grads, lr = trees(9, dtype), torch.tensor(0.02)
    updates, expected = adamw(**kwargs).update(grads, state, params, lr)
    before = [x.clone() for x in tree.leaves((params, grads, state))]
    got = adamw_step(**kwargs)(grads, state, params, lr)
    assert_same_bits(got, (apply_updates(params, updates), expected))
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves((params, grads, state)), strict=True))
    assert sorted(launched) == [3, 3, 5, 5]


@pytest.mark.parametrize("kwargs", VARIANTS, ids=lambda kwargs: "-".join(kwargs) or "defaults")
def test_donated_memory_receives_the_results(kwargs):
    """Oracle: the step without donation, to the bit, and the addresses given; a leaf that lies apart, too."""
    params, _, state = run(reference(**kwargs), 2, torch.float32)
    params["b"] = params["b"].new_zeros(*params["b"].shape, 2)[..., 0]
    grads, lr = trees(9, torch.float32), torch.tensor(0.02)
    for missing in (False, True):
        if missing:
            grads["b"] = None
        expected = tree.map(torch.clone, adamw_step(**kwargs)(grads, state, params, lr))
        given = tree.leaves((params, state.m, state.v))
        places, kept = [x.data_ptr() for x in given], [x.clone() for x in tree.leaves(grads)]
        params, state = adamw_step(**kwargs, donate=True)(grads, state, params, lr)
        assert_same_bits((params, state), expected)
        assert [x.data_ptr() for x in tree.leaves((params, state.m, state.v))] == places
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(grads), kept, strict=True))
        with pytest.raises(RuntimeError, match="donated to adamw_step"):
            given[0].sum()


def test_memory_that_cannot_be_donated():
    params = {"w": torch.ones(4)}
    step, state = adamw_step(donate=True), adamw().init(params)
    with pytest.raises(ValueError, match="share memory"):
        step({"w": params["w"]}, state, params, 0.1)
    with pytest.raises(ValueError, match="requires grad"):
        step({"w": torch.ones(4)}, state, {"w": torch.ones(4, requires_grad=True)}, 0.1)
    assert torch.equal(params["w"], torch.ones(4)) and torch.equal(state.m["w"], torch.zeros(4))  # nothing was taken


@INTERPRETED
def test_in_place_in_the_kernel():
    """Oracle: the same launch into new memory."""
    generator = torch.Generator().manual_seed(0)
    p, g, m, v = ([torch.rand(n, generator=generator) for n in (32, 7)] for _ in range(4))
    scalars = torch.tensor([-0.1, 0.5, 0.0, 0.9, 0.1], dtype=torch.float64)
    rest = scalars, [True, False], 0.1, 0.99, 0.01, 1e-8, False, True, True, True
    expected = adamw_triton.step(p, g, m, v, *rest)
    got = adamw_triton.step(p, g, m, v, *rest, in_place=True)
    assert all(a is b for a, b in zip(got, [*p, *m, *v], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@INTERPRETED
def test_one_launch_for_each_set_of_dtypes(launched):
    """Oracle: the reference; mixed dtypes, views that lie apart, views that begin at odd addresses."""
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 9, generator=g)
    params = {"a": wide.T, "b": wide[:, 1::2], "c": wide.flatten()[1:8], "d": wide[0].bfloat16()}
    grads = {"a": wide, "b": wide[:, ::2][:, :4], "c": wide.flatten()[3:10], "d": wide[1].bfloat16()}
    grads["a"] = torch.randn(9, 6, generator=g)
    state = adamw().init(params)
    before = [x.clone() for x in tree.leaves((params, grads, state))]
    got, expected = (o.update(grads, state, params, 0.01) for o in (adamw(), reference()))
    assert sum(launched) == 4 and len(launched) >= 2
    for a, b in zip(tree.leaves(got), tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2.4e-7 * 3)
        assert a.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves((params, grads, state)), strict=True))


@INTERPRETED
def test_many_leaves(launched):
    """Oracle: the reference; each program finds its leaf among three hundred, some of them empty."""
    params = [torch.full((i % 5,), float(i)) for i in range(300)]
    grads = [torch.full_like(p, i - 150.0) for i, p in enumerate(params)]
    got, expected = (o.update(grads, o.init(params), params, 0.1) for o in (adamw(), reference()))
    for a, b in zip(tree.leaves(got), tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=2.4e-7, atol=4e-5)  # 2 ulp of 300
    assert sorted(launched) == [60, 240]  # the empty ones and the others


def test_missing_gradients_and_empty_trees():
    """Oracle: the reference; a leaf without a gradient keeps its value and its moments."""
    params = {"a": torch.ones(3), "b": torch.ones(2), "c": None}
    for grads in ({"a": torch.ones(3), "b": None, "c": None}, {"a": None, "b": None, "c": None}):
        state = AdamWState(torch.tensor(3), tree.zeros_like(params), tree.map(torch.ones_like, params))
        assert_same_bits(*(o.update(grads, state, params, 0.1) for o in (adamw(), reference())))
    assert_same_bits(*(o.update({}, o.init({}), {}, 0.1) for o in (adamw(), reference())))


def test_composes_as_the_reference_does():
    """Oracle: the reference in the same chain, and in a part of a tree."""
    for wrap in (
        lambda o: chain(clip_by_global_norm(1.0), o),
        lambda o: partitioned(lambda path, p: "w" in path, sgd(), o),
    ):
        assert_same_bits(run(wrap(adamw(weight_decay=0.1))), run(wrap(reference(weight_decay=0.1))))


@pytest.mark.compile
def test_compiles_once_and_equals_eager():
    """Oracle: eager, in one graph, three steps without recompiling."""
    optimizer = chain(clip_by_global_norm(1.0), adamw(weight_decay=0.1, mask=is_matrix))

    def step(params, state, grads, lr):
        updates, state = optimizer.update(grads, state, params, lr)
        return apply_updates(params, updates), state

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager = fused = (trees(0), optimizer.init(trees(0)))
    for i in range(3):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            fused = compiled(*fused, trees(i + 1), torch.tensor(0.01 * i))
        eager = step(*eager, trees(i + 1), torch.tensor(0.01 * i))
    for a, b in zip(tree.leaves(fused), tree.leaves(eager), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


@pytest.mark.compile
def test_compiled_step_equals_eager():
    """Oracle: eager; the same in one graph, and under jit in donated storage."""
    step, state = adamw_step(weight_decay=0.1, mask=is_matrix), adamw().init(trees(0))
    args = (trees(1), state, trees(0), torch.tensor(0.02))
    expected = step(*args)
    torch._dynamo.reset()
    for f in (torch.compile(step, fullgraph=True, backend="aot_eager"), jit(step, donate=(1, 2), backend="eager")):
        copies = tree.map(torch.clone, args)
        at = {x.data_ptr() for x in tree.leaves(copies[1:3]) if x.numel()}
        got = f(*copies)
        for a, b in zip(tree.leaves(got), tree.leaves(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)
    assert {x.data_ptr() for x in tree.leaves(got) if x.numel()} == at


def test_opcheck():
    """Oracle: torch.library.opcheck: schema, fake tensors and their strides, ahead-of-time dispatch."""
    p, g, m, v = ([torch.rand(2, 3), torch.rand(4).bfloat16()] for _ in range(4))
    scalars = torch.tensor([-0.1, 0.5, 0.0, 0.99, 0.01], dtype=torch.float64)
    args = (p, g, m, v, scalars, [True, False], 0.1, 0.95, 0.05, 1e-8, False, True, True, False)
    torch.library.opcheck(module._step, args)
    torch.library.opcheck(module._step, (*args[:-1], True))
    torch.library.opcheck(module._step, ([p[0].T], [g[0].T], [m[0].T], [v[0].T], scalars, [True], *args[6:]))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"betas\[0\] must be in"):
        adamw(betas=(1.0, 0.9))
    with pytest.raises(ValueError, match="decay_order must be one of"):
        adamw(decay_order="first")
