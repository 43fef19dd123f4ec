"""The training step: loss, gradients, reduction, clipping and update as one pure function of (state, batch).

    state = init_state(params, optimizer)
    step = make_step(loss_fn, optimizer, schedule, max_norm=1.0)
    state, metrics = step(state, batch)

The model enters as `loss_fn(params, batch) -> (scalar, metrics)` alone. `jit(step, donate=0)` is the compiled step,
which holds one copy of parameters and optimizer state. For several processes give `init_state` and `make_step` the same
`Strategy`, which says how parameters are divided over processes and how gradients are computed.
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
    """The state of training: everything that a step replaces."""

    params: Any  # tree of master weights
    opt_state: Any  # as returned by Optimizer.init and update
    step: Tensor  # 0-d int64: updates done so far


class Precision(NamedTuple):
    """Dtypes: master weights in `param`, forward and backward in `compute`, gradients reduced in `reduce`."""

    param: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32


FULL = Precision()
MIXED = Precision(compute=torch.bfloat16)


def identity(x: Any) -> Any:
    """x itself: what a `Strategy` does in place of a function that it does not need."""
    return x


def with_denominator(batch: Any) -> Any:
    """The batch with "denominator" added: the sum of its weights w, or its number of targets if it has no weights.

    A loss that divides by this number instead of its own microbatch's sum of weights can be added over microbatches:
    their losses sum to sum_i w_i nll_i / sum_i w_i, over the targets i of the whole batch, however it is split. The
    denominator is 1 where the weights sum to 0, so that a batch without targets has loss 0. A batch that has a
    "denominator" already, or is not a mapping with "targets", is returned unchanged.
    """
    total = n_targets(batch)
    if total is None or "denominator" in batch:
        return batch
    total = torch.where(total == 0, 1.0, total)
    if not torch.compiler.is_compiling():
        # purelm.dist refuses this denominator where it sums losses over processes: it needs that of all batches.
        total.of_one_process = True  # type: ignore[attr-defined]
    return {**batch, "denominator": total}


def n_targets(batch: Any) -> Tensor | None:
    """0-d sum of the batch's weights, or its number of targets if it has none; None if it has no "targets"."""
    if not isinstance(batch, Mapping) or "targets" not in batch:
        return None
    targets, weights = batch["targets"], batch.get("weights")
    if weights is None:
        return torch.full((), float(targets.numel()), dtype=torch.float32, device=targets.device)
    return weights.sum(dtype=torch.promote_types(weights.dtype, torch.float32))


class Differentiate(Protocol):
    """loss -> function (local params, local batch) -> ((loss, metrics), gradients), over all processes' batches.

    microbatches: parts in which each process computes its batch. compute: the dtype that parameters are cast to for the
    loss.
    """

    def __call__(
        self, loss: Loss, /, *, microbatches: int = 1, compute: torch.dtype | None = None
    ) -> Callable[[Any, Any], Any]: ...


class Strategy(NamedTuple):
    """How a training step works on several processes: functions that belong together, as one value.

    Made by `ddp.strategy`, `zero.strategy`, `fsdp.strategy` and `tensor_parallel.strategy` of purelm.dist. The
    functions may communicate, so all processes must call them in the same order.
    """

    # batch -> batch, before it is cut into microbatches: sets "denominator", to that of all processes' batches
    prepare: Callable[[Any], Any] = with_denominator
    # Loss -> function that also gives gradients; not compiled as a whole. None: value_and_grad and accumulate.
    differentiate: Differentiate | None = None
    reduce: Callable[[Any], Any] = identity  # a process's gradients -> gradients of the loss of all processes
    norm: Callable[[Any], Tensor] = tree.global_norm  # reduced gradients -> norm of the whole, not of local parts
    optimizer: Callable[[Optimizer], Optimizer] = identity  # -> the one that takes reduced gradients and local params
    shard: Callable[[Any], Any] = identity  # whole params -> the params that this process holds
    unshard: Callable[[Any], Any] = identity  # the inverse, on every process; also takes gradients
    evaluate: Callable[[Loss], Loss] = identity  # loss of whole params -> loss of local params, summed over processes


ALONE = Strategy()


def reducing(reduce: Callable[[Any], Any]) -> Strategy:
    """`ALONE` with another `reduce`: a function gradient tree -> gradient tree, such as `ddp.all_reduce_mean`.

    Each process's loss is divided by the denominator of its own batch, so reducing by a mean gives the mean of the
    processes' means. `ddp.strategy` gives the mean over all targets, which differs where denominators do.
    """
    return Strategy(reduce=reduce)


def init_state(
    params: Any, optimizer: Optimizer, precision: Precision = FULL, strategy: Strategy = ALONE
) -> TrainState:
    """State before the first update: master weights cast to `precision.param`, fresh optimizer state, step 0.

    params are the whole parameters, on every process; the state has the part that `strategy.shard` keeps.
    """
    return state_of(strategy.shard(tree.cast(params, precision.param)), optimizer, strategy)


def state_of(local: Any, optimizer: Optimizer, strategy: Strategy = ALONE) -> TrainState:
    """`init_state` for `local`, this process's part of the master weights, in the dtype that they have."""
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
        loss_fn: (params, batch) -> (scalar, metrics). Scalars and metrics are summed over microbatches and processes,
            so the scalar, and any metric that is a mean, must be a sum divided by batch["denominator"] (set by the
            strategy if the batch has none). With more than one microbatch or process the first step refuses
            (ValueError) a loss that is a mean over its own microbatch, whatever the denominator.
        schedule: 0-d step -> 0-d learning rate; the first update gets step 0.
        strategy: how this works on several processes; the same one as for `init_state`.
        max_norm: gradients are scaled down to this global norm, over all processes, if theirs is larger; None: no
            clipping. The first step refuses an optimizer that clips by the norm of one process's part.
        microbatches: number of equal parts that the batch axis is cut into. The result is that of the whole batch, and
            activations of one part are alive at a time.
        precision: parameters are cast to `compute` inside the differentiated function, so gradients have the dtype of
            the master weights; these gradients are cast to `reduce` before `strategy.reduce`.
    Returns:
        step(state, batch) -> (state, metrics). metrics are detached 0-d tensors: loss, lr, grad_norm (before clipping)
        and those of loss_fn. Read them one step late, since reading waits for the device.
    """
    if not isinstance(microbatches, int) or microbatches < 1:
        raise ValueError(f"microbatches must be at least 1, got {microbatches!r}")
    if max_norm is not None:
        check_range("max_norm", max_norm, 0.0, float("inf"))
    prepare, differentiate, reduce, norm = strategy[:4]
    is_local = norm is tree.global_norm  # compiled with the update; another norm may communicate and stays uncompiled
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
        """Clipped gradients, and the metrics with grad_norm, the norm before clipping."""
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
        """`update` that writes into the memory of the state."""
        grads, metrics = measured(found) if is_local else found
        lr = schedule(state.step)
        assert write_over is not None
        params, opt_state = write_over(grads, state.opt_state, state.params, lr)
        return TrainState(params, opt_state, state.step.add_(1)), {**metrics, "lr": lr}

    # jit compiles the loss (forward and backward) and the optimizer's update of one leaf. Walks over trees stay plain
    # Python, since tracing and compiling them would take longer than the model.
    gradients = gradients_of(compute_loss)
    if differentiate is None:
        gradients = jitted_as(gradients, lambda donate, options: gradients_of(jit(compute_loss, **options)))
    else:
        gradients = not_traced(gradients)
    write_over = step_of(optimizer)
    if write_over is not None:
        jitted_as(update, lambda donate, options: consuming(update, update_) if donate else None)
    # `reduced`, which may communicate, runs uncompiled between the two compiled stages.
    if is_local and reduce is identity:
        return in_stages(gradients, update)
    return in_stages(gradients, not_traced(reduced), update)


def _check_divides(loss: Loss, params: Any, batch: Any, microbatches: int) -> None:
    """ValueError for a loss that is a mean over its own microbatch, whatever batch["denominator"] says.

    Summed over n microbatches or processes it would be n times too large. The loss of the first microbatch is evaluated
    with the denominator and with twice that: if they differ, the loss divides by it. Otherwise, or without a
    denominator, the loss is evaluated on that microbatch concatenated with itself: a sum doubles, a mean does not.
    """
    sizes = {x.shape[0] for x in tree.leaves(batch) if isinstance(x, Tensor) and x.ndim > 0}
    if not isinstance(batch, Mapping) or len(sizes) != 1:
        return
    n = sizes.pop() // microbatches
    if not n:  # fewer rows than microbatches: `accumulate` raises the error
        return
    some = tree.map(lambda x: x[:n] if isinstance(x, Tensor) and x.ndim > 0 else x, batch)
    # Same shapes and requires_grad as in the step that follows, so that compiled blocks need not be compiled again.
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
        'make_step: the loss is a mean over its own microbatch and does not divide by batch["denominator"]: summed '
        "over n microbatches or processes it would be n times too large. Divide the sum over targets by "
        'batch["denominator"], their number in the whole batch, which the strategy sets for any batch with "targets"'
    )


def _check_whole(params: Any, gradient: Any = None) -> None:
    """ValueError where purelm.dist has marked parameters or gradients as one process's parts of the whole."""
    gives_parts = getattr(gradient, "gives_parts", None)
    if (gives_parts is not None and gives_parts()) or any(getattr(x, "is_part", False) for x in tree.leaves(params)):
        raise ValueError(
            "make_step: each process has a part of the gradients, and grad_norm would be the norm of that part: give "
            "make_step the strategy that divided the parameters, from fsdp, tensor_parallel or zero, unchanged"
        )
