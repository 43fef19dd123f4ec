"""Under torch.compile: one graph, no recompilation from step to step, and the eager numbers.

Oracle: the same functions without compile. Fused kernels contract a multiplication and an addition into one rounding,
so values agree to a few ulp (muon: five iterations of sums in another order).
"""

import pytest
import torch

from purelm import tree
from purelm.optim import (
    adamw,
    apply_updates,
    chain,
    clip_by_global_norm,
    cosine,
    is_matrix,
    lion,
    muon_adamw,
    one_minus_sqrt_decay,
    sgd,
    wsd,
)

# torch.compile's own import, on its first use, warns about torch.jit.
pytestmark = [pytest.mark.compile, pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")]

CASES = {
    "adamw": (chain(clip_by_global_norm(1.0), adamw(weight_decay=0.1, mask=is_matrix)), 2e-6),
    "course": (adamw(eps_placement="uncorrected", eps_root=1e-6, decay_order="after"), 2e-6),
    "sgd": (sgd(0.9, 0.1, nesterov=True), 2e-6),
    "lion": (lion(weight_decay=0.1), 2e-6),
    "muon_adamw": (muon_adamw(iteration_dtype=torch.float32), 1e-5),
}


def model(seed):
    g = torch.Generator().manual_seed(seed)
    return {
        "token_embeddings": {"weight": torch.randn(9, 8, generator=g)},
        "layers": [{"w": {"weight": torch.randn(8, 8, generator=g)}, "ln": {"weight": torch.randn(8, generator=g)}}],
    }


@pytest.mark.parametrize("name", CASES)
def test_compiles_once_and_equals_eager(name):
    optimizer, tolerance = CASES[name]
    schedule = wsd(0.1, 50, n_warmup=5, n_decay=10, decay=one_minus_sqrt_decay) if name == "sgd" else cosine(0.1, 50)

    def step(params, state, grads, i):
        updates, state = optimizer.update(grads, state, params, schedule(i))
        return apply_updates(params, updates), state

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    eager = fused = (model(0), optimizer.init(model(0)))
    for i in range(3):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            fused = compiled(*fused, model(i + 1), torch.tensor(i))
        eager = step(*eager, model(i + 1), torch.tensor(i))
    assert tree.structure(fused) == tree.structure(eager)
    for a, b in zip(tree.leaves(fused), tree.leaves(eager), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-6, atol=tolerance)


def test_scalars_stay_out_of_the_wide_kernels():
    """The powers of the bias corrections and the schedule's cosine are evaluated in fp64 once, not per element."""
    from torch._inductor.utils import run_and_get_code

    params = {"a": torch.randn(300), "b": torch.randn(500)}
    optimizer, schedule = adamw(weight_decay=0.1), cosine(0.1, 50)

    def step(params, state, grads, i):
        updates, state = optimizer.update(grads, state, params, schedule(i))
        return apply_updates(params, updates), state

    torch._dynamo.reset()
    _, codes = run_and_get_code(
        torch.compile(step, fullgraph=True), params, optimizer.init(params), params, torch.tensor(3)
    )
    loops = [loop for code in codes for loop in cpp_loops(code) if "300L" in loop or "500L" in loop]
    assert len(loops) >= 2
    for loop in loops:
        assert "sqrt" in loop  # it is the update
        assert not any(word in loop for word in ("double", "pow", "cos"))


def cpp_loops(code: str) -> list[str]:
    """The text of each outermost for loop of generated C++."""
    found, at = [], code.find("for(")
    while at >= 0:
        depth, end = 0, code.index("{", at)
        while True:
            depth += {"{": 1, "}": -1}.get(code[end], 0)
            end += 1
            if depth == 0:
                break
        found.append(code[at:end])
        at = code.find("for(", end)
    return found
