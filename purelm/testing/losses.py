"""check_loss: the laws of a loss (params, batch) -> (scalar, metrics), anyone's own, by the contract of `make_step`."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from purelm import tree
from purelm.testing.laws import run_laws
from purelm.testing.loss_laws import LOSS_LAWS, Case
from purelm.testing.numeric import detached, in_order, tolerance_of
from purelm.train import Loss, with_denominator
from purelm.tree import Tree

__all__ = ["LOSS_LAWS", "check_loss"]


def check_loss(
    loss: Loss,
    params: Tree,
    batch: Tree,
    *,
    laws: Iterable[str] | None = None,
    mask: str = "weights",
    inputs: Sequence[str] = ("tokens",),
    group: int = 1,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """LawError for the laws of LOSS_LAWS, or of those in `laws`, that the loss breaks with these arguments.

    - scalar: (0-d floating loss, dict of detached 0-d metrics); some parameter has a gradient.
    - pure: no argument is changed and no global generator used; two calls give the same bits.
    - split: losses and gradients of parts of the batch, each with the whole's "denominator", sum to those of the whole,
      as over microbatches and processes. It is refused where the loss is a mean over the rows that it is given.
    - metrics: so do metrics.
    - order: rows in another order give the same loss and gradients.
    - masked: values where batch[mask] is 0 change neither loss nor gradients, of all leaves but inputs.
    - padding: nor do inputs after the last position of a row where batch[mask] is not 0.
    - gradients: the gradient is the difference quotient of the loss.
    - jvp, per_sample: torch.func.jvp, and vmap of grad over rows, agree with the gradient.

    The laws masked and padding add zeros to those that the mask has. A batch without a mask leaves them out:
    `laws=without(LOSS_LAWS, "masked", "padding")`; a loss of a bidirectional model without segment ids leaves out
    padding, one of a model with remat jvp and per_sample. Parameters without a gradient by design, such as a frozen
    reference, would fail gradients: give them by a closure.

    Args:
        batch: a tree of tensors, all with rows on axis 0 but 0-d ones; at least two rows, or groups of rows. Like a
            training step, the check adds "denominator" to a batch with "targets" that has none.
        mask: name of the leaf that is 0 where nothing counts: (B, T) for positions, or (B,) for rows.
        inputs: names of the leaves that other positions of their row depend on. segment_ids and the denominator are
            never changed.
        group: rows that belong together, 2 for pairs; parts of the batch, samples and orders are of whole groups.
        rtol, atol: |found - expected| <= atol + rtol |expected|. None: both are eps^(2/3) of the parameters' dtype,
            atol in units of the largest expected value; float64 is best, and difference quotients need float32.

    >>> import torch
    >>> def loss(params, batch):
    ...     errors = (batch["x"] @ params["w"] - batch["targets"]).square() * batch["weights"]
    ...     return errors.sum() / batch["denominator"], {}
    >>> batch = {"x": torch.eye(4)[:, :3], "targets": torch.arange(4.0), "weights": torch.ones(4)}
    >>> check_loss(loss, {"w": torch.ones(3)}, batch, inputs=["x"])
    """
    sizes = {path: x.shape[0] for path, x in tree.to_flat(batch).items() if isinstance(x, Tensor) and x.ndim}
    if not isinstance(group, int) or group < 1:
        raise ValueError(f"check_loss: group must be an int of at least 1, got {group!r}")
    if len(set(sizes.values())) != 1:
        raise ValueError(f"check_loss: tensors of batch must have one size of axis 0, the rows; got {sizes}")
    n = next(iter(sizes.values()))
    if n % group or n < 2 * group:
        raise ValueError(f"check_loss: batch must have at least two whole groups of {group} rows, got {n} rows")
    if isinstance(inputs, str):
        raise ValueError(f"check_loss: inputs must be a list of names, got the string {inputs!r}; pass [{inputs!r}]")
    params, batch = detached((params, batch))
    tolerance = tolerance_of("check_loss", params, rtol, atol)
    case = Case(loss, params, with_denominator(batch), mask, tuple(inputs), group, n // group, tolerance)
    run_laws("check_loss", LOSS_LAWS, in_order(LOSS_LAWS, laws), case)
