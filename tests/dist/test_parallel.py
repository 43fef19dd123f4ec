"""What experiments.parallel makes of a run. Oracles: transformer.init, and Python's weak references."""

import gc
import weakref
from functools import partial

import pytest
import torch

from experiments.config import Optim
from experiments.loop import make_core
from experiments.parallel import Job, Parallel, alone, layout
from purelm import random, tree
from purelm.dist.sharding import part_of
from purelm.dist.world import World, rank_of, size_of
from purelm.models import transformer
from purelm.ops import REFERENCE
from purelm.optim import schedules
from purelm.train import FULL
from tests.dist.models import CFG, batch_of, equal
from tests.dist.processes import run

CPU = torch.device("cpu")


def made(mode, optimizer="adamw"):
    """The run of this mode on this rank; "alone": of one process."""
    core = make_core(Optim(name=optimizer), transformer.leaves(CFG))
    muon, init = optimizer == "muon", partial(transformer.init, random.key(0), CFG)
    job = Job(CFG, init, core, 1.0, muon, schedules.constant(0.1), REFERENCE, transformer.identity, FULL, 1)
    if mode == "alone":
        return alone(job, CPU, compiled=False, graph=False)
    return layout(World(rank_of(None), size_of(None), CPU), Parallel(mode), job, compiled=False)


def on_rank_begins(mode):
    params = transformer.init(random.key(0), CFG)
    if mode == "fsdp":
        params = tree.map(lambda x: part_of(x, rank_of(None), size_of(None)) if x.ndim > 1 else x, params)
    assert equal(made(mode).init().params, params)


@pytest.mark.parametrize("mode", ["ddp", "zero1", "fsdp"])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_begin_with_what_one_process_has(mode, size):
    run(on_rank_begins, mode, size=size)


def on_rank_holds(mode, optimizer):
    """A run would else keep the first state, or the whole model, beside what it trains."""
    made_run = made(mode, optimizer)
    first = made_run.init()
    state, metrics = made_run.step(first, batch_of(rank_of(None), size_of(None)))
    refs = [weakref.ref(x) for x in tree.leaves((first, state)) if x.ndim]
    assert len(refs) > 20
    del first, state, metrics
    gc.collect()
    assert not [ref().shape for ref in refs if ref() is not None]


@pytest.mark.parametrize("mode", ["ddp", "zero1", "fsdp", "alone"])
def test_functions_hold_no_state(mode):
    run(on_rank_holds, mode, "adamw") if mode != "alone" else on_rank_holds(mode, "adamw")


def test_functions_hold_no_state_of_owners():
    run(on_rank_holds, "zero1", "muon")
