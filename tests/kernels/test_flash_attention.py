"""flash_attention: Triton kernels in the interpreter, the op on a CPU, and every transform of it.

Oracles: `purelm.ops.attention.attention` in float64, for values and gradients; gradcheck for the tiled code; the
log-sum-exp of the scores written out. Tolerances: tests/kernels/rules.py, and 1e-12 between float64 results.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from purelm.kernels.flash_attention import (
    bidirectional_flash_attention,
    checked_arguments,
    flash_attention,
    flash_attention_reference,
    segment_ids_from_cu_seqlens,
)
from purelm.kernels.flash_attention_launch import Request, backward, backward_of_bias, forward
from purelm.kernels.flash_attention_ops import _backward_op, _forward_op
from purelm.kernels.flash_attention_reference import tiled_backward, tiled_forward
from purelm.kernels.flash_attention_tuned import TABLE, Blocks, choose, fallback
from purelm.ops import REFERENCE
from purelm.ops.attention import attention
from purelm.ops.masks import span
from purelm.transforms import remat, save_matmuls
from tests.kernels.rules import assert_as_exact, attention_scales

interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
SMALL = Blocks(16, 16, 4, 1)


def tensors(B=2, T=20, S=None, H=4, G=2, K=16, E=None, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    S, E = S or T, E or K
    shapes = ((B, T, H, K), (B, S, G, K), (B, S, G, E), (B, T, H, E))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def scores_of(shape, kind, dtype=torch.float32, seed=3):
    """A bias, or a mask in which some queries see nothing."""
    g = torch.Generator().manual_seed(seed)
    if kind == "bias":
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    mask = torch.rand(shape, generator=g) > 0.5
    return mask & (torch.arange(shape[-2]) % 5 != 2).unsqueeze(-1)


def ids(B, T, n=3, seed=0):
    return torch.randint(0, n, (B, T), generator=torch.Generator().manual_seed(seed)).sort(-1).values


def with_gradients(f, leaves, do):
    leaves = [x.detach().requires_grad_() for x in leaves]
    o = f(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


CASES = {
    "causal": (dict(T=20), {}),
    "full": (dict(T=37, K=24), dict(causal=False)),
    "more_queries": (dict(T=40, S=23, K=20, E=12), {}),
    "more_keys": (dict(T=7, S=40), {}),
    "left": (dict(T=50, B=1), dict(window=9)),
    "long_left": (dict(T=100, B=1, H=1, G=1), dict(window=40)),  # whole tiles between the two edges
    "both_sides": (dict(T=50, S=45, B=1), dict(causal=False, window=(5, 12))),
    "segments": (dict(T=50), dict(segment_ids=ids(2, 50))),
    "segments_all": (dict(T=50, S=41), dict(segment_ids=(ids(2, 50), ids(2, 41, seed=1)), window=20, softcap=2.0)),
    "no_common_ids": (dict(T=20), dict(segment_ids=(ids(2, 20), ids(2, 20) + 7), causal=False)),
    "softcap": (dict(T=33, B=1), dict(softcap=0.7, scale=0.9)),
    "one": (dict(T=1, B=1, H=1, G=1), {}),
    "mqa": (dict(T=17, H=3, G=1, K=10), {}),
}


SOME = ("causal", "segments_all", "mqa")
# 16 bits differ in rounding only: three cases are enough.
DTYPES = {"fp32": (torch.float32, CASES), "fp16": (torch.float16, SOME), "bf16": (torch.bfloat16, SOME)}


@interpreter
@pytest.mark.parametrize("name,dtype", [(n, d) for d, names in DTYPES.values() for n in names], ids=str)
def test_kernels_against_float64(name, dtype):
    """Oracle: the reference op in float64; the reference in the same dtype sets the tolerance."""
    size, options = CASES[name]
    q, k, v, do = tensors(**size, dtype=dtype)
    exact = with_gradients(lambda *x: attention(*x, **options), [x.double() for x in (q, k, v)], do.double())
    same = with_gradients(lambda *x: attention(*x, **options), [q, k, v], do)
    found = checked_arguments(q, k, v, *arguments(options), sinks=None, precision="ieee")
    *pair, sinks, bias, mask, left, right, scale, cap, _ = found
    assert bias is None and mask is None
    segments = None if pair[0] is None else (pair[0].contiguous(), pair[1].contiguous())
    request = Request(left, right, scale, cap)
    o, lse = forward(q, k, v, segments, sinks, request, SMALL)
    mine = [o, *backward(do, None, q, k, v, o, lse, segments, request, SMALL, SMALL)[:3]]
    scales, score = attention_scales(q, k, v, do, scale)
    for found, reference, wanted, size in zip(mine, same, exact, scales, strict=True):
        # Scores, exp, sums over keys and features, a quotient, products.
        assert_as_exact(found, reference, wanted, roundings=score + math.log2(k.shape[1] * k.shape[3]) + 4, scale=size)


def arguments(options):
    names = ("causal", "window", "segment_ids", "scale", "softcap")
    defaults = (True, None, None, None, None)
    return [options.get(n, d) for n, d in zip(names, defaults, strict=True)]


@interpreter
@settings(max_examples=25)
@given(
    T=st.integers(1, 90), S=st.integers(1, 90), causal=st.booleans(), left=st.none() | st.integers(0, 60),
    right=st.none() | st.integers(0, 60), m=st.sampled_from((16, 32)), n=st.sampled_from((16, 32)), seg=st.booleans(),
)  # fmt: skip
def test_every_window_and_length_is_cut_into_the_right_tiles(T, S, causal, left, right, m, n, seg):
    """Oracle: the reference op; fp32, so 1e-5 is rounding and a wrong tile is far more."""
    q, k, v, do = tensors(1, T, S, 2, 1, dtype=torch.float32)
    segments = (ids(1, T, 4), ids(1, S, 4, seed=1)) if seg else None
    options = dict(causal=causal, window=(left, right), segment_ids=segments)
    exact = with_gradients(lambda *x: attention(*x, **options), [q, k, v], do)
    request = Request(*span(T, S, causal, (left, right)), 0.25)
    pair = None if segments is None else tuple(x.int() for x in segments)
    o, lse = forward(q, k, v, pair, None, request, Blocks(m, n, 4, 1))
    blocks = Blocks(m, n, 4, 1)
    mine = [o, *backward(do, None, q, k, v, o, lse, pair, request, blocks, blocks)[:3]]
    for found, wanted in zip(mine, exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@interpreter
def test_sinks_and_the_gradient_of_lse_in_the_kernels():
    """Oracle: the tiled code in float64."""
    q, k, v, do = tensors(1, 30, 25, dtype=torch.float32)
    sinks, dlse = torch.linspace(-1, 3, 4), torch.randn(1, 4, 30, generator=torch.Generator().manual_seed(2))
    request = Request(6, 0, 0.25, 3.0)
    o, lse = forward(q, k, v, None, sinks, request, SMALL)
    found = backward(do, dlse, q, k, v, o, lse, None, request, SMALL, SMALL)
    wide = [x.double() for x in (q, k, v)]
    o2, lse2 = tiled_forward(*wide, None, sinks.double(), 6, 0, 0.25, 3.0, tile=7)
    wanted = tiled_backward(do.double(), dlse.double(), *wide, o2, lse2, None, 6, 0, 0.25, 3.0, tile=7)
    for x, y in zip((o, lse, *found), (o2, lse2, *wanted[:4]), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@interpreter
def test_kernels_read_views_and_leave_their_arguments():
    """Oracle: the same numbers laid out densely."""
    q, k, v, do = tensors(2, 20, dtype=torch.float32)
    packed = torch.cat([q, k, v], 2)  # one projection for all three: slices of it are not dense
    views = packed[:, :, :4], packed[:, :, 4:6], packed[:, :, 6:]
    turned = [x.movedim(1, 3).contiguous().movedim(3, 1) for x in (q, k, v)]  # the last axis is not dense
    flat = [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)]
    before = packed.clone()
    request = Request(None, 0, 0.25)
    for given_ in (views, turned, flat):
        dense = [x.contiguous() for x in given_]
        o, lse = forward(*given_, None, None, request, SMALL)
        p, lse2 = forward(*dense, None, None, request, SMALL)
        assert torch.equal(o, p) and torch.equal(lse, lse2)
        found = backward(do.transpose(0, 1).contiguous().transpose(0, 1), None, *given_, o, lse, None, request)
        wanted = backward(do, None, *dense, o, lse, None, request)
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    assert torch.equal(packed, before)
    # What vmap over the backward pass alone makes of one sample's results, and scores of heads that lie apart.
    one = [x[:1].expand_as(x) for x in (q, k, v)]
    sinks = torch.tensor([0.5, 9.0, -1.0, 9.0, 2.0, 9.0, 0.0])
    o, lse = forward(*one, None, sinks[::2], request, SMALL)
    p, lse2 = forward(*(x.contiguous() for x in one), None, sinks[::2].contiguous(), request, SMALL)
    assert torch.equal(o, p) and torch.equal(lse, lse2)
    bias = torch.zeros(1, 4, 20, 20)
    for o_, lse_ in ((o, lse), (o[:1].clone().expand_as(o), lse[:1].clone().expand_as(lse))):
        found = backward(do, None, *one, o_, lse_, None, request, bias=bias)
        wanted = backward(do, None, *(x.contiguous() for x in one), o, lse, None, request, bias=bias)
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
        each = ((lse_, found[3]), (lse, wanted[3]))
        db = [backward_of_bias(do, *one, *x, None, request, bias, None) for x in each]
        assert torch.equal(*db)


@interpreter
@pytest.mark.parametrize("size", [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_kernels_of_nothing(size):
    B, T, S = size
    q, k, v, do = (torch.randn(B, n, 2, 16) for n in (T, S, S, T))
    o, lse = forward(q, k, v, None, None, Request(None, None, 1.0))
    assert not o.any() and torch.equal(lse, torch.full((B, 2, T), -torch.inf))
    grads = backward(do, None, q, k, v, o, lse, None, Request(None, None, 1.0))
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape, lse.shape] and not any(g.any() for g in grads)
    _, sunk = forward(q, k, v, None, torch.tensor([1.0, 2.0]), Request(None, None, 1.0))
    assert torch.equal(sunk, torch.tensor([1.0, 2.0])[None, :, None].expand(B, 2, T))


# --- the op


@pytest.mark.parametrize("f", [flash_attention, flash_attention_reference])
@pytest.mark.parametrize("name", CASES)
def test_op_against_the_reference(f, name):
    """Oracle: the reference op, both in float64."""
    size, options = CASES[name]
    q, k, v, do = tensors(**size)
    found = with_gradients(lambda *x: f(*x, **options), [q, k, v], do)
    wanted = with_gradients(lambda *x: attention(*x, **options), [q, k, v], do)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_tiles_change_nothing():
    """Oracle: one tile."""
    q, k, v, do = tensors(1, 30, 41)
    whole = tiled_forward(q, k, v, None, None, 9, 0, 0.3, None, tile=64)
    cut = tiled_forward(q, k, v, None, None, 9, 0, 0.3, None, tile=7)
    for x, y in zip(whole, cut, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    back = [tiled_backward(do, None, q, k, v, *whole, None, 9, 0, 0.3, None, tile=n) for n in (64, 7)]
    for x, y in zip(*back, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_lse_is_that_of_the_scores_and_merges_partial_attentions():
    """Oracle: logsumexp written out; attention over all keys from those over two halves (Dao 2023, section 2)."""
    q, k, v, _ = tensors(2, 9, 20, H=2, G=2)
    o, lse = flash_attention(q, k, v, causal=False, return_lse=True)
    s = torch.einsum("bthk,bshk->bhts", q, k) / 4
    torch.testing.assert_close(lse, s.logsumexp(-1), rtol=1e-12, atol=1e-12)

    def merged(q, k, v):
        (a, la), (b, lb) = (
            flash_attention(q, k[:, half], v[:, half], causal=False, return_lse=True)
            for half in (slice(0, 11), slice(11, 20))
        )
        share = torch.sigmoid(la - lb).transpose(1, 2).unsqueeze(-1)
        return share * a + (1 - share) * b

    found = with_gradients(merged, [q, k, v], o)
    wanted = with_gradients(lambda *args: attention(*args, causal=False), [q, k, v], o)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_gradcheck_with_everything():
    """Oracle: finite differences, of o and lse, sinks included."""
    q, k, v, _ = (x.requires_grad_() for x in tensors(1, 5, 4, H=2, G=1, K=3))
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    for f in (flash_attention, flash_attention_reference):

        def call(q, k, v, s, f=f):
            return f(q, k, v, sinks=s, softcap=2.0, window=2, return_lse=True)

        # A query without keys has lse = -inf without a sink; with one all is finite.
        assert torch.autograd.gradcheck(call, (q, k, v, sinks))


def test_a_sink_is_a_key_without_value():
    """Oracle: the reference with one more key of zeros whose score is the sink, by hand."""
    q, k, v, _ = tensors(1, 6, H=1, G=1, K=4)
    sinks = torch.tensor([1.5], dtype=torch.float64)
    s = torch.einsum("bthk,bshk->bhts", q, k) / 2
    s = torch.where(torch.ones(6, 6, dtype=torch.bool).tril(), s, -torch.inf)
    p = torch.cat([s, torch.full((1, 1, 6, 1), 1.5, dtype=torch.float64)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(flash_attention(q, k, v, sinks=sinks), torch.einsum("bhts,bshk->bthk", p, v))


def test_packed_documents_are_documents():
    """Oracle: each document alone."""
    q, k, v, _ = tensors(1, 20)
    cu = torch.tensor([0, 3, 4, 15, 20])
    o = flash_attention(q, k, v, cu_seqlens=cu)
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        torch.testing.assert_close(o[:, a:b], attention(q[:, a:b], k[:, a:b], v[:, a:b]), rtol=1e-12, atol=1e-12)
    assert torch.equal(segment_ids_from_cu_seqlens(cu, 20)[0].bincount(), cu.diff())


def test_bidirectional_with_lengths():
    """Oracle: each row cut to its length; outputs on padding are zeros."""
    q, k, v, _ = tensors(3, 12)
    lengths = torch.tensor([12, 5, 1])
    o = bidirectional_flash_attention(q, k, v, lengths=lengths)
    for i, n in enumerate(lengths.tolist()):
        one = attention(q[i : i + 1, :n], k[i : i + 1, :n], v[i : i + 1, :n], causal=False)
        torch.testing.assert_close(o[i : i + 1, :n], one, rtol=1e-12, atol=1e-12)
        assert not o[i, n:].any()
    torch.testing.assert_close(bidirectional_flash_attention(q, k, v), attention(q, k, v, causal=False))


def test_causality_is_exact():
    """Gradients of early outputs by late keys are exact zeros."""
    q, k, v, _ = tensors(1, 10)
    k, v = k.requires_grad_(), v.requires_grad_()
    dk, dv = torch.autograd.grad(flash_attention(q, k, v)[:, :4].sum(), (k, v))
    assert not dk[:, 4:].any() and not dv[:, 4:].any() and dk[:, :4].any()


# --- transforms


def loss(f, **options):
    return lambda q, k, v: f(q, k, v, **options).square().sum()


SEGMENTS = ids(1, 20)


@pytest.mark.parametrize("options", [{}, dict(window=5, segment_ids=SEGMENTS, softcap=2.0)], ids=["plain", "all"])
def test_torch_func(options):
    """Oracle: the same transforms of the reference."""
    q, k, v, _ = tensors(3, 20)
    f, g = loss(flash_attention, **options), loss(attention, **options)
    one = [x[:1] for x in (q, k, v)]
    for x, y in zip(grad(f, (0, 1, 2))(*one), grad(g, (0, 1, 2))(*one), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    rows = [x.unsqueeze(1) for x in (q, k, v)]
    for mine, theirs in ((vmap(f), vmap(g)), (vmap(grad(f)), vmap(grad(g)))):
        torch.testing.assert_close(mine(*rows), theirs(*rows), rtol=1e-12, atol=1e-12)
    shared = (0, None, None)  # many queries, one set of keys; and the gradient of the shared keys
    f2, g2 = (vmap(grad(h, 1), in_dims=shared) for h in (f, g))
    torch.testing.assert_close(f2(rows[0], *one[1:]), g2(rows[0], *one[1:]), rtol=1e-12, atol=1e-12)
    few = [x[:, :4] for x in one]
    small = {k: v for k, v in options.items() if k != "segment_ids"}
    a, b = (jacrev(lambda q, h=h: h(q, *few[1:], **small))(few[0]) for h in (flash_attention, attention))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_vmap_over_another_axis_over_sinks_and_in_two_levels():
    """Oracle: a loop."""
    q, k, v, _ = tensors(2, 6)
    many = torch.stack([q, q + 1, q * 2], 2)
    sinks = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = vmap(lambda q, s: flash_attention(q, k, v, sinks=s), in_dims=(2, 0))(many, sinks)
    for i in range(3):
        torch.testing.assert_close(found[i], flash_attention(many[:, :, i], k, v, sinks=sinks[i]))
    twice = vmap(vmap(lambda q: flash_attention(q[None], k[:1], v[:1])[0]), in_dims=2)(many)
    torch.testing.assert_close(twice[1], torch.cat([flash_attention(x[None], k[:1], v[:1]) for x in many[:, :, 1]]))


def test_some_inputs_without_gradient_and_one_tensor_in_three_roles():
    """Oracle: the reference."""
    q, k, v, _ = tensors(1, 8)
    k = k.requires_grad_()
    (dk,) = torch.autograd.grad(flash_attention(q, k, v).sum(), k)
    (wanted,) = torch.autograd.grad(attention(q, k, v).sum(), k)
    torch.testing.assert_close(dk, wanted)
    x = q.clone().requires_grad_()
    (dx,) = torch.autograd.grad(flash_attention(x, x, x).square().sum(), x)
    (wanted,) = torch.autograd.grad(attention(x, x, x).square().sum(), x)
    torch.testing.assert_close(dx, wanted)


class Count(TorchDispatchMode):
    """How often the kernel's forward op was called."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.purelm.flash_attention_fwd.default
        return func(*args, **(kwargs or {}))


def test_checkpoint_gives_the_same_and_selective_checkpoint_calls_the_kernel_once():
    """Oracle: without checkpoint; calls are counted by a dispatch mode."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    q, k, v, _ = (x.requires_grad_() for x in tensors(1, 8))
    wanted = torch.autograd.grad(loss(attention)(q, k, v), (q, k, v))

    def keep(ctx, op, *args, **kwargs):
        mine = op is torch.ops.purelm.flash_attention_fwd.default
        return CheckpointPolicy.MUST_SAVE if mine else CheckpointPolicy.PREFER_RECOMPUTE

    for context, n_calls in ((None, 2), (lambda: create_selective_checkpoint_contexts(keep), 1)):
        extra = {} if context is None else {"context_fn": context}
        with Count() as count:
            out = checkpoint(loss(flash_attention), q, k, v, use_reentrant=False, **extra)
            found = torch.autograd.grad(out, (q, k, v))
        assert count.n == n_calls
        for x, y in zip(found, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_remat_with_save_matmuls_keeps_the_result_of_the_kernel():
    """Oracle: the number of calls, and the gradient without remat."""

    q, k, v, _ = (x.requires_grad_() for x in tensors(1, 8))
    wanted = torch.autograd.grad(loss(flash_attention)(q, k, v), q)
    for policy, n_calls in ((None, 2), (save_matmuls, 1)):
        with Count() as count:
            found = torch.autograd.grad(remat(loss(flash_attention), policy)(q, k, v), q)
        assert count.n == n_calls and torch.equal(found[0], wanted[0])


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [{}, dict(window=5, segment_ids=SEGMENTS, softcap=2.0), dict(mask=scores_of((1, 1, 20, 20), "mask"))],
    ids=["plain", "all", "mask"],
)
def test_compiled_equals_eager(options):
    """Oracle: eager; one graph, and gradients through it."""
    q, k, v, do = tensors(1, 20)
    compiled = torch.compile(lambda *x: flash_attention(*x, **options) * 2, fullgraph=True)
    found = with_gradients(compiled, [q, k, v], do)
    wanted = with_gradients(lambda *x: flash_attention(*x, **options) * 2, [q, k, v], do)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_opcheck():
    q, k, v, do = tensors(1, 8, dtype=torch.float32)
    numbers = (3, 0, 0.25, 2.0, "ieee")
    a = ids(1, 8).int()
    bias, mask = torch.zeros(1, 4, 8, 1), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    torch.library.opcheck(_forward_op, (q, k, v, a, a, torch.zeros(4), None, None, *numbers))
    torch.library.opcheck(_forward_op, (q, k, v, None, None, None, bias, mask, *numbers))
    o, lse = _forward_op(q, k, v, a, a, None, None, None, *numbers)
    torch.library.opcheck(_backward_op, (do, None, q, k, v, o, lse, a, a, None, None, *numbers, False))
    torch.library.opcheck(_backward_op, (do, None, q, k, v, o, lse, None, None, bias, mask, *numbers, True))


def test_in_the_bundle_of_ops():
    """The Ops field's signature."""
    q, k, v, _ = tensors(1, 8)
    ops = REFERENCE._replace(attention=flash_attention)
    kw = dict(causal=True, window=3, segment_ids=None, scale=0.3, softcap=None)
    torch.testing.assert_close(ops.attention(q, k, v, **kw), REFERENCE.attention(q, k, v, **kw))


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(scale=-1.0), "scale must be above 0"),
        (dict(softcap=0.0), "softcap must be above 0"),
        (dict(precision="fp8"), 'precision must be "ieee"'),
        (dict(sinks=torch.zeros(3)), "sinks must have one score a query head"),
        (dict(cu_seqlens=torch.tensor([0, 8]), segment_ids=ids(2, 8)), "not both"),
        (dict(cu_seqlens=torch.tensor([0, 8])), "cu_seqlens needs batch 1"),
        (dict(window=-1), "window must have sides"),
    ],
)
def test_errors(change, message):
    q, k, v, _ = tensors(2, 8)
    with pytest.raises(ValueError, match=message):
        flash_attention(q, k, v, **change)


def test_one_dtype_for_all():
    q, k, v, _ = tensors(1, 8)
    with pytest.raises(ValueError, match="one dtype"):
        flash_attention(q, k.float(), v)


def test_the_shipped_table_is_of_tiles_that_can_be():
    """Powers of two of at least 16, warps of 4 or 8; and a choice exists for every width."""
    for key, blocks in TABLE.items():
        assert key[1] in ("forward", "backward_q", "backward_kv") and all(n & (n - 1) == 0 for n in blocks[:3])
        assert min(blocks[:2]) >= 16 and blocks[2] in (2, 4, 8) and 1 <= blocks[3] <= 5
    for which in ("forward", "backward_q", "backward_kv"):
        for width in (16, 32, 64, 128, 256):
            for size in (2, 4):
                blocks = fallback(which, width, size)
                resident, streamed = (blocks.n, blocks.m) if which == "backward_kv" else (blocks.m, blocks.n)
                tiles = 2 * resident + 2 * max(blocks.n_stages, 1) * streamed
                assert tiles * width * size <= 100 << 10  # of Ampere's consumer GPUs
    assert choose("forward", 64, 64, torch.float32, True, 4096, torch.device("cpu")) == SMALL


def test_tiles_are_those_of_the_nearest_measured_length(monkeypatch):
    table = {("sm90", "forward", 64, 2, True, 4096): (1, 2, 4, 1), ("sm90", "forward", 64, 2, True, 1024): (3, 4, 4, 1)}
    table[("sm90", "forward", 32, 2, True, 4096)] = (5, 6, 4, 1)
    monkeypatch.setattr("purelm.kernels.flash_attention_tuned.TABLE", table)
    monkeypatch.setattr("purelm.kernels.flash_attention_tuned.architecture", lambda device: "sm90")

    def m(D, length):
        return choose("forward", D, 16, torch.bfloat16, True, length, torch.device("cuda")).m

    assert [m(64, n) for n in (1, 1024, 2048, 2049, 1 << 20)] == [3, 3, 3, 1, 1]
    assert [m(32, n) for n in (1, 1 << 20)] == [5, 5]


@pytest.mark.parametrize("ends", [[2, 4], [0, 4, 2, 6], [0, 3, 9], [2, 6], [0, 3], [6], []], ids=str)
def test_cu_seqlens_that_are_no_ends_of_documents(ends):
    """Oracle: the documented form [0, n1, n1 + n2, ..., T]; anything else mixed documents or cut them elsewhere."""
    q = torch.zeros(1, 6, 2, 4)
    with pytest.raises(ValueError, match=r"cu_seqlens must be the ends of documents, .* \.\.\., 6\], got"):
        flash_attention(q, q, q, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    with pytest.raises(ValueError, match="cu_seqlens must be the ends of documents"):
        segment_ids_from_cu_seqlens(torch.tensor([0.0, 6.0]), 6)
    assert segment_ids_from_cu_seqlens(torch.tensor([0, 2, 2, 6]), 6).tolist() == [[0, 0, 2, 2, 2, 2]]


@pytest.mark.parametrize("lengths", [[7], [-1], [1, 2], [1.0]], ids=str)
def test_lengths_that_rows_do_not_have(lengths):
    q = torch.zeros(1, 6, 2, 4)
    with pytest.raises(ValueError, match="lengths must be"):
        bidirectional_flash_attention(q, q, q, lengths=torch.tensor(lengths))
