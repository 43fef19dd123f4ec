"""The training step: loss, gradients, reduction, clipping and update as one pure function of (state, batch).

    state = init_state(params, optimizer)
    step = make_step(loss_fn, optimizer, schedule, max_norm=1.0)
    state, metrics = step(state, batch)

`loss_fn(params, batch) -> (scalar, metrics)`; nothing else is known of the model. `jit(step, donate=0)` compiles it
so that one copy of parameters and optimizer state is held. On several processes both functions get one more argument,
the same `Strategy`: how parameters lie on them, and how gradients come about.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from purelm import tree
from purelm.optim import Optimizer, apply_updates, step_of
from purelm.optim.checks import check_range
from purelm.optim.clip import clip
from purelm.optim.parts import check_sees_all
from purelm.transforms import accumulate, in_stages, jit, value_and_grad
from purelm.transforms.boundary import not_traced
from purelm.transforms.donation import consuming, jitted_as

__all__ = [
    "ALONE",
    "FULL",
    "MIXED",
    "Differentiate",
    "Loss",
    "Precision",
    "Strategy",
    "TrainState",
    "init_state",
    "make_step",
    "n_targets",
    "reducing",
    "state_of",
    "with_denominator",
]

Loss = Callable[[Any, Any], tuple[Tensor, dict[str, Tensor]]]  # (params, batch) -> (0-d loss, metrics)


class TrainState(NamedTuple):
    """Everything that a step changes."""

    params: Any  # tree of master weights
    opt_state: Any  # the optimizer's own state
    step: Tensor  # 0-d int64: updates done so far


class Precision(NamedTuple):
    """Number formats: masters in `param`, forward and backward in `compute`, gradients reduced in `reduce`."""

    param: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32


FULL = Precision()
MIXED = Precision(compute=torch.bfloat16)


def identity(x: Any) -> Any:
    return x


def with_denominator(batch: Any) -> Any:
    """The batch with "denominator" = sum of weights (or number of targets), so that a mean survives any split.

    A loss that divides by this number, and not by what its own microbatch holds, can be added over microbatches:
    sum_i nll_i w_i / sum_i w_i does not depend on how i is divided. It is 1 where the sum is 0: the loss of a batch
    without targets is 0. A batch that has the key, or is no mapping with "targets", is returned as it is.
    """
    total = n_targets(batch)
    if total is None or "denominator" in batch:
        return batch
    total = torch.where(total == 0, 1.0, total)
    if not torch.compiler.is_compiling():
        # What sums losses over processes (purelm.dist) refuses a denominator of one of them.
        total.of_one_process = True  # type: ignore[attr-defined]
    return {**batch, "denominator": total}


def n_targets(batch: Any) -> Tensor | None:
    """The sum of the batch's weights, or its number of targets, 0-d; None where it is no mapping with "targets"."""
    if not isinstance(batch, Mapping) or "targets" not in batch:
        return None
    targets, weights = batch["targets"], batch.get("weights")
    if weights is None:
        return torch.full((), float(targets.numel()), dtype=torch.float32, device=targets.device)
    return weights.sum(dtype=torch.promote_types(weights.dtype, torch.float32))


class Differentiate(Protocol):
    """The function (local params, batch) -> ((loss, metrics), gradients) of what all processes have.

    microbatches: parts in which each process's batch is computed. compute: the dtype of parameters in the loss.
    """

    def __call__(
        self, loss: Loss, /, *, microbatches: int = 1, compute: torch.dtype | None = None
    ) -> Callable[[Any, Any], Any]: ...


class Strategy(NamedTuple):
    """What several processes do differently, as one value: its functions agree with each other.

    From `ddp.strategy`, `zero.strategy`, `fsdp.strategy`, `tensor_parallel.strategy` of purelm.dist. Each function is
    called by all processes alike.
    """

    # batch -> batch, before it is cut into microbatches: where a denominator of all processes' batches enters
    prepare: Callable[[Any], Any] = with_denominator
    # Never compiled as a whole. None: value_and_grad and accumulate, of this process's batch.
    differentiate: Differentiate | None = None
    reduce: Callable[[Any], Any] = identity  # gradients -> gradients of what all processes have
    norm: Callable[[Any], Tensor] = tree.global_norm  # of reduced gradients: of all of them, not of one process's parts
    optimizer: Callable[[Optimizer], Optimizer] = identity  # to the one that takes these gradients
    shard: Callable[[Any], Any] = identity  # whole params -> what this process holds
    unshard: Callable[[Any], Any] = identity  # the inverse, on every process; of gradients, too
    evaluate: Callable[[Loss], Loss] = identity  # to the loss of local params, summed over processes


ALONE = Strategy()


def reducing(reduce: Callable[[Any], Any]) -> Strategy:
    """The strategy of a function gradient tree -> gradient tree, such as `ddp.all_reduce_mean`, and nothing else.

    Each process divides by the denominator of its own batch; where these differ, `ddp.strategy` gives the mean over all
    targets, and this one the mean of means.
    """
    return Strategy(reduce=reduce)


def init_state(
    params: Any, optimizer: Optimizer, precision: Precision = FULL, strategy: Strategy = ALONE
) -> TrainState:
    """State before the first update: masters cast to `precision.param`, fresh optimizer state, step 0.

    params are whole; each process keeps what the strategy says.
    """
    return state_of(strategy.shard(tree.cast(params, precision.param)), optimizer, strategy)


def state_of(local: Any, optimizer: Optimizer, strategy: Strategy = ALONE) -> TrainState:
    """The same, of masters that were sharded already."""
    device = next((x.device for x in tree.leaves(local)), torch.device("cpu"))
    step = torch.zeros((), dtype=torch.int64, device=device)
    return TrainState(local, strategy.optimizer(optimizer).init(local), step)


def make_step(
    loss_fn: Loss,
    optimizer: Optimizer,
    schedule: Callable[[Tensor], Tensor],
    *,
    strategy: Strategy = ALONE,
    max_norm: float | None = None,
    microbatches: int = 1,
    precision: Precision = FULL,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Tensor]]]:
    """One update: g = clip(reduce(grad loss(cast(params), batch))); params + optimizer.update(g, lr = schedule(step)).

    Args:
        loss_fn: (params, batch) -> (scalar, metrics); over microbatches and processes both are added up, as every loss
            here can be that divides by batch["denominator"] (put there by the strategy where it is missing). The first
            step refuses (ValueError) a loss that is a mean whatever the denominator.
        schedule: 0-d step -> 0-d learning rate; the first update sees step 0.
        strategy: of several processes; the state comes from `init_state` with the same one.
        max_norm: largest global norm of the gradients, of all processes' together; None: they are not clipped. The
            first step refuses an optimizer that clips by the norm of one process's parts.
        microbatches: the batch axis is cut in this many equal parts; same result, activations of one part at a time.
        precision: parameters are cast to `compute` inside the differentiated function, so gradients arrive in the
            masters' dtype; they are cast to `reduce` before the strategy's `reduce` sees them.
    Returns:
        step(state, batch) -> (state, metrics): metrics are detached 0-d tensors: loss, lr, grad_norm (before any
        clipping) and what loss_fn reports. Read them one step late: reading waits for the device.
    """
    if not isinstance(microbatches, int) or microbatches < 1:
        raise ValueError(f"microbatches must be at least 1, got {microbatches!r}")
    if max_norm is not None:
        check_range("max_norm", max_norm, 0.0, float("inf"))
    prepare, differentiate, reduce, norm = strategy[:4]
    is_local = norm is tree.global_norm  # then it is compiled with the update; another one may talk to other processes
    given, optimizer = optimizer, strategy.optimizer(optimizer)

    def compute_loss(params: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return loss_fn(tree.cast(params, precision.compute), batch)

    def gradients_of(loss: Loss) -> Callable[[TrainState, Any], tuple[Any, dict[str, Tensor]]]:
        if differentiate is not None:
            gradient = differentiate(loss, microbatches=microbatches, compute=precision.compute)
        else:
            gradient = value_and_grad(loss, has_aux=True)
            if microbatches > 1:
                gradient = accumulate(gradient, microbatches)

        def gradients(state: TrainState, batch: Any) -> tuple[Any, dict[str, Tensor]]:
            if differentiate is not None and is_local:
                _check_whole(state.params, gradient)
            batch = prepare(batch)
            check_loss(state.params, batch)
            (loss, metrics), grads = gradient(state.params, batch)
            return tree.cast(grads, precision.reduce), {**metrics, "loss": loss}

        return gradients

    is_added = microbatches > 1 or strategy.evaluate is not identity
    is_tried: list[bool] = []
    is_checked: list[bool] = [] if is_added else [True]

    @not_traced
    def check_loss(params: Any, batch: Any) -> None:
        if not is_checked:
            _check_divides(strategy.evaluate(compute_loss), params, batch, microbatches)
            is_checked.append(True)

    def measured(found: tuple[Any, dict[str, Tensor]]) -> tuple[Any, dict[str, Tensor]]:
        """Clipped gradients, and their norm before among the metrics."""
        grads, metrics = found
        size = norm(grads)
        if max_norm is not None:
            grads, _ = clip(grads, max_norm, norm=lambda _: size)
        return grads, {**metrics, "grad_norm": size}

    def reduced(state: TrainState, found: tuple[Any, dict[str, Tensor]]) -> tuple[Any, dict[str, Tensor]]:
        grads, metrics = found
        grads = reduce(grads)
        if not is_tried:
            if is_local:
                _check_whole(state.params)
            else:
                advice = "give make_step max_norm instead"
                check_sees_all(given, state.params, norm, "make_step", advice)
            is_tried.append(True)
        return (grads, metrics) if is_local else measured((grads, metrics))

    def update(state: TrainState, found: tuple[Any, dict[str, Tensor]]) -> tuple[TrainState, dict[str, Tensor]]:
        grads, metrics = measured(found) if is_local else found
        lr = schedule(state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, lr)
        return TrainState(apply_updates(state.params, updates), opt_state, state.step + 1), {**metrics, "lr": lr}

    def update_(state: TrainState, found: tuple[Any, dict[str, Tensor]]) -> tuple[TrainState, dict[str, Tensor]]:
        """`update`, written over the state."""
        grads, metrics = measured(found) if is_local else found
        lr = schedule(state.step)
        assert write_over is not None
        params, opt_state = write_over(grads, state.opt_state, state.params, lr)
        return TrainState(params, opt_state, state.step.add_(1)), {**metrics, "lr": lr}

    # What is compiled: the loss, forward and backward, and the optimizer's function of one leaf. Walks of trees are
    # not: they would take longer to trace and compile than the model.
    gradients = gradients_of(compute_loss)
    if differentiate is None:
        gradients = jitted_as(gradients, lambda donate, options: gradients_of(jit(compute_loss, **options)))
    else:
        gradients = not_traced(gradients)
    write_over = step_of(optimizer)
    if write_over is not None:
        jitted_as(update, lambda donate, options: consuming(update, update_) if donate else None)
    # What talks to other processes runs between the two, as it is.
    if is_local and reduce is identity:
        return in_stages(gradients, update)
    return in_stages(gradients, not_traced(reduced), update)


def _check_divides(loss: Loss, params: Any, batch: Any, microbatches: int) -> None:
    """ValueError for a loss that is a mean over what it is given, whatever batch["denominator"] says.

    Summed over n microbatches or processes it would be n times too large. Two evaluations of the first microbatch; and
    for a loss that does not depend on the denominator (or has none) one more, of that microbatch twice, which of a sum
    is twice as much.
    """
    sizes = {x.shape[0] for x in tree.leaves(batch) if isinstance(x, Tensor) and x.ndim > 0}
    if not isinstance(batch, Mapping) or len(sizes) != 1:
        return
    n = sizes.pop() // microbatches
    if not n:  # too few rows, which is said where they are divided
        return
    some = tree.map(lambda x: x[:n] if isinstance(x, Tensor) and x.ndim > 0 else x, batch)
    # Shapes, and gradients that could be asked for, as in the step that follows: compiled blocks are compiled for it.
    params = tree.map(lambda x: x.detach().requires_grad_() if tree.is_floating(x) else x, params)
    value = loss(params, some)[0].detach()
    if "denominator" in batch:
        other = loss(params, {**some, "denominator": 2 * batch["denominator"]})[0].detach()
        if not bool(torch.isclose(value, other, rtol=1e-2, atol=0.0)):
            return
    twice = tree.map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim > 0 else x, some)
    doubled = loss(params, twice)[0].detach()
    if not bool(value.abs() > 0) or bool((doubled - 2 * value).abs() < (doubled - value).abs()):
        return
    raise ValueError(
        'make_step: the loss is a mean over what it is given and does not divide by batch["denominator"]: its sum over '
        "microbatches or processes would be as many times too large. Divide the sum over targets by it, a number that "
        "is of the whole batch; the strategy puts it there for a batch with targets"
    )


def _check_whole(params: Any, gradient: Any = None) -> None:
    """ValueError where purelm.dist says that a process holds parts, of parameters or of their gradients."""
    gives_parts = getattr(gradient, "gives_parts", None)
    if (gives_parts is not None and gives_parts()) or any(getattr(x, "is_part", False) for x in tree.leaves(params)):
        raise ValueError(
            "make_step: each process has a part of the gradients, and grad_norm would be of that alone: give make_step "
            "the strategy that divided the parameters, from fsdp, tensor_parallel or zero, as it is"
        )
