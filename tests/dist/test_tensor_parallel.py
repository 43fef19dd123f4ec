"""Tensor parallelism on two and four Gloo processes. Oracle: `transformer.loss` in one process, whole parameters."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist

from purelm import random, tree
from purelm.dist import conjugates, tensor_parallel, vocab_parallel
from purelm.dist.agreement import check_equal
from purelm.dist.tensor_parallel import Layout, shard, strategy, unshard
from purelm.dist.world import rank_of, size_of
from purelm.models import transformer
from purelm.ops import REFERENCE
from purelm.ops.linear_cross_entropy import linear_cross_entropy
from purelm.transforms import remat, save_matmuls, value_and_grad
from tests.dist.processes import ALL_GATHER, REDUCE_SCATTER, RankError, run

T = 8
GQA = transformer.Config(
    vocab_size=20, context_length=T, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=20
)
# name -> (Config, options of loss, kind of batch); 20 rows of the vocabulary are even, 19 and 5 are filled up
CASES = {
    "gqa": (GQA, {}, "plain"),
    "biases": (replace(GQA, biases="all", norm="layer", norm_position="sandwich"), {}, "weights"),
    "qkv_biases": (replace(GQA, biases="qkv", ffn="gelu", window=3), {"chunk": 5}, "weights"),
    "tied": (replace(GQA, tie_embeddings=True, norm_position="post"), {}, "weights"),
    "tied_odd": (replace(GQA, tie_embeddings=True, vocab_size=19), {"z_loss": 0.1, "chunk": 7}, "segments"),
    "odd_vocabulary": (replace(GQA, vocab_size=5, norm="none"), {"z_loss": 0.01}, "plain"),
    "softcap": (replace(GQA, logit_softcap=2.0, attention_softcap=3.0, vocab_size=19), {"z_loss": 0.1}, "weights"),
    "head_norms": (replace(GQA, qk_norm="head", norm_position="output", ffn="geglu"), {"chunk": 100}, "segments"),
    "learned": (replace(GQA, position="learned", biases="all", causal=False), {}, "segments"),
    "remat": (replace(GQA, biases="all"), {"wrap_block": remat, "chunk": 3}, "denominator"),
    "remat_matmuls": (GQA, {"wrap_block": partial(remat, policy=save_matmuls)}, "plain"),
    "nothing_counts": (GQA, {}, "padding"),
}
TOLERANCE = {torch.float64: {"rtol": 1e-10, "atol": 1e-11}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}


class Plan:
    """A Config divided over a group: its Layout, and what comes of it."""

    def __init__(self, cfg, group=None, sequence_parallel=False):
        self.cfg, self.group = cfg, group
        self.layout = Layout(cfg.vocab_size, group, sequence_parallel)
        self.strategy = strategy(self.model(), self.layout)
        self.shard, self.unshard = self.strategy.shard, self.strategy.unshard
        self.reduce, self.global_norm = self.strategy.reduce, self.strategy.norm

    def model(self, ops=REFERENCE, wrap_block=transformer.identity):
        return transformer.make(self.cfg, self.layout.ops(ops), wrap_block)

    def loss(self, params, batch, ops=REFERENCE, wrap_block=transformer.identity, **options):
        return self.model(ops, wrap_block).loss(params, batch, **options)


def params_of(cfg, dtype=torch.float64):
    """Nothing stays at 0 or 1: a bias or norm that is forgotten changes the loss."""
    scale = 0.25 if cfg.norm == "none" else 1.0  # without norms rounding errors grow with the weights
    return tree.map(
        lambda x: scale * (x + 0.2 * torch.cos(torch.arange(x.numel(), dtype=dtype)).view(x.shape)),
        tree.cast(transformer.init(random.key(0), cfg), dtype),
    )


def batch_of(cfg, kind="weights", dtype=torch.float64, rows=4, step=0):
    key = random.fold_in(random.key(5), step)
    x = random.randint(key, (rows, T + 1), 0, cfg.vocab_size)
    batch = {"tokens": x[:, :-1].contiguous(), "targets": x[:, 1:].contiguous()}
    if kind != "plain":
        weights = random.uniform(random.fold_in(key, 1), (rows, T)).to(dtype)
        weights[0, :3] = 0.0
        batch["targets"][0, :3] = -100  # anything, where the weight is 0
        batch["weights"] = torch.zeros_like(weights) if kind == "padding" else weights
    if kind == "segments":
        batch["segment_ids"] = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 0], [1] * 8] * (rows // 2))
    if kind == "denominator":
        batch["denominator"] = torch.tensor(7.5, dtype=dtype)
    return batch


def assert_close(a, b, **tolerance):
    assert tree.structure(a) == tree.structure(b)
    for path, x, y in zip(tree.paths(a), tree.leaves(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y, **tolerance, msg=lambda text, path=path: f"{path}: {text}")


def compared(plan, cfg, options, batch, dtype):
    """The plan's loss, metrics and gradients against one process."""
    params = params_of(cfg, dtype)
    oracle = value_and_grad(partial(transformer.loss, cfg=cfg, **options), has_aux=True)(params, batch)
    local = plan.shard(params)
    found, grads = value_and_grad(partial(plan.loss, **options), has_aux=True)(local, batch)
    grads = plan.reduce(grads)
    assert tree.structure(grads) == tree.structure(local)
    whole = plan.unshard(grads)
    assert_close((found, whole), oracle, **TOLERANCE[dtype])
    check_equal((found, whole), plan.group)  # to the bit: what is on every rank stays equal when it is updated
    norm = plan.global_norm(grads)
    torch.testing.assert_close(norm, tree.global_norm(oracle[1]), **TOLERANCE[dtype])
    return float(norm)


def on_rank(name, sequence_parallel, dtype):
    cfg, options, kind = CASES[name]
    return compared(Plan(cfg, None, sequence_parallel), cfg, options, batch_of(cfg, kind, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_one_process(name, sequence_parallel, dtype):
    norms = run(on_rank, name, sequence_parallel, dtype)
    assert (norms[0] == 0.0) == (name == "nothing_counts")


def on_rank_of_four(sequence_parallel):
    """Four ranks: vocabularies of 5 and 6 leave the last rank no row at all, 19 one row less."""
    for vocab_size in (5, 6, 19):
        cfg = replace(GQA, vocab_size=vocab_size, n_heads=8, n_kv_heads=4, head_dim=2, qk_norm="head", biases="all")
        compared(Plan(cfg, None, sequence_parallel), cfg, {"z_loss": 0.1}, batch_of(cfg), torch.float64)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence"])
def test_four_ranks(sequence_parallel):
    run(on_rank_of_four, sequence_parallel, size=4)


def on_rank_bfloat16():
    """err(divided, fp32) <= 2 err(one process in bf16, fp32), of all gradients together and of the loss."""
    cfg = replace(GQA, vocab_size=19)
    batch, params, plan = batch_of(cfg, dtype=torch.float32), params_of(cfg, torch.float32), Plan(cfg, None, True)

    def differentiated(f, params, dtype):
        return value_and_grad(lambda params: f(tree.cast(params, dtype), batch), has_aux=True)(params)

    whole = partial(transformer.loss, cfg=cfg)
    (exact, _), oracle = differentiated(whole, params, torch.float32)
    (one, _), grads_one = differentiated(whole, params, torch.bfloat16)
    (found, _), grads = differentiated(plan.loss, plan.shard(params), torch.bfloat16)
    off = [tree.global_norm(tree.map(torch.sub, g, oracle)) for g in (grads_one, plan.unshard(plan.reduce(grads)))]
    assert found.dtype == torch.float32 and 0 < off[1] <= 2 * off[0]
    assert abs(found - exact) <= 2 * abs(one - exact) + 2**-8
    # Sums over chunks are held in fp32: they differ by the last rounding.
    hidden, part = (random.normal(random.key(i), (n, 4)).bfloat16() for i, n in enumerate((256, 3)))
    d_part = []
    for chunk in (None, 1):
        leaf = part.clone().requires_grad_()
        loss, _ = vocab_parallel.linear_cross_entropy(hidden, leaf, torch.arange(256) % 6, 6, chunk=chunk)
        d_part.append(torch.autograd.grad(loss, leaf)[0].float())
    torch.testing.assert_close(*d_part, rtol=2**-7, atol=2**-8)


def test_bfloat16():
    run(on_rank_bfloat16)


def on_rank_fused(sequence_parallel):
    """The kernels, in the interpreter; the loss is not theirs but vocab_parallel's."""
    from purelm.kernels.fused import FUSED

    cfg = replace(GQA, d_model=16, head_dim=16, n_layers=1)
    batch = batch_of(cfg, "plain", torch.float32, rows=2)
    params, plan = params_of(cfg, torch.float32), Plan(cfg, None, sequence_parallel)
    oracle = value_and_grad(partial(transformer.loss, cfg=cfg), has_aux=True)(params, batch)
    found, grads = value_and_grad(partial(plan.loss, ops=FUSED), has_aux=True)(plan.shard(params), batch)
    assert_close((found, plan.unshard(plan.reduce(grads))), oracle, rtol=1e-4, atol=1e-5)


def test_fused_ops():
    run(on_rank_fused, True)


def on_rank_differs(what):
    cfg = replace(GQA, d_ff=GQA.d_ff + 2 * (what == "cfg" and rank_of(None)))
    params = params_of(GQA)
    if what == "params" and rank_of(None):
        params["layers"][1]["ln1"]["weight"] = params["layers"][1]["ln1"]["weight"].float()
    Plan(cfg).shard(params)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("cfg", "leaves.layers.0.ffn.w1.weight.0.0: 20 on rank 0; 22 on rank 1"),
        ("params", "params.layers.1.ln1.weight: (12,) float64 on rank 0; (12,) float32 on rank 1"),
    ],
)
def test_a_rank_that_differs_is_an_error_on_all(what, said):
    with pytest.raises(RankError) as error:
        run(on_rank_differs, what)
    assert sorted(error.value.errors) == [0, 1]
    assert all(f"tensor_parallel.shard: ranks differ at {said}" in text for text in error.value.errors.values())


def on_rank_layout(name):
    cfg = CASES[name][0]
    params, rank, N = params_of(cfg), rank_of(None), size_of(None)
    leaves, layout = transformer.leaves(cfg), Layout(cfg.vocab_size)
    local = shard(params, leaves)
    shapes = tensor_parallel.like(leaves, layout)
    assert tree.map(lambda x: tuple(x.shape), local) == tree.map(lambda x: tuple(x.shape), shapes)
    layer, mine = params["layers"][1], local["layers"][1]
    assert torch.equal(mine["attn"]["k_proj"]["weight"], layer["attn"]["k_proj"]["weight"].chunk(N)[rank])
    assert torch.equal(mine["ffn"]["w2"]["weight"], layer["ffn"]["w2"]["weight"].chunk(N, 1)[rank])
    assert_close(unshard(local, leaves), params, rtol=0, atol=0)
    half = tree.map(lambda x: x.bfloat16() if x.ndim == 1 else x, local)  # two dtypes, and an absent leaf
    half["lm_head"] = {"weight": None}
    again = unshard(half, leaves)
    assert again["lm_head"] == {"weight": None}
    back = tree.map(lambda x: x.bfloat16() if x.ndim == 1 else x, {**params, "lm_head": {"weight": None}})
    assert_close(again, back, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["biases", "tied_odd", "odd_vocabulary", "learned", "head_norms"])
def test_parts_put_together_are_the_whole(name):
    run(on_rank_layout, name)


def on_rank_conjugates():
    """Forward: stacked tensors of all ranks. Backward: the conjugate applied to the gradient."""
    rank, N = rank_of(None), size_of(None)
    everyone = [random.normal(random.key(r), (3, 2 * N, 5), dtype=torch.float64) for r in range(N)]
    total, at = sum(everyone), slice(2 * rank, 2 * rank + 2)
    x = everyone[rank].requires_grad_()
    dy = [torch.cos(9 * y.detach()) for y in everyone]
    for f, forward, backward in [
        (conjugates.enter, x, sum(dy)),
        (conjugates.leave, total, dy[rank]),
        (conjugates.scatter_time, total[:, at], torch.cat([d[:, :2] for d in dy], 1)),
    ]:
        y = f(x)
        torch.testing.assert_close(y, forward, rtol=0, atol=1e-14)
        (dx,) = torch.autograd.grad(y, x, dy[rank][:, : y.shape[1]])
        torch.testing.assert_close(dx, backward, rtol=0, atol=1e-14)
    y = conjugates.gather_time(x)
    assert torch.equal(y, torch.cat(everyone, 1))
    wide = [torch.cat([d] * N, 1) * (r + 1) for r, d in enumerate(dy)]
    (dx,) = torch.autograd.grad(y, x, wide[rank])
    torch.testing.assert_close(dx, sum(wide)[:, 2 * N * rank : 2 * N * (rank + 1)], rtol=0, atol=1e-14)
    torch.testing.assert_close(conjugates.leave(x[:, :, 2].mT), total[:, :, 2].mT, rtol=0, atol=1e-14)  # a view
    with pytest.raises(ValueError, match=f"scatter_time: {2 * N + 1} positions are not divisible by the {N} ranks"):
        conjugates.scatter_time(torch.zeros(1, 2 * N + 1, 2))


@pytest.mark.parametrize("size", [2, 4])
def test_conjugates(size):
    run(on_rank_conjugates, size=size)


COLLECTIVES = ("all_reduce", ALL_GATHER, REDUCE_SCATTER)


def counted(f):
    """Bytes of each message that f sends, by collective; those of a whole all_gather or reduce_scatter."""
    sent, kept = {name: [] for name in COLLECTIVES}, {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name):
        def collective(*tensors, **options):
            sent[name].append(max(x.nbytes for x in tensors if isinstance(x, torch.Tensor)))
            return kept[name](*tensors, **options)

        return collective

    try:
        for name in COLLECTIVES:
            setattr(dist, name, counting(name))
        f()
    finally:
        for name in COLLECTIVES:
            setattr(dist, name, kept[name])
    return {name: sizes for name, sizes in sent.items() if sizes}


def on_rank_messages(sequence_parallel, n_layers, backward, chunk=None):
    cfg = replace(GQA, n_layers=n_layers)
    plan, batch = Plan(cfg, None, sequence_parallel), batch_of(cfg, "plain")
    local = plan.shard(params_of(cfg))
    f = partial(plan.loss, batch=batch, chunk=chunk)
    return counted(lambda: value_and_grad(f, has_aux=True)(local) if backward else f(local))


@pytest.mark.parametrize("chunk", [None, 5])
def test_messages(chunk):
    """Oracle: the counts that the docstrings state. n bytes of x_BTD; 8 N and 16 N are the loss's numbers a token."""
    N, n = 4 * T, 4 * T * GQA.d_model * 8
    loss = [8 * N, 16 * N]
    for L in (1, 3):
        assert run(on_rank_messages, False, L, False, chunk)[0] == {"all_reduce": [n] * (1 + 2 * L) + loss}
        both = run(on_rank_messages, False, L, True, chunk)[0]["all_reduce"]
        assert both == [n] * (1 + 2 * L) + loss + [n] * (1 + 2 * L)  # those of the sublayers, and the loss's hidden
        ends = 1 + 2 * L  # with the embedding's scatter, and the loss's gather
        assert run(on_rank_messages, True, L, False, chunk)[0] == {
            "all_reduce": loss, ALL_GATHER: [n] * ends, REDUCE_SCATTER: [n] * ends,
        }  # fmt: skip
        # Backward: the states that the loss saw are the same on all ranks, and their gradient a sum over ranks.
        assert run(on_rank_messages, True, L, True, chunk)[0] == {
            "all_reduce": [*loss, n], ALL_GATHER: [n] * 2 * ends, REDUCE_SCATTER: [n] * (2 * ends - 1),
        }  # fmt: skip


def on_rank_reduce_messages(sequence_parallel, qk_norm):
    cfg = replace(GQA, qk_norm=qk_norm)
    plan = Plan(cfg, None, sequence_parallel)
    local = plan.shard(params_of(cfg))
    kept = tree.map(torch.clone, local)
    sent = counted(lambda: plan.reduce(local)), counted(lambda: plan.global_norm(local))
    assert_close(local, kept, rtol=0, atol=0)  # not written to
    return sent


def test_reduce_sends_one_message_or_none():
    norms, heads = 5 * GQA.d_model * 8, 4 * GQA.head_width * 8
    one = {"all_reduce": [8]}
    assert run(on_rank_reduce_messages, False, "none")[0] == ({}, one)
    assert run(on_rank_reduce_messages, False, "head")[0] == ({"all_reduce": [heads]}, one)
    assert run(on_rank_reduce_messages, True, "head")[0] == ({"all_reduce": [heads + norms]}, one)


def on_rank_memory():
    """Saved for backward under sequence parallelism: what norms and residuals keep is that of T / N positions."""
    seen = []

    def rms_norm(x, weight, eps):
        seen.append(tuple(x.shape))
        return REFERENCE.rms_norm(x, weight, eps)

    plan = Plan(GQA, None, True)
    plan.loss(plan.shard(params_of(GQA)), batch_of(GQA), ops=REFERENCE._replace(rms_norm=rms_norm))
    return set(seen)


def test_norms_see_their_positions_only():
    assert run(on_rank_memory) == [{(4, T // 2, GQA.d_model)}] * 2


def test_alone_it_is_the_model():
    for cfg, options, kind in CASES.values():
        params, batch, plan = params_of(cfg), batch_of(cfg, kind), Plan(cfg, sequence_parallel=True)
        assert plan.shard(params) is params and plan.unshard(params) is params and plan.reduce(params) is params
        found, grads = value_and_grad(partial(plan.loss, **options), has_aux=True)(plan.shard(params), batch)
        oracle = value_and_grad(partial(transformer.loss, cfg=cfg, **options), has_aux=True)(params, batch)
        assert_close((found, grads), oracle, rtol=0, atol=0)
        assert torch.equal(plan.global_norm(grads), tree.global_norm(grads))
    Plan(replace(GQA, n_heads=3, n_kv_heads=1, d_ff=7, qk_norm="full"))  # nothing to divide
    x = torch.ones(1, 3, 2)
    assert all(getattr(conjugates, name)(x) is x for name in conjugates.__all__ if name != "whole")
    assert conjugates.whole(x, 1) is x
    hidden, rows, targets = torch.randn(5, 4), torch.randn(7, 4), torch.arange(5)
    a = vocab_parallel.linear_cross_entropy(hidden, rows, targets, 7, softcap=3.0, chunk=2)
    torch.testing.assert_close(a, linear_cross_entropy(hidden, rows, targets, softcap=3.0))
    assert torch.equal(vocab_parallel.embedding(targets, rows, 7), rows[:5])


def on_rank_refused(case):
    if case == "positions":
        batch = {k: v[:, :7] for k, v in batch_of(GQA).items()}
        Plan(GQA, None, True).loss(shard(params_of(GQA), transformer.leaves(GQA)), batch)
    elif case == "rows":
        shard(params_of(GQA), transformer.leaves(replace(GQA, vocab_size=21)))
    elif case == "leaf":
        shard({**params_of(GQA), "adapter": {"weight": torch.zeros(2)}}, transformer.leaves(GQA))
    elif case in ("token", "target"):
        cfg = replace(GQA, vocab_size=19)
        batch = batch_of(cfg, "plain")
        batch["tokens" if case == "token" else "targets"][1, 2] = 19  # a row that is filled up
        Plan(cfg).loss(Plan(cfg).shard(params_of(cfg)), batch)
    elif case == "chunk":
        Plan(GQA).loss(Plan(GQA).shard(params_of(GQA)), batch_of(GQA), chunk=0)
    else:
        Plan(replace(GQA, **case))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("positions", r'ValueError: batch\["tokens"\] has 7 positions; sequence_parallel needs a multiple of the 2'),
        ("rows", r"ValueError: params: lm_head.weight has shape \(20, 12\), the leaf table says \(21, 12\)"),
        ("leaf", "ValueError: adapter.weight: tensor parallelism does not know"),
        ("token", "IndexError: index out of range"),
        ("target", "ValueError: targets must be in 0..18 where weights are not 0, got 19"),
        ("chunk", "ValueError: chunk must be at least 1 token or None, got 0"),
        ({"n_heads": 3, "n_kv_heads": 3}, "ValueError: layers.0.attn.q_proj.weight: n_heads must be a .* got 3"),
        ({"n_kv_heads": 1}, "ValueError: layers.0.attn.k_proj.weight: n_kv_heads must be a multiple of the 2 .* got 1"),
        ({"d_ff": 7}, "ValueError: layers.0.ffn.w1.weight: d_ff must be a multiple of the 2 ranks .* got 7"),
        ({"qk_norm": "full"}, 'norm over all heads .qk_norm "full". must be a multiple of the 2 ranks'),
    ],
    ids=str,
)
def test_refused_on_every_rank(case, message):
    """And before any message, so that the processes work on."""
    with pytest.raises(RankError, match=message) as error:
        run(on_rank_refused, case)
    assert len(error.value.errors) == 2


def on_rank_outputs(sequence_parallel):
    """hidden, logits and log-probabilities are those of the whole model, on every rank."""
    cfg = replace(GQA, vocab_size=19)
    plan, batch, params = Plan(cfg, None, sequence_parallel), batch_of(cfg), params_of(cfg)
    model, local, whole = plan.model(), plan.shard(params), transformer.make(cfg)
    for name in ("hidden", "apply"):
        expected = getattr(whole, name)(params, batch["tokens"])
        torch.testing.assert_close(getattr(model, name)(local, batch["tokens"]), expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(model.log_probs(local, batch), whole.log_probs(params, batch), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence"])
def test_outputs_are_whole(sequence_parallel):
    run(on_rank_outputs, sequence_parallel)


def on_rank_misused(how):
    plan, params, batch = Plan(GQA), params_of(GQA), batch_of(GQA)
    if how == "another model":
        model = transformer.make(GQA)
    else:
        ops = plan.layout.ops(REFERENCE)
        model = transformer.make(GQA, ops._replace(linear_out=REFERENCE.linear))
    plan.strategy.differentiate(model.loss)(plan.shard(params), batch)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("another model", "k_proj.weight has shape .* the model's configuration says"),
        ("another end", "ops.enter was called 4 times and ops.linear_out 0 times"),
    ],
)
def test_models_that_do_not_fit_are_refused(how, message):
    with pytest.raises(RankError, match=message):
        run(on_rank_misused, how)
