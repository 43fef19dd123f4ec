"""On a CPU every kernel's op, and sdpa_attention, has second derivatives and forward mode.

Oracle: the reference of purelm.ops, in float64.
"""

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from purelm.kernels.cross_entropy import cross_entropy
from purelm.kernels.flash_attention import flash_attention, flash_attention_reference
from purelm.kernels.fused import FUSED
from purelm.kernels.linear_cross_entropy import linear_cross_entropy, log_probs_and_entropy
from purelm.kernels.rms_norm import add_rms_norm, rms_norm
from purelm.kernels.rope import rope, rope_qk
from purelm.kernels.swiglu import swiglu
from purelm.kernels.weighted_sum import reference as weighted_sum_reference
from purelm.kernels.weighted_sum import weighted_sum
from purelm.ops import REFERENCE
from purelm.ops.attention import attention
from purelm.ops.cross_entropy import cross_entropy as ce_reference
from purelm.ops.log_probs import log_probs
from purelm.ops.rope import rope_tables
from purelm.ops.sdpa import sdpa_attention

# torch's own: its tables of forward-mode formulas use what it deprecates, and have no batching rule for some.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching"),
]

T, H, G, K, D, V = 4, 4, 2, 4, 5, 7
IDS = torch.tensor([[1, 1, 2, 0]])
PAIR = (IDS, torch.tensor([[1, 2, 2]]))  # the last query sees nothing
TARGETS = torch.tensor([[1, 2, -100, 6]])
WEIGHTS = torch.tensor([[1.0, 0.5, 0.0, 2.0]], dtype=torch.float64)
TABLES = rope_tables(torch.arange(T), K, dtype=torch.float64)
QKV = [(1, T, H, K), (1, T, G, K), (1, T, G, K)]
SHORT = [(1, T, H, K), (1, 3, G, K), (1, 3, G, K)]
ALL = dict(window=2, segment_ids=IDS, softcap=1.0, scale=0.5)


def with_sinks(q, k, v, s):
    """The definition: one more key with the score s and no value."""
    scores = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(H // G, 2)) / 2
    scores = torch.where(torch.ones(T, T, dtype=torch.bool).tril(), scores, -torch.inf)
    p = torch.cat([scores, s.view(1, H, 1, 1).expand(1, H, T, 1)], -1).softmax(-1)[..., :-1]
    return torch.einsum("bhts,bshk->bthk", p, v.repeat_interleave(H // G, 2))


def losses(f, **options):
    return lambda *xs: f(*xs[:-1], TARGETS, weights=xs[-1], **options)[0]


def both(f, g):
    """Two results as one tensor."""
    return lambda *xs: torch.cat([x.flatten() for x in f(*xs)]), lambda *xs: torch.cat([x.flatten() for x in g(*xs)])


OPTIONS = dict(softcap=2.0, z_loss=0.1, denominator=2.0)
# name -> (kernel, reference, shapes of their arguments); a shape of None is that of WEIGHTS, and its value.
CASES = {
    "flash": (flash_attention, attention, QKV),
    "flash_all": (lambda *x: flash_attention(*x, **ALL), lambda *x: attention(*x, **ALL), QKV),
    "sdpa": (sdpa_attention, attention, QKV),
    "sdpa_masked": (
        lambda *x: sdpa_attention(*x, window=2, segment_ids=IDS),
        lambda *x: attention(*x, window=2, segment_ids=IDS),
        QKV,
    ),
    "sdpa_blind": (sdpa_attention, attention, SHORT),
    "flash_blind": (flash_attention, attention, SHORT),
    "flash_pair": (
        lambda *x: flash_attention(*x, causal=False, segment_ids=PAIR),
        lambda *x: attention(*x, causal=False, segment_ids=PAIR),
        SHORT,
    ),
    "flash_sinks": (lambda q, k, v, s: flash_attention(q, k, v, sinks=s), with_sinks, [*QKV, (H,)]),
    "flash_reference": (lambda *x: flash_attention_reference(*x, **ALL), lambda *x: attention(*x, **ALL), QKV),
    "rms_norm": (rms_norm, REFERENCE.rms_norm, [(T, D), (D,)]),
    "add_rms_norm": (
        *both(add_rms_norm, lambda x, r, w: (REFERENCE.rms_norm(x + r, w), x + r)),
        [(T, D), (T, D), (D,)],
    ),
    "rope": (lambda x: rope(x, *TABLES), lambda x: REFERENCE.rope(x, *TABLES), [(1, T, H, K)]),
    "rope_qk": (
        *both(
            lambda q, k: rope_qk(q, k, *TABLES, "half"), lambda *xs: [REFERENCE.rope(x, *TABLES, "half") for x in xs]
        ),
        [(1, T, H, K), (1, T, G, K)],
    ),
    "swiglu": (swiglu, REFERENCE.swiglu, [(T, D), (T, D)]),
    "weighted_sum": (weighted_sum, weighted_sum_reference, [(T, D), (D,)]),
    "cross_entropy": (losses(cross_entropy, **OPTIONS), losses(ce_reference, **OPTIONS), [(1, T, V), None]),
    "cross_entropy_none": (
        losses(cross_entropy, reduction="none"), losses(ce_reference, reduction="none"), [(1, T, V), None]
    ),
    "linear_sum": (
        losses(linear_cross_entropy, **OPTIONS),
        losses(REFERENCE.linear_cross_entropy, **OPTIONS),
        [(1, T, D), (V, D), None],
    ),
    "linear_mean": (
        lambda h, w: linear_cross_entropy(h, w, TARGETS, reduction="mean", ignore_index=-100, chunk=2)[0],
        lambda h, w: REFERENCE.linear_cross_entropy(h, w, TARGETS, reduction="mean", ignore_index=-100)[0],
        [(1, T, D), (V, D)],
    ),
    "linear_none": (
        losses(linear_cross_entropy, reduction="none", softcap=2.0, z_loss=0.1),
        losses(REFERENCE.linear_cross_entropy, reduction="none", softcap=2.0, z_loss=0.1),
        [(1, T, D), (V, D), None],
    ),
    "log_probs": (
        *both(
            lambda h, w: log_probs_and_entropy(h, w, TARGETS, ignore_index=-100, temperature=0.7, softcap=2.0, chunk=2),
            lambda h, w: log_probs(h, w, TARGETS, ignore_index=-100, temperature=0.7, softcap=2.0),
        ),
        [(1, T, D), (V, D)],
    ),
}  # fmt: skip


def case(name):
    """(kernel, reference), both scalar functions that are curved in their results, and their arguments."""
    kernel, reference, shapes = CASES[name]
    g = torch.Generator().manual_seed(0)
    xs = [WEIGHTS if s is None else torch.randn(s, dtype=torch.float64, generator=g) for s in shapes]
    return [lambda *xs, f=f: (f(*xs) + 0.3).sin().sum() for f in (kernel, reference)], xs


def close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)  # float64, sums of some hundred terms


@pytest.mark.parametrize("name", CASES)
def test_double_backward(name):
    """Oracle: the reference, by torch.autograd with create_graph, which changes no bit of the first gradient."""
    functions, xs = case(name)
    found = []
    for f in functions:
        leaves = [x.clone().requires_grad_() for x in xs]
        plain = torch.autograd.grad(f(*leaves), leaves)
        first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
        if f is functions[0]:
            assert all(torch.equal(a, b) for a, b in zip(first, plain, strict=True))
        seconds = torch.autograd.grad(sum(g.cos().sum() for g in first), leaves, create_graph=True)
        third = torch.autograd.grad(sum(g.sin().sum() for g in seconds), leaves[:1])
        found.append((*first, *seconds, *third))
    close(*found)


@pytest.mark.parametrize("name", CASES)
def test_func_grad_of_grad_and_jvp(name):
    """Oracle: the reference under the same transforms of torch.func."""
    functions, xs = case(name)
    numbers = tuple(range(len(xs)))
    directions = tuple(torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1)) for x in xs)

    def results(f):
        first = grad(f, numbers)
        second = grad(lambda *x: sum(g.cos().sum() for g in first(*x)), numbers)(*xs)
        value, tangent = jvp(f, tuple(xs), directions)
        _, product = jvp(first, tuple(xs), directions)
        return [*second, value, tangent, *product]

    close(*(results(f) for f in functions))


SOME = ("flash_all", "sdpa_masked", "rms_norm", "swiglu", "rope", "cross_entropy", "linear_sum", "linear_none")


@pytest.mark.parametrize("name", SOME)
def test_hessians_and_per_sample_products(name):
    """Oracle: the reference. jacfwd and jacrev of jacrev, and a Hessian-vector product of each of two samples."""
    functions, xs = case(name)
    many, rest = torch.stack([xs[0], xs[0] * 0.5]), xs[1:]

    def results(f):
        of_first = lambda x: f(x, *rest)  # noqa: E731
        product = vmap(lambda x: jvp(grad(of_first), (x,), (x.cos(),))[1])(many)
        twice = vmap(grad(lambda x: (grad(of_first)(x) * x.cos()).sum()))(many)
        outside = grad(lambda m: vmap(grad(of_first))(m).sin().sum())(many)
        small = [product, twice, outside]
        return [*small, jacfwd(jacrev(of_first))(xs[0]), jacrev(grad(of_first))(xs[0])]

    close(*(results(f) for f in functions))


def test_forward_mode_without_torch_func():
    """Oracle: torch.func.jvp."""
    import torch.autograd.forward_ad as fwd

    (f, _), xs = case("flash_all")
    directions = [torch.ones_like(x) for x in xs]
    with fwd.dual_level():
        tangent = fwd.unpack_dual(f(*(fwd.make_dual(x, d) for x, d in zip(xs, directions, strict=True)))).tangent
    torch.testing.assert_close(tangent, jvp(f, tuple(xs), tuple(directions))[1])


def test_a_hidden_gradient_of_0_still_has_a_derivative():
    """Oracle: p - onehot, the gradient by the logits of the mixed derivative by a factor that happens to be 0."""
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    targets, c = torch.tensor([1, 3]), torch.tensor([0.0, 2.0], dtype=torch.float64, requires_grad=True)
    wanted = logits.softmax(-1) - torch.nn.functional.one_hot(targets, 5)
    for f in (
        lambda x: cross_entropy(x, targets, reduction="none")[0],
        lambda x: -log_probs_and_entropy(x, torch.eye(5, dtype=torch.float64), targets)[0],
    ):
        (g,) = torch.autograd.grad((f(logits) * c).sum(), logits, create_graph=True)
        (mixed,) = torch.autograd.grad(g[0, 0], c)
        torch.testing.assert_close(mixed, torch.stack([wanted[0, 0], torch.zeros((), dtype=torch.float64)]))


META = {
    "flash_attention": lambda x, w: FUSED.attention(x, x, x),
    "rms_norm": lambda x, w: FUSED.rms_norm(x),
    "swiglu": lambda x, w: FUSED.swiglu(x, x),
    "rope": lambda x, w: FUSED.rope(x, *(t.to("meta") for t in rope_tables(torch.arange(4), 8))),
    "rope_qk": lambda x, w: rope_qk(x, x, *(t.to("meta") for t in rope_tables(torch.arange(4), 8)))[0],
    "weighted_sum": lambda x, w: weighted_sum(x, w[0]),
    "cross_entropy": lambda x, w: cross_entropy(x, w.new_zeros(1, 4, 2, dtype=torch.int64))[0],
    "linear_cross_entropy": lambda x, w: linear_cross_entropy(x, w, w.new_zeros(1, 4, 2, dtype=torch.int64))[0],
    "linear_cross_entropy:": lambda x, w: log_probs_and_entropy(x, w, w.new_zeros(1, 4, 2, dtype=torch.int64))[0],
}


@pytest.mark.parametrize("name", META)
def test_a_gpu_says_which_bundle_has_it(name):
    """A device that is no CPU: torch's meta device, where ops have shapes alone. As a term of a loss, too."""
    x = torch.empty(1, 4, 2, 8, device="meta", requires_grad=True)
    w = torch.empty(5, 8, device="meta", requires_grad=True)
    (g,) = torch.autograd.grad(META[name](x, w).square().sum(), x, create_graph=True)
    message = rf"{name.rstrip(':')}: double backward is not supported on a GPU: use ops=REFERENCE"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(x.sum() + g.square().sum(), x)
