"""The training step: loss, gradients, reduction, clipping and update as one pure function of (state, batch).

    state = init_state(params, optimizer)
    step = make_step(loss_fn, optimizer, schedule)
    state, metrics = step(state, batch)

`loss_fn(params, batch) -> (scalar, metrics)`; nothing else is known of the model. `jit(step, donate=0)` compiles it
so that one copy of parameters and optimizer state is held.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purelm import tree
from purelm.optim import Optimizer, apply_updates, step_of
from purelm.optim.parts import check_sees_all
from purelm.transforms import accumulate, in_stages, jit, value_and_grad
from purelm.transforms.boundary import not_traced
from purelm.transforms.donation import consuming, jitted_as

__all__ = ["FULL", "MIXED", "Precision", "TrainState", "init_state", "make_step", "n_targets", "with_denominator"]


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


def init_state(params: Any, optimizer: Optimizer, precision: Precision = FULL) -> TrainState:
    """State before the first update: masters cast to `precision.param`, fresh optimizer state, step 0."""
    params = tree.cast(params, precision.param)
    device = next((x.device for x in tree.leaves(params)), torch.device("cpu"))
    return TrainState(params, optimizer.init(params), torch.zeros((), dtype=torch.int64, device=device))


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


def make_step(
    loss_fn: Callable[[Any, Any], tuple[Tensor, dict[str, Tensor]]],
    optimizer: Optimizer,
    schedule: Callable[[Tensor], Tensor],
    *,
    reduce: Callable[[Any], Any] = identity,
    microbatches: int = 1,
    precision: Precision = FULL,
    prepare: Callable[[Any], Any] = with_denominator,
    differentiate: Callable[..., Callable[[Any, Any], Any]] | None = None,
    norm: Callable[[Any], Tensor] = tree.global_norm,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Tensor]]]:
    """One update: g = reduce(grad loss(cast(params), batch)); params + optimizer.update(g, lr = schedule(step)).

    Args:
        loss_fn: (params, batch) -> (scalar, metrics); with microbatches > 1 both must be additive over them, as every
            loss here is that divides by batch["denominator"] (added when it is missing: `with_denominator`).
        schedule: 0-d step -> 0-d learning rate; the first update sees step 0.
        reduce: gradient tree -> gradient tree; data parallelism enters here (average over ranks), and clipping by a
            norm that is a sum over processes. It runs between two compiled graphs.
        microbatches: the batch axis is cut in this many equal parts; same result, activations of one part at a time.
        precision: parameters are cast to `compute` inside the differentiated function, so gradients arrive in the
            masters' dtype; they are cast to `reduce` before `reduce` sees them.
        prepare: batch -> batch, before it is cut in microbatches: where a denominator of the whole batch enters, which
            with several processes is that of all of them.
        differentiate: loss -> gradient function (params, batch) -> ((loss, metrics), grads), in place of
            `value_and_grad` and `accumulate`, and never compiled as a whole (purelm.dist.ddp.differentiate).
        norm: reduced gradient tree -> the metric grad_norm; of sharded gradients it is a sum over processes. The first
            step refuses (ValueError) an optimizer that clips by another norm, of this process's gradients alone.
    Returns:
        step(state, batch) -> (state, metrics): metrics are detached 0-d tensors: loss, lr, grad_norm (before any
        clipping in the optimizer) and what loss_fn reports. Read them one step late: reading waits for the device.
    """
    if not isinstance(microbatches, int) or microbatches < 1:
        raise ValueError(f"microbatches must be at least 1, got {microbatches!r}")

    def compute_loss(params: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return loss_fn(tree.cast(params, precision.compute), batch)

    if differentiate is not None and microbatches > 1:
        raise ValueError("make_step: with differentiate, microbatches are its own argument")

    def gradients_of(loss: Callable[[Any, Any], Any]) -> Callable[[TrainState, Any], tuple[Any, dict[str, Tensor]]]:
        gradient = value_and_grad(loss, has_aux=True) if differentiate is None else differentiate(loss)
        if microbatches > 1:
            gradient = accumulate(gradient, microbatches)

        def gradients(state: TrainState, batch: Any) -> tuple[Any, dict[str, Tensor]]:
            if differentiate is not None and norm is tree.global_norm:
                _check_whole(state.params, gradient)
            (loss, metrics), grads = gradient(state.params, prepare(batch))
            return tree.cast(grads, precision.reduce), {**metrics, "loss": loss}

        return gradients

    is_tried: list[bool] = []

    def reduced(state: TrainState, found: tuple[Any, dict[str, Tensor]]) -> tuple[Any, dict[str, Tensor]]:
        grads, metrics = found
        grads = reduce(grads)
        if not is_tried:
            if norm is tree.global_norm:
                _check_whole(state.params)
            else:
                advice = "give it the same norm as make_step, clip_by_global_norm(max_norm, norm=...)"
                check_sees_all(optimizer, state.params, norm, "make_step", advice)
            is_tried.append(True)
        # The plain norm is compiled with the update; another one may talk to other processes.
        return grads, metrics if norm is tree.global_norm else {**metrics, "grad_norm": norm(grads)}

    def update(state: TrainState, found: tuple[Any, dict[str, Tensor]]) -> tuple[TrainState, dict[str, Tensor]]:
        grads, metrics = found
        lr = schedule(state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, lr)
        new = TrainState(apply_updates(state.params, updates), opt_state, state.step + 1)
        if norm is tree.global_norm:
            metrics = {**metrics, "grad_norm": norm(grads)}
        return new, {**metrics, "lr": lr}

    def update_(state: TrainState, found: tuple[Any, dict[str, Tensor]]) -> tuple[TrainState, dict[str, Tensor]]:
        """`update`, written over the state."""
        grads, metrics = found
        lr = schedule(state.step)
        if norm is tree.global_norm:
            metrics = {**metrics, "grad_norm": norm(grads)}
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
    if reduce is identity and norm is tree.global_norm:
        return in_stages(gradients, update)
    return in_stages(gradients, not_traced(reduced), update)


def _check_whole(params: Any, gradient: Any = None) -> None:
    """ValueError where purelm.dist says that a process holds parts, of parameters or of their gradients."""
    gives_parts = getattr(gradient, "gives_parts", None)
    if (gives_parts is not None and gives_parts()) or any(getattr(x, "is_part", False) for x in tree.leaves(params)):
        raise ValueError(
            "make_step: each process has a part of the gradients, and grad_norm would be of that alone: give the norm "
            "of all, norm=plan.norm of fsdp, norm=plan.global_norm of tensor_parallel, or norm=zero.global_norm(group)"
        )
