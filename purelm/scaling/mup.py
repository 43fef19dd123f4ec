"""muP: initial values and learning rates by width, so that a narrow model's best learning rate is a wide one's too.

    base = transformer.Config(..., d_model=128, n_heads=2)          # where the learning rate was tuned
    cfg = mup.config(dataclasses.replace(base, d_model=1024, n_heads=16), base)
    small = transformer.leaves(base)
    model = transformer.make(cfg, std=mup.std(small))
    optimizer = mup.optimizer(lambda f: adamw(weight_decay=0.1 / f), model.leaves, small)

With m_in and m_out how many times larger a matrix's input and output are than the base model's:

| | initial std | AdamW's lr | SGD's lr |
|---|---|---|---|
| matrices and head | m_in^-1/2 min(1, (m_out / m_in)^1/2) | 1 / m_in | m_out / m_in |
| embeddings, biases, norms | 1 | 1 | m_out |

times the base model's; attention's scores are divided by the head's width in the place of its root. That is table 3 of
Yang et al. 2022 (arXiv:2203.03466): of hidden matrices m_in = m_out, and of the head, whose output is the vocabulary,
m_out = 1, so its initial std is 1 / m_in. The form between these is that of Yang, Simon and Bernstein 2023
(arXiv:2310.17813). At the base's own width all factors are 1: it is trained as it was without muP.

Width may grow by more heads, by wider ones, or both: attention_scale depends on the head's width alone, so more heads
of one width leave it as it is. The base has the depth, the vocabulary and all else of the model: muP says nothing of
other depths, nor of how batch size and number of steps move the learning rate (`hyperparameters`). Weight decay is to
stay lr w at all widths, so each optimizer is made for its factor f. AdamW's eps must be small beside gradients, which
fall with width. Embeddings that are tied to the head would need two sizes at once, and are refused.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from purelm.models.config import Config
from purelm.models.leaves import Draw, Leaf, Leaves, Std
from purelm.optim import Optimizer, labelled, scale_lr

__all__ = ["Rule", "config", "optimizer", "rates", "std"]

Rule = Literal["adam", "sgd"]
WIDTHS = ("d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "attention_scale")  # what may differ from the base's


def config(cfg: Config, base: Config) -> Config:
    """cfg with muP's attention_scale: the base's, times its head's width over this one's.

    >>> base = Config(vocab_size=8, context_length=4, d_model=32, n_layers=1, n_heads=2)
    >>> config(dataclasses.replace(base, d_model=64), base).attention_scale == 1 / 16**0.5 * 16 / 32
    True

    ValueError names fields other than widths that differ, and tied embeddings.
    """
    for field in dataclasses.fields(Config):
        ours, theirs = getattr(cfg, field.name), getattr(base, field.name)
        if field.name not in WIDTHS and ours != theirs:
            raise ValueError(f"muP: Config.{field.name} must be the base's, {theirs!r}, got {ours!r}")
    if cfg.tie_embeddings:
        raise ValueError("muP: Config.tie_embeddings must be False: embeddings keep their size and the head's shrinks")
    of_base = base.head_width**-0.5 if base.attention_scale is None else base.attention_scale
    scale = of_base * base.head_width / cfg.head_width
    if cfg.attention_scale not in (None, scale):
        raise ValueError(f"muP: Config.attention_scale must be None, or {scale} by the rule, got {cfg.attention_scale}")
    return dataclasses.replace(cfg, attention_scale=scale)


def std(base: Leaves, *, head: float = 1.0) -> Std:
    """The rule (path, leaf) -> initial std for `transformer.make(cfg, std=...)`, by the leaf table of the base model.

    Leaves that bring an initializer of their own, as norms do, keep it. head: a further factor of the head's. With 1
    the first logits fall as m_in^-1/2; with 0, which Yang et al. advise, they are 0 at every width.
    """
    if not 0 <= head < math.inf:
        raise ValueError(f"head must be at least 0 and finite, got {head}")

    def rule(path: str, leaf: Leaf) -> float:
        there = _there(path, leaf, base)
        if not isinstance(there.init, Draw):
            raise ValueError(f"muP: the base model draws {path} with {there.init!r}; a std is needed")
        m_in, m_out = _ratios(path, leaf, there)
        more = head if leaf.kind == "head" else 1.0
        return there.init.std / math.sqrt(m_in) * min(1.0, math.sqrt(m_out / m_in)) * more

    return rule


def rates(leaves: Leaves, base: Leaves, rule: Rule = "adam") -> dict[str, float]:
    """path -> the factor of the learning rate. rule: adam is for optimizers whose steps do not scale with gradients.

    ValueError for tables that differ in more than widths.
    """
    if rule not in ("adam", "sgd"):
        raise ValueError(f"rule must be adam or sgd, got {rule!r}")
    if missing := sorted(set(base) - set(leaves)):
        raise ValueError(f"muP: the base model has {', '.join(missing[:3])}, the model has not: they differ in depth")
    found = {}
    for path, leaf in leaves.items():
        m_in, m_out = _ratios(path, leaf, _there(path, leaf, base))
        found[path] = (m_out if rule == "sgd" else 1.0) / m_in
    return found


def optimizer(make: Callable[[float], Optimizer], leaves: Leaves, base: Leaves, rule: Rule = "adam") -> Optimizer:
    """An optimizer with each leaf's own learning rate: `make(f)` for those whose factor is f, at lr f.

    make: sees f so that decoupled decay can stay lr w: `lambda f: adamw(weight_decay=w / f)`. Clipping by the norm of
    all gradients comes before it: `chain(clip_by_global_norm(1.0), mup.optimizer(...))`.
    """
    of = rates(leaves, base, rule)
    parts = {repr(f): scale_lr(make(f), f) for f in sorted(set(of.values()))}
    return labelled(_Label({path: repr(f) for path, f in of.items()}), parts)


@dataclass(frozen=True)
class _Label:
    """(path, parameter) -> its optimizer's name; a class, so that the optimizer can be pickled."""

    names: dict[str, str]

    def __call__(self, path: str, x: Any) -> str:
        if path not in self.names:
            raise ValueError(f"muP: {path} is not in the model's leaf table")
        return self.names[path]


def _there(path: str, leaf: Leaf, base: Leaves) -> Leaf:
    """The base model's leaf."""
    if path not in base:
        raise ValueError(
            f"muP: the base model has no {path}: it must have the model's depth, and differ in width alone"
        )
    there = base[path]
    if there.kind != leaf.kind or len(there.shape) != len(leaf.shape):
        raise ValueError(f"muP: {path} is {leaf.kind} {leaf.shape}, but {there.kind} {there.shape} in the base model")
    return there


def _ratios(path: str, leaf: Leaf, there: Leaf) -> tuple[float, float]:
    """(m_in, m_out). The input of an embedding is one of its rows, of a bias or norm it is 1."""
    if leaf.kind in ("matrix", "head") and len(leaf.shape) == 2:
        m_out, m_in = (a / b for a, b in zip(leaf.shape, there.shape, strict=True))
        if leaf.kind == "head" and m_out != 1:
            raise ValueError(f"muP: {path} has {leaf.shape[0]} rows, the base model's {there.shape[0]}: "
                             "vocabularies must be one")  # fmt: skip
        return m_in, m_out
    if leaf.kind == "embedding" and len(leaf.shape) == 2:
        if leaf.shape[0] != there.shape[0]:
            raise ValueError(f"muP: {path} has {leaf.shape[0]} rows, the base model's {there.shape[0]}; "
                             "these must be one number")  # fmt: skip
        return 1.0, leaf.shape[1] / there.shape[1]
    if len(leaf.shape) == 1 and leaf.kind in ("norm", "bias"):
        return 1.0, leaf.shape[0] / there.shape[0]
    raise ValueError(f"muP: no rule for {path}, {leaf.kind} of shape {leaf.shape}")
