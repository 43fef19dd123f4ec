"""Tensor parallelism on a 2-D mesh: with data parallelism, and with sharded parameters. Oracle: one process."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist

from purelm import tree
from purelm.dist import ddp, fsdp
from purelm.dist.agreement import check_equal
from purelm.dist.tensor_parallel import Layout, like, strategy
from purelm.models import transformer
from purelm.ops import REFERENCE
from purelm.optim import adamw, schedules
from purelm.train import Precision, init_state, make_step
from purelm.transforms import remat, value_and_grad
from tests.dist.processes import run
from tests.dist.test_tensor_parallel import CASES, GQA, TOLERANCE, assert_close, batch_of, params_of


def on_rank_mesh(sequence_parallel):
    """2 x 2: rows of the batch over one axis, the model over the other. Three updates equal those of one process."""
    rank = dist.get_rank()
    models = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    data = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    model_group, data_group = models[rank // 2], data[rank % 2]
    cfg = replace(GQA, vocab_size=19, biases="all", qk_norm="head")
    layout = Layout(cfg.vocab_size, model_group, sequence_parallel)
    model, whole = transformer.make(cfg, layout.ops(REFERENCE)), transformer.make(cfg)
    both = strategy(model, layout, ddp.strategy(data_group))
    float64 = Precision(torch.float64, torch.float64, torch.float64)
    options = {"optimizer": adamw(), "schedule": schedules.constant(0.01), "precision": float64, "max_norm": 0.5}
    step_alone = make_step(partial(whole.loss, z_loss=0.1), **options)
    step_mesh = make_step(partial(model.loss, z_loss=0.1), strategy=both, microbatches=2, **options)
    a = init_state(params_of(cfg), adamw(), float64)
    b = init_state(params_of(cfg), adamw(), float64, both)
    for i in range(3):
        batch = {**batch_of(cfg, "segments", step=i, rows=8)}
        batch["denominator"] = batch["weights"].sum()
        mine = {k: x if x.ndim == 0 else x.chunk(2)[rank // 2] for k, x in batch.items()}
        a, metrics = step_alone(a, batch)
        b, own = step_mesh(b, mine)
        assert float(metrics["grad_norm"]) > 0.5  # clipped
        torch.testing.assert_close(own["grad_norm"], metrics["grad_norm"], rtol=1e-11, atol=0)
        torch.testing.assert_close(own["loss"], metrics["loss"], rtol=1e-11, atol=0)
    assert_close(both.unshard(b.params), a.params, rtol=1e-8, atol=1e-9)  # Adam divides small numbers
    check_equal(b.params, data_group)
    assert not tree.leaves(b.params["lm_head"])[0][10 - rank % 2 :].any()  # rows filled up stay zeros


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence"])
def test_with_data_parallelism(sequence_parallel):
    run(on_rank_mesh, sequence_parallel, size=4)


def on_rank_sharded(name, sequence_parallel, wrap):
    """2 x 2: each model rank's parameters cut once more over the data ranks. Twice: units are gathered ahead."""
    cfg, rank, n = CASES[name][0], dist.get_rank(), dist.get_world_size() // 2  # ranks along the model
    models = [dist.new_group(list(range(i, i + n))) for i in range(0, 2 * n, n)]
    data = [dist.new_group([i, i + n]) for i in range(n)]
    over_data = data[rank % n]
    layout = Layout(cfg.vocab_size, models[rank // n], sequence_parallel)
    model = transformer.make(cfg, fsdp.ops(layout.ops(REFERENCE)), lambda f: fsdp.gathered(wrap(f)))
    both = strategy(model, layout, fsdp.strategy(like(model, layout), over_data))
    batch = {**batch_of(cfg, "segments", rows=8)}
    batch["denominator"] = batch["weights"].sum()
    mine = {k: x if x.ndim == 0 else x.chunk(2)[rank // n] for k, x in batch.items()}
    differentiated = both.differentiate(partial(model.loss, z_loss=0.1, chunk=5))
    expected, theirs = value_and_grad(partial(transformer.loss, cfg=cfg, z_loss=0.1), has_aux=True)(
        params_of(cfg), batch
    )
    local = both.shard(params_of(cfg))
    for _ in range(2):
        (value, metrics), grads = differentiated(local, mine)
        torch.testing.assert_close(value, expected[0], rtol=1e-11, atol=0)
        torch.testing.assert_close(metrics["n_targets"], expected[1]["n_targets"], rtol=1e-6, atol=0)
        grads = both.reduce(grads)
        assert_close(both.unshard(grads), theirs, **TOLERANCE[torch.float64])
        torch.testing.assert_close(both.norm(grads), tree.global_norm(theirs), **TOLERANCE[torch.float64])
    shares = like(model, layout)
    halves = [2 * p.numel() >= s.numel() > p.numel() for p, s in zip(*map(tree.leaves, (local, shares)), strict=True)]
    assert sum(halves) >= 9 * cfg.n_layers - 4  # matrices are cut


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("wrap", [transformer.identity, remat], ids=["plain", "remat"])
@pytest.mark.parametrize("name", ["gqa", "tied_odd", "head_norms"])
def test_with_sharded_parameters(name, sequence_parallel, wrap):
    run(on_rank_sharded, name, sequence_parallel, wrap, size=4)


def test_sharded_parameters_and_one_rank_along_the_model():
    run(on_rank_sharded, "gqa", False, transformer.identity)
