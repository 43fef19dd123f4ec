"""eager_or_op: when it leaves torch's dispatcher out, and that the ops are right then.

Oracles: the list in its docstring; purelm.ops in float64, by the rule of rules.py. On a CPU `launched` takes the way of
a GPU, with interpreted kernels.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from purelm.kernels import recipe
from purelm.kernels.recipe import eager_or_op
from purelm.kernels.rms_norm import add_rms_norm, rms_norm
from purelm.kernels.rope import rope, rope_qk
from purelm.kernels.swiglu import swiglu
from purelm.ops.glu import swiglu as plain_swiglu
from purelm.ops.rms_norm import rms_norm as plain_norm
from purelm.ops.rope import rope as plain_rope
from tests.kernels import rules

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here: see tests/gpu")
which = eager_or_op(lambda x: "op", lambda x: "launch")


@pytest.fixture
def launched(monkeypatch):
    """Tensors of the CPU go to the (interpreted) kernels, as a GPU's do."""
    monkeypatch.setattr(recipe, "_on_gpu", lambda x: True)


class Silent(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Sub(torch.Tensor):
    pass


def test_the_op_on_a_cpu():
    assert which(torch.ones(2)) == "op"


def test_the_kernel_itself_in_plain_eager_code(launched):
    x = torch.ones(2, requires_grad=True)
    assert which(x) == which(x.detach()) == which(torch.nn.Parameter(x.detach())) == "launch"
    with torch.no_grad():
        assert which(x) == "launch"


def test_the_op_where_torch_must_see_it(launched, monkeypatch):
    x, seen = torch.ones(2), []

    def f(x):
        seen.append(which(x))
        return x.sum()

    torch.func.grad(f)(x)
    torch.func.vmap(f)(torch.ones(3, 2))
    with Silent():
        f(x)
    f(x.as_subclass(Sub))
    with torch._subclasses.FakeTensorMode():
        f(torch.ones(2))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    f(x)
    assert seen == ["op"] * 6


def numbers(*shapes, dtype):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def fused(x, y, w, cos, sin):
    n, total = add_rms_norm(x, y, w, 0.1)
    q, k = rope_qk(n, total, cos, sin)
    return swiglu(rms_norm(q, w, 0.1), rope(k, cos, sin))


def plain(x, y, w, cos, sin):
    q, k = plain_rope(plain_norm(x + y, w, 0.1), cos, sin), plain_rope(x + y, cos, sin)
    return plain_swiglu(plain_norm(q, w, 0.1), plain_rope(k, cos, sin))


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_values_and_gradients_without_the_dispatcher(launched, dtype):
    shapes = (2, 5, 3, 8), (2, 5, 3, 8), (8,), (5, 4), (5, 4), (2, 5, 3, 8)

    def found(f, dtype):
        *xs, cos, sin, up = (x.to(dtype) for x in numbers(*shapes, dtype=torch.float16))
        xs = [x.requires_grad_() for x in xs]
        y = f(*xs, cos, sin)
        return [y.detach(), *torch.autograd.grad(y, xs, up)]

    for triple in zip(found(fused, dtype), found(plain, dtype), found(plain, torch.float64), strict=True):
        # Six ops in a row and back, each result held in the dtype, and some five operations in each.
        rules.assert_as_exact(*triple, stored=12.0, roundings=60.0)


@INTERPRETED
def test_a_kernel_was_launched(launched, monkeypatch):
    """Else the test above would be one of the references."""
    from purelm.kernels import rms_norm_triton, rope_triton, swiglu_triton

    for module, name in ((rms_norm_triton, "forward"), (rope_triton, "turn"), (swiglu_triton, "forward")):
        monkeypatch.setattr(module, name, lambda *args: 1 / 0)
    x, table = torch.ones(1, 2, 1, 4), torch.ones(2, 2)
    for call in (lambda: rms_norm(x), lambda: rope(x, table, table), lambda: swiglu(x, x)):
        with pytest.raises(ZeroDivisionError):
            call()
