"""The whole model against an independent one of torch.nn modules that loads the same weights by name."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from purelm import tree
from purelm.models import transformer
from purelm.ops import REFERENCE
from purelm.ops.rope import frequencies
from purelm.ops.sdpa import sdpa_attention


def make_norm(cfg):
    if cfg.norm == "rms":
        return nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)
    return nn.LayerNorm(cfg.d_model, eps=cfg.norm_eps, bias=cfg.biases == "all")


class Attention(nn.Module):
    def __init__(self, cfg, window, theta, scaling):
        super().__init__()
        self.cfg, self.window, self.theta, self.scaling = cfg, window, theta, scaling
        D, H, K = cfg.d_model, cfg.n_heads, cfg.head_dim or cfg.d_model // cfg.n_heads
        G = cfg.n_kv_heads or H
        self.H, self.G, self.K = H, G, K
        some, every = cfg.biases != "none", cfg.biases == "all"
        self.q_proj = nn.Linear(D, H * K, bias=some)
        self.k_proj, self.v_proj = nn.Linear(D, G * K, bias=some), nn.Linear(D, G * K, bias=some)
        self.output_proj = nn.Linear(H * K, D, bias=every)
        if cfg.qk_norm == "head":
            self.q_norm, self.k_norm = nn.RMSNorm(K, eps=cfg.norm_eps), nn.RMSNorm(K, eps=cfg.norm_eps)
        if cfg.qk_norm == "full":
            self.q_norm, self.k_norm = nn.RMSNorm(H * K, eps=cfg.norm_eps), nn.RMSNorm(G * K, eps=cfg.norm_eps)

    def turn(self, x, same):
        """(B, heads, T, K) times exp(i angle); dynamic_ntk goes by the length of a token's own document."""
        cfg, T = self.cfg, x.shape[2]
        lengths = [[T] * T] if same is None else same.sum(-1).tolist()
        w = torch.stack([
            torch.stack([frequencies(self.K, self.theta, self.scaling, length=n) for n in row])
            for row in lengths
        ])[:, None]
        factor = 1.0
        if self.scaling is not None and self.scaling.kind == "yarn":
            factor = 0.1 * math.log(self.scaling.factor) + 1
        angle = torch.arange(T)[:, None] * w
        z = torch.polar(torch.full_like(angle, factor), angle)
        if cfg.rope_layout == "interleaved":
            return torch.view_as_real(torch.complex(x[..., 0::2], x[..., 1::2]) * z).flatten(-2)
        turned = torch.complex(x[..., : self.K // 2], x[..., self.K // 2 :]) * z
        return torch.cat([turned.real, turned.imag], -1)

    def forward(self, x, same):
        cfg, (B, T, _) = self.cfg, x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if cfg.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(B, T, self.H, self.K).transpose(1, 2)
        k, v = (y.view(B, T, self.G, self.K).transpose(1, 2) for y in (k, v))
        if cfg.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if cfg.position == "rope":
            q, k = self.turn(q, same), self.turn(k, same)
        k, v = (y.repeat_interleave(self.H // self.G, 1) for y in (k, v))
        distance = torch.arange(T)[:, None] - torch.arange(T)
        seen = distance >= 0 if cfg.causal else torch.ones(T, T, dtype=torch.bool)
        if self.window is not None:
            seen = seen & (distance.abs() <= self.window)
        if same is not None:
            seen = seen & same[:, None]
        s = q @ k.mT * (cfg.attention_scale or self.K**-0.5)
        if cfg.attention_softcap:
            s = torch.tanh(s / cfg.attention_softcap) * cfg.attention_softcap
        p = s.masked_fill(~seen, -torch.inf).softmax(-1)
        return self.output_proj((p @ v).transpose(1, 2).reshape(B, T, self.H * self.K))


class FeedForward(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        bias = cfg.biases == "all"
        self.w1, self.w2 = nn.Linear(cfg.d_model, cfg.d_ff, bias=bias), nn.Linear(cfg.d_ff, cfg.d_model, bias=bias)
        if cfg.ffn in ("swiglu", "geglu"):
            self.w3 = nn.Linear(cfg.d_model, cfg.d_ff, bias=bias)

    def forward(self, x):
        gelu = nn.GELU("tanh" if self.cfg.gelu_tanh else "none")
        act = {
            "swiglu": F.silu, "silu": F.silu, "geglu": gelu, "gelu": gelu, "relu2": lambda x: F.relu(x) ** 2
        }[self.cfg.ffn]  # fmt: skip
        y = act(self.w1(x))
        return self.w2(y * self.w3(x) if hasattr(self, "w3") else y)


class Layer(nn.Module):
    def __init__(self, cfg, *of_layer):
        super().__init__()
        self.cfg, self.attn, self.ffn = cfg, Attention(cfg, *of_layer), FeedForward(cfg)
        if cfg.norm != "none":
            self.ln1, self.ln2 = make_norm(cfg), make_norm(cfg)
        if cfg.norm_position == "sandwich":
            self.ln1_post, self.ln2_post = make_norm(cfg), make_norm(cfg)

    def forward(self, x, same):
        if self.cfg.norm == "none":
            x = x + self.attn(x, same)
            return x + self.ffn(x)
        if self.cfg.norm_position == "pre":
            x = x + self.attn(self.ln1(x), same)
            return x + self.ffn(self.ln2(x))
        if self.cfg.norm_position == "post":
            x = self.ln1(x + self.attn(x, same))
            return self.ln2(x + self.ffn(x))
        if self.cfg.norm_position == "output":
            x = x + self.ln1(self.attn(x, same))
            return x + self.ln2(self.ffn(x))
        x = x + self.ln1_post(self.attn(self.ln1(x), same))
        return x + self.ln2_post(self.ffn(self.ln2(x)))


class Model(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.token_embeddings = nn.Embedding(cfg.vocab_size, cfg.d_model)
        turns = [x if isinstance(x, tuple) else (x,) for x in (cfg.window, cfg.rope_theta, cfg.rope_scaling)]
        self.layers = nn.ModuleList(Layer(cfg, *(x[i % len(x)] for x in turns)) for i in range(cfg.n_layers))
        if cfg.position == "learned":
            self.position_embeddings = nn.Embedding(cfg.context_length, cfg.d_model)
        if cfg.norm != "none":
            self.ln_final = make_norm(cfg)
        if not cfg.tie_embeddings:
            self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)

    def forward(self, tokens, segment_ids=None):
        x, same = self.token_embeddings(tokens), None
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        if segment_ids is not None:
            same = segment_ids[:, :, None] == segment_ids[:, None, :]
            positions = torch.tensor([[row[:i].count(s) for i, s in enumerate(row)] for row in segment_ids.tolist()])
        if self.cfg.position == "learned":
            x = x + self.position_embeddings(positions)
        for layer in self.layers:
            x = layer(x, same)
        x = self.ln_final(x) if self.cfg.norm != "none" else x
        logits = F.linear(x, (self.token_embeddings if self.cfg.tie_embeddings else self.lm_head).weight)
        c = self.cfg.logit_softcap
        return logits if c is None else c * torch.tanh(logits / c)


def twin(cfg, params):
    """The module with these weights: names and shapes must be exactly those of the tree."""
    model = Model(cfg).double()
    model.load_state_dict(dict(zip(tree.paths(params), tree.leaves(params), strict=True)), strict=True)
    return model


def test_logits_and_gradients(axis, make):
    """Oracle: the nn.Module, packed and not; gradients of a random functional, leaf by leaf."""
    torch.manual_seed(0)
    params = tree.map(lambda x: x.requires_grad_(), make(axis))
    model = twin(axis, params)
    tokens = torch.randint(0, axis.vocab_size, (2, 11))
    ids = torch.tensor([[1] * 4 + [2] * 6 + [0], [5] * 11])
    for segment_ids in (None, ids):
        mine = transformer.apply(params, tokens, axis, segment_ids=segment_ids)
        theirs = model(tokens, segment_ids)
        torch.testing.assert_close(mine, theirs)
    g = torch.randn_like(mine)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(mine, tree.leaves(params), g)
    expected = torch.autograd.grad(theirs, [named[p] for p in tree.paths(params)], g)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_sdpa_is_a_drop_in(axis, make):
    """Oracle: the reference ops."""
    if axis.attention_softcap is not None:
        return
    params, tokens = make(axis), torch.randint(0, axis.vocab_size, (2, 11))
    ids = torch.tensor([[1] * 4 + [2] * 6 + [0], [5] * 11])
    for segment_ids in (None, ids):
        got, expected = (
            transformer.apply(params, tokens, axis, ops=ops, segment_ids=segment_ids)
            for ops in (REFERENCE._replace(attention=sdpa_attention), REFERENCE)
        )
        torch.testing.assert_close(got, expected)


def test_bf16_parameters(axis, make):
    """Oracle: float64 of the same bf16 weights; at most twice the module's error in bf16, on average over logits."""
    params = tree.cast(make(axis), torch.bfloat16)
    # Many rows: without norms a few tokens have most of the error, by chance of either side.
    tokens = torch.randint(0, axis.vocab_size, (32, 16), generator=torch.Generator().manual_seed(0))
    logits = transformer.apply(params, tokens, axis)
    assert logits.dtype == torch.bfloat16
    exact = transformer.apply(tree.cast(params, torch.float64), tokens, axis)
    model = twin(axis, tree.cast(params, torch.float64)).to(torch.bfloat16)
    Attention.turn, turn = (lambda self, x, same: turn(self, x.float(), same).to(x.dtype)), Attention.turn
    try:
        theirs = model(tokens)
    finally:
        Attention.turn = turn
    mine, peer = ((x.double() - exact).square().mean().sqrt() for x in (logits, theirs))
    assert mine <= 2 * peer
