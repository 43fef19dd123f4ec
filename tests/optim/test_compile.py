"""Under torch.compile: one graph, no recompilation from step to step, and the eager numbers.

Oracle: the same functions without compile. Fused kernels contract a multiplication and an addition into one rounding,
so values agree to a few ulp (muon: five iterations of sums in another order).
"""

import pytest
import torch

from purelm import tree
from purelm.optim import (
    adamw,
    apply_if_finite,
    apply_updates,
    chain,
    clip_by_global_norm,
    constant,
    cosine,
    ema,
    is_matrix,
    join,
    labelled,
    lion,
    muon_adamw,
    one_minus_sqrt_decay,
    rmsprop,
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
    "rmsprop": (rmsprop(0.9, 1e-6, 0.1, momentum=0.5), 2e-6),
    "muon_adamw": (muon_adamw(iteration_dtype=torch.float32), 1e-5),
    "labelled": (labelled(lambda path, p: "ab"[p.ndim - 1], {"a": sgd(0.9), "b": apply_if_finite(lion())}), 2e-6),
}
SCHEDULES = {
    "sgd": wsd(0.1, 50, n_warmup=5, n_decay=10, decay=one_minus_sqrt_decay),
    "labelled": join([constant(0.1), cosine(0.2, 10)], [2]),
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
    schedule = SCHEDULES.get(name, cosine(0.1, 50))

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


def test_skipped_steps_and_averages_compile_once():
    """No graph break and no recompilation where gradients are not finite, nor for another decay."""
    optimizer, params = apply_if_finite(adamw()), model(0)

    def step(params, state, average, grads, decay):
        updates, state = optimizer.update(grads, state, params, 0.1)
        params = apply_updates(params, updates)
        average = ema.update(average, params, decay)
        return params, state, average, ema.value(average)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    eager = fused = (params, optimizer.init(params), ema.init(params, debias=True))
    for i in range(4):
        grads = model(i + 1)
        grads["layers"][0]["w"]["weight"][0, 0] = float("nan") if i % 2 else 1.0
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            *fused, value = compiled(*fused, grads, torch.tensor(0.1 * i))
        *eager, expected = step(*eager, grads, torch.tensor(0.1 * i))
    for a, b in zip(tree.leaves((fused, value)), tree.leaves((eager, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    assert int(fused[1].n_total) == 2 and int(fused[1].inner.step) == 2


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
