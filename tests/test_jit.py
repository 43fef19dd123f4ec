"""jit: a train step with donation measured and abused; stages, caches, and jit without donation."""

import copy
import subprocess
import sys

import pytest
import torch

from purelm import random, tree
from purelm.transforms import accumulate, in_stages, jit, remat, value_and_grad
from tests.test_transforms import (
    State,
    clone,
    close,
    equal,
    init_state,
    mlp_batch,
    mlp_loss,
    mlp_params,
    train_step,
    value_and_grad_of_mlp,
)


@pytest.mark.compile
def test_a_train_step_equals_eager_and_compiles_once():
    """Oracle: the eager step, in float64 (1e-10: Adam divides by the root of a moment, which magnifies rounding).

    Two graphs: loss with its gradient, and the update. None on steps two and three.
    """
    from torch._dynamo import config
    from torch._dynamo.utils import counters

    state, batch = init_state(mlp_params(random.key(0))), mlp_batch(random.key(1))
    plain = clone(state)
    step = jit(train_step, donate=0)
    counters.clear()
    with config.patch(error_on_recompile=True):
        for _ in range(3):
            state, metrics = step(state, batch)
            plain, expected = train_step(plain, batch)
    close((state, metrics), (plain, expected), rtol=1e-10, atol=1e-12)
    assert type(state) is State and type(metrics) is dict and state.step.item() == 3
    if torch.__version__ >= "2.13":
        assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.compile
def test_donated_storage_receives_the_results():
    """The results lie where the arguments lay, in new tensor objects; the batch is as before."""
    state, batch = init_state(mlp_params(random.key(0))), mlp_batch(random.key(1))
    kept = clone(batch)
    old, places = tree.leaves(state), [x.data_ptr() for x in tree.leaves(state)]
    step = jit(train_step, donate=0)
    new, _ = step(state, batch)
    assert [x.data_ptr() for x in tree.leaves(new)] == places
    assert all(type(x) is torch.Tensor and not x._is_view() for x in tree.leaves(new))
    assert not {id(x) for x in tree.leaves(new)} & {id(x) for x in old}
    assert equal(batch, kept)
    third, _ = step(new, batch)
    assert [x.data_ptr() for x in tree.leaves(third)] == places


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1,
        lambda x: x.shape,
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: x.item(),
        lambda x: x[0],
        torch.sum,
        lambda x: torch.ones(2) * x,
        lambda x: x.data,
        lambda x: x.dtype,
        lambda x: x.clone(),
        len,
        bool,
        lambda x: x.add_(1),
        lambda x: x.untyped_storage(),
        lambda x: tree.map(torch.clone, {"x": x}),
        copy.deepcopy,
        torch.nn.functional.relu,
        lambda x: torch.stack([x]),
        jit(lambda y: y + 1, donate=0, backend="eager"),
    ],
)
@pytest.mark.compile
def test_any_use_of_a_donated_tensor_raises(use):
    x = torch.ones(2)
    jit(lambda x: x * 2, donate=0, backend="eager")(x)
    with pytest.raises(RuntimeError, match=r"this tensor was donated to jit\(<lambda>\)"):
        use(x)
    assert repr(x) == str(x) == f"{x}" == "<donated to jit(<lambda>)>" and "donated" in repr({"x": x})


@pytest.mark.compile
def test_several_donated_arguments_and_keywords():
    """Oracle: the plain call; the second positional argument is not donated and stays."""

    def f(a, b, c, *, d):
        return c + b, {"x": a["x"] * d["d"]}

    a, b, c, d = {"x": torch.ones(2)}, torch.full((3,), 5.0), torch.zeros(3), {"d": torch.tensor(4.0)}
    place = c.data_ptr()
    new_c, new_a = jit(f, donate=(2, 0), backend="eager")(a, b, c, d=d)
    assert new_c.tolist() == [5.0] * 3 and new_a["x"].tolist() == [4.0, 4.0] and new_c.data_ptr() == place
    assert b.tolist() == [5.0] * 3 and d["d"].item() == 4.0
    assert "donated" in repr(a["x"]) and "donated" in repr(c)


def raises_and_keeps(error, message, call, *trees):
    kept = clone(trees)
    with pytest.raises(error, match=message):
        call(*trees)
    assert equal(kept, trees)


@pytest.mark.compile
def test_errors_leave_all_arguments_intact():
    def run(f, donate=0):
        return jit(f, donate, backend="eager")

    x, y = torch.ones(2), torch.ones(3)
    unmatched = "match no result.*0.w.1 \\(3,\\) torch.float32$"
    raises_and_keeps(ValueError, unmatched, run(lambda s: {"w": [s["w"][0] + 1, 0.0]}), {"w": [x, y]})
    swapped = "match no result.*: 0.a \\(3,\\) torch.float32$"  # named by name, in whatever order the tree comes
    raises_and_keeps(ValueError, swapped, run(lambda s: {"b": s["b"] + 1}), {"b": x, "a": y})
    raises_and_keeps(ValueError, "match no result.*: 0 \\(3,\\)", run(lambda a, b: b + 1, donate=(1, 0)), y, x)
    raises_and_keeps(ValueError, "match no result", run(lambda s: s.bfloat16()), x)
    raises_and_keeps(ValueError, "match no result", run(lambda s: s[:1]), x)
    raises_and_keeps(ValueError, "arguments 0.a and 0.b share memory", run(dict), {"a": x, "b": x})
    raises_and_keeps(ValueError, "arguments 0.a and 0.b share memory", run(dict), {"a": x, "b": x.view(1, 2)})
    raises_and_keeps(ValueError, "arguments 0 and 1 share memory", run(lambda a, b: a + b), x, x)
    raises_and_keeps(ValueError, "arguments 0 and 1.b share memory", run(lambda a, b: a), x, {"b": x[1:]})
    raises_and_keeps(ValueError, "arguments 0 and 1 share memory", run(lambda a, b: b, donate=1), x, x)
    raises_and_keeps(ValueError, "1 positional", run(lambda a: a, donate=1), x)
    raises_and_keeps(ValueError, "requires grad", run(lambda a: a), torch.ones(2, requires_grad=True))
    with pytest.raises(ValueError, match="donate is"):
        jit(lambda a: a, donate=(0, 0))
    with pytest.raises(ValueError, match="donate is"):
        jit(lambda a: a, donate=-1)

    def broken(state):
        if state["w"][0] is not None:
            raise KeyError("mine")

    raises_and_keeps(KeyError, "mine", run(broken), {"w": [x]})


@pytest.mark.compile
def test_parts_of_one_buffer_may_be_donated():
    """Oracle: the plain call; unravel gives views of one vector, which lie side by side."""
    vector, unravel = tree.ravel({"a": torch.ones(2, 2), "b": torch.full((3,), 2.0), "empty": torch.zeros(0)})
    parts = unravel(vector)
    result = jit(lambda t: tree.map(lambda x: x + 1, t), donate=0, backend="eager")(parts)
    assert vector.tolist() == [2.0] * 4 + [3.0] * 3  # the storage was donated, not this tensor
    assert equal(result, unravel(vector)) and result["empty"].shape == (0,)


@pytest.mark.compile
def test_without_donation_jit_is_a_differentiable_compiled_function():
    """Oracle: the eager function and its autograd."""
    f = jit(lambda x, scale: (x**2 * scale).sum())
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    f(x, torch.tensor(3.0)).backward()
    assert x.grad.tolist() == [6.0, 12.0]
    assert f(x, torch.tensor(1.0)).item() == 5.0


@pytest.mark.compile
def test_jit_inside_jit_donates_nothing():
    """jax's rule: the outer compilation owns the buffers."""
    inner = jit(lambda x: x + 1, donate=0)

    def outer(x):
        y = inner(x)
        return x * y

    x = torch.tensor([2.0, 3.0])
    assert jit(outer, backend="eager")(x).tolist() == [6.0, 12.0]
    assert x.tolist() == [2.0, 3.0]


@pytest.mark.compile
def test_functions_given_to_jit_do_not_share_a_cache():
    """Dynamo compiles one code object at most 8 times, then runs it uncompiled: each jit has its own."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    for i in range(12):
        f = jit(lambda x, i=i: x * (i + 2), donate=0, backend=counter, dynamic=None)
        assert f(torch.ones(i + 1)).tolist() == [i + 2.0] * (i + 1)
    assert counter.frame_count == 12


@pytest.mark.compile
def test_calls_deep_inside_a_step_keep_one_last_graph():
    """The gradient may be taken in a helper, over microbatches of a rematerialised loss. Oracle: the plain step."""

    def gradient(params, batch):
        return accumulate(value_and_grad(remat(mlp_loss), has_aux=True), 3)(params, batch)

    def step(state, batch):
        def helper(p):
            (value, metrics), grads = gradient(p, batch)
            return value, metrics, grads

        _, metrics, grads = helper(state["p"])
        return {"p": tree.map(lambda p, g: p - 0.1 * g, state["p"], grads)}, metrics

    params, batch = mlp_params(random.key(0)), mlp_batch(random.key(1))
    (value, metrics), grads = value_and_grad_of_mlp(params, batch)
    expected = tree.map(lambda p, g: p - 0.1 * g, params, grads)
    state, found = jit(step, donate=0)({"p": params}, batch)
    close(state["p"], expected, rtol=1e-12, atol=1e-14)
    close(found, metrics, rtol=1e-12, atol=0)
    assert value.item() == pytest.approx(found["loss"].item(), rel=1e-12)


@pytest.mark.compile
def test_stages_are_compiled_one_by_one():
    """Oracle: the stages called in turn; a stage marked as disabled stays plain Python."""
    seen = []

    def gradients(state, batch):
        return value_and_grad(lambda p: (p * batch).sum())(state)[1]

    @torch.compiler.disable
    def plain(state, grads):
        seen.append(torch.compiler.is_compiling())
        return grads * 2

    def update(state, grads):
        return state - grads, grads.sum()

    f = in_stages(gradients, plain, update)
    x, batch = torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])
    expected = f(x, batch)
    place = x.data_ptr()
    result = jit(f, donate=0, backend="eager")(x, batch)
    assert equal(result, expected) and result[0].data_ptr() == place and "donated" in repr(x)
    assert seen == [False, False]
    assert equal(in_stages(lambda s, b: s + b)(batch, batch), batch * 2)
    with pytest.raises(ValueError, match="at least one"):
        in_stages()


PEAK = """
import resource, sys, torch
from purelm import tree
from purelm.transforms import jit, value_and_grad
torch.set_num_threads(1)
n, width, donate = 12, 1024, bool(int(sys.argv[1]))  # 12 matrices of 4 MiB

def loss(params, x):
    for w in params:
        x = torch.tanh(x @ w)
    return (x * x).sum()

gradient = value_and_grad(loss)

def step(state, x):
    value, grads = gradient(state["p"], x)
    m = tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["m"], grads)
    v = tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, state["v"], grads)
    p = tree.map(lambda p, m, v: p - 0.01 * m / (v.sqrt() + 1e-8), state["p"], m, v)
    return {"p": p, "m": m, "v": v}, value

state = {k: [torch.full((width, width), 1e-3) for _ in range(n)] for k in "pmv"}
x = torch.ones(2, width)
f = jit(step, donate=0 if donate else ())
for _ in range(2):
    state, _ = f(state, x)

def memory(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) * 1024

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # peak := now
before = memory("VmRSS")
state, _ = f(state, x)
print((memory("VmHWM") - before) / tree.n_bytes(state["p"]))
"""


@pytest.mark.slow
@pytest.mark.compile
def test_one_copy_of_the_state_is_held():
    """Peak resident memory of a step beyond the state that stands before it, in units of the parameters (48 MiB).

    With donation the gradients, 1. Without, the new parameters and two moments as well: 3.0 to 3.5 measured, since
    gradients go while the update is made and the allocator may hold free pages already, which do not count.
    """
    peaks = []
    for donate in (0, 1):
        out = subprocess.run([sys.executable, "-c", PEAK, str(donate)], capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        peaks.append(float(out.stdout))
    without, with_donation = peaks
    assert without > 2.5 and with_donation < (1.4 if torch.__version__ >= "2.13" else 4.6), peaks


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
def test_numbers_are_stored(dtype, backend, in_pieces):
    """Oracle: the plain call; 0-d leaves beside a 1-d one, changed, swapped and passed on, three times.

    Names are not in the order of the alphabet, nor is all one graph: both have lost numbers.
    """

    def f(s, x):
        if in_pieces:
            torch._dynamo.graph_break()
        return {"a": s["a"] + x, "b": s["c"] * 1, "c": s["b"] * 1, "kept": s["kept"], "v": s["v"] + s["a"]}, s["a"] * 2

    start = {k: torch.tensor(float(i), dtype=dtype) for i, k in enumerate(["a", "b", "c", "kept"])}
    start = {"v": torch.ones(1, dtype=dtype), **start}
    plain, state = start, tree.map(torch.clone, start)
    places = {k: x.data_ptr() for k, x in state.items()}
    step = jit(f, donate=0, backend=backend)
    for i in range(3):
        x = torch.tensor(i + 2.0, dtype=dtype)
        plain, expected = f(plain, x)
        state, twice = step(state, x)
        assert torch.equal(twice, expected)
        for k in plain:
            assert torch.equal(state[k], plain[k]) and state[k].shape == plain[k].shape, k
            assert state[k].data_ptr() == places[k]
