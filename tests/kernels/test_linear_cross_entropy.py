"""linear_cross_entropy and its kin against purelm.ops (values, gradients, transforms) and float64 (Triton's rows)."""

import math

import pytest
import torch
from torch.func import grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from purelm.kernels import linear_cross_entropy_chunks as passes
from purelm.kernels import linear_cross_entropy_ops as module
from purelm.kernels.cross_entropy import PLAIN
from purelm.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_value_and_grad,
    log_probs_and_entropy,
)
from purelm.models import transformer
from purelm.ops import REFERENCE
from purelm.ops.linear_cross_entropy import linear_cross_entropy as reference
from purelm.ops.log_probs import log_probs
from purelm.transforms import value_and_grad
from tests.kernels.rules import assert_as_exact

EVERYTHING = {"denominator": 2.5, "softcap": 3.0, "z_loss": 0.1}

pytestmark = [
    # Triton in its interpreter: numpy warns of the infinities that the maths means.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    # Dynamo makes an instance of a Function where torch itself says not to (2.13).
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def random_case(shape=(3, 5), V=11, D=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, D, generator=g, dtype=torch.float64).to(dtype)
    unembedding = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, V, shape, generator=g)
    weights = torch.rand(shape, generator=g) * (torch.rand(shape, generator=g) > 0.3)
    return hidden, unembedding, targets, weights.to(torch.promote_types(dtype, torch.float32))


def run(f, hidden, unembedding, targets, weights, **options):
    """(loss, nll, and the gradients of sin(loss) for hidden, unembedding and weights)."""
    leaves = [x.detach().requires_grad_() for x in (hidden, unembedding, weights)]
    loss, nll = f(leaves[0], leaves[1], targets, weights=leaves[2], **options)
    assert not nll.requires_grad or f is reference
    return loss.detach(), nll.detach(), *torch.autograd.grad(loss.sin().sum(), leaves)


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("shape", [(), (7,), (0,), (3, 5)])
def test_equals_reference(shape, reduction, chunk):
    """Oracle: purelm.ops in float64. A token of weight 0 has target -100."""
    hidden, unembedding, targets, weights = random_case(shape)
    targets = torch.where(weights == 0, -100, targets)
    got, expected = (
        run(f, hidden, unembedding, targets, weights, reduction=reduction, chunk=c, **EVERYTHING)
        for f, c in ((linear_cross_entropy, chunk), (reference, None))
    )
    torch.testing.assert_close(got, expected)
    with torch.no_grad():  # the loss alone
        alone = linear_cross_entropy(
            hidden, unembedding, targets, weights=weights, reduction=reduction, chunk=chunk, **EVERYTHING
        )
    torch.testing.assert_close(alone, expected[:2])


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [1, 2, 501])
def test_against_float64(V, dtype, reduction):
    """Oracle: float64, by the rule of rules.py: 5 chunks, and dW summed where half of it lies in the result."""
    hidden, unembedding, targets, weights = random_case((150,), V, 16, dtype)
    same = run(reference, hidden, unembedding, targets, weights, denominator=150.0, reduction=reduction)
    exact = run(
        reference, hidden.double(), unembedding.double(), targets, weights.double(), denominator=150.0,
        reduction=reduction,
    )  # fmt: skip
    options = {"denominator": 150.0, "reduction": reduction, "chunk": 32}
    got = run(linear_cross_entropy, hidden, unembedding, targets, weights, **options)
    for x, s, e in zip(got, same, exact, strict=True):
        assert_as_exact(x, s, e, roundings=8 + math.log2(16 * V * 150))  # sums over features, a row and tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_passes_with_triton_rows(dtype):
    """Oracle: the same passes with torch's rows in float64; the rule's other side is torch's rows in the dtype."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU; tests/gpu has these")
    from purelm.kernels.cross_entropy_triton import TRITON
    from purelm.kernels.linear_cross_entropy_triton import scale

    h, w, t, weights = random_case((20,), 301, 8, dtype)
    per_token = torch.randn(20)

    def everything(rows, h, w, weights, g):
        total = passes.losses_and_gradients(rows, h, w, t, weights, 2.0, 0.1, 8, w.dtype, True, True)
        loss, nll, log_z, entropy = passes.losses(rows, h, w, t, None, 2.0, 0.1, 0.7, True, 8)
        again = passes.gradients_again(rows, h, w, t, log_z, g, -g, g.sin(), entropy, 2.0, 0.7, 8, True, True)
        return *total, loss, nll, entropy, *again

    exact = everything(PLAIN, h.double(), w.double(), weights.double(), per_token.double())
    same = everything(PLAIN, h, w, weights, per_token)
    for x, s, e in zip(everything(TRITON, h, w, weights, per_token), same, exact, strict=True):
        # Sums over features, a row and tokens, exp, log, a softcap and a temperature.
        assert_as_exact(x, s, e, roundings=8 + math.log2(8 * 301 * 20))
    third = torch.tensor(1 / 3)
    # a rounding: the interpreter truncates to bf16
    assert_as_exact(scale(h[::2], third, dtype), (h[::2].float() * third).to(dtype), h[::2].double() * third.double())


@pytest.mark.parametrize("V, D", [(1, 3), (2, 5), (127, 2), (130, 3), (1000, 1)])
def test_accumulator_in_the_results_storage(V, D):
    """Exact: integers, summed over chunks and rounded in place, and a result that holds no more than itself."""
    d, x = torch.randint(-3, 4, (9, V)).bfloat16(), torch.randint(-3, 4, (9, D)).bfloat16()
    total = passes._start_sum(torch.empty(V, D, dtype=torch.bfloat16), torch.bfloat16)
    for i in range(0, 9, 4):
        passes._add(total, d[i : i + 4], x[i : i + 4], first=i == 0)
    out = passes._finish(total)
    assert torch.equal(out.float(), d.float().t() @ x.float())
    assert out.untyped_storage().nbytes() == 2 * V * D


def test_value_and_grad():
    """Oracle: autograd of the reference; arguments are not touched, and nothing is recorded."""
    hidden, unembedding, targets, weights = random_case()
    leaves = [x.clone().requires_grad_() for x in (hidden, unembedding)]
    loss, nll = reference(*leaves, targets, weights=weights, **EVERYTHING)
    expected = (loss.detach(), nll, *torch.autograd.grad(loss, leaves))
    got = linear_cross_entropy_value_and_grad(*leaves, targets, weights=weights, chunk=4, **EVERYTHING)
    torch.testing.assert_close(got, expected)
    assert not any(x.requires_grad for x in got)
    assert all(torch.equal(a, b) for a, b in zip(leaves, (hidden, unembedding), strict=True))


@pytest.mark.parametrize("ignore_index", [None, -1])
def test_log_probs_and_entropy(ignore_index):
    """Oracle: log_softmax over all the logits in float64, for each of the two and both, and finite differences."""
    hidden, unembedding, targets, _ = random_case()
    if ignore_index is not None:
        targets[1, 2:] = ignore_index
    options = {"softcap": 3.0, "temperature": 0.7, "ignore_index": ignore_index}
    leaves = [x.requires_grad_() for x in (hidden, unembedding)]
    got = log_probs_and_entropy(*leaves, targets, chunk=4, **options)
    expected = log_probs(*leaves, targets, **options)
    torch.testing.assert_close(got, expected)
    for pick in (lambda p, h: p.sin().sum(), lambda p, h: h.sin().sum(), lambda p, h: (p * h).sum()):
        torch.testing.assert_close(
            torch.autograd.grad(pick(*got), leaves, retain_graph=True),
            torch.autograd.grad(pick(*expected), leaves, retain_graph=True),
        )
    small = [x[:1, :2].detach().requires_grad_() if x.ndim == 3 else x for x in leaves]
    assert torch.autograd.gradcheck(lambda h, w: log_probs_and_entropy(h, w, targets[:1, :2], **options), small)


def test_mean_and_ignore_index():
    """Oracle: torch.nn.functional.cross_entropy."""
    hidden, unembedding, targets, _ = random_case()
    targets[0, 1:] = 3
    leaves = [x.requires_grad_() for x in (hidden, unembedding)]
    logits = (hidden @ unembedding.T).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=3)
    loss, nll = linear_cross_entropy(*leaves, targets, reduction="mean", ignore_index=3)
    torch.testing.assert_close((loss, nll), (expected, expected.detach()))
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("which", [(0,), (1,), (2,)])
def test_gradients_of_a_subset(which):
    """Oracle: the reference; and a gradient that nobody asks for is not formed."""
    case = random_case()
    found = []
    for f in (linear_cross_entropy, reference):
        h, w, weights = (x.clone().requires_grad_(i in which) for i, x in enumerate((case[0], case[1], case[3])))
        loss, _ = f(h, w, case[2], weights=weights)
        found.append(torch.autograd.grad(loss, [(h, w, weights)[i] for i in which]))
    torch.testing.assert_close(*found)
    args = (case[0].reshape(-1, 4), case[1], case[2].reshape(-1), None, None, 0.0, 0)
    _, _, d_hidden, d_unembedding = module._sum_op(*args, 0 in which, 1 in which)
    assert (d_hidden.numel() > 0, d_unembedding.numel() > 0) == (0 in which, 1 in which)


def scalar(f, **options):
    return lambda h, w, t, s: f(h, w, t, weights=s, **options, **EVERYTHING)[0].sin().sum()


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("in_dims", [(0, None, 0, 0), (0, None, None, None), (1, 0, 0, None), (None, 0, None, None)])
def test_func(in_dims, reduction):
    """Oracle: the same transform of the reference: vmap, gradients of each sample, the gradient of a vmap."""
    B = 3
    shapes = [(5, 4), (11, 4), (5,), (5,)]
    g = torch.Generator().manual_seed(0)

    def draw(i):
        if i == 2:
            return torch.randint(0, 11, shapes[i], generator=g)
        return torch.rand(shapes[i], generator=g, dtype=torch.float64)

    args = [draw(i) if d is None else torch.stack([draw(i) for _ in range(B)], d) for i, d in enumerate(in_dims)]
    ours, theirs = (scalar(f, reduction=reduction) for f in (linear_cross_entropy, reference))
    torch.testing.assert_close(vmap(ours, in_dims)(*args), vmap(theirs, in_dims)(*args))
    for argnums in ((0, 1, 3), 0):
        torch.testing.assert_close(*(vmap(grad(f, argnums), in_dims)(*args) for f in (ours, theirs)))
        torch.testing.assert_close(
            *(grad(lambda *a, f=f: vmap(f, in_dims)(*a).sum(), argnums)(*args) for f in (ours, theirs))
        )


def test_jacrev():
    """Oracle: jacrev of the reference."""
    h, w, t, _ = random_case((3,))
    for reduction in ("sum", "none"):
        ours, theirs = (
            jacrev(lambda a, b, f=f, r=reduction: f(a, b, t, reduction=r)[0], (0, 1))(h, w)
            for f in (linear_cross_entropy, reference)
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.compile
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiled_equals_eager(reduction):
    """Oracle: eager, value and gradients, one graph; without gradients too."""
    case = random_case(dtype=torch.float32)

    def f(h, w, t, **options):
        loss, nll = linear_cross_entropy(h.sin(), w * 2, t, reduction=reduction, **options)
        log_prob, entropy = log_probs_and_entropy(h, w, t)
        return loss * 2 + (log_prob * entropy).sum(), nll

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(run(g, *case, **EVERYTHING) for g in (compiled, f)), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*case[:3]), f(*case[:3]))


def test_checkpoint():
    """Oracle: the same without checkpoint."""
    h, w, t, weights = random_case()
    leaves = [x.requires_grad_() for x in (h, w)]

    def f(h, w):
        return linear_cross_entropy(h * 2, w, t, weights=weights)[0]

    again = torch.autograd.grad(checkpoint(f, *leaves, use_reentrant=False), leaves)
    torch.testing.assert_close(again, torch.autograd.grad(f(*leaves), leaves))


def test_in_a_model():
    """Oracle: the same model with the reference's loss; tied embeddings, so W has two gradients."""
    cfg = transformer.Config(
        vocab_size=31, context_length=8, d_model=16, n_layers=1, n_heads=2, tie_embeddings=True, logit_softcap=5.0
    )
    from purelm import random

    params = transformer.init(random.key(0), cfg)
    tokens = torch.arange(16).reshape(2, 8)
    batch = {"tokens": tokens, "targets": tokens + 1, "weights": (tokens % 3 > 0).float()}
    ours, theirs = (
        value_and_grad(lambda p, o=o: transformer.loss(p, batch, cfg, ops=o, z_loss=1e-2), has_aux=True)(params)
        for o in (REFERENCE._replace(linear_cross_entropy=linear_cross_entropy), REFERENCE)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_opcheck():
    """torch.library.opcheck on plain tensors: schema, fake strides and dtypes, tracing."""
    for dtype in (torch.float16, torch.bfloat16):
        h, w, t, weights = random_case((6,), dtype=dtype)
        g = torch.randn(6)
        torch.library.opcheck(module._sum_op, (h, w, t, weights, 2.0, 0.1, 4, True, True))
        torch.library.opcheck(module._sum_op, (h, w, t, None, None, 0.0, 0, False, False))
        torch.library.opcheck(module._tokens_op, (h, w, t, weights, 2.0, 0.1, 0.7, True, 0))
        torch.library.opcheck(module._tokens_op, (h, w, t, None, None, 0.1, 1.0, False, 4))
        torch.library.opcheck(module._tokens_bwd_op, (h, w, t, g, g, g, g, g, 2.0, 0.7, 4, True, True))
        torch.library.opcheck(module._tokens_bwd_op, (h, w, t, g, g, g, None, None, None, 1.0, 4, True, False))
        torch.library.opcheck(module._scale_op, (h, torch.tensor(0.5), torch.float32))


def test_backward_twice_and_the_hidden_states_are_not_kept():
    """Exact: a second backward gives the same; but on a CPU the graph holds no tensor that shares hidden's memory."""
    h, w, t, _ = random_case()
    leaves = [h.requires_grad_(), w.requires_grad_()]
    far = [x.detach().to("meta").requires_grad_(x.is_floating_point()) for x in (h, w, t)]  # not a CPU
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        linear_cross_entropy(*far)
    mine = [x.untyped_storage()._cdata for x in far[:2]]
    assert saved and all(x.untyped_storage()._cdata not in mine for x in saved)
    loss, _ = linear_cross_entropy(*leaves, t)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True))


@pytest.mark.parametrize("N, V, itemsize", [(32768, 128256, 2), (1, 10, 2), (5000, 128256, 4), (10**6, 32000, 2)])
def test_default_chunk(N, V, itemsize):
    """Law: about 2048 tokens at least (or all), and at most 512 MiB of logits if that is more than 2048 tokens."""
    chunk = passes.chunk_tokens(N, V, itemsize)
    assert chunk >= min(N, 1700) and (chunk <= 2048 or chunk * V * itemsize <= 512 * 2**20)
    assert passes.chunk_tokens(32768, 128256, 2) == 2048
    assert passes.chunk_tokens(0, 5, 2) == 1


def test_bad_arguments():
    h, w, t, weights = random_case()
    for match, call in {
        "chunk must be at least 1": lambda: linear_cross_entropy(h, w, t, chunk=0),
        "reduction must be": lambda: linear_cross_entropy(h, w, t, reduction="max"),
        "unembedding must be": lambda: linear_cross_entropy(h, w[0], t),
        "hidden must be": lambda: linear_cross_entropy(h, w[:, 1:], t),
        "one float dtype": lambda: linear_cross_entropy(h.float(), w, t),
        "targets must have": lambda: linear_cross_entropy(h, w, t[:1]),
        "weights must have": lambda: linear_cross_entropy(h, w, t, weights=weights[:1]),
        "for a gradient": lambda: linear_cross_entropy_value_and_grad(h, w, t, reduction="none"),
        "temperature must be": lambda: log_probs_and_entropy(h, w, t, temperature=0.0),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
