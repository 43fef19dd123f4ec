"""make_step: equal to a loop written by hand with torch.optim, to any split into microbatches, and pure.

Oracles: torch.optim.AdamW on the same loss; float64; torch.equal of the old state before and after.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import random, tree
from purelm.ops import REFERENCE
from purelm.optim import adamw, chain, clip_by_global_norm, lion, muon_adamw, schedules, sgd
from purelm.train import FULL, MIXED, Precision, Strategy, init_state, make_step, reducing, with_denominator
from purelm.transforms import in_stages, jit

V, D = 7, 5


def init(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return {"embed": torch.randn(V, D, generator=g, dtype=dtype), "out": torch.randn(V, D, generator=g, dtype=dtype)}


def loss_fn(params, batch):
    """Bigram model: -sum w log softmax(out @ embed[token])[target] / denominator."""
    logits = params["embed"][batch["tokens"]] @ params["out"].T
    nll = -torch.log_softmax(logits.to(torch.float64), -1).gather(-1, batch["targets"][..., None])[..., 0]
    weights = batch.get("weights", torch.ones_like(nll))
    denominator = batch.get("denominator", weights.sum())
    loss = (nll * weights).sum() / denominator
    return loss, {"nll": loss.detach(), "n_tokens": weights.sum().detach() / denominator}


def make_batch(seed, rows=6, weighted=True):
    g = torch.Generator().manual_seed(seed)
    batch = {
        "tokens": torch.randint(V, (rows, 4), generator=g),
        "targets": torch.randint(V, (rows, 4), generator=g),
    }
    if weighted:
        batch["weights"] = torch.rand(rows, 4, generator=g, dtype=torch.float64)
    return batch


F64 = Precision(torch.float64, torch.float64, torch.float64)


def test_equals_torch_adamw_with_clipping_step_by_step():
    optimizer = chain(clip_by_global_norm(0.5), adamw(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1))
    schedule = schedules.cosine(0.1, 12, n_warmup=3, lr_final=0.01)
    step = make_step(loss_fn, optimizer, schedule, precision=F64)
    state = init_state(init(), optimizer, F64)
    peers = {k: v.clone().requires_grad_() for k, v in init().items()}
    peer = torch.optim.AdamW(peers.values(), lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for i in range(15):
        state, metrics = step(state, make_batch(i))
        for group in peer.param_groups:
            group["lr"] = float(schedule(i))
        peer.zero_grad()
        loss, _ = loss_fn(peers, make_batch(i))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(peers.values(), 0.5)
        peer.step()
        # float64 throughout; the learning rate passes through float32 (1e-7 relative), hence not tighter.
        torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(metrics["grad_norm"].double(), norm, rtol=1e-5, atol=0)
        for k in peers:
            torch.testing.assert_close(state.params[k], peers[k].detach(), rtol=0, atol=1e-6)
    assert state.step.dtype == torch.int64 and int(state.step) == 15


@given(seed=st.integers(0, 1000), parts=st.sampled_from([1, 2, 3, 6]), weighted=st.booleans())
def test_any_number_of_microbatches_gives_the_same_step(seed, parts, weighted):
    optimizer = sgd(momentum=0.9)
    batch = make_batch(seed, weighted=weighted)
    plain = make_step(loss_fn, optimizer, schedules.constant(0.3), precision=F64)
    split = make_step(loss_fn, optimizer, schedules.constant(0.3), precision=F64, microbatches=parts)
    state = init_state(init(seed), optimizer, F64)
    (a, ma), (b, mb) = plain(state, batch), split(state, batch)
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)  # float64, other order of sums
    assert ma.keys() == mb.keys()
    for name in ma:
        torch.testing.assert_close(ma[name], mb[name], rtol=1e-6, atol=1e-12)  # norms are float32


def test_uneven_weights_need_the_batch_wide_denominator():
    """A mean of microbatch means would differ here: the test above cannot pass by luck."""
    batch = make_batch(3)
    halves = [{k: v[i : i + 3] for k, v in batch.items()} for i in (0, 3)]
    mean_of_means = sum(loss_fn(init(), h)[0] for h in halves) / 2
    assert abs(float(mean_of_means - loss_fn(init(), batch)[0])) > 1e-4


def test_step_writes_to_nothing_it_was_given():
    optimizer = adamw()
    state = init_state(init(), optimizer, F64)
    batch = make_batch(0)
    before = [x.clone() for x in tree.leaves((state, batch))]
    make_step(loss_fn, optimizer, schedules.constant(0.1), precision=F64, microbatches=2)(state, batch)
    assert set(batch) == {"tokens", "targets", "weights"}
    for x, y in zip(before, tree.leaves((state, batch)), strict=True):
        assert torch.equal(x, y) and y.grad is None and not y.requires_grad


def test_metrics_are_detached_scalars_and_lr_is_that_of_the_step():
    optimizer = sgd()
    step = make_step(loss_fn, optimizer, schedules.linear(1.0, 4), precision=F64)
    state = init_state(init(), optimizer, F64)
    rates = []
    for i in range(5):
        state, metrics = step(state, make_batch(i))
        assert all(m.ndim == 0 and not m.requires_grad for m in metrics.values())
        rates.append(float(metrics["lr"]))
    assert rates == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_reduce_sees_gradients_in_its_dtype_and_its_result_is_used():
    seen = []

    def reduce(grads):
        seen.append({x.dtype for x in tree.leaves(grads)})
        return tree.map(torch.zeros_like, grads)

    optimizer = sgd()
    precision = Precision(torch.float32, torch.float32, torch.bfloat16)
    state = init_state(init(dtype=torch.float32), optimizer, precision)
    options = {"strategy": reducing(reduce), "precision": precision}
    new, metrics = make_step(loss_fn, optimizer, schedules.constant(1.0), **options)(state, make_batch(0))
    assert seen == [{torch.bfloat16}]
    assert float(metrics["grad_norm"]) == 0.0
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(new.params), tree.leaves(state.params), strict=True))


def test_mixed_precision_computes_in_bf16_and_keeps_fp32_masters():
    seen = []

    def watching(params, batch):
        seen.append({x.dtype for x in tree.leaves(params)})
        return loss_fn(params, batch)

    optimizer = sgd()
    state = init_state(init(dtype=torch.float32), optimizer, MIXED)
    new, _ = make_step(watching, optimizer, schedules.constant(0.1), precision=MIXED)(state, make_batch(0))
    assert seen == [{torch.bfloat16}]
    assert {x.dtype for x in tree.leaves(new.params)} == {torch.float32}
    full, _ = make_step(loss_fn, optimizer, schedules.constant(0.1), precision=FULL)(state, make_batch(0))
    for a, b in zip(tree.leaves(new.params), tree.leaves(full.params), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02)  # 8 bits of mantissa on values and gradients of order 1


def test_with_denominator():
    batch = make_batch(0, weighted=False)
    assert float(with_denominator(batch)["denominator"]) == 24.0
    assert with_denominator({**batch, "denominator": 5})["denominator"] == 5
    assert with_denominator((1, 2)) == (1, 2)
    assert "denominator" not in batch


def test_bad_microbatches():
    with pytest.raises(ValueError, match="microbatches must be at least 1, got 0"):
        make_step(loss_fn, sgd(), schedules.constant(1.0), microbatches=0)
    step = make_step(loss_fn, sgd(), schedules.constant(1.0), microbatches=4, precision=F64)
    with pytest.raises(ValueError, match="6"):
        step(init_state(init(), sgd(), F64), make_batch(0))


@pytest.mark.compile
def test_compiled_and_donated_equals_eager_without_recompiling():
    optimizer = chain(clip_by_global_norm(1.0), adamw())
    eager = make_step(loss_fn, optimizer, schedules.cosine(0.1, 8, n_warmup=2), precision=F64)
    compiled = jit(eager, donate=0)
    a, b = init_state(init(), optimizer, F64), init_state(init(), optimizer, F64)
    for i in range(5):
        a, ma = eager(a, make_batch(i))
        if i == 2:
            torch._dynamo.config.error_on_recompile = True
        try:
            b, mb = compiled(b, make_batch(i))
        finally:
            torch._dynamo.config.error_on_recompile = False
        # The learning rate and the clipping norm are float32 (6e-8), rounded differently by fused code.
        torch.testing.assert_close(mb["loss"], ma["loss"], rtol=1e-6, atol=0)
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=4), st.integers(-3, 3))
def test_in_stages_is_composition(factors, x):
    stages = [lambda state, y, f=f: y * f + state for f in factors]
    expected = x
    for f in factors:
        expected = expected * f + 5
    assert in_stages(*stages)(5, x) == expected
    with pytest.raises(ValueError, match="at least one stage"):
        in_stages()


@pytest.mark.compile
def test_a_reduction_stays_plain_python_between_compiled_stages():
    """It sees real tensors at every step (a traced one would be called once, with fake ones)."""
    seen = []

    def reduce(grads):
        assert not torch.compiler.is_compiling()
        seen.append(float(tree.leaves(grads)[0].sum()))
        return tree.map(lambda g: 2 * g, grads)

    optimizer = sgd()
    plain = make_step(loss_fn, optimizer, schedules.constant(0.1), strategy=reducing(reduce), precision=F64)
    compiled = jit(plain, donate=0)
    a, b = init_state(init(), optimizer, F64), init_state(init(), optimizer, F64)
    for i in range(3):
        a, _ = plain(a, make_batch(i))
        b, _ = compiled(b, make_batch(i))
    assert len(seen) == 6
    assert seen[0::2] == pytest.approx(seen[1::2], rel=1e-9)
    for x, y in zip(tree.leaves(a.params), tree.leaves(b.params), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)  # lr * gradient: lr is float32


# A quadratic, whose gradients are known in closed form: 0.5 sum_i w_i |x_i - p|^2 / denominator.


def quadratic(params, batch):
    part = batch["w"][:, None] * (params["p"] - batch["x"])
    loss = 0.5 * (part * (params["p"] - batch["x"])).sum() / batch.get("denominator", 1.0)
    return loss, {"weight": batch["w"].sum().detach()}


def quadratic_gradient(params, batch):
    denominator = batch.get("denominator", 1.0)
    return {"p": (batch["w"][:, None] * (params["p"] - batch["x"])).sum(0) / denominator}


def quadratic_batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(6, 3, generator=g, dtype=torch.float64),
        "w": torch.rand(6, generator=g, dtype=torch.float64),
    }


def quadratic_state():
    return init_state({"p": torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)}, sgd(), F64)


QUARTER = schedules.constant(0.25)


def quadratic_step(how, loss_fn=quadratic, schedule=QUARTER, microbatches=1, **options):
    """With learning rate 0.25, so that new = p - g / 4; options are of the strategy."""
    options = {"strategy": Strategy(**options), "microbatches": microbatches, "precision": F64}
    step = make_step(loss_fn, sgd(), schedule, **options)
    return step if how == "eager" else jit(step, backend="eager")


HOW = pytest.mark.parametrize("how", ["eager", pytest.param("jit", marks=pytest.mark.compile)])
CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # float64, other order of sums


@pytest.mark.compile
def test_functions_of_one_line_that_differ_in_default_arguments():
    """Oracle: the step that is not compiled. torch 2.11 keeps compiled code by line, and does not look at defaults."""
    batch, state = quadratic_batch(), quadratic_state()
    for factor in (1.0, 4.0, 9.0):
        options = {
            "prepare": lambda batch, factor=factor: {**batch, "denominator": factor * batch["w"].sum()},
            "schedule": lambda step, *, factor=factor: 0.25 * factor + 0.0 * step,
        }
        (new, metrics), (wanted, expected) = (quadratic_step(how, **options)(state, batch) for how in ("jit", "eager"))
        torch.testing.assert_close(new.params["p"], wanted.params["p"], **CLOSE)
        torch.testing.assert_close(metrics, expected, **CLOSE)


@HOW
@pytest.mark.parametrize("parts", [1, 3])
def test_prepare_is_called_once_before_the_batch_is_cut(parts, how):
    """Oracle: the same step on a batch that has the denominator; and gradients in closed form."""
    seen = []

    def prepare(batch, factor):
        if how == "eager":  # else it is traced
            seen.append(tuple(batch["x"].shape))
        return {**batch, "denominator": factor * batch["w"].sum()}

    batch, state = quadratic_batch(), quadratic_state()
    gradients = {}
    for factor in (1.0, 4.0):
        step = quadratic_step(how, prepare=lambda b, factor=factor: prepare(b, factor), microbatches=parts)
        by_hand = {**batch, "denominator": factor * batch["w"].sum()}
        (new, metrics), (wanted, expected) = step(state, batch), quadratic_step("eager")(state, by_hand)
        assert set(batch) == {"x", "w"}
        torch.testing.assert_close(new.params["p"], wanted.params["p"], **CLOSE)
        torch.testing.assert_close(metrics, expected, **CLOSE)
        gradients[factor] = (state.params["p"] - new.params["p"]) / 0.25
        torch.testing.assert_close(gradients[factor], quadratic_gradient(state.params, by_hand)["p"], **CLOSE)
    torch.testing.assert_close(gradients[1.0], 4 * gradients[4.0], **CLOSE)
    assert seen == ([(6, 3)] * 2 if how == "eager" else [])


@HOW
@pytest.mark.parametrize("given", [None, "largest"])
@pytest.mark.parametrize("reduce", [None, "twice"])
def test_grad_norm_is_the_norm_of_reduced_gradients(reduce, given, how):
    """Oracle: the gradient in closed form. What the loss calls grad_norm does not take its place."""
    calls = []

    def largest(grads):  # plain Python also under jit: it may be a message (an assert would have dynamo give up)
        calls.append(torch.compiler.is_compiling())
        return grads["p"].abs().max()

    def with_its_own(params, batch):
        loss, metrics = quadratic(params, batch)
        return loss, {**metrics, "grad_norm": torch.full((), -7.0)}

    options = {} if given is None else {"norm": largest}
    if reduce == "twice":
        options["reduce"] = lambda grads: tree.map(lambda g: 2 * g, grads)
    batch, state = quadratic_batch(), quadratic_state()
    g = quadratic_gradient(state.params, batch)["p"] * (2 if reduce == "twice" else 1)
    wanted = g.square().sum().sqrt() if given is None else g.abs().max()
    for loss_fn in (quadratic, with_its_own):
        new, metrics = quadratic_step(how, loss_fn, **options)(state, batch)
        torch.testing.assert_close(metrics["grad_norm"], wanted, **CLOSE)
        torch.testing.assert_close(new.params["p"], state.params["p"] - g / 4, **CLOSE)
        assert set(metrics) == {"weight", "loss", "lr", "grad_norm"}
    assert calls == ([] if given is None else [False, False])


@HOW
def test_differentiate_takes_the_place_of_autograd(how):
    """Three times the gradient written by hand, called as plain Python. Oracle: autograd's step, reduced by 3 g."""
    calls = []

    def differentiate(loss_fn, **_):
        def gradient(params, batch):
            calls.append((torch.compiler.is_compiling(), *batch))
            with torch.no_grad():
                found = loss_fn(params, batch)
            return found, tree.map(lambda g: 3 * g, quadratic_gradient(params, batch))

        return gradient

    def prepare(batch):
        return {**batch, "denominator": batch["w"].sum()}

    batch, a, b = quadratic_batch(), quadratic_state(), quadratic_state()
    step = quadratic_step(how, differentiate=differentiate, prepare=prepare)
    plain = quadratic_step("eager", prepare=prepare, reduce=lambda grads: tree.map(lambda g: 3 * g, grads))
    for _ in range(2):
        (a, metrics), (b, expected) = step(a, batch), plain(b, batch)
        torch.testing.assert_close(a.params["p"], b.params["p"], **CLOSE)
        torch.testing.assert_close(metrics, expected, **CLOSE)
    assert calls == [(False, "x", "w", "denominator")] * 2


def test_differentiate_cuts_its_own_microbatches():
    """It is told how many, and the dtype that parameters are cast to."""
    told = []

    def differentiate(loss, **options):
        told.append(options)
        return lambda params, batch: (loss(params, batch), params)

    strategy = Strategy(differentiate=differentiate)
    make_step(loss_fn, sgd(), schedules.constant(1.0), strategy=strategy, microbatches=2, precision=MIXED)
    assert told == [{"microbatches": 2, "compute": torch.bfloat16}]


def mean(params, batch):
    logits = batch["tokens"] @ params["w"]
    return torch.nn.functional.cross_entropy(logits, batch["targets"]), {}


def divided(params, batch):
    logits = batch["tokens"] @ params["w"]
    nll = torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="sum")
    return nll / batch["denominator"], {}


def added(params, batch):
    """A sum over what it is given, by a constant of its own."""
    return torch.nn.functional.cross_entropy(batch["tokens"] @ params["w"], batch["targets"], reduction="sum") / 7, {}


@pytest.mark.parametrize("loss", [mean, divided, added])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_mean_is_refused_where_losses_are_added(loss, microbatches):
    """Oracle: the step with the whole batch. A mean over each of two microbatches would be twice as large."""
    g = torch.Generator().manual_seed(0)
    batch = {"tokens": torch.randn(4, 3, generator=g), "targets": torch.tensor([0, 1, 2, 1])}
    params = {"w": torch.randn(3, 3, generator=g)}
    step = make_step(loss, sgd(), schedules.constant(1.0), microbatches=microbatches)
    if loss is mean and microbatches == 2:
        with pytest.raises(ValueError, match=r"does not divide by batch.*denominator"):
            step(init_state(params, sgd()), batch)
        return
    state, metrics = step(init_state(params, sgd()), batch)
    whole, expected = make_step(loss, sgd(), schedules.constant(1.0))(init_state(params, sgd()), batch)
    torch.testing.assert_close((state.params, metrics), (whole.params, expected))


def test_clipping_of_the_step_is_that_of_the_chain():
    """Oracle: clip_by_global_norm in the optimizer; and the norm that is reported is that before it."""
    chained = chain(clip_by_global_norm(0.5), adamw())
    by_chain = make_step(loss_fn, chained, schedules.constant(0.1), precision=F64)
    by_step = make_step(loss_fn, adamw(), schedules.constant(0.1), max_norm=0.5, precision=F64)
    a, expected = by_chain(init_state(init(), chained, F64), make_batch(0))
    b, found = by_step(init_state(init(), adamw(), F64), make_batch(0))
    assert float(found["grad_norm"]) > 0.5
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a.params), tree.leaves(b.params), strict=True))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(ValueError, match="max_norm must be in"):
        make_step(loss_fn, adamw(), schedules.constant(0.1), max_norm=-1.0)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("ops", ["reference", "fused"])
def test_a_batch_without_targets(ops, microbatches):
    """Oracle: the documented loss, 0. Gradients are 0 and the step is the weight decay's and nothing else."""
    from purelm.kernels.fused import FUSED
    from purelm.models import transformer

    cfg = transformer.Config(vocab_size=8, context_length=4, d_model=4, n_layers=1, n_heads=2)
    params = transformer.init(random.key(0), cfg)
    some = REFERENCE if ops == "reference" else FUSED
    optimizer = chain(clip_by_global_norm(1.0), adamw(weight_decay=0.0))

    def loss(params, batch):
        return transformer.loss(params, batch, cfg, ops=some, z_loss=0.1)

    step = make_step(loss, optimizer, schedules.constant(1e-3), microbatches=microbatches)
    zeros = torch.zeros(2, 4, dtype=torch.long)
    batch = {"tokens": zeros, "targets": zeros - 100, "weights": torch.zeros(2, 4)}
    state, metrics = step(init_state(params, optimizer), batch)
    assert metrics["loss"] == 0.0 and metrics["nll"] == 0.0 and metrics["grad_norm"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(state.params), tree.leaves(params), strict=True))
    assert bool(tree.all_finite(state.opt_state))

    # A microbatch without targets beside one with them: the whole batch's step.
    half = {**batch, "targets": zeros, "weights": torch.tensor([[1.0, 0.5, 0.0, 2.0], [0.0] * 4])}
    parts, of_parts = step(init_state(params, optimizer), half)
    whole, of_whole = make_step(loss, optimizer, schedules.constant(1e-3))(init_state(params, optimizer), half)
    assert of_parts["loss"] > 0.0
    torch.testing.assert_close(of_parts, of_whole)
    torch.testing.assert_close(parts.params, whole.params)


@pytest.mark.parametrize("optimizer", [sgd(momentum=0.9), lion(), muon_adamw()], ids=["sgd", "lion", "muon"])
def test_updates_of_no_gradient_are_finite(optimizer):
    """Oracle: the definition. What divides by a norm or a second moment must not make NaN of 0."""
    params = {"w": torch.ones(3, 2), "b": torch.ones(2)}
    updates, state = optimizer.update(tree.zeros_like(params), optimizer.init(params), params, torch.tensor(0.1))
    assert bool(tree.all_finite((updates, state)))
