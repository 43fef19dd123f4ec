"""Biases, masks and other numbers of batch axes in attention; ALiBi and T5's biases.

Oracles: a loop over queries; PyTorch's own attention; the papers' formulas in plain Python. float64.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from purelm.kernels.flash_attention import flash_attention, flash_attention_reference
from purelm.ops.attention import attention, attention_with_lse
from purelm.ops.attention_bias import alibi_bias, alibi_slopes, t5_bias, t5_buckets
from purelm.ops.sdpa import sdpa_attention

# torch's own: its tables of forward-mode formulas use what it deprecates, and its CPU attention has no batching rule.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching"),
]
ALL = pytest.mark.parametrize("attend", [attention, sdpa_attention, flash_attention, flash_attention_reference])
B, T, S, H, G, K = 2, 5, 6, 4, 2, 3


def numbers(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, dtype=torch.float64, generator=g, requires_grad=True) for s in shapes]


def qkv(lead=(B,), T=T, S=S):
    return numbers((*lead, T, H, K), (*lead, S, G, K), (*lead, S, G, K))


def loop(q, k, v, *, bias=None, mask=None, causal=True, softcap=None):
    """One query, one head, one list of visible keys at a time."""
    T, S = q.shape[1], k.shape[1]
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    bias = torch.zeros(()) if bias is None else bias
    mask = torch.ones((), dtype=torch.bool) if mask is None else mask
    bias, mask = (x.expand(q.shape[0], H, T, S) for x in (bias, mask))
    for b in range(q.shape[0]):
        for h in range(H):
            for t in range(T):
                keys = [s for s in range(S) if mask[b, h, t, s] and (not causal or s <= t + S - T)]
                keys = [s for s in keys if bias[b, h, t, s] != -torch.inf]
                if keys:
                    scores = k[b, keys, h // (H // G)] @ q[b, t, h] / math.sqrt(K)
                    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                    out[b, t, h] = torch.softmax(scores + bias[b, h, t, keys], 0) @ v[b, keys, h // (H // G)]
    return out


def compare(f, g, leaves, seed=1):
    mine, theirs = f(*leaves), g(*leaves)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    (do,) = numbers(mine.shape, seed=seed)
    mine, theirs = (x + 0.0 * sum(y.sum() for y in leaves) for x in (mine, theirs))  # also where all is hidden
    pair = [torch.autograd.grad(x, leaves, do.detach()) for x in (mine, theirs)]
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


SHAPES = [(B, H, T, S), (H, T, S), (T, S), (B, 1, T, S), (1, H, 1, S), (B, 1, T, 1), (1, 1, 1, 1), (), (B, H, 1, 1)]


@ALL
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_bias(attend, shape, causal):
    """Oracle: the loop, with the gradient of the bias, summed where it was broadcast."""
    (bias,) = numbers(shape, seed=2)
    options = dict(causal=causal)
    compare(
        lambda q, k, v, b: attend(q, k, v, bias=b, **options),
        lambda q, k, v, b: loop(q, k, v, bias=b, **options),
        [*qkv(), bias],
    )


@ALL
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_mask(attend, shape, causal):
    """Oracle: the loop. Some queries see nothing: exact zeros, and gradients without NaN."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.6
    mask = mask if mask.ndim < 2 else mask & (torch.arange(mask.shape[-2]) != 3).unsqueeze(-1)
    compare(
        lambda *x: attend(*x, mask=mask, causal=causal), lambda *x: loop(*x, mask=mask, causal=causal), qkv()
    )
    if mask.ndim > 1 and mask.shape[-2] == T:
        assert not attend(*qkv(), mask=mask, causal=causal)[:, 3].any()


@ALL
def test_bias_of_minus_infinity_hides(attend):
    """Oracle: the loop, and the same as a mask; a row of -inf alone gives zeros."""
    (bias,) = numbers((B, H, T, S), seed=4)
    mask = torch.rand(B, H, T, S, generator=torch.Generator().manual_seed(5)) > 0.5
    mask[:, :, 2] = False

    def hidden(q, k, v, b):
        return attend(q, k, v, bias=torch.where(mask, b, -torch.inf))

    compare(hidden, lambda q, k, v, b: loop(q, k, v, bias=b, mask=mask), [*qkv(), bias])
    compare(hidden, lambda q, k, v, b: attend(q, k, v, bias=b, mask=mask), [*qkv(), bias])
    assert not hidden(*qkv(), bias)[:, 2].any()


@pytest.mark.parametrize("attend", [attention, flash_attention, flash_attention_reference])
def test_the_bias_comes_after_the_softcap(attend):
    """Oracle: the loop, everything at once."""
    (bias,) = numbers((H, T, S), seed=6)
    mask = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(7)) > 0.3
    compare(
        lambda q, k, v, b: attend(q, k, v, bias=b, mask=mask, softcap=0.8),
        lambda q, k, v, b: loop(q, k, v, bias=b, mask=mask, softcap=0.8),
        [*qkv(), bias],
    )


@ALL
def test_with_windows_and_segments(attend):
    """Oracle: the masks of both, given as one mask by hand."""
    ids = torch.tensor([[1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 3]])
    (bias,) = numbers((H, S, S), seed=8)
    mask = torch.rand(S, S, generator=torch.Generator().manual_seed(9)) > 0.3
    t = torch.arange(S)
    near = (t <= t[:, None]) & (t >= t[:, None] - 2)
    whole = mask & near & (ids[:, None, :, None] == ids[:, None, None, :])
    leaves = [*qkv(T=S), bias]
    compare(
        lambda q, k, v, b: attend(q, k, v, bias=b, mask=mask, window=2, segment_ids=ids),
        lambda q, k, v, b: loop(q, k, v, bias=b, mask=whole, causal=False),
        leaves,
    )


@pytest.mark.parametrize("attend", [attention, flash_attention])
def test_bf16_adds_the_bias_in_fp32(attend):
    """Oracle: float64 on the same bf16 q, k, v: a bias of 100 and a little, which bf16 would round by 0.25."""
    q, k, v = (x.detach().bfloat16() for x in qkv())
    bias = 100.0 + torch.rand(H, T, S, generator=torch.Generator().manual_seed(1))
    exact = attention(q.double(), k.double(), v.double(), bias=bias.double())
    o = attend(q, k, v, bias=bias)
    assert o.dtype == torch.bfloat16
    # bf16 rounds scores, probabilities and the result at 2^-9 each; a rounded bias would be 30 times as far off.
    torch.testing.assert_close(o.double(), exact, rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="bias must have q's dtype"):
        sdpa_attention(q, k, v, bias=bias)


@ALL
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 2)], ids=str)
def test_any_number_of_batch_axes(attend, lead):
    """Oracle: every sample alone; ids, bias and mask with all, some or none of the axes."""
    n = math.prod(lead)
    q, k, v = qkv(lead, T=S)
    ids = torch.randint(0, 2, (*lead, S), generator=torch.Generator().manual_seed(2)).sort(-1).values
    (bias,) = numbers((*lead, H, S, S), seed=3)
    mask = torch.rand((1,) * len(lead) + (1, S, S), generator=torch.Generator().manual_seed(4)) > 0.2
    o = attend(q, k, v, segment_ids=ids, bias=bias, mask=mask)
    assert o.shape == (*lead, S, H, K)
    samples = zip(*(x.reshape(n, *x.shape[len(lead) :]) for x in (o, q, k, v, ids, bias)), strict=True)
    for mine, q1, k1, v1, ids1, bias1 in samples:
        one = attention(q1[None], k1[None], v1[None], segment_ids=ids1[None], bias=bias1, mask=mask.view(S, S))
        torch.testing.assert_close(mine, one[0], rtol=1e-12, atol=1e-12)
    pair = attend(q, k, v, segment_ids=(ids, ids), bias=bias, mask=mask)
    torch.testing.assert_close(pair, o, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attend", [attention, flash_attention])
def test_torch_func(attend):
    """Oracle: loops and torch.autograd; biases shared by samples and of each sample, second derivatives."""
    q, k, v = (x.detach() for x in qkv())
    shared, own = (x.detach() for x in numbers((1, H, T, S), (B, H, T, S), seed=1))

    def f(q, k, v, bias):
        return attend(q[None], k[None], v[None], bias=bias).sin().sum()

    for bias, dim in ((shared, None), (own, 0)):
        dims = (0, 0, 0, dim)
        rows = torch.func.vmap(torch.func.grad(f, (0, 1, 2, 3)), dims)(q, k, v, bias)
        outside = torch.func.grad(lambda b, d=dims: torch.func.vmap(f, d)(q, k, v, b).sum())(bias)
        total = torch.zeros_like(bias)
        for i in range(B):
            one = bias if dim is None else bias[i]
            leaves = [x.clone().requires_grad_() for x in (q[i], k[i], v[i], one)]
            wanted = torch.autograd.grad(loop_one(*leaves), leaves)
            for a, b in zip(rows, wanted, strict=True):
                torch.testing.assert_close(a[i], b, rtol=1e-10, atol=1e-12)
            total = total + (wanted[3] if dim is None else torch.eye(B)[i].view(B, 1, 1, 1) * wanted[3])
        torch.testing.assert_close(outside, total, rtol=1e-10, atol=1e-12)
    leaves = [x[0].clone().requires_grad_() for x in (q, k, v, own)]
    assert torch.autograd.gradgradcheck(f, leaves, atol=1e-4)
    tangent = torch.func.jvp(lambda b: f(q[0], k[0], v[0], b), (own[0],), (own[1],))[1]
    gradient = torch.func.grad(f, 3)(q[0], k[0], v[0], own[0])
    torch.testing.assert_close(tangent, (gradient * own[1]).sum())


@ALL
def test_vmap_over_masks(attend):
    """Oracle: a loop; a mask of each sample and of each row of it, one for all samples, and gradients."""
    q, k, v = (x.detach() for x in qkv((3, B)))
    mask = torch.rand(3, B, 1, T, S, generator=torch.Generator().manual_seed(1)) > 0.4
    for m, dim in ((mask, 0), (mask[0], None), (mask[0, :1], None), (mask[:, :1].movedim(0, 2), 2)):

        def f(q, k, v, m):
            return attend(q, k, v, mask=m).sin().sum()

        rows = torch.func.vmap(torch.func.grad(f), (0, 0, 0, dim))(q, k, v, m)
        for i in range(3):
            one = torch.func.grad(f)(q[i], k[i], v[i], m if dim is None else m.select(dim, i))
            torch.testing.assert_close(rows[i], one, rtol=1e-12, atol=1e-12)


def loop_one(q, k, v, bias):
    return loop(q[None], k[None], v[None], bias=bias).sin().sum()


@ALL
def test_bad_arguments(attend, unchecked):
    q, k, v = qkv()
    for options, message in (
        (dict(bias=torch.zeros(H, S, T)), r"bias must broadcast to .* \(2, 4, 5, 6\), got \(4, 6, 5\)"),
        (dict(bias=torch.zeros(T, S, dtype=torch.bool)), "bias must be floating, got torch.bool"),
        (dict(mask=torch.ones(1, 1, H, T, S, dtype=torch.bool)), "mask must broadcast to"),
        (dict(mask=torch.ones(T, S)), "mask must be boolean, True where a key is seen, got torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, **options)


# --- log-sum-exp


def test_lse_of_the_reference():
    """Oracles: logsumexp of the scores written out; attention itself; finite differences of both results."""
    q, k, v = qkv()
    (bias,) = numbers((H, T, S), seed=2)
    o, lse = attention_with_lse(q, k, v, bias=bias)
    scores = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(H // G, 2)) / math.sqrt(K) + bias
    scores = torch.where(torch.ones(T, S, dtype=torch.bool).tril(S - T), scores, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert torch.equal(o, attention(q, k, v, bias=bias))
    few = (*qkv((1,), 2, 3), bias[:, :2, :3])
    assert torch.autograd.gradcheck(lambda *x: attention_with_lse(*x[:3], bias=x[3]), few)
    blind = attention_with_lse(q, k[:, :2], v[:, :2])[1]
    assert torch.equal(blind[:, :, :3], torch.full((B, H, 3), -torch.inf, dtype=torch.float64))
    (dq,) = torch.autograd.grad(blind[:, :, 3:].sum(), q)
    assert bool(dq.isfinite().all()) and not dq[:, :3].any()
    assert attention_with_lse(q[0], k[0], v[0])[1].shape == (H, T)
    assert torch.equal(attention_with_lse(q, k[:, :0], v[:, :0])[1], torch.full((B, H, T), -torch.inf).double())


# --- ALiBi and T5


@pytest.mark.parametrize("n_heads", [1, 2, 8, 12, 20])
def test_alibi_slopes(n_heads):
    """Oracle: the authors' recursive function, get_slopes."""

    def get_slopes(n):
        if math.log2(n).is_integer():
            start = 2 ** (-(2 ** -(math.log2(n) - 3)))
            return [start * start**i for i in range(n)]
        closest = 2 ** math.floor(math.log2(n))
        return get_slopes(closest) + get_slopes(2 * closest)[0::2][: n - closest]

    torch.testing.assert_close(alibi_slopes(n_heads), torch.tensor(get_slopes(n_heads)))


def test_alibi_in_attention():
    """Oracle: PyTorch's attention with the paper's bias, slope (s - t), written out by distance."""
    q, k, v = (x.detach() for x in numbers((1, 5, 4, 3), (1, 5, 4, 3), (1, 5, 4, 3)))
    bias = torch.zeros(4, 5, 5, dtype=torch.float64)
    for h in range(4):
        for t in range(5):
            for s in range(5):
                bias[h, t, s] = 2.0 ** (-8 * (h + 1) / 4) * (s - t) if s <= t else -torch.inf
    wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias).transpose(1, 2)
    mine = alibi_bias(4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(attention(q, k, v, bias=mine), wanted)
    assert torch.equal(alibi_bias(4, 2, 5), alibi_bias(4, 5, 5)[:, 3:]) and torch.equal(mine, mine.mT)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 20), (4, 3)])
def test_t5_buckets(bidirectional, n_buckets, max_distance):
    """Oracle: the description in plain Python, one distance at a time, in the authors' float32."""

    def bucket(ahead):
        n, first = n_buckets, 0
        if bidirectional:
            n //= 2
            first = n if ahead > 0 else 0
            distance = abs(ahead)
        else:
            distance = max(-ahead, 0)
        exact = n // 2
        if distance < exact:
            return first + distance
        ratio = (torch.tensor(distance / exact).log() / math.log(max_distance / exact)).item()
        return first + min(n - 1, exact + int(ratio * (n - exact)))

    found = t5_buckets(150, 200, n_buckets=n_buckets, max_distance=max_distance, bidirectional=bidirectional)
    wanted = torch.tensor([[bucket(s - (t + 50)) for s in range(200)] for t in range(150)])
    assert torch.equal(found, wanted) and found.min() >= 0 and found.max() < n_buckets


def test_t5_bias_and_its_gradient():
    """Oracle: indexing; the gradient of a weight is the sum over the places of its bucket."""
    (weight,) = numbers((8, H))
    bias = t5_bias(weight, T, S, max_distance=6)
    buckets = t5_buckets(T, S, n_buckets=8, max_distance=6)
    assert torch.equal(bias, torch.stack([weight[:, h][buckets] for h in range(H)]))
    leaves = [*qkv(), weight]
    compare(
        lambda q, k, v, w: attention(q, k, v, bias=t5_bias(w, T, S, max_distance=6), causal=False),
        lambda q, k, v, w: loop(q, k, v, bias=w[buckets].movedim(-1, 0), causal=False),
        leaves,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alibi_slopes(0), "n_heads must be at least 1, got 0"),
        (lambda: t5_buckets(2, 2, n_buckets=5), "n_buckets must be an even number of at least 4"),
        (lambda: t5_buckets(2, 2, n_buckets=1, bidirectional=False), "n_buckets must be at least 2"),
        (lambda: t5_buckets(2, 2, max_distance=8), "max_distance must be above 8"),
    ],
)
def test_bad_numbers_of_buckets_and_heads(call, message):
    with pytest.raises(ValueError, match=message):
        call()
