"""Low-rank updates as a run: what is trained, saved and loaded is the tree of adapters."""

from functools import partial
from typing import Any

from experiments.finetune.config import FineTuning
from experiments.parallel import Job, Run, loss_of
from purelm import checkpoint as one_process
from purelm import random, tree
from purelm.align import lora
from purelm.dist import checkpoint, ddp
from purelm.dist.world import World
from purelm.evals import Score, score
from purelm.models import transformer
from purelm.models.leaves import of_kind
from purelm.optim import adamw
from purelm.train import ALONE, init_state, make_step
from purelm.transforms import jit


def low_rank(cfg: FineTuning, world: World, job: Job, params: Any, *, compiled: bool) -> Run:
    """A run that trains an update of every matrix of the blocks; with several processes each has all of it."""
    model = transformer.make(job.model, job.ops, job.wrap_block)
    base = tree.cast(params, job.precision.compute)
    own_loss = loss_of(job, model)

    def loss(adapters: Any, batch: Any) -> Any:
        return own_loss(lora.merge(base, adapters, alpha=cfg.lora.alpha), batch)

    optim = cfg.optim
    optimizer = adamw((optim.beta1, optim.beta2), optim.eps, optim.weight_decay)
    strategy = ddp.strategy() if world.size > 1 else ALONE
    step = make_step(
        loss, optimizer, job.schedule, strategy=strategy, microbatches=job.microbatches, precision=job.precision,
        max_norm=job.max_norm if job.max_norm > 0 else None,
    )  # fmt: skip
    if compiled:
        step = jit(step, donate=0)
    matrices = of_kind(model.leaves, "matrix")

    def adapters() -> Any:
        return lora.init(random.key(cfg.seed).to(world.device), params, cfg.lora.rank, matrices)

    def evaluate(adapters: Any, batches: Any, n_bytes: int) -> Score:
        """Every process computes all batches."""
        merged = lora.merge(params, adapters, alpha=cfg.lora.alpha)
        return score(own_loss, merged, batches, n_bytes, device=world.device)

    like = {"params": adapters()}
    like["opt_state"] = optimizer.init(like["params"])
    save: Any = one_process.save
    load: Any = partial(one_process.load, like=like, device=world.device)
    if world.size > 1:
        save = partial(checkpoint.save, like=like, sharded=False)
        load = partial(checkpoint.load, like=like, sharded=False, device=world.device)
    return Run(
        init=lambda: init_state(adapters(), optimizer, job.precision, strategy),
        step=step,
        evaluate=evaluate,
        whole=lambda x: lora.merge(params, x, alpha=cfg.lora.alpha),
        save=save,
        load=load,
    )

