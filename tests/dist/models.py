"""A small Transformer and its batches for tests of several processes: each can make everyone's data. Comparisons."""

import torch

from purelm import random, tree
from purelm.dist import fsdp
from purelm.models import transformer
from purelm.ops import REFERENCE

CFG = transformer.Config(vocab_size=19, context_length=8, d_model=12, n_layers=3, n_heads=2, d_ff=20)
TIED = transformer.Config(
    vocab_size=19, context_length=8, d_model=12, n_layers=2, n_heads=3, n_kv_heads=1, d_ff=20, tie_embeddings=True,
    biases="all", norm="layer",
)  # fmt: skip


def params_of(cfg=CFG, dtype=torch.float64, seed=0):
    return tree.map(
        lambda x: x + 0.1 * torch.cos(torch.arange(x.numel(), dtype=dtype)).view(x.shape),
        tree.cast(transformer.init(random.key(seed), cfg), dtype),
    )


def batch_of(rank, size, cfg=CFG, rows=4, step=0, dtype=torch.float64):
    """This rank's rows of the global batch; weights differ, so that ranks have different denominators."""
    key = random.fold_in(random.key(5), step)
    x = random.randint(key, (rows * 2, cfg.context_length + 1), 0, cfg.vocab_size)
    weights = random.uniform(random.fold_in(key, 1), (rows * 2, cfg.context_length)).to(dtype)
    weights[:3] = 0.0
    batch = {"tokens": x[:, :-1].contiguous(), "targets": x[:, 1:].contiguous(), "weights": weights}
    n = rows * 2 // size
    return {k: v[rank * n : (rank + 1) * n] for k, v in batch.items()}


def sharded_model(cfg=CFG, wrap=transformer.identity, ops=REFERENCE):
    """A model whose parameters are gathered block by block."""
    return transformer.make(cfg, fsdp.ops(ops), lambda f: fsdp.gathered(wrap(f)))


def assert_close(a, b, rtol=1e-12, atol=1e-13):
    assert tree.structure(a) == tree.structure(b)
    for path, x, y in zip(tree.paths(a), tree.leaves(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=lambda text, path=path: f"{path}: {text}")


def equal(a, b):
    """To the last bit, in form and dtype too."""
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return tree.structure(a) == tree.structure(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


# Leaves of odd shapes.
SHAPES = {
    "w": (4, 3),
    "odd": (5, 2),
    "one": (1, 4),
    "scalar": (),
    "empty": (0, 3),
    "hollow": (3, 0),
    "cube": (2, 3, 2),
    "embeddings": (7, 3),
    "vector": (123,),
}


def made(seed, dtypes=(torch.float64,)):
    """A tree of odd shapes with absent leaves, the dtypes in turn."""
    key = random.key(seed)
    leaves = {
        name: random.normal(random.fold_in(key, i), shape, dtype=torch.float64).to(dtypes[i % len(dtypes)])
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    return {"nest": [leaves, None, {"last": leaves["odd"].T * 0.5}], "none": None}  # last: not contiguous
