"""torch modules in the style of the course's (Linear, Embedding and RMSNorm hold a `weight` and nothing else), and what
compares a wrapped one with the same module in one process.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from purelm.dist.sharding import part_of
from purelm.dist.world import rank_of, size_of


class Linear(nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in) / d_in**0.5)

    def forward(self, x):
        return torch.einsum("...i,oi->...o", x, self.weight)


class Embedding(nn.Module):
    def __init__(self, vocab, d):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab, d))

    def forward(self, ids):
        return self.weight[ids]


class RMSNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(d))

    def forward(self, x):
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        return (x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.weight).to(dtype)


class Block(nn.Module):
    def __init__(self, d, d_ff):
        super().__init__()
        self.norm, self.up, self.down = RMSNorm(d), Linear(d, d_ff), Linear(d_ff, d)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """13 tokens and d_ff 9: odd first axes, which two ranks do not divide."""

    def __init__(self, kind="plain", d=6, vocab=13):
        super().__init__()
        self.embed, self.norm, self.head = Embedding(vocab, d), RMSNorm(d), Linear(d, vocab)
        self.blocks = nn.ModuleList([Block(d, 9) for _ in range(3)])
        self.kind, self.scale = kind, nn.Parameter(torch.tensor(1.5))
        self.register_buffer("table", torch.linspace(0, 1, d))
        if kind == "tied":
            self.head.weight = self.embed.weight
        if kind == "frozen":
            self.blocks[1].up.weight.requires_grad_(False)
            self.blocks[2].norm.weight.requires_grad_(False)
            self.embed.weight.requires_grad_(False)

    def forward(self, ids):
        x = self.embed(ids) + self.table.to(self.embed.weight.dtype)
        for block in self.blocks:
            if self.kind.startswith("checkpoint") and x.requires_grad:
                x = checkpoint(block, x, use_reentrant=self.kind == "checkpoint_reentrant")
            else:
                x = block(x)
        x = self.blocks[0](x) if self.kind == "twice" else x
        return self.head(self.norm(x)) * self.scale


KINDS = ["plain", "tied", "frozen", "twice", "checkpoint", "checkpoint_reentrant"]


def model_of(kind="plain", dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return Model(kind).to(dtype)


def data(step, rows=8):
    """Targets and inputs of the whole batch."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 13, (2, rows, 5), generator=generator)


def loss_of(model, ids):
    x, y = ids
    logits = model(x).flatten(0, 1)
    return nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y.flatten())


def mine(ids):
    n = ids.shape[1] // size_of(None)
    return ids[:, rank_of(None) * n : (rank_of(None) + 1) * n]


def whole(model):
    return model.gather_full_params() if hasattr(model, "gather_full_params") else model.module.state_dict()


def compare(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def part_like(x, p):
    return x if x.shape == p.shape else part_of(x, rank_of(None), size_of(None))


def compare_grads(model, oracle, tolerance):
    """Of the wrapped module, whole or parts."""
    theirs = dict(oracle.named_parameters())
    for name, p in model.module.named_parameters():
        g = theirs[name].grad
        assert (p.grad is None) == (g is None), name
        if g is not None:
            assert p.grad.shape == p.shape and p.grad.dtype == p.dtype
            torch.testing.assert_close(p.grad, part_like(g, p), **tolerance, msg=lambda t, name=name: f"{name}: {t}")


TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    # Rows are added up in another order: some roundings of 2^-24 of numbers near 1.
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
}
