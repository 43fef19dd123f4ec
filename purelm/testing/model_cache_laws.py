"""Laws of a Model's cache: init_cache, prefill, decode, decode_. `models.check_model` runs them.

n_positions is given throughout, as `generate` gives it, so that positions which scale with the length agree with apply.
Legend: B batch, T positions, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from purelm import tree
from purelm.testing.laws import require
from purelm.testing.model_laws import PLACE, Case, logits_of, named
from purelm.testing.numeric import close

__all__ = ["CACHE_LAWS"]


def cache(case: Case) -> None:
    """A prompt in two chunks and then one token at a time give the logits of apply at each position."""
    model, params, tokens = case.model, case.params, case.tokens_BT
    expected, T = logits_of(case), tokens.shape[1]
    first, second = T // 3, T // 3 + max(T // 4, 1)
    found, state = model.prefill(params, tokens[:, :first], _empty(case), last_only=False, n_positions=T)
    what = f"logits of prefill (positions 0 to {first - 1}) and of apply"
    close(found, expected[:, :first], what, case.tolerance, PLACE)
    last, _ = model.prefill(params, tokens[:, :first], _empty(case), n_positions=T)
    what = f"logits of prefill's last position ({first - 1}) and of apply"
    close(last, expected[:, first - 1], what, case.tolerance, ("row", "token id"))
    found, state = model.prefill(params, tokens[:, first:second], state, n_positions=T)
    what = f"logits of prefill's second chunk (positions {first} to {second - 1}, the last) and of apply"
    close(found, expected[:, second - 1], what, case.tolerance, ("row", "token id"))
    _decoded(case, model.decode, "decode", state, second)


def decode_(case: Case) -> None:
    """decode_ gives the logits and the cache of decode, and goes on from its own cache."""
    model, params, tokens = case.model, case.params, case.tokens_BT
    T = tokens.shape[1]
    _, state = model.prefill(params, tokens[:, : T // 2], _empty(case), n_positions=T)
    for t in range(T // 2, T):
        expected, after = model.decode(params, tokens[:, t], state, n_positions=T)
        found, state = model.decode_(params, tokens[:, t], state, n_positions=T)
        what = f"of decode_ and decode at position {t}"
        close(found, expected, f"logits {what}", case.tolerance, ("row", "token id"))
        close(state, after, f"caches {what}", case.tolerance)


def lengths(case: Case) -> None:
    """Prompts and second chunks of different lengths, padded on the right with any tokens, go on as each does alone."""
    model, params, tokens = case.model, case.params, case.tokens_BT
    expected, (B, T) = logits_of(case), tokens.shape
    longest = max(T // 2, 2)
    rows = torch.arange(B, device=tokens.device)

    def chunk(start: Tensor, n: Tensor) -> Tensor:
        at = start[:, None] + torch.arange(int(n.max()), device=tokens.device)
        return torch.where(at < (start + n)[:, None], tokens.gather(1, at.clamp(max=T - 1)), tokens[:, -1:])

    n = torch.tensor([longest - (b + 1) % longest for b in range(B)], device=tokens.device)
    found, state = model.prefill(params, chunk(0 * n, n), _empty(case), lengths=n, n_positions=T)
    what = f"logits after a prompt of lengths {n.tolist()}"
    close(found, expected[rows, n - 1], f"{what} and of apply", case.tolerance, ("row", "token id"))
    more = 1 + rows % 2
    found, state = model.prefill(params, chunk(n, more), state, lengths=more, n_positions=T)
    n, what = n + more, f"{what}, a chunk of lengths {more.tolist()}"
    close(found, expected[rows, n - 1], f"{what} and of apply", case.tolerance, ("row", "token id"))
    for j in range(T - int(n.max())):
        found, state = model.decode(params, tokens[rows, n + j], state, n_positions=T)
        text = f"{what}, {j + 1} more tokens, and of apply"
        close(found, expected[rows, n + j], text, case.tolerance, ("row", "token id"))


def cache_pure(case: Case) -> None:
    """prefill and decode change no argument (the given cache too), and give the same bits twice; so does init_cache."""
    model, params, tokens = case.model, case.params, case.tokens_BT
    T = tokens.shape[1]
    fill: Callable[[Any], Any] = lambda state: model.prefill(params, tokens[:, : T // 2], state, n_positions=T)  # noqa: E731
    empty = named("init_cache", lambda: _empty(case))
    _, state = named("prefill", lambda: fill(empty), {"params": params, "tokens": tokens, "cache": empty})
    require(any(isinstance(x, Tensor) and x.numel() for x in tree.leaves(state)), "the cache has no tensors")
    token = tokens[:, T // 2]
    step = lambda: model.decode(params, token, state, n_positions=T)  # noqa: E731
    named("decode", step, {"params": params, "tokens": token, "cache": state})


def _empty(case: Case) -> Any:
    B, T = case.tokens_BT.shape
    x = case.model.unembedding(case.params)
    return case.model.init_cache(B, T, x.dtype, x.device)


def _decoded(case: Case, step: Callable[..., Any], name: str, state: Any, first: int) -> None:
    expected, T = logits_of(case), case.tokens_BT.shape[1]
    for t in range(first, T):
        found, state = step(case.params, case.tokens_BT[:, t], state, n_positions=T)
        what = f"logits of {name} at position {t} and of apply"
        close(found, expected[:, t], what, case.tolerance, ("row", "token id"))


CACHE_LAWS = {law.__name__: law for law in (cache, decode_, lengths, cache_pure)}
