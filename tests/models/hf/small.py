"""Small models of every family by transformers' own classes, with every parameter drawn anew."""

import torch
import transformers
from transformers import AutoModelForCausalLM

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=80,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
GPT2 = dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=80)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
# name -> (class of the configuration, its arguments)
MODELS = {
    "llama": ("LlamaConfig", SIZES),
    "llama tied, llama3": ("LlamaConfig", {**SIZES, "tie_word_embeddings": True, "rope_scaling": LLAMA3}),
    "llama, linear": ("LlamaConfig", {**SIZES, "rope_scaling": dict(rope_type="linear", factor=2.0)}),
    "llama, yarn": ("LlamaConfig", {**SIZES, "rope_scaling": YARN, "head_dim": 12}),
    "llama, dynamic": ("LlamaConfig", {**SIZES, "rope_scaling": dict(rope_type="dynamic", factor=2.0)}),
    "llama, theta": ("LlamaConfig", {**SIZES, "rope_theta": 500.0, "num_key_value_heads": 4}),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 5}),
    "mistral, no window": ("MistralConfig", {**SIZES, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {**SIZES, "tie_word_embeddings": True}),
    "qwen2, windows": (
        "Qwen2Config", {**SIZES, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 16}),
    "olmo2": ("Olmo2Config", SIZES),
    "olmo3": ("Olmo3Config", {**SIZES, "num_hidden_layers": 4, "sliding_window": 5, "rope_scaling": YARN}),
    "gpt2": ("GPT2Config", GPT2),
    "gpt2, untied": ("GPT2Config", {**GPT2, "n_inner": 40, "tie_word_embeddings": False}),
}  # fmt: skip


def made(name, seed=0):
    """transformers' model in fp32 and eval mode; weights, norms and biases too are random, and large enough to show."""
    kind, options = MODELS[name]
    config = getattr(transformers, kind)(**options, bos_token_id=0, eos_token_id=1, pad_token_id=None)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.ndim == 1 else 0.15) + (1.0 if p.ndim == 1 else 0.0))
    return model
