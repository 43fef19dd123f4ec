"""The families of open weights as data: what their tensors and the fields of their config.json are called here.

One table a family, used in both directions. {i} stands for the number of a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FAMILIES", "Family", "Tensors", "family_of"]


@dataclass(frozen=True)
class Tensors:
    """One tensor of a file: the leaves that it holds, one below the other, and whether it is stored as x W (GPT-2)."""

    paths: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """How one architecture is written to files."""

    model_type: str  # of config.json
    architecture: str  # its class in transformers
    names: Mapping[str, str | Tensors]  # name in the file -> path of the leaf
    fields: Mapping[str, str]  # field of config.json -> field of Config
    fixed: Mapping[str, Any]  # fields of Config that are the same for the whole family
    # What a field that config.json lacks is, as in transformers' classes; one that is not here must be given.
    defaults: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]]  # fields of config.json, and the values with which it is this architecture
    # Tensors of older files that hold no parameter, and a prefix that some files leave out.
    buffers: tuple[str, ...] = ()
    prefix: str = ""
    ignored: tuple[str, ...] = ()  # fields of config.json beside `IGNORED` that change no result
    extra: Mapping[str, Any] = field(default_factory=dict)  # further fields to write


# Fields of any config.json that change no logits: of training, of generation, of bookkeeping.
IGNORED = (
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout",
    "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "hidden_dropout", "id2label",
    "initializer_range", "is_encoder_decoder", "is_llama_config", "keys_to_ignore_at_inference", "label2id",
    "max_length", "model_type", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
    "problem_type", "return_dict", "rope_interleaved", "task_specific_params", "torch_dtype", "transformers.js_config",
    "transformers_version", "unk_token_id", "unsloth_fixed", "unsloth_version", "use_cache",
)  # fmt: skip

_BLOCK = {
    "model.layers.{i}.self_attn.q_proj.weight": "layers.{i}.attn.q_proj.weight",
    "model.layers.{i}.self_attn.k_proj.weight": "layers.{i}.attn.k_proj.weight",
    "model.layers.{i}.self_attn.v_proj.weight": "layers.{i}.attn.v_proj.weight",
    "model.layers.{i}.self_attn.o_proj.weight": "layers.{i}.attn.output_proj.weight",
    "model.layers.{i}.mlp.gate_proj.weight": "layers.{i}.ffn.w1.weight",
    "model.layers.{i}.mlp.up_proj.weight": "layers.{i}.ffn.w3.weight",
    "model.layers.{i}.mlp.down_proj.weight": "layers.{i}.ffn.w2.weight",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embeddings.weight",
    "model.norm.weight": "ln_final.weight",
    "lm_head.weight": "lm_head.weight",
}
_BEFORE = {
    "model.layers.{i}.input_layernorm.weight": "layers.{i}.ln1.weight",
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.ln2.weight",
}
_BEHIND = {
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.ln1.weight",
    "model.layers.{i}.post_feedforward_layernorm.weight": "layers.{i}.ln2.weight",
}
_QK_NORMS = {
    "model.layers.{i}.self_attn.q_norm.weight": "layers.{i}.attn.q_norm.weight",
    "model.layers.{i}.self_attn.k_norm.weight": "layers.{i}.attn.k_norm.weight",
}
_QKV_BIASES = {
    "model.layers.{i}.self_attn.q_proj.bias": "layers.{i}.attn.q_proj.bias",
    "model.layers.{i}.self_attn.k_proj.bias": "layers.{i}.attn.k_proj.bias",
    "model.layers.{i}.self_attn.v_proj.bias": "layers.{i}.attn.v_proj.bias",
}
_LIKE_LLAMA: dict[str, Any] = dict(
    fields={
        "vocab_size": "vocab_size",
        "max_position_embeddings": "context_length",
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "head_dim": "head_dim",
        "intermediate_size": "d_ff",
        "rms_norm_eps": "norm_eps",
        "tie_word_embeddings": "tie_embeddings",
    },
    buffers=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
_LLAMA = {"norm": "rms", "ffn": "swiglu", "rope_layout": "half"}
_SILU = {"hidden_act": ("silu",)}
_LLAMA_DEFAULTS = {
    "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            {**_OUTSIDE, **_BLOCK, **_BEFORE},
            fixed=_LLAMA,
            defaults=_LLAMA_DEFAULTS,
            only={**_SILU, "attention_bias": (False,), "mlp_bias": (False,)},
            **_LIKE_LLAMA,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            {**_OUTSIDE, **_BLOCK, **_BEFORE},
            fixed=_LLAMA,
            defaults={**_LLAMA_DEFAULTS, "sliding_window": 4096},
            only=_SILU,
            **_LIKE_LLAMA,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            {**_OUTSIDE, **_BLOCK, **_BEFORE, **_QKV_BIASES},
            fixed={**_LLAMA, "biases": "qkv"},
            defaults={**_LLAMA_DEFAULTS, "use_sliding_window": False},
            only=_SILU,
            **_LIKE_LLAMA,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            {**_OUTSIDE, **_BLOCK, **_BEFORE, **_QK_NORMS},
            fixed={**_LLAMA, "qk_norm": "head"},
            defaults={**_LLAMA_DEFAULTS, "head_dim": 128, "use_sliding_window": False},
            only={**_SILU, "attention_bias": (False,)},
            **_LIKE_LLAMA,
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            {**_OUTSIDE, **_BLOCK, **_BEHIND, **_QK_NORMS},
            fixed={**_LLAMA, "qk_norm": "full", "norm_position": "output"},
            defaults={**_LLAMA_DEFAULTS, "rms_norm_eps": 1e-5},
            only={**_SILU, "attention_bias": (False,)},
            **_LIKE_LLAMA,
        ),
        Family(
            "olmo3",
            "Olmo3ForCausalLM",
            {**_OUTSIDE, **_BLOCK, **_BEHIND, **_QK_NORMS},
            fixed={**_LLAMA, "qk_norm": "full", "norm_position": "output"},
            defaults={**_LLAMA_DEFAULTS, "rms_norm_eps": 1e-5, "sliding_window": 4096},
            only={**_SILU, "attention_bias": (False,)},
            **_LIKE_LLAMA,
        ),
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            {
                "transformer.wte.weight": "token_embeddings.weight",
                "transformer.wpe.weight": "position_embeddings.weight",
                "transformer.h.{i}.ln_1.weight": "layers.{i}.ln1.weight",
                "transformer.h.{i}.ln_1.bias": "layers.{i}.ln1.bias",
                "transformer.h.{i}.attn.c_attn.weight": Tensors(
                    tuple([f"layers.{{i}}.attn.{x}_proj.weight" for x in "qkv"]), transposed=True
                ),
                "transformer.h.{i}.attn.c_attn.bias": Tensors(
                    tuple([f"layers.{{i}}.attn.{x}_proj.bias" for x in "qkv"])
                ),
                "transformer.h.{i}.attn.c_proj.weight": Tensors(("layers.{i}.attn.output_proj.weight",), True),
                "transformer.h.{i}.attn.c_proj.bias": "layers.{i}.attn.output_proj.bias",
                "transformer.h.{i}.ln_2.weight": "layers.{i}.ln2.weight",
                "transformer.h.{i}.ln_2.bias": "layers.{i}.ln2.bias",
                "transformer.h.{i}.mlp.c_fc.weight": Tensors(("layers.{i}.ffn.w1.weight",), True),
                "transformer.h.{i}.mlp.c_fc.bias": "layers.{i}.ffn.w1.bias",
                "transformer.h.{i}.mlp.c_proj.weight": Tensors(("layers.{i}.ffn.w2.weight",), True),
                "transformer.h.{i}.mlp.c_proj.bias": "layers.{i}.ffn.w2.bias",
                "transformer.ln_f.weight": "ln_final.weight",
                "transformer.ln_f.bias": "ln_final.bias",
                "lm_head.weight": "lm_head.weight",
            },
            fields={
                "vocab_size": "vocab_size",
                "n_positions": "context_length",
                "n_embd": "d_model",
                "n_layer": "n_layers",
                "n_head": "n_heads",
                "n_inner": "d_ff",
                "layer_norm_epsilon": "norm_eps",
                "tie_word_embeddings": "tie_embeddings",
            },
            fixed={"norm": "layer", "biases": "all", "position": "learned", "ffn": "gelu", "gelu_tanh": True},
            defaults={
                "n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
                "activation_function": "gelu_new", "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
            },
            only={
                "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
            },
            buffers=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
            prefix="transformer.",
            ignored=(
                "attn_pdrop", "embd_pdrop", "gradient_checkpointing", "n_ctx", "reorder_and_upcast_attn", "resid_pdrop",
                "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
                "summary_use_proj",
            ),
        ),
    )
}  # fmt: skip


def family_of(model_type: Any, what: str) -> Family:
    """The family of a config.json's model_type; ValueError lists those that are known."""
    if model_type not in FAMILIES:
        raise ValueError(f"{what}: model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
