"""check_model: the laws of a Model, anyone's own too."""

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from purelm import random, tree
from purelm.models.model import Model
from purelm.testing.laws import run_laws
from purelm.testing.model_cache_laws import CACHE_LAWS
from purelm.testing.model_laws import FORWARD_LAWS, Case
from purelm.testing.model_loss_laws import MODEL_LOSS_LAWS
from purelm.testing.numeric import detached, in_order, tolerance_of
from purelm.tree import Tree

__all__ = ["MODEL_LAWS", "check_model"]

# name -> law, a function of a Case
MODEL_LAWS = {**FORWARD_LAWS, **MODEL_LOSS_LAWS, **CACHE_LAWS}


def check_model(
    model: Model,
    params: Tree | None = None,
    *,
    laws: Iterable[str] | None = None,
    batch_size: int = 3,
    length: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """LawError for the laws of MODEL_LAWS, or of those in `laws`, that the model breaks.

    Of its functions but those of the cache:

    - init: it is pure; parameters have the paths and shapes of the leaf table, other values for another key.
    - keys: no two leaves are drawn with one key.
    - used: every parameter has a gradient of the loss.
    - pure: no function of parameters changes arguments or uses a global generator; two calls give the same bits.
    - causality: other tokens after a position change no logits up to it.
    - context: the logits at a position depend on its token and on the one before. Where a softmax is saturated
      no dependence is left, and no gradient for `used`: check parameters of a usual size.
    - rows: a row of a batch has the logits that it has alone.
    - padding: so has a row of fewer tokens, with other tokens after it.
    - packing: so have documents in one row, told apart by segment_ids; and loss and log_probs are theirs.
    - logits: apply = hidden unembedding^T, or c tanh of that / c with one soft cap c.
    - loss: the mean of -log_softmax(apply)[target]; metrics are detached 0-d tensors.
    - weights: with weights w and a denominator d, sum w nll / d; d is sum w without one.
    - options: z_loss, chunk and temperature do what `purelm.models.protocols` says.
    - log_probs: log_softmax(apply)[target], and its entropy.
    - gradients: the loss's gradient is its difference quotient.
    - jvp, per_sample: torch.func.jvp, and vmap of grad over rows, agree with the gradient.

    And of the cache:

    - cache: a prompt in chunks, then token by token, gives the logits of apply at each position.
    - decode_: equals decode.
    - lengths: prompts and second chunks padded on the right go on as each does alone.
    - cache_pure: prefill and decode change no argument.

    What your model is not made for is left out by name, `laws=without(MODEL_LAWS, ...)`:

    - a bidirectional model: causality, padding (its logits do depend on it unless segment_ids tell it apart) and all
      of the cache, *CACHE_LAWS;
    - no cache: *CACHE_LAWS. No segment_ids: packing. No weights or denominator: weights. No keywords: options;
    - positions that scale with the length of the row (dynamic_ntk beyond its original_length): padding;
    - remat (torch's checkpoint does not work under torch.func): jvp and per_sample.

    Args:
        params: None: those of init(key(0)) in float64, where one-dimensional leaves, and leaves that hold one value,
            have noise added: of a bias of 0, a norm weight of 1 or a head of 0 a wrong place would not show. A model
            that cannot compute in float64 needs params. Difference quotients need float32 at least.
        batch_size: rows of the batch, at least 2.
        length: positions of it, 4 to context_length; None: 9, or context_length if that is less.
        rtol, atol: |found - expected| <= atol + rtol |expected|. None: both are eps^(2/3) of the parameters' dtype,
            atol in units of the largest expected value.

    >>> from purelm.models import transformer
    >>> cfg = transformer.Config(vocab_size=8, context_length=6, d_model=8, n_layers=1, n_heads=2)
    >>> check_model(transformer.make(cfg))
    """
    if not isinstance(batch_size, int) or batch_size < 2:
        raise ValueError(f"check_model: batch_size must be an int of at least 2, got {batch_size!r}")
    if model.vocab_size < 2:
        raise ValueError(f"check_model: vocab_size must be at least 2, got {model.vocab_size}")
    n = min(9, model.context_length) if length is None else length
    if not isinstance(n, int) or not 4 <= n <= model.context_length:
        raise ValueError(f"check_model: length must be in 4..{model.context_length} (context_length), got {n!r}")
    params = _shaken(model.init(random.key(0))) if params is None else params
    params = detached(params)
    tolerance = tolerance_of("check_model", params, rtol, atol)
    device = next(x.device for x in tree.leaves(params) if tree.is_floating(x))
    key = random.key(3)
    names = ("tokens", "targets")
    shape = (batch_size, n)
    batch = {
        name: random.randint(random.fold_in(key, 10 + i), shape, 0, model.vocab_size).to(device)
        for i, name in enumerate(names)
    }
    run_laws(
        "check_model",
        MODEL_LAWS,
        in_order(MODEL_LAWS, laws),
        Case(model, params, batch["tokens"], batch, key, tolerance),
    )


def _shaken(params: Tree) -> Tree:
    """The parameters in float64, with noise of size 0.3 in leaves of one axis, or that hold one value."""

    def shaken(path: str, x: Tensor) -> Tensor:
        if x.ndim > 1 and bool((x != x.reshape(-1)[:1]).any()):
            return x
        noise = random.normal(random.fold_in(random.key(1), zlib.crc32(path.encode())), tuple(x.shape))
        return x + 0.3 * noise.to(x.device, x.dtype)

    wide = tree.cast(params, torch.float64)
    return tree.map_with_path(lambda path, x: shaken(path, x) if tree.is_floating(x) else x, wide)
