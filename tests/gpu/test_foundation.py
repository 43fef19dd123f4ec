"""The foundation on an accelerator: same random bits, same maths, donated storage, training end to end.

Oracles: the CPU in float64 or with the same bits; torch's allocator for memory.
"""

import os

import pytest
import torch

from purelm import checkpoint, random, tree
from purelm.data import random_windows
from purelm.generate import Sampling, continued, empty_past, generate
from purelm.models import transformer
from purelm.ops import REFERENCE
from purelm.ops.sdpa import sdpa_attention
from purelm.optim import adamw, chain, clip_by_global_norm, muon_adamw, schedules
from purelm.train import FULL, MIXED, Precision, init_state, make_step
from purelm.transforms import accumulate, jit, remat, value_and_grad

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at cuBLAS's first call
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (make gpu-test)"),
]
CUDA = torch.device("cuda")
CFG = transformer.Config(vocab_size=97, context_length=64, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2)
SDPA = REFERENCE._replace(attention=sdpa_attention)


def make_batch(i, device=CUDA, rows=8):
    x = random.randint(random.fold_in(random.key(7), i), (rows, CFG.context_length + 1), 0, CFG.vocab_size).to(device)
    return {"tokens": x[:, :-1].contiguous(), "targets": x[:, 1:].contiguous()}


@pytest.mark.parametrize("shape", [(), (1,), (7, 123), (1 << 18,)])
def test_random_bits_equal_those_of_the_cpu(shape):
    here, there = random.key(42), random.key(42, device=CUDA)
    assert torch.equal(random.bits(here, shape), random.bits(there, shape).cpu())
    assert torch.equal(random.uniform(here, shape), random.uniform(there, shape).cpu())
    assert torch.equal(random.randint(here, shape, -5, 1000), random.randint(there, shape, -5, 1000).cpu())
    # erfinv is another polynomial on each device.
    torch.testing.assert_close(random.normal(here, shape), random.normal(there, shape).cpu(), rtol=1e-5, atol=1e-6)
    for a, b in zip(random.split(here), random.split(there), strict=True):
        assert torch.equal(a, b.cpu())
    compiled = torch.compile(lambda key: random.bits(key, shape))
    assert torch.equal(compiled(there).cpu(), random.bits(here, shape))


def test_init_is_that_of_the_cpu():
    a = transformer.init(random.key(3), CFG)
    b = transformer.init(random.key(3, device=CUDA), CFG)
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y.cpu(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ops", [REFERENCE, SDPA], ids=["reference", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_against_float64_on_the_cpu(ops, dtype):
    """err(GPU, fp64) <= 2 err(CPU in the same dtype, fp64) + a rounding of the value."""
    params = transformer.init(random.key(0), CFG)
    batch = make_batch(0, "cpu", rows=2)

    def gradient(p, b, o):
        return value_and_grad(lambda q: transformer.loss(q, b, CFG, ops=o)[0])(p)

    _, exact = gradient(tree.cast(params, torch.float64), batch, REFERENCE)
    low = tree.cast(params, dtype)
    _, same = gradient(low, batch, REFERENCE)
    _, ours = gradient(tree.to(low, CUDA), tree.to(batch, CUDA), ops)
    unit = torch.finfo(dtype).eps
    for e, s, o in zip(tree.leaves(exact), tree.leaves(same), tree.leaves(ours), strict=True):
        allowed = 2 * (s.double() - e).abs().max() + 4 * unit * e.abs().max()
        assert (o.cpu().double() - e).abs().max() <= allowed


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("precision", [FULL, MIXED], ids=["fp32", "mixed"])
def test_compiled_donated_step_follows_the_eager_one(name, precision):
    core = adamw() if name == "adamw" else muon_adamw(iteration_dtype=torch.float32)
    optimizer = chain(clip_by_global_norm(1.0), core)
    step = make_step(
        lambda p, b: transformer.loss(p, b, CFG, ops=SDPA), optimizer, schedules.constant(1e-3), precision=precision
    )
    compiled = jit(step, donate=0)
    params = transformer.init(random.key(0, device=CUDA), CFG)
    a = init_state(params, optimizer)
    b = init_state(tree.map(torch.clone, params), optimizer)
    for i in range(6):
        a, ma = step(a, make_batch(i))
        used = b
        b, mb = compiled(b, make_batch(i))
        with pytest.raises(RuntimeError, match="donated"):
            _ = tree.leaves(used.params)[0] + 1
        # Same maths in another order: bf16 activations, or fp32 with tensor-core sums.
        tolerance = 2e-2 if precision is MIXED else 2e-3
        torch.testing.assert_close(ma["loss"], mb["loss"], rtol=tolerance, atol=0)


def test_donation_holds_one_copy_of_the_state():
    n = 16_000_000
    params = {"w": torch.zeros(n, device=CUDA), "v": torch.zeros(n, device=CUDA)}
    optimizer = adamw()
    step = make_step(lambda p, x: ((p["w"] * x).sum() + p["v"].sum(), {}), optimizer, schedules.constant(1e-3))

    def peak(run):
        state = init_state(params, optimizer)
        state = copied(state)
        for _ in range(2):
            state, _ = run(state, torch.ones((), device=CUDA))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        state, _ = run(state, torch.ones((), device=CUDA))
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / (4 * n)

    kept, given = peak(jit(step)), peak(jit(step, donate=0))
    # In units of one array of n: the gradients are 2; a second copy of params and both moments would be 6 more.
    assert given <= 2.5 and kept >= given + 5, (kept, given)


def copied(state):
    return tree.map(torch.clone, state)


def test_remat_and_accumulate_save_memory_and_keep_gradients():
    params = transformer.init(random.key(0, device=CUDA), CFG)
    batch = {**make_batch(0, rows=64), "denominator": torch.tensor(64.0 * 64, device=CUDA)}

    def peak(f):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (value, _), grads = f(params, batch)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, value, grads

    plain = value_and_grad(lambda p, b: transformer.loss(p, b, CFG, ops=SDPA), has_aux=True)
    again = value_and_grad(lambda p, b: transformer.loss(p, b, CFG, ops=SDPA, wrap_block=remat), has_aux=True)
    m0, v0, g0 = peak(plain)
    for m, v, g in (peak(again), peak(accumulate(plain, 8))):
        assert m < 0.8 * m0
        torch.testing.assert_close(v, v0, rtol=1e-4, atol=0)
        for x, y in zip(tree.leaves(g), tree.leaves(g0), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-4)


@pytest.fixture
def deterministic():
    """Embedding's backward adds by atomics otherwise, in an order that changes from run to run."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_training_reduces_the_loss_and_resumes_bit_for_bit(tmp_path, deterministic):
    tokens = (torch.arange(5000) % 13).numpy().astype("uint16")
    optimizer = chain(clip_by_global_norm(1.0), adamw())
    step = jit(
        make_step(
            lambda p, b: transformer.loss(p, b, CFG, ops=SDPA), optimizer, schedules.constant(3e-3), precision=MIXED
        ),
        donate=0,
    )

    def fresh():
        return init_state(transformer.init(random.key(0, device=CUDA), CFG), optimizer)

    def run(state, start, stop):
        losses = []
        for i in range(start, stop):
            batch = random_windows(tokens, random.key(1), i, 8, CFG.context_length, device=CUDA)
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        return state, losses

    whole, losses = run(fresh(), 0, 60)
    assert losses[-1] < 0.3 < losses[0]
    half, _ = run(fresh(), 0, 30)
    checkpoint.save(tmp_path, 30, {"params": half.params, "opt_state": half.opt_state})
    template = fresh()
    trees, _ = checkpoint.load(
        tmp_path, like={"params": template.params, "opt_state": template.opt_state}, device=CUDA
    )
    resumed, again = run(type(half)(trees["params"], trees["opt_state"], torch.tensor(30, device=CUDA)), 30, 60)
    assert again == losses[30:]
    for x, y in zip(tree.leaves(whole), tree.leaves(resumed), strict=True):
        assert torch.equal(x, y)


def test_greedy_generation_equals_that_of_the_cpu():
    params = transformer.init(random.key(5), CFG)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    model, greedy = transformer.make(CFG), Sampling(temperature=0.0)
    a = generate(model, params, prompts, random.key(1), max_new_tokens=20, sampling=greedy)
    b = generate(
        model, tree.to(params, CUDA), prompts, random.key(1, device=CUDA), max_new_tokens=20, sampling=greedy
    )
    assert [x.tolist() for x in a.tokens] == [x.tolist() for x in b.tokens]


def test_a_row_goes_on_from_its_past():
    """The second turn, whose beginning is in the cache. Oracle: generate of the whole prompt; fp64, so no near ties."""
    cfg = transformer.Config(vocab_size=97, context_length=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2)
    model = transformer.make(cfg)
    params = tree.to(transformer.init(random.key(0), cfg, dtype=torch.float64), "cuda")
    key = random.key(1).to("cuda")
    first = list(continued(model, params, [1, 2, 3], key, empty_past(model, params), max_new_tokens=20))
    prompt = [1, 2, 3, *(x.token for x in first), 4]
    second = [x.token for x in continued(model, params, prompt, key, first[-1].past, max_new_tokens=20)]
    for ids, found in (([1, 2, 3], [x.token for x in first]), (prompt, second)):
        assert found == generate(model, params, [ids], key, max_new_tokens=20).tokens[0].tolist()


def test_param_dtype_of_masters():
    optimizer = adamw()
    precision = Precision(param=torch.bfloat16, compute=torch.bfloat16, reduce=torch.float32)
    state = init_state(transformer.init(random.key(0, device=CUDA), CFG), optimizer, precision)
    step = make_step(
        lambda p, b: transformer.loss(p, b, CFG, ops=SDPA), optimizer, schedules.constant(1e-3), precision=precision
    )
    state, _ = step(state, make_batch(0))
    assert {x.dtype for x in tree.leaves(state.params)} == {torch.bfloat16}
