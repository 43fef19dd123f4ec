"""Cross-entropy of given logits: the interpreted Triton rows against float64, and the public op against purelm.ops."""

import math

import pytest
import torch
from torch.func import grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from purelm.kernels import cross_entropy as module
from purelm.kernels.cross_entropy import PLAIN, cross_entropy
from purelm.ops.cross_entropy import cross_entropy as reference
from tests.kernels.rules import assert_as_exact, largest

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS = [{}, {"softcap": 2.0, "z_loss": 0.1}]

pytestmark = [
    # Triton in its interpreter: numpy warns of the infinities that the maths means.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    # Dynamo makes an instance of a Function where torch itself says not to (2.13).
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def triton_rows():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU; tests/gpu has these")
    from purelm.kernels.cross_entropy_triton import TRITON

    return TRITON


def random_case(N=5, V=11, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(N, V, generator=g, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, V, (N,), generator=g)
    weights = torch.rand(N, generator=g) + 0.1
    weights[N // 2] = 0.0
    targets = torch.where(weights == 0, -100, targets)
    return logits, targets, weights.to(torch.promote_types(dtype, torch.float32))


def reference_rows(logits, targets, weights, softcap=None, z_loss=0.0):
    """(loss, nll, d sum w loss / d logits) of purelm.ops; where the weight is 0 all three are 0."""
    logits = logits.detach().requires_grad_()
    live = (weights != 0).to(weights.dtype)
    loss, nll = reference(logits, targets, weights=live, reduction="none", softcap=softcap, z_loss=z_loss)
    (g,) = torch.autograd.grad((loss * weights).sum(), logits)
    return loss.detach(), nll, g


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, V", [(1, 1), (3, 7), (5, 123), (4, 9001)])
def test_rows_against_float64(triton_rows, N, V, dtype, options):
    """Oracle: purelm.ops in float64, by the rule of rules.py. Forward, backward and both at once, in place."""
    logits, targets, weights = random_case(N, V, dtype)
    if N == 1:
        weights, targets = weights + 1, targets * 0
    cap, z = options.get("softcap"), options.get("z_loss", 0.0)
    same = reference_rows(logits, targets, weights, cap, z)
    exact = reference_rows(logits.double(), targets, weights.double(), cap, z)
    loss, nll, log_z, _ = triton_rows.forward(logits, targets, weights, cap, z)
    before = logits.clone()
    d = triton_rows.gradient(logits, targets, log_z, weights * (1 + 2 * z * log_z), -weights, cap)
    assert torch.equal(logits, before)
    # Softcap, exp, a sum over the row, log, a difference of numbers of the logits' size. The gradient is a difference
    # of numbers of the weights' size: p is 1 where V is.
    rule = {"roundings": 6 + math.log2(V) + largest(logits)}
    sizes = [largest(logits) + z * largest(log_z) ** 2] * 2 + [largest(weights) * (1 + 2 * z * largest(log_z))]
    for got, s, e, size in zip((loss, nll, d), same, exact, sizes, strict=True):
        assert_as_exact(got, s, e, scale=size, **rule)
    # rows that start at multiples of more than V, as the chunks' buffer has them
    padded = torch.zeros(N, V + 3, dtype=dtype)[:, :V].copy_(logits)
    loss2, nll2 = triton_rows.loss_and_gradient_(padded, targets, weights, cap, z)
    for got, s, e, size in zip((loss2, nll2, padded), same, exact, sizes, strict=True):
        assert_as_exact(got, s, e, scale=size, **rule)
    again = logits.clone()
    assert torch.equal(triton_rows.loss_and_gradient_(again, targets, weights, cap, z)[0], loss2)
    assert torch.equal(again, padded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_entropy(triton_rows, dtype):
    """Oracle: torch.log_softmax in float64 and autograd, with temperature."""
    logits, targets, weights = random_case(6, 300, dtype)
    g, e = torch.randn(6), torch.randn(6)
    g[3] = e[3] = 0.0  # the token of weight 0

    def oracle(x):
        x = x.detach().requires_grad_()
        log_p = torch.log_softmax(2.0 * torch.tanh(x.to(torch.promote_types(x.dtype, torch.float32)) / 2.0) / 0.7, -1)
        entropy = torch.where(weights == 0, 0.0, -(log_p.exp() * log_p).sum(-1))
        nll = torch.where(weights == 0, 0.0, -log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0])
        (d,) = torch.autograd.grad((nll * g.to(nll.dtype) + entropy * e.to(nll.dtype)).sum(), x)
        return nll.detach(), entropy.detach(), d

    _, nll, log_z, entropy = triton_rows.forward(logits, targets, weights, 2.0, 0.0, 0.7, True)
    d = triton_rows.gradient(logits, targets, log_z, g, -g, 2.0, 0.7, e, entropy)
    for got, s, x in zip((nll, entropy, d), oracle(logits), oracle(logits.double()), strict=True):
        assert_as_exact(got, s, x, roundings=8 + math.log2(logits.shape[-1]))  # as above, and a temperature


def test_rows_at_the_edges(triton_rows):
    """Exact: extreme logits, -inf logits, bad targets that are not read, an empty batch, expanded and turned inputs."""
    logits = torch.tensor([[1e4, 0.0, -1e4], [-torch.inf, 0.0, 0.0], [0.0, 0.0, 0.0], [-torch.inf] * 3])
    targets = torch.tensor([2, 1, 7, 0])
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])
    loss, nll, log_z, entropy = triton_rows.forward(logits, targets, weights, None, 0.0, 1.0, True)
    torch.testing.assert_close(loss[:2], torch.tensor([2e4, 2.0]).where(torch.tensor([True, False]), loss[1]))
    torch.testing.assert_close(entropy[:3], torch.tensor([0.0, 2.0, 3.0]).clamp(min=1).log())
    torch.testing.assert_close(loss[1], torch.tensor(2.0).log())
    assert loss[2].isnan() and nll[2].isnan() and loss[3] == 0 and log_z[3] == 0
    d = triton_rows.gradient(logits, targets, log_z, weights, -weights, None)
    torch.testing.assert_close(d[1], torch.tensor([0.0, -0.5, 0.5]))
    assert d[2].isnan().all() and torch.equal(d[3], torch.zeros(3))
    for N in (0, 4):
        for x in (torch.randn(1, 9).expand(N, 9), torch.randn(9, N).t()):
            args = (x, torch.arange(N), None, 3.0, 0.1)
            torch.testing.assert_close(triton_rows.forward(*args), PLAIN.forward(*args))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_op_equals_reference(shape, dtype, reduction):
    """Oracle: purelm.ops, values and gradients, weights' and denominator's too."""
    g = torch.Generator().manual_seed(1)
    wide = torch.promote_types(dtype, torch.float32)
    logits = torch.randn(*shape, 7, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, 7, shape, generator=g)
    weights = torch.rand(shape, generator=g).to(wide).requires_grad_()
    denominator = torch.tensor(2.5, dtype=wide, requires_grad=True)
    found = []
    for f in (cross_entropy, reference):
        loss, nll = f(
            logits, targets, weights=weights, denominator=denominator, reduction=reduction, softcap=2.0, z_loss=0.1
        )
        found.append((loss, nll, *torch.autograd.grad(loss.sin().sum(), (logits, weights, denominator))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_mean_and_ignore_index():
    """Oracle: torch.nn.functional.cross_entropy; the mean over nothing is 0."""
    logits, targets, _ = random_case(6, 7)
    targets[:2] = -100
    expected = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(cross_entropy(logits, targets, reduction="mean", ignore_index=-100)[0], expected)
    assert cross_entropy(logits, torch.full((6,), -1), reduction="mean", ignore_index=-1)[0] == 0.0
    assert cross_entropy(logits[:0], targets[:0], reduction="mean")[0] == 0.0


def scalar(f, **options):
    return lambda x, t, w: f(x, t, weights=w, reduction="none", **options)[0].sin().sum()


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (1, 1, None), (None, 0, None)])
def test_func(in_dims):
    """Oracle: the same transform of the reference."""
    logits, targets, weights = random_case(4, 7)
    batched = [
        x if d is None else torch.stack([x, x.flip(0) if i else x, x.roll(1, 0)], d)
        for i, (x, d) in enumerate(zip((logits, targets, weights), in_dims, strict=True))
    ]
    batched[2] = batched[2].abs() + 0.1 if in_dims[2] is not None else weights + 1
    batched[1] = batched[1].clamp(min=0)
    ours, theirs = (scalar(f, softcap=2.0, z_loss=0.1) for f in (cross_entropy, reference))
    torch.testing.assert_close(vmap(ours, in_dims)(*batched), vmap(theirs, in_dims)(*batched))
    got, expected = (vmap(grad(f, (0, 2)), in_dims)(*batched) for f in (ours, theirs))
    torch.testing.assert_close(got, expected)
    if in_dims[0] is not None:
        got, expected = (grad(lambda *a, f=f: vmap(f, in_dims)(*a).sum())(*batched) for f in (ours, theirs))
        torch.testing.assert_close(got, expected)


def test_jacrev():
    """Oracle: jacrev of the reference."""
    logits, targets, weights = random_case(3, 5)
    ours, theirs = (
        jacrev(lambda x, f=f: f(x, targets, weights=weights, reduction="none", z_loss=0.1)[0])(logits)
        for f in (cross_entropy, reference)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.compile
def test_compiled_equals_eager():
    """Oracle: eager, value and gradients, one graph."""
    logits, targets, weights = random_case(5, 17, torch.float32)
    logits.requires_grad_()

    def f(x, t, w):
        return cross_entropy(x.sin(), t, weights=w, denominator=w.sum(), z_loss=0.1)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for g in (f, compiled):
        loss, nll = g(logits, targets, weights)
        (d,) = torch.autograd.grad(loss, logits)
        if g is f:
            expected = loss, nll, d
    for a, b in zip((loss, nll, d), expected, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(logits, targets, weights), (loss, nll))


def test_checkpoint():
    """Oracle: the same without checkpoint."""
    logits, targets, weights = random_case(5, 17)
    logits.requires_grad_()

    def f(x):
        return cross_entropy(x * 2, targets, weights=weights)[0]

    torch.testing.assert_close(
        torch.autograd.grad(checkpoint(f, logits, use_reentrant=False), logits), torch.autograd.grad(f(logits), logits)
    )


def test_opcheck():
    """torch.library.opcheck on plain tensors: schema, fake strides and dtypes, tracing."""
    for dtype in (torch.float32, torch.bfloat16):
        logits, targets, weights = random_case(5, 17, dtype)
        torch.library.opcheck(module._fwd_op, (logits, targets, weights, 2.0, 0.1))
        torch.library.opcheck(module._fwd_op, (logits, targets.clamp(min=0), None, None, 0.0))
        per_token = torch.randn(5)
        torch.library.opcheck(module._bwd_op, (logits, targets.clamp(min=0), per_token, per_token, per_token, None))


def test_bad_arguments():
    logits, targets, weights = random_case()
    for match, call in {
        "reduction must be": lambda: cross_entropy(logits, targets, reduction="max"),
        "denominator must be None": lambda: cross_entropy(logits, targets, reduction="mean", denominator=2.0),
        "targets must have the batch": lambda: cross_entropy(logits, targets[1:]),
        "weights must have the batch": lambda: cross_entropy(logits, targets, weights=weights[:1]),
        "targets must be integers": lambda: cross_entropy(logits, weights),
        "logits must be floating": lambda: cross_entropy(targets, targets),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises((RuntimeError, IndexError)):  # on a CPU; NaN on a GPU
        cross_entropy(logits, targets + 100)
