"""draw_: the interpreted kernel against `purelm.generate.rows.draw`, its oracle; on the CPU it is that function."""

import pytest
import torch

from purelm import tree
from purelm.generate import Sampling, Stop
from purelm.generate.rows import begin, draw
from purelm.kernels.draw import draw_

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here: see tests/gpu")
B = 48


def case(V, seed=0):
    """Logits with bad rows, and rows of which some are full, closed or at their last token."""
    g = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(B, V, generator=g)
    u = torch.rand(B, 3, generator=g, dtype=torch.float64)
    u[0], u[1] = 0.0, 1 - 2**-53
    logits[2, 0], logits[3], logits[4, 2] = torch.nan, -torch.inf, torch.inf
    logits[5, :3] = -torch.inf
    rows = begin([1, 2, 3, 3] * (B // 4), u)
    rows = rows._replace(n_B=rows.n_B + rows.limit_B - 1, open_B=torch.arange(B) % 7 != 6)
    stops = torch.zeros(V, dtype=torch.bool)
    stops[::2] = True
    return logits, rows, stops


@INTERPRETED
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of rows of inf and NaN
@pytest.mark.parametrize("V", [5, 16, 1000, 9001])
@pytest.mark.parametrize("temperature", [1.0, 0.0, 0.7, 3.0])
def test_the_kernel_is_the_reference(V, temperature):
    """Tokens and marks exactly: no target lies at a border here. Log-probabilities to fp32's rounding of logits."""
    from purelm.kernels import draw_triton as kernels

    logits, rows, stops = case(V)
    got = tree.map(torch.clone, rows)
    kernels.draw_(logits, got, temperature, stops)
    want = draw(logits, rows, Sampling(temperature), Stop(tuple(range(0, V, 2))), stops)
    assert want.bad_B.sum() == 3 and 0 < want.stopped_B.sum() < B
    for name, x, y in zip(rows._fields, got, want, strict=True):
        if "logprobs" in name:
            torch.testing.assert_close(x, y, rtol=1e-6, atol=4e-6, msg=name)
        else:
            assert torch.equal(x, y), name


def test_on_a_cpu_and_with_filters_it_is_the_reference():
    """Exact, and nothing is written."""
    logits, rows, stops = case(20)
    stop = Stop(tuple(range(0, 20, 2)), min_new_tokens=2)
    before = tree.map(torch.clone, rows)
    for sampling in (Sampling(), Sampling(top_k=3), Sampling(0.5, top_p=0.9, min_p=0.01)):
        got, want = draw_(logits, rows, sampling, stop, stops), draw(logits, rows, sampling, stop, stops)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(rows, before, strict=True))
