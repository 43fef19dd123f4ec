"""A recurrent language model that is none of the library's, as a user would write it, with parts to replace.

h_t = tanh(x_t + U h_{t-1} + b), x_t the token's embedding (Elman 1990, "Finding structure in time"). Its cache is h.
Legend: B batch, T positions, D width, V vocabulary.
"""

from functools import partial
from typing import NamedTuple

import torch

from purelm.models.leaves import Draw, Fill, Leaf, init_leaves
from purelm.models.model import Model

V, D, T = 11, 6, 9
LEAVES = {
    "embedding": Leaf((V, D), "embedding", "embedding", Draw(1.0)),
    "mix.0": Leaf((D, D), "matrix", "mix", Draw(0.7)),
    "mix.1": Leaf((D,), "bias", "mix", Fill(0.0)),
    "head": Leaf((V, D), "head", "head", Draw(0.7)),
}


class State(NamedTuple):
    h: torch.Tensor  # (B, D)
    unused: None = None  # an absent leaf


def init(key, dtype=torch.float32):
    return {**init_leaves(key, LEAVES, dtype), "absent": None}


def step(params, h, x):
    u, b = params["mix"]
    return torch.tanh(x + h @ u.T + b)


def hidden_of(step):
    def hidden(params, tokens, *, segment_ids=None):
        x = params["embedding"][tokens]
        h, states = torch.zeros_like(x[:, 0]), []
        for t in range(tokens.shape[1]):
            if segment_ids is not None and t:
                h = torch.where((segment_ids[:, t] == segment_ids[:, t - 1])[:, None], h, 0.0)
            h = step(params, h, x[:, t])
            states.append(h)
        return torch.stack(states, 1)

    return hidden


def cross_entropy(logits, batch, z_loss=0.0):
    log_z = logits.logsumexp(-1)
    nll = log_z - logits.gather(-1, batch["targets"][..., None])[..., 0]
    w = batch.get("weights", torch.ones_like(nll))
    value = (w * (nll + z_loss * log_z.square())).sum() / batch.get("denominator", w.sum())
    return value, {"nll": (w * nll).detach().sum() / batch.get("denominator", w.sum())}


def recurrent(step=step, hidden=None, cross_entropy=cross_entropy):
    """The model of this step, or of another function for hidden states."""
    hidden = hidden_of(step) if hidden is None else hidden

    def apply(params, tokens, *, segment_ids=None):
        return hidden(params, tokens, segment_ids=segment_ids) @ params["head"].T

    def loss(params, batch, *, z_loss=0.0, chunk=None):
        logits = apply(params, batch["tokens"], segment_ids=batch.get("segment_ids"))
        return cross_entropy(logits, batch, z_loss)

    def log_probs(params, batch, *, temperature=1.0, chunk=None):
        logits = apply(params, batch["tokens"], segment_ids=batch.get("segment_ids"))
        log_p = torch.log_softmax(logits / temperature, -1)
        return log_p.gather(-1, batch["targets"][..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)

    def init_cache(batch, max_len, dtype=torch.float32, device=None):
        return State(torch.zeros(batch, D, dtype=dtype, device=device))

    def prefill(params, tokens, cache, *, lengths=None, last_only=True, n_positions=None):
        h, states = cache.h, []
        for t in range(tokens.shape[1]):
            new = step(params, h, params["embedding"][tokens[:, t]])
            h = new if lengths is None else torch.where((t < lengths)[:, None], new, h)
            states.append(h)
        logits = torch.stack(states, 1) @ params["head"].T
        return logits[:, -1] if last_only else logits, State(h)

    def decode(params, tokens, cache, *, used=None, n_positions=None):
        return prefill(params, tokens[:, None], cache)

    return Model(
        init, LEAVES, hidden, lambda params: params["head"], apply, loss, log_probs, init_cache, prefill, decode,
        torch.no_grad()(decode), V, T, None,
    )  # fmt: skip


def both_ways(params, tokens, *, segment_ids=None):
    """States of a pass from the left plus those of one from the right: a bidirectional model."""
    forwards, flip = hidden_of(step), partial(torch.flip, dims=[1])
    ids = None if segment_ids is None else flip(segment_ids)
    return forwards(params, tokens, segment_ids=segment_ids) + flip(forwards(params, flip(tokens), segment_ids=ids))
