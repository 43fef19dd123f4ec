"""flash_attention on a GPU: the Triton kernels at real sizes.

Oracles: `purelm.ops.attention.attention` in float64 on the GPU, with the same reference in the same dtype for the
tolerance; eager for compiled; a second run for determinism; one row at a time for lengths whose whole does not fit.
"""

import math

import pytest
import torch
from torch.func import grad, vmap

from purelm.kernels.flash_attention import bidirectional_flash_attention, flash_attention, flash_attention_with_lse
from purelm.ops.attention import attention, attention_with_lse
from tests.kernels.rules import assert_as_exact, attention_scales

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (make gpu-test)"),
    pytest.mark.filterwarnings("ignore:flash_attention. tiles for:UserWarning"),  # sizes that were never tuned
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def tensors(B, T, S, H, G, K, E, dtype, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    shapes = ((B, T, H, K), (B, S, G, K), (B, S, G, E), (B, T, H, E))
    return [torch.randn(s, generator=g, device="cuda", dtype=torch.float32).to(dtype) for s in shapes]


def ids(B, T, n, seed=0):
    return torch.randint(0, n, (B, T), generator=torch.Generator().manual_seed(seed)).sort(-1).values.cuda()


def with_gradients(f, leaves, do):
    leaves = [x.detach().requires_grad_() for x in leaves]
    o = f(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def check(size, dtype, **options):
    q, k, v, do = tensors(*size, dtype)
    mine = with_gradients(lambda *x: flash_attention(*x, **options), [q, k, v], do)
    options = {k: v for k, v in options.items() if k != "precision"}
    wide = [x.double() for x in (q, k, v)]
    exact = with_gradients(lambda *x: attention(*x, **options), wide, do.double())
    same = with_gradients(lambda *x: attention(*x, **options), [q, k, v], do)
    scales, score = attention_scales(q, k, v, do, options.get("scale") or q.shape[-1] ** -0.5)
    for found, reference, wanted, size in zip(mine, same, exact, scales, strict=True):
        # Scores, exp, sums over keys and features, a quotient, products. (tf32x3, the default, drops the product of the
        # two low parts: 2^-22 of a term, 2 more.)
        roundings = score + math.log2(k.shape[1] * k.shape[3]) + 6
        assert_as_exact(found, reference, wanted, roundings=roundings, scale=size)


@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_head_dims_in_bf16(dim, causal):
    check((2, 700, 700, 4, 2, dim, dim), BF16, causal=causal)


@pytest.mark.parametrize("dim,value_dim", [(80, 80), (96, 96), (100, 36), (18, 18), (192, 128)])
def test_head_dims_that_are_no_powers_of_two(dim, value_dim):
    """100 and 18 are rows of no whole 16 bytes, which descriptors cannot describe: the path of pointers."""
    check((1, 333, 333, 4, 2, dim, value_dim), BF16)


@pytest.mark.parametrize("T,S", [(1, 1), (7, 123), (123, 7), (1, 2048), (129, 128), (128, 129), (1000, 1024)])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_lengths(T, S, dtype):
    check((2, T, S, 4, 1, 64, 64), dtype)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_fp32(precision, dim):
    check((2, 300, 300, 2, 2, dim, dim), FP32, precision=precision)


@pytest.mark.parametrize(
    "options",
    [
        dict(window=200),
        dict(window=0),
        dict(window=(100, 50), causal=False),
        dict(window=(None, 50), causal=False),
        dict(softcap=5.0, scale=0.2),
        dict(softcap=5.0, window=64),
    ],
)
@pytest.mark.parametrize("dim", [64, 128])
def test_windows_and_softcaps(options, dim):
    check((2, 513, 513, 4, 2, dim, dim), BF16, **options)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents(causal):
    check((2, 1500, 1500, 4, 2, 64, 64), BF16, causal=causal, segment_ids=ids(2, 1500, 9))
    check((2, 900, 1100, 4, 2, 64, 64), BF16, causal=causal, segment_ids=(ids(2, 900, 4), ids(2, 1100, 4, 1)))


EXTRAS = [
    ((2, 4, 513, 530), None, {}),
    ((1, 4, 513, 530), None, dict(causal=False)),
    ((2, 1, 1, 530), None, dict(window=200)),
    ((1, 4, 513, 1), (2, 1, 1, 530), dict(causal=False)),
    (None, (2, 4, 513, 530), {}),
    (None, (1, 1, 513, 530), dict(causal=False, softcap=5.0)),
    ((1, 4, 513, 530), (2, 1, 513, 530), dict(softcap=5.0, window=100)),
]


@pytest.mark.parametrize("dim", [64, 128, 36])  # 36: by pointers
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("bias_shape,mask_shape,options", EXTRAS)
def test_biases_and_masks(bias_shape, mask_shape, options, dtype, dim):
    """Oracle: float64, with the gradient of the bias; some queries see nothing; two runs give the same bits."""
    q, k, v, do = tensors(2, 513, 530, 4, 2, dim, dim, dtype)
    g = torch.Generator("cuda").manual_seed(1)
    bias = None if bias_shape is None else torch.randn(bias_shape, generator=g, device="cuda").to(dtype)
    mask = None if mask_shape is None else torch.rand(mask_shape, generator=g, device="cuda") > 0.5
    if mask is not None and mask_shape[-2] > 1:
        mask = mask & (torch.arange(513, device="cuda") % 7 != 3).unsqueeze(-1)
    leaves = [q, k, v] if bias is None else [q, k, v, bias]

    def run(f, leaves, do, **more):
        return with_gradients(lambda q, k, v, b=None: f(q, k, v, bias=b, mask=mask, **options, **more), leaves, do)

    mine = run(flash_attention, leaves, do)
    assert all(torch.equal(x, y) for x, y in zip(mine, run(flash_attention, leaves, do), strict=True))
    exact = run(attention, [x.double() for x in leaves], do.double())
    same = run(attention, leaves, do)
    scales, score = attention_scales(q, k, v, do, dim**-0.5)
    if bias is not None:
        score += float(bias.abs().max())
        # A sum of p (dp - delta) over what shares a number, each of the size of dp at most.
        dp = scales[1] / float(k.abs().max()) * dim**0.5
        scales.append(dp * (2 * 4 * 513 * 530 / bias.numel()) ** 0.5)
    for found, reference, wanted, size in zip(mine, same, exact, scales, strict=True):
        roundings = score + math.log2(k.shape[1] * k.shape[3]) + 6
        assert_as_exact(found, reference, wanted, roundings=roundings, scale=size)


def test_launching_again_with_another_bias_and_mask():
    """The second launch of a shape takes a short way. Oracle: the reference."""
    q, k, v, _ = tensors(2, 100, 100, 4, 2, 64, 64, BF16)
    for seed in range(3):
        g = torch.Generator("cuda").manual_seed(seed)
        bias = torch.randn(4, 100, 100, generator=g, device="cuda")
        mask = torch.rand(2, 1, 100, 100, generator=g, device="cuda") > 0.3
        for b, m in ((bias, None), (None, mask), (bias, mask), (bias.mT, mask.mT), (bias.bfloat16(), mask)):
            wanted = attention(q.double(), k.double(), v.double(), bias=None if b is None else b.double(), mask=m)
            o = flash_attention(q, k, v, bias=b, mask=m)
            torch.testing.assert_close(o.double(), wanted, rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="bias must be fp32, bf16 or fp16 on CUDA"):
        flash_attention(q, k, v, bias=bias.double())
    with pytest.raises(ValueError, match="mask must be on cuda"):
        flash_attention(q, k, v, mask=mask.cpu())


def test_the_transposed_accumulator_is_right_on_hopper():
    """Triton 3.4 to 3.7.0 multiply a transposed accumulator wrongly: dk and dv at the tiles where that bit others.

    Oracle: float64; the error was of the size of the gradients themselves, here 1 % of them would already fail.
    """
    for dim in (64, 128):
        for T in (128, 256, 1024):
            q, k, v, do = tensors(2, T, T, 4, 4, dim, dim, BF16)
            found = with_gradients(flash_attention, [q, k, v], do)
            wanted = with_gradients(attention, [x.double() for x in (q, k, v)], do.double())
            for x, y in zip(found, wanted, strict=True):
                assert float((x.double() - y).norm() / y.norm()) < 0.01


def test_the_same_bits_in_every_run():
    q, k, v, do = tensors(2, 2048, 2048, 8, 2, 64, 64, BF16)
    first = with_gradients(flash_attention, [q, k, v], do)
    for _ in range(5):
        again = with_gradients(flash_attention, [q, k, v], do)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_launching_again_with_other_tensors_views_and_roles():
    """The second launch of a shape takes a short way. Oracle: the reference."""
    for seed in range(3):
        q, k, v, do = tensors(2, 100, 100, 2, 2, 64, 64, BF16, seed)
        wanted = with_gradients(attention, [q.double(), k.double(), v.double()], do.double())
        for x, y in zip(with_gradients(flash_attention, [q, k, v], do), wanted, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=0.05, atol=0.05)
        same = flash_attention(q, q, q)
        torch.testing.assert_close(same.double(), attention(*[q.double()] * 3), rtol=0.02, atol=0.02)
        packed = torch.cat([q, k, v], 2)
        views = packed[:, :, :2], packed[:, :, 2:4], packed[:, :, 4:]
        assert torch.equal(flash_attention(*views), flash_attention(q, k, v))
        odd = torch.empty(q.numel() + 1, dtype=BF16, device="cuda")[1:].view(q.shape)  # no address of whole 16 bytes
        odd.copy_(q)
        torch.testing.assert_close(flash_attention(odd, k, v), flash_attention(q, k, v), rtol=0.02, atol=0.02)


def test_sinks_and_lse():
    """Oracle: the op on the CPU, in float64."""
    q, k, v, do = tensors(2, 300, 300, 4, 2, 64, 64, BF16)
    sinks = torch.linspace(-1, 2, 4, device="cuda")

    def f(q, k, v, s):
        o, lse = flash_attention(q, k, v, sinks=s, return_lse=True)
        return o.float().mul(w).sum() + (lse * 0.1).sum()

    w = do.float()
    found = torch.autograd.grad(f(*(leaves := [x.requires_grad_() for x in (q, k, v, sinks)])), leaves)
    wide = [x.detach().cpu().double().requires_grad_() for x in leaves]
    w = w.cpu().double()
    o, lse = flash_attention(*wide[:3], sinks=wide[3], return_lse=True)
    wanted = torch.autograd.grad((o * w).sum() + (lse * 0.1).sum(), wide)
    for x, y in zip(found, wanted, strict=True):
        assert float((x.cpu().double() - y).norm() / y.norm()) < 0.01  # bf16 rounds at 0.4 %


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_halves_of_the_keys_merge_to_the_whole(dtype):
    """Oracle: float64 attention over all keys, value and gradients, those of lse included (as in ring attention)."""
    q, k, v, do = tensors(2, 300, 512, 4, 2, 64, 64, dtype)

    def merged(f):
        def call(q, k, v):
            parts = [f(q, k[:, at], v[:, at], causal=False) for at in (slice(0, 200), slice(200, 512))]
            lse = torch.logaddexp(parts[0][1], parts[1][1])
            return sum(torch.exp(p - lse).transpose(1, 2).unsqueeze(-1) * o.to(p.dtype) for o, p in parts).to(q.dtype)

        return call

    exact = with_gradients(lambda *x: attention(*x, causal=False), [x.double() for x in (q, k, v)], do.double())
    same = with_gradients(merged(attention_with_lse), [q, k, v], do)
    mine = with_gradients(merged(flash_attention_with_lse), [q, k, v], do)
    scales, score = attention_scales(q, k, v, do, 0.125)
    for x, reference, wanted, size in zip(mine, same, exact, scales, strict=True):
        # As one attention, and the merge: an exp, products and a sum.
        assert_as_exact(x, reference, wanted, roundings=2 * score + math.log2(512 * 64) + 10, stored=4.0, scale=size)


def test_sinks_of_another_dtype_at_the_same_shape():
    """A launch that is remembered must not read them as the first one's. Oracle: the op on the CPU in float64."""
    q, k, v, _ = tensors(1, 64, 64, 2, 2, 64, 64, BF16)
    sinks = torch.tensor([0.5, -1.0], device="cuda")
    wanted = flash_attention(*(x.cpu().double() for x in (q, k, v)), sinks=sinks.cpu().double())
    for dtype in (FP32, BF16, FP32):
        o = flash_attention(q, k, v, sinks=sinks.to(dtype))
        torch.testing.assert_close(o.cpu().double(), wanted, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_compiled_checkpointed_and_torch_func():
    """Oracle: eager."""
    q, k, v, do = tensors(2, 256, 256, 4, 2, 64, 64, BF16)
    wanted = with_gradients(flash_attention, [q, k, v], do)
    compiled = torch.compile(flash_attention, fullgraph=True)
    for x, y in zip(with_gradients(compiled, [q, k, v], do), wanted, strict=True):
        assert torch.equal(x, y)
    again = with_gradients(
        lambda *x: torch.utils.checkpoint.checkpoint(flash_attention, *x, use_reentrant=False), [q, k, v], do
    )
    assert all(torch.equal(x, y) for x, y in zip(again, wanted, strict=True))
    found = grad(lambda q, k, v: (flash_attention(q, k, v) * do).sum(), (0, 1, 2))(q, k, v)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted[1:], strict=True))
    per = vmap(grad(lambda q, k, v, g: (flash_attention(q[None], k[None], v[None]) * g).sum(), (0, 1, 2)))(q, k, v, do)
    assert all(torch.equal(x, y) for x, y in zip(per, wanted[1:], strict=True))


def test_65536_tokens():
    """Oracle: float64 for the first and last queries, which is what fits; gradients of one query reach its keys."""
    q, k, v, _ = tensors(1, 65536, 65536, 2, 1, 64, 64, BF16)
    o = flash_attention(q, k, v)
    for at in (0, 5, 40000, 65535):
        wanted = attention(q[:, at : at + 1].double(), k[:, : at + 1].double(), v[:, : at + 1].double())
        torch.testing.assert_close(o[:, at : at + 1].double(), wanted, rtol=0.02, atol=0.005)
    found = with_gradients(lambda *x: flash_attention(*x)[:, -1:], [q, k, v], torch.ones_like(q[:, -1:]))[1:]
    row = [q[:, -1:].double(), k.double(), v.double()]
    wanted = with_gradients(attention, row, torch.ones_like(row[0]))[1:]
    for x, y in zip((found[0][:, -1:], *found[1:]), wanted, strict=True):
        assert float((x.double() - y).norm() / y.norm()) < 0.02


def test_more_elements_than_32_bits_count():
    """Offsets are 64 bits wide. Oracle: the last rows alone."""
    shape = (300, 512, 128, 128)  # 2.5e9 elements, 5 GB
    q = torch.randn(1, *shape[1:], device="cuda", dtype=BF16).expand(shape).contiguous()
    k = torch.randn(300, 64, 1, 128, device="cuda", dtype=BF16)
    o = flash_attention(q, k, k, causal=False)
    torch.testing.assert_close(o[-1:], flash_attention(q[-1:].clone(), k[-1:], k[-1:], causal=False))
    narrow = flash_attention(q[..., :66], k[..., :66], k[..., :66], causal=False)  # by pointers
    one = flash_attention(q[-1:, ..., :66].contiguous(), k[-1:, ..., :66], k[-1:, ..., :66], causal=False)
    torch.testing.assert_close(narrow[-1:], one)


def test_bidirectional_with_lengths_and_what_is_refused():
    q, k, v, _ = tensors(3, 100, 100, 2, 2, 64, 64, BF16)
    lengths = torch.tensor([100, 7, 1], device="cuda")
    o = bidirectional_flash_attention(q, k, v, lengths=lengths)
    for i, n in enumerate(lengths.tolist()):
        one = attention(*(x[i : i + 1, :n].double() for x in (q, k, v)), causal=False)
        torch.testing.assert_close(o[i : i + 1, :n].double(), one, rtol=0.02, atol=0.02)
        assert not o[i, n:].any()
    with pytest.raises(ValueError, match="fp32, bf16 or fp16"):
        flash_attention(q.double(), k.double(), v.double())
    wide = torch.zeros(1, 4, 1, 264, device="cuda")
    with pytest.raises(ValueError, match="head dims up to 256"):
        flash_attention(wide, wide, wide)
