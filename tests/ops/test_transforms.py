"""Every op under torch.func (grad, vmap, jvp) and under torch.compile, against plain eager autograd."""

import importlib
import pkgutil

import pytest
import torch
from torch.func import grad, jvp, vmap

import purelm.ops
from purelm.ops import REFERENCE
from purelm.ops.cross_entropy import cross_entropy
from purelm.ops.rope import rope_tables
from purelm.ops.sdpa import sdpa_attention
from purelm.ops.softmax import log_softmax, softmax

# torch's own: importing inductor, and its tables of forward-mode formulas, use what torch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching"),
]

B, T, H, G, K, D, V = 3, 5, 4, 2, 6, 8, 11
IDS = torch.tensor([[1, 1, 2, 2, 0]])
TARGETS = torch.tensor([[1, 2, 3, 4, 10]])
WEIGHTS = torch.tensor([[1.0, 0.5, 0.0, 1.0, 2.0]], dtype=torch.float64)


def tables():
    return rope_tables(torch.arange(T), K, dtype=torch.float64)


# name -> (function of float tensors, their shapes); the first axis of the first one is a batch of size 1.
CASES = {
    "linear": (REFERENCE.linear, [(1, T, D), (4, D), (4,)]),
    "embedding": (lambda x, w: x + REFERENCE.embedding(TARGETS, w), [(1, T, D), (V, D)]),
    "rms_norm": (REFERENCE.rms_norm, [(1, T, D), (D,)]),
    "layer_norm": (REFERENCE.layer_norm, [(1, T, D), (D,), (D,)]),
    "rope": (lambda x: REFERENCE.rope(x, *tables(), "interleaved"), [(1, T, H, K)]),
    "rope_half": (lambda x: REFERENCE.rope(x, *tables(), "half"), [(1, T, H, K)]),
    "attention": (REFERENCE.attention, [(1, T, H, K), (1, T, G, K), (1, T, G, K)]),
    "attention_all": (
        lambda q, k, v: REFERENCE.attention(q, k, v, window=2, segment_ids=IDS, softcap=1.0, scale=0.5),
        [(1, T, H, K), (1, T, G, K), (1, T, G, K)],
    ),
    "attention_blind": (REFERENCE.attention, [(1, T, H, K), (1, 2, G, K), (1, 2, G, K)]),
    "sdpa": (sdpa_attention, [(1, T, H, K), (1, T, G, K), (1, T, G, K)]),
    "sdpa_mask": (
        lambda q, k, v: sdpa_attention(q, k, v, window=2, segment_ids=IDS),
        [(1, T, H, K), (1, T, G, K), (1, T, G, K)],
    ),
    "swiglu": (REFERENCE.swiglu, [(1, D), (1, D)]),
    "geglu": (REFERENCE.geglu, [(1, D), (1, D)]),
    "silu": (REFERENCE.silu, [(1, D)]),
    "gelu": (REFERENCE.gelu, [(1, D)]),
    "relu2": (REFERENCE.relu2, [(1, D)]),
    "softmax": (softmax, [(1, D)]),
    "log_softmax": (log_softmax, [(1, D)]),
    "cross_entropy": (lambda x: cross_entropy(x, TARGETS, weights=WEIGHTS, z_loss=0.1)[0], [(1, T, V)]),
    "linear_cross_entropy": (
        lambda h, w: REFERENCE.linear_cross_entropy(h, w, TARGETS, weights=WEIGHTS, softcap=2.0, z_loss=0.1)[0],
        [(1, T, D), (V, D)],
    ),
    "linear_cross_entropy_chunked": (
        lambda h, w: REFERENCE.linear_cross_entropy(h, w, TARGETS, weights=WEIGHTS, chunk=2)[0],
        [(1, T, D), (V, D)],
    ),
}


def inputs(name, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, dtype=dtype, generator=g) for s in CASES[name][1]]


def scalar(f):
    return lambda *xs: f(*xs).sin().sum()  # sin: upstream gradients that differ from place to place


@pytest.mark.parametrize("name", CASES)
def test_func_grad(name):
    """Oracle: torch.autograd.grad."""
    f, xs = scalar(CASES[name][0]), inputs(name)
    expected = torch.autograd.grad(f(*(leaves := [x.requires_grad_() for x in xs])), leaves)
    got = grad(f, tuple(range(len(xs))))(*(x.detach() for x in xs))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
def test_vmap_per_sample_gradients(name):
    """Oracle: a loop over samples; all other arguments are shared."""
    f, (_, *rest) = scalar(CASES[name][0]), inputs(name)
    x = torch.randn(B, *CASES[name][1][0], dtype=torch.float64)
    if name.startswith(("attention", "sdpa", "swiglu", "geglu")):  # these belong to a sample, too
        rest = [torch.randn(B, *s, dtype=torch.float64) for s in CASES[name][1][1:]]
        in_dims = (0,) * (1 + len(rest))
    else:
        in_dims = (0, *(None for _ in rest))
    argnums = tuple(range(1 + len(rest)))
    got = vmap(grad(f, argnums), in_dims)(x, *rest)
    for b in range(B):
        one = grad(f, argnums)(x[b], *(r[b] if d == 0 else r for r, d in zip(rest, in_dims[1:], strict=True)))
        for a, c in zip(got, one, strict=True):
            torch.testing.assert_close(a[b], c)


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("sdpa")])
def test_jvp(name):
    """Oracle: <gradient, direction>, and for vector outputs the same through a random functional."""
    f, xs = scalar(CASES[name][0]), inputs(name)
    directions = [torch.randn_like(x) for x in xs]
    _, tangent = jvp(f, tuple(xs), tuple(directions))
    gradients = grad(f, tuple(range(len(xs))))(*xs)
    expected = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    torch.testing.assert_close(tangent, expected)


@pytest.mark.compile
def test_compiled_equals_eager():
    """Oracle: eager, value and gradients in fp32, one graph for all ops at once.

    Traced and differentiated ahead of time, but not compiled by inductor, which the models' test does for one model:
    C++ for each op would take half a minute.
    """
    names = [n for n in CASES if "blind" not in n]

    def everything(trees):
        return torch.stack([scalar(CASES[n][0])(*trees[n]).float() for n in names])

    trees = {n: [x.requires_grad_() for x in inputs(n, torch.float32)] for n in names}
    flat = [x for n in names for x in trees[n]]
    mine = torch.compile(everything, fullgraph=True, backend="aot_eager")(trees)
    plain = everything(trees)
    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-4)  # fp32 sums of up to 120 terms in another order
    g = torch.randn(len(names))
    for a, b in zip(torch.autograd.grad(mine, flat, g), torch.autograd.grad(plain, flat, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


MODULES = [m.name for m in pkgutil.iter_modules(purelm.ops.__path__, "purelm.ops.")]




def test_no_torch_nn_in_the_reference():
    """The reference is torch primitives alone; sdpa, which is a wrapper of one of torch.nn's, is not in it."""
    for name in MODULES:
        if not name.endswith(".sdpa"):
            with open(importlib.import_module(name).__file__) as file:
                assert "torch.nn" not in file.read(), name
