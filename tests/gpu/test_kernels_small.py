"""The kernels that memory limits, on an accelerator: weighted_sum, rms_norm, rope, swiglu, adamw.

Oracles: the references in float64, with the rule of tests/kernels/rules.py; compiled against eager; run against run.
"""

import pytest
import torch

from purelm import tree
from purelm.kernels.adamw import adamw, adamw_step
from purelm.kernels.rms_norm import add_rms_norm, rms_norm
from purelm.kernels.rope import rope, rope_qk
from purelm.kernels.swiglu import swiglu
from purelm.kernels.weighted_sum import reference as weighted_sum_reference
from purelm.kernels.weighted_sum import weighted_sum
from purelm.ops.glu import swiglu as swiglu_reference
from purelm.ops.rms_norm import rms_norm as rms_norm_reference
from purelm.ops.rope import rope as rope_reference
from purelm.ops.rope import rope_tables
from purelm.optim import apply_updates, is_matrix
from purelm.optim.adamw import adamw as adamw_reference
from purelm.transforms import cuda_graph
from tests.kernels.rules import assert_as_exact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (make gpu-test)"),
    # What dynamo does to trace a Function, and torch.compile's own import.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]
CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["interleaved", "half"]


def numbers(seed, *shapes, dtype=torch.float32):
    g = torch.Generator(device=CUDA).manual_seed(seed)
    return [torch.randn(s, generator=g, device=CUDA, dtype=torch.float64).to(dtype) for s in shapes]


def outputs_and_gradients(f, xs, upstream=None):
    """Outputs of f(*xs), then gradients of xs, for given upstream gradients (always the same when None)."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    out = f(*xs)
    outs = out if isinstance(out, tuple) else (out,)
    upstream = numbers(99, *[y.shape for y in outs]) if upstream is None else upstream
    grads = torch.autograd.grad(outs, xs, [u.to(y.dtype) for u, y in zip(upstream, outs, strict=True)])
    return [*[y.detach() for y in outs], *grads]


def check(kernel, reference, xs):
    """Outputs and gradients by the rule, upstream gradients rounded to the dtype for all; and the same bits twice."""
    n_outputs = len(outputs_and_gradients(kernel, xs)) - len(xs)
    upstream = numbers(98, *[y.shape for y in outputs_and_gradients(kernel, xs)[:n_outputs]], dtype=xs[0].dtype)
    mine = outputs_and_gradients(kernel, xs, upstream)
    same = outputs_and_gradients(reference, xs, upstream)
    exact = outputs_and_gradients(reference, [x.double() for x in xs], upstream)
    again = outputs_and_gradients(kernel, xs, upstream)
    for a, b, c, d in zip(mine, same, exact, again, strict=True):
        assert a.dtype == b.dtype
        assert_as_exact(a, b, c, roundings=24)  # sums of up to 2^18 terms, and six operations more
        assert torch.equal(a, d)


def add_reference(x, r, w):
    return rms_norm_reference(x + r, w), x + r


ROWS = [
    (4, 1000, 768),
    (2048, 4096),
    (513, 5120),
    (300, 8192),
    (65, 16384),
    (17, 40000),
    (5, 65536),
    (7, 123),
    (1, 1, 1000),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rms_norm(shape, dtype):
    check(rms_norm, rms_norm_reference, numbers(0, shape, shape[-1:], dtype=dtype))
    check(rms_norm, rms_norm_reference, numbers(0, shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS[::2], ids=str)
def test_add_rms_norm(shape, dtype):
    check(add_rms_norm, add_reference, numbers(1, shape, shape, shape[-1:], dtype=dtype))


def test_rms_norm_of_views_and_of_wide_weights():
    """Rows of a wider tensor, heads of a joint projection, fp32 weights with bf16 rows."""
    (wide,) = numbers(2, (8, 100, 3 * 512), dtype=torch.bfloat16)
    (w,) = numbers(3, (512,))
    for view in (lambda t: t[..., 512:1024], lambda t: t.mT[:, :512].mT, lambda t: t[:, :, :512].transpose(0, 1)):
        mine, plain = (
            outputs_and_gradients(lambda t, w, f=f, view=view: f(view(t), w), (wide, w))
            for f in (rms_norm, rms_norm_reference)
        )
        for a, b in zip(mine, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)  # two roundings to bf16
        assert torch.equal(mine[0], rms_norm(view(wide).contiguous(), w))

    def heads(f):
        return lambda t, w: f(t.unflatten(-1, (12, 128))[:, :, 4:8], w)

    check(heads(rms_norm), heads(rms_norm_reference), [wide, *numbers(4, (128,), dtype=torch.bfloat16)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 1000, 768), (1000, 2816), (3, 11008), (1,), (4097,)], ids=str)
def test_swiglu(shape, dtype):
    check(swiglu, swiglu_reference, numbers(5, shape, shape, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "B,T,H,G,K,per_row",
    [(8, 512, 12, 12, 64, False), (2, 1024, 32, 8, 128, True), (1, 100, 16, 1, 96, False), (3, 7, 5, 5, 10, True)],
)
def test_rope(B, T, H, G, K, per_row, dtype, layout):
    """Views of a joint projection, as a model has them."""
    positions = torch.arange(T, device=CUDA)
    positions = positions + torch.arange(B, device=CUDA)[:, None] if per_row else positions
    cos, sin = rope_tables(positions, K)
    (qkv,) = numbers(6, (B, T, (H + 2 * G) * K), dtype=dtype)

    def split(x):
        q, k, _ = x.split([H * K, G * K, G * K], -1)
        return q.unflatten(-1, (H, K)), k.unflatten(-1, (G, K))

    def tables(x):
        return cos.to(torch.promote_types(x.dtype, cos.dtype)), sin.to(torch.promote_types(x.dtype, sin.dtype))

    check(lambda x: rope_qk(*split(x), cos, sin, layout), lambda x: _turned(split(x), tables(x), layout), [qkv])
    check(
        lambda x: rope(split(x)[0], cos, sin, layout),
        lambda x: rope_reference(split(x)[0], *tables(x), layout),
        [qkv],
    )


def _turned(qk, tables, layout):
    return tuple(rope_reference(x, *tables, layout) for x in qk)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 1000, 768), (1000, 5000), (7, 123), (3,), (70000, 8)], ids=str)
def test_weighted_sum(shape, dtype):
    check(weighted_sum, weighted_sum_reference, numbers(7, shape, shape[-1:], dtype=dtype))


FUNCTIONS = {
    "rms_norm": (rms_norm, [(64, 768), (768,)]),
    "add_rms_norm": (add_rms_norm, [(64, 768), (64, 768), (768,)]),
    "add_twice": (lambda x, w: add_rms_norm(x, x, w), [(64, 768), (768,)]),
    "swiglu": (swiglu, [(64, 768), (64, 768)]),
    "swiglu_twice": (lambda x: swiglu(x, x), [(64, 768)]),
    "rope": (lambda x: rope(x, *rope_tables(torch.arange(32, device=CUDA), 64)), [(2, 32, 4, 64)]),
    "rope_qk": (
        lambda q, k: rope_qk(q, k, *rope_tables(torch.arange(32, device=CUDA), 64), "half"),
        [(2, 32, 4, 64), (2, 32, 2, 64)],
    ),
    "weighted_sum": (weighted_sum, [(64, 768), (768,)]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_equals_eager(name):
    """In one graph, with inductor, what surrounds the op fused into it or not; values and gradients."""
    f, shapes = FUNCTIONS[name]

    def around(*xs):
        out = f(*[x * 2 for x in xs])
        return tuple(y.sin() for y in (out if isinstance(out, tuple) else (out,)))

    xs = numbers(8, *shapes)
    torch._dynamo.reset()
    mine = outputs_and_gradients(torch.compile(around, fullgraph=True), xs)
    plain = outputs_and_gradients(around, xs)
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_per_sample_gradients(name):
    """Oracle: a loop over the samples."""
    f, shapes = FUNCTIONS[name]

    def loss(*xs):
        out = f(*xs)
        return sum(y.sin().sum() for y in (out if isinstance(out, tuple) else (out,)))

    g = torch.func.grad(loss, tuple(range(len(shapes))))
    xs = numbers(9, *[(3, *s) for s in shapes])
    for i, one in enumerate(zip(*torch.func.vmap(g)(*xs), strict=True)):
        for a, b in zip(one, g(*[x[i] for x in xs]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_unsupported_dtypes_say_so():
    x = torch.ones(2, 4, 2, 4, dtype=torch.float64, device=CUDA)
    table = torch.ones(4, 2, device=CUDA)
    params = {"w": x}
    for call in (
        lambda: rms_norm(x),
        lambda: add_rms_norm(x, x),
        lambda: swiglu(x, x),
        lambda: rope(x, table, table),
        lambda: weighted_sum(x, x[0, 0, 0]),
        lambda: adamw().update(params, adamw().init(params), params, 0.1),
    ):
        with pytest.raises(ValueError, match=r"float32, bfloat16 or float16 on a GPU, got torch.float64"):
            call()


def test_more_than_2_to_the_31_elements():
    """Oracle: the last rows on their own. Offsets would overflow 32 bits."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB")
    n, D = (1 << 21) + 8, 1024
    x = torch.ones(n, D, device=CUDA, dtype=torch.bfloat16)
    x[-8:] = torch.randn(8, D, device=CUDA)
    w = torch.ones(D, device=CUDA, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, w)[-8:], rms_norm(x[-8:], w))
    assert torch.equal(swiglu(x, x)[-8:], swiglu(x[-8:], x[-8:]))
    heads, tables = x.view(1, n, 8, 128), torch.ones(n, 64, device=CUDA)
    assert torch.equal(rope(heads, tables, tables)[0, -8:], rope(heads[:, -8:], tables[-8:], tables[-8:])[0])
    assert torch.equal(weighted_sum(x, w)[-8:], weighted_sum(x[-8:], w))


# adamw


def some_tree(seed, dtype=torch.float32):
    shapes = {"embed": (1000, 768), "w": (2048, 768), "norm": (768,), "odd": (123, 7), "scalar": (), "empty": (0, 4)}
    g = torch.Generator(device=CUDA).manual_seed(seed)
    return {k: torch.randn(s, generator=g, device=CUDA, dtype=torch.float64).to(dtype) for k, s in shapes.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [
        {"betas": (0.9, 0.95), "weight_decay": 0.1, "mask": is_matrix},
        {"weight_decay": 0.0},
        {"eps_placement": "uncorrected", "decay_order": "after", "eps_root": 1e-6},
        {"dtype": torch.bfloat16},
    ],
    ids=["decay", "none", "other_places", "bf16_moments"],  # the same in every process, which addresses are not
)
def test_adamw_equals_the_reference(kwargs, dtype):
    """Oracle: purelm.optim.adamw on the GPU, one step from the same state; multiply-adds are rounded once here."""
    mine, plain = adamw(**kwargs), adamw_reference(**kwargs)
    params, state = some_tree(0, dtype), plain.init(some_tree(0, dtype))
    for i in range(3):
        grads, lr = some_tree(i + 1, dtype), torch.tensor(0.01, device=CUDA)
        before = [x.clone() for x in tree.leaves((params, grads, state))]
        got, again = (mine.update(grads, state, params, lr) for _ in range(2))
        expected = plain.update(grads, state, params, lr)
        assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves((params, grads, state)), strict=True))
        for a, b, c in zip(*(tree.leaves(t) for t in (got, again, expected)), strict=True):
            assert a.dtype == c.dtype and torch.equal(a, b)
            narrow = a.dtype in (torch.bfloat16, torch.float16)
            # 2 ulp of what is added (parameters and moments up to 8), or an ulp of a 16-bit moment at a tie.
            torch.testing.assert_close(a, c, rtol=1e-2 if narrow else 5e-7, atol=1e-6)
        applied, new = adamw_step(**kwargs)(grads, state, params, lr)
        for a, b in zip(tree.leaves((applied, new)), tree.leaves((apply_updates(params, got[0]), got[1])), strict=True):
            assert torch.equal(a, b)
        # In place: the same bits over copies of what was given.
        given = tree.map(torch.clone, (state, params))
        places = [x.data_ptr() for x in tree.leaves((given[1], given[0].m, given[0].v))]
        over = adamw_step(**kwargs, donate=True)(grads, *given, lr)
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(over), tree.leaves((applied, new)), strict=True))
        assert [x.data_ptr() for x in tree.leaves((over[0], over[1].m, over[1].v))] == places
        updates, state = expected
        params = apply_updates(params, updates)


def test_adamw_compiled_equals_eager():
    """Oracle: eager; in one graph, three steps without recompiling, in the default mode and with CUDA graphs around."""
    optimizer = adamw(weight_decay=0.1, mask=is_matrix)

    def step(params, state, grads, lr):
        updates, state = optimizer.update(grads, state, params, lr)
        return apply_updates(params, updates), state

    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, mode=mode)
        eager = fused = (some_tree(0), optimizer.init(some_tree(0)))
        for i in range(4):
            lr = torch.tensor(0.01 * (i + 1), device=CUDA)
            fused = tree.map(torch.clone, compiled(*fused, some_tree(i + 1), lr))
            eager = step(*eager, some_tree(i + 1), lr)
        for a, b in zip(tree.leaves(fused), tree.leaves(eager), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("donate", [False, True])
def test_adamw_in_a_graph(donate):
    """Oracle: the same calls without a graph, to the last bit; gradients lie elsewhere at every call."""
    optimizer, in_place = adamw(weight_decay=0.1), adamw_step(weight_decay=0.1, donate=True)

    def step(carried, grads, lr):
        params, state = carried
        if donate:
            return in_place(grads, state, params, lr)
        updates, state = optimizer.update(grads, state, params, lr)
        return apply_updates(params, updates), state

    def after(step):
        params = some_tree(0)
        carried = params, optimizer.init(params)
        for i in range(6):
            carried = step(carried, some_tree(i + 1), torch.tensor(0.01 * (i + 1), device=CUDA))
            torch.randn(10**6, device=CUDA)  # what an address that has been freed may hold
        return carried

    for a, b in zip(tree.leaves(after(cuda_graph(step, donate=0))), tree.leaves(after(step)), strict=True):
        assert torch.equal(a, b)
