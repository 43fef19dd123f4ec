"""cuda_graph where there is no GPU: the function itself. What it does on one is in tests/gpu/test_graph.py."""

import pytest
import torch

from purelm.transforms import cuda_graph, jit


def test_without_a_gpu_the_function_is_called_as_it_is():
    calls = []

    def f(x, n=1, *, m):
        calls.append(n)
        return {"y": x * n + m}

    graphed = cuda_graph(f, n_warmup=1)
    x = torch.arange(3.0, requires_grad=True)
    for i in range(4):
        assert torch.equal(graphed(x, i, m=2)["y"], x * i + 2)
    assert calls == [0, 1, 2, 3] and graphed.__name__ == "f"


@pytest.mark.compile
def test_donation_is_that_of_the_function_on_a_cpu():
    step = cuda_graph(jit(lambda s, x: {"w": s["w"] + x}, donate=0, backend="eager"), donate=0)
    state, x = {"w": torch.zeros(3)}, torch.ones(3)
    for i in range(5):
        old, at = state, state["w"].data_ptr()
        state = step(state, x)
        assert state["w"].tolist() == [i + 1.0] * 3 and state["w"].data_ptr() == at
        with pytest.raises(RuntimeError, match="was donated"):
            old["w"] + 1


@pytest.mark.compile
def test_inside_a_compiled_function_it_is_the_function():
    inner = cuda_graph(lambda x: x * 2)
    f = torch.compile(lambda x: inner(x) + 1, backend="eager", fullgraph=True)
    assert f(torch.ones(2)).tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_warmup": 0}, "n_warmup is 0; at least one call"),
        ({"donate": (0, 0)}, "distinct positions"),
        ({"donate": -1}, "distinct positions"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        cuda_graph(lambda x: x, **options)


def test_donated_position_without_an_argument():
    with pytest.raises(ValueError, match=r"donate is \(1,\), but 1 positional arguments were given"):
        cuda_graph(lambda x: x, donate=1)(torch.ones(2))
