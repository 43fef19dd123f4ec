"""The peer of the benches of training: the same Transformer as idiomatic nn.Modules with autocast and fused AdamW."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purelm.models.transformer import Config


class Block(nn.Module):
    def __init__(self, cfg: Config, d_ff: int):
        super().__init__()
        d = cfg.d_model
        self.n_heads, self.head_dim = cfg.n_heads, d // cfg.n_heads
        self.ln1, self.ln2 = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.w1, self.w3 = nn.Linear(d, d_ff, bias=False), nn.Linear(d, d_ff, bias=False)
        self.w2 = nn.Linear(d_ff, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(B, T, 3, self.n_heads, self.head_dim).unbind(2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        x = x + self.out(o.transpose(1, 2).reshape(B, T, D))
        h = self.ln2(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved rotary embedding; cos and sin (T, head_dim / 2)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Module(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, cfg: Config, d_ff: int):
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg, d_ff) for _ in range(cfg.n_layers))
        self.ln_final = nn.RMSNorm(cfg.d_model, eps=1e-5)
        self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        half = cfg.d_model // cfg.n_heads // 2
        angle = torch.arange(cfg.context_length)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.trunc_normal_(p, std=math.sqrt(2.0 / sum(p.shape)))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.lm_head(self.ln_final(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def on_many(model: Any, way: str, device: torch.device) -> Any:
    """The model on several processes: by fully_shard of each block and of the rest (torch_fsdp2), else by
    DistributedDataParallel.

    On a GPU fully_shard computes with bf16 parameters and sends fp32 gradients; DistributedDataParallel needs autocast.
    """
    cuda = device.type == "cuda"
    if way != "torch_fsdp2":
        return nn.parallel.DistributedDataParallel(model, device_ids=[device] if cuda else None)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if cuda else MixedPrecisionPolicy()
    for part in (*model.blocks, model):
        fully_shard(part, mp_policy=mixed)
    return model


def step_of(model: Any, optimizer: torch.optim.Optimizer, device: torch.device, autocast: bool) -> Callable:
    """batch -> loss: forward, backward and update; in bf16 where autocast is on."""

    def run(batch: dict) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(batch["tokens"], batch["targets"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run
