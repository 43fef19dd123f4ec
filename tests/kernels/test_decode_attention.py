"""decode_attention_: the interpreted kernels against float64, with the rule of rules.py; on the CPU, the reference.

Oracle: purelm.ops.decode_attention in float64.
"""

import pytest
import torch

from purelm.kernels import decode_attention as module
from purelm.ops.decode_attention import decode_attention_ as reference
from purelm.ops.rope import rope_tables
from tests.kernels.rules import assert_as_exact

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here: see tests/gpu")


def numbers(seed, *shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


@INTERPRETED
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # numpy's log2(0), as on a GPU -inf
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "window", "softcap", "layout"),
    [
        ((3, 70, 4, 4, 16), None, None, "interleaved"),
        ((3, 70, 4, 2, 16), None, 5.0, "half"),
        ((2, 1100, 2, 1, 32), None, None, None),
        ((3, 600, 3, 3, 20), 30, None, "half"),
    ],
    ids=str,
)
def test_kernels_are_as_exact_as_the_reference(sizes, window, softcap, layout, dtype):
    from purelm.kernels import decode_attention_triton as kernels

    B, S, H, G, K = sizes
    length = torch.tensor([0, S - 1, S // 2][:B])
    q, k, v, keys, values = numbers(0, (B, H, K), (B, G, K), (B, G, K), (B, S, G, K), (B, S, G, K), dtype=dtype)
    cos, sin = rope_tables(length, K) if layout else (None, None)
    mine, same, exact = ([x.clone() for x in (keys, values)] for _ in range(3))
    exact = [x.double() for x in exact]
    options = {"window": window, "softcap": softcap}
    if layout:
        options |= {"cos_BJ": cos, "sin_BJ": sin, "layout": layout}
    got = kernels.forward_(q, k, v, *mine, length, cos, sin, layout == "interleaved", window, K**-0.5, softcap)
    wide = {**options, **({"cos_BJ": cos.double(), "sin_BJ": sin.double()} if layout else {})}
    assert_as_exact(
        got,
        reference(q, k, v, *same, length, **options),
        reference(q.double(), k.double(), v.double(), *exact, length, **wide),
        roundings=30,  # exp of scores up to 10, a sum of 1100 terms
    )
    for x, y, old in zip(mine, same, (keys, values), strict=True):
        torch.testing.assert_close(x, y, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        others = torch.ones(B, S, dtype=torch.bool)
        others[torch.arange(B), length] = False
        assert torch.equal(x[others], old[others])


@INTERPRETED
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_a_full_row_is_nan_and_writes_nothing():
    from purelm.kernels import decode_attention_triton as kernels

    for S in (10, 520):
        q, k, v, keys, values = numbers(1, (2, 2, 16), (2, 2, 16), (2, 2, 16), (2, S, 2, 16), (2, S, 2, 16))
        for n in (S, S + 1, 1024, 5000):  # decode_ counts on, also of a row that is full
            for window in (None, 20):
                mine = keys.clone(), values.clone()
                out = kernels.forward_(q, k, v, *mine, torch.tensor([3, n]), None, None, True, window, 0.25, None)
                assert out[1].isnan().all() and out[0].isfinite().all()
                assert torch.equal(mine[0][1], keys[1]) and torch.equal(mine[1][1], values[1])


def test_on_a_cpu_it_is_the_reference():
    """Exact."""
    q, k, v, keys, values = numbers(2, (2, 4, 8), (2, 2, 8), (2, 2, 8), (2, 9, 2, 8), (2, 9, 2, 8))
    length = torch.tensor([3, 8])
    cos, sin = rope_tables(length, 8)
    one, two = ([x.clone() for x in (keys, values)] for _ in range(2))
    options = {"cos_BJ": cos, "sin_BJ": sin, "layout": "half", "window": 4, "softcap": 3.0}
    assert torch.equal(
        module.decode_attention_(q, k, v, *one, length, **options), reference(q, k, v, *two, length, **options)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    with pytest.raises(ValueError, match="layout"):
        module.decode_attention_(q, k, v, *one, length, layout="odd")
