"""Laws of a Model's forward pass: init, hidden, unembedding, apply. `models.check_model` runs them.

Legend: B batch, T positions, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purelm import random, tree
from purelm.models.model import Model
from purelm.testing.laws import assert_trees_equal, require, unchanged
from purelm.testing.numeric import (
    Tolerance,
    close,
    closeness,
    detached,
    others,
)
from purelm.tree import Tree

__all__ = ["FORWARD_LAWS", "PLACE", "Case", "log_p_of", "logits_of", "named"]

PLACE = ("row", "position", "token id")


class Case(NamedTuple):
    """What every law gets: a model, parameters, and a batch drawn for it."""

    model: Model
    params: Tree
    tokens_BT: Tensor
    batch: dict[str, Tensor]  # tokens, and targets drawn by themselves
    key: random.Key  # on the CPU; for what a law draws
    tolerance: Tolerance


def logits_of(case: Case, tokens_BT: Tensor | None = None, **options: Any) -> Tensor:
    """apply's logits; AssertionError unless they are finite, (B, T, V), and differ between some rows or positions."""
    tokens_BT = case.tokens_BT if tokens_BT is None else tokens_BT
    logits = case.model.apply(case.params, tokens_BT, **options)
    shape = (*tokens_BT.shape, case.model.vocab_size)
    require(
        logits.shape == shape and logits.dtype.is_floating_point,
        f"apply must give floating logits (B, T, V) = {shape}, got {tuple(logits.shape)} {logits.dtype}",
    )
    require(torch.isfinite(logits).all(), "apply's logits are not all finite")
    require(
        tokens_BT.numel() < 2 or (logits != logits[:1, :1]).any(),
        "apply's logits are the same in all rows and positions, so that nothing can be compared",
    )
    return logits


def named(name: str, call: Callable[[], Any], *args: Tree) -> Any:
    """The result of call(), called twice; AssertionError with the name if it changes args, or gives other bits."""
    try:
        with unchanged(*args):
            first, second = (detached(call()) for _ in range(2))
        assert_trees_equal(second, first, "results of two calls with the same arguments")
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None
    return first


def init(case: Case) -> None:
    """init is pure, and its parameters are those of the leaf table: the same for the same key, others for another."""
    model, key = case.model, random.key(1)
    first = named("init", lambda: model.init(key), {"key": key})
    found = tree.to_flat(first)
    missing, unknown = sorted(set(model.leaves) - set(found)), sorted(set(found) - set(model.leaves))
    require(not missing, f"params lack {', '.join(missing[:3])}, which the leaf table has")
    require(not unknown, f"params have {', '.join(unknown[:3])}, unknown to the leaf table")
    for path, leaf in model.leaves.items():
        shape = tuple(found[path].shape)
        require(shape == tuple(leaf.shape), f"{path} has shape {shape}, the leaf table says {tuple(leaf.shape)}")
        require(found[path].device == key.device, f"{path} is on {found[path].device}, the key on {key.device}")
    for dtype in (torch.float32, torch.float64):
        drawn = tree.to_flat(first if dtype == torch.float32 else model.init(key, dtype=dtype))
        wrong = [f"{path} {x.dtype}" for path, x in drawn.items() if tree.is_floating(x) and x.dtype != dtype]
        by = "by default" if dtype == torch.float32 else "if asked for"
        require(not wrong, f"{dtype} is due {by}, got {', '.join(wrong[:3])}")
    other = tree.leaves(model.init(random.key(2)))
    same = all(torch.equal(x, y) for x, y in zip(other, tree.leaves(first), strict=True))
    require(not same, "params of inits from two keys are the same")


def keys(case: Case) -> None:
    """No two leaves are drawn with one key: their first 16 values are not in the same order of size."""
    orders: dict[tuple[int, ...], str] = {}
    for path, x in tree.to_flat(case.model.init(random.key(1))).items():
        some = x.detach().reshape(-1)[:16]
        if not tree.is_floating(x) or len(torch.unique(some)) < 16:
            continue
        order = tuple(torch.argsort(some).tolist())
        require(
            order not in orders,
            f"{orders.get(order)} and {path} are drawn with one key: their first 16 values are in the same order of "
            "size; give each leaf a key of its own (random.fold_in, models.leaves.leaf_key)",
        )
        orders[order] = path
    require(bool(orders), "no leaf of init has 16 different values to compare")


def pure(case: Case) -> None:
    """No function of parameters changes its arguments or uses a global generator; two calls give the same bits."""
    model, params, tokens, batch = case.model, case.params, case.tokens_BT, case.batch
    calls: dict[str, Callable[[], Any]] = {
        "hidden": lambda: model.hidden(params, tokens),
        "unembedding": lambda: model.unembedding(params),
        "apply": lambda: model.apply(params, tokens),
        "loss": lambda: model.loss(params, batch),
        "log_probs": lambda: model.log_probs(params, batch),
    }
    for name, call in calls.items():
        named(name, call, {"params": params, "tokens": tokens, "batch": batch})
    logits_of(case)


def causality(case: Case) -> None:
    """Other tokens after a position change no logits up to it (and do change those after it)."""
    tokens, logits = case.tokens_BT, logits_of(case)
    changed = others(random.fold_in(case.key, 1), tokens, case.model.vocab_size)
    moved = False
    for t in range(1, tokens.shape[1]):
        now = logits_of(case, torch.cat([tokens[:, :t], changed[:, t:]], 1))
        close(now[:, :t], logits[:, :t], f"logits with other tokens from position {t} on", case.tolerance, PLACE)
        moved = moved or bool(_moved(now[:, t:], logits[:, t:], case).any())
    require(moved, "other tokens change no logits at all")


def context(case: Case) -> None:
    """The logits at a position depend on its token and on the token before."""
    tokens, logits = case.tokens_BT, logits_of(case)
    changed = others(random.fold_in(case.key, 2), tokens, case.model.vocab_size)
    for s in range(tokens.shape[1]):
        at = torch.arange(tokens.shape[1], device=tokens.device) == s
        moved = _moved(logits_of(case, torch.where(at, changed, tokens)), logits, case)
        for t in range(s, min(s + 2, tokens.shape[1])):
            still = (~moved[:, t]).nonzero().flatten().tolist()
            which = "their own token" if t == s else "the token before"
            require(not still, f"logits at position {t} do not depend on {which} (rows {still[:3]})")


def _moved(a: Tensor, b: Tensor, case: Case) -> Tensor:
    """(B, T): where logits differ by more than the rounding of the largest."""
    return (a - b).detach().double().abs().amax(-1) > 4 * case.tolerance.eps * float(b.detach().abs().max())


def rows(case: Case) -> None:
    """A row of a batch has the logits that it has alone."""
    logits = logits_of(case)
    for b in range(case.tokens_BT.shape[0]):
        alone = logits_of(case, case.tokens_BT[b : b + 1])
        close(logits[b], alone[0], f"logits of row {b} in a batch and alone", case.tolerance, PLACE[1:])


def padding(case: Case) -> None:
    """Rows of different lengths, padded at the end with any tokens, have the logits that they have alone."""
    tokens, T = case.tokens_BT, case.tokens_BT.shape[1]
    filler = others(random.fold_in(case.key, 3), tokens, case.model.vocab_size)
    lengths = [T - 1 - b % (T - 1) for b in range(tokens.shape[0])]
    at = torch.arange(T, device=tokens.device)
    padded = torch.where(at < torch.tensor(lengths, device=tokens.device)[:, None], tokens, filler)
    logits = logits_of(case, padded)
    for b, n in enumerate(lengths):
        alone = case.model.apply(case.params, tokens[b : b + 1, :n])
        what = f"logits of row {b}, {n} tokens padded to {T}, and alone"
        close(logits[b, :n], alone[0], what, case.tolerance, PLACE[1:])


def packing(case: Case) -> None:
    """Documents in one row, told apart by segment_ids, have the logits, loss and log_probs that they have alone."""
    model, params = case.model, case.params
    ids, spans = _documents(case)
    logits = logits_of(case, segment_ids=ids)
    # For the loss the padding belongs to the last document: what counts as padding there, weights say.
    batch = {**case.batch, "segment_ids": ids.cummax(1).values}
    value = model.loss(params, batch)[0].double()
    names = ("log-probabilities", "entropies")
    found = model.log_probs(params, batch)
    n_rows, T = case.tokens_BT.shape
    total = torch.zeros_like(value)
    for b, first, end, n_padding in spans:
        at = f"of the document at positions {first} to {end - 1} of row {b}, packed and alone,"
        alone = model.apply(params, case.tokens_BT[b : b + 1, first:end])
        close(logits[b, first:end], alone[0], f"logits {at}", case.tolerance, PLACE[1:])
        document = {name: x[b : b + 1, first : end + n_padding] for name, x in case.batch.items()}
        for name, x, y in zip(names, found, model.log_probs(params, document), strict=True):
            close(x[b, first : end + n_padding], y[0], f"{name} {at}", case.tolerance, PLACE[1:])
        total = total + model.loss(params, document)[0].double() * (end + n_padding - first)
    close(value, total / (n_rows * T), "the loss of packed documents and their mean loss alone", case.tolerance)


def _documents(case: Case) -> tuple[Tensor, list[tuple[int, int, int, int]]]:
    """segment_ids (B, T), 1, 2, ... and 0 for padding; and (row, first position, end, padding after) of each document.

    Row b has b mod 3 positions of padding and 2, 3, 1, 2, ... documents.
    """
    B, T = case.tokens_BT.shape
    ids = torch.zeros(B, T, dtype=torch.int64)
    spans = []
    for b in range(B):
        real = T - b % 3
        order = random.permutation(random.fold_in(case.key, 100 + b), real - 1)
        n = min((b + 1) % 3 + 1, real)
        ends = [*sorted((order[: n - 1] + 1).tolist()), real]
        for i, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
            ids[b, first:end] = i + 1
            spans.append((b, first, end, T - real if end == real else 0))
    return ids.to(case.tokens_BT.device), spans


def logits(case: Case) -> None:
    """apply = cap(hidden unembedding^T), cap being the identity or a soft cap c tanh(x / c) with one c for all."""
    found = logits_of(case)
    h, w = case.model.hidden(case.params, case.tokens_BT), case.model.unembedding(case.params)
    V = case.model.vocab_size
    require(
        h.shape[:-1] == case.tokens_BT.shape and tuple(w.shape) == (V, h.shape[-1]),
        f"hidden must be (B, T, D) and unembedding ({V}, D), got {tuple(h.shape)} and {tuple(w.shape)}",
    )
    x, y = (h @ w.T).detach().double(), found.detach().double()
    flat = int(x.abs().argmax())
    a, b = float(x.flatten()[flat]), float(y.flatten()[flat])
    if not closeness(y, x, case.tolerance) and a and 0 < b / a < 1:
        c = _cap(abs(a), abs(b))
        if closeness(y, c * torch.tanh(x / c), case.tolerance):
            return
    close(y, x, "apply's logits and hidden unembedding^T, with no soft cap between,", case.tolerance, PLACE)


def _cap(x: float, y: float) -> float:
    """c with c tanh(x / c) = y, for 0 < y < x, by bisection: the left side grows with c."""
    low, high = y, y
    cap = lambda c: c * float(torch.tanh(torch.tensor(x / c, dtype=torch.float64)))  # noqa: E731
    while cap(high) < y:
        high *= 2
    for _ in range(100):
        c = (low + high) / 2
        low, high = (c, high) if cap(c) < y else (low, c)
    return high


def log_p_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log p(target), entropy of p) with p = softmax(logits), in float64, written out."""
    log_p = torch.log_softmax(logits.double(), -1)
    return log_p.gather(-1, targets[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


FORWARD_LAWS = {law.__name__: law for law in (pure, init, keys, causality, context, rows, padding, packing, logits)}
