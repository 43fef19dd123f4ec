"""GGUF files, llama.cpp's: weights, dequantised, and the configuration that they have with them.

    params, cfg, tokenizer = load("SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32)

Llama (SmolLM2 and Mistral are), Qwen 2.5, Qwen 3 and OLMo 2, in any format that the package `gguf` dequantises.
Parameters are those that `purelm.models.hf` reads from the same model's folder, but for what quantisation lost.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purelm import tree
from purelm.models.config import Config, RopeScaling
from purelm.models.layers import leaves
from purelm.models.leaves import Params
from purelm.tokenizer import BPE, vocab_size
from purelm.tokenizer import load as load_tokenizer
from purelm.tokenizer.formats.gguf import open_gguf

__all__ = ["ARCHITECTURES", "Architecture", "load", "load_weights"]

_OUTSIDE = {
    "token_embd.weight": "token_embeddings.weight",
    "output_norm.weight": "ln_final.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "blk.{i}.attn_q.weight": "layers.{i}.attn.q_proj.weight",
    "blk.{i}.attn_k.weight": "layers.{i}.attn.k_proj.weight",
    "blk.{i}.attn_v.weight": "layers.{i}.attn.v_proj.weight",
    "blk.{i}.attn_output.weight": "layers.{i}.attn.output_proj.weight",
    "blk.{i}.ffn_gate.weight": "layers.{i}.ffn.w1.weight",
    "blk.{i}.ffn_up.weight": "layers.{i}.ffn.w3.weight",
    "blk.{i}.ffn_down.weight": "layers.{i}.ffn.w2.weight",
}
_BEFORE = {"blk.{i}.attn_norm.weight": "layers.{i}.ln1.weight", "blk.{i}.ffn_norm.weight": "layers.{i}.ln2.weight"}
_BEHIND = {
    "blk.{i}.post_attention_norm.weight": "layers.{i}.ln1.weight",
    "blk.{i}.post_ffw_norm.weight": "layers.{i}.ln2.weight",
}
_QK_NORMS = {
    "blk.{i}.attn_q_norm.weight": "layers.{i}.attn.q_norm.weight",
    "blk.{i}.attn_k_norm.weight": "layers.{i}.attn.k_norm.weight",
}
_BIASES = {f"blk.{{i}}.attn_{x}.bias": f"layers.{{i}}.attn.{x}_proj.bias" for x in "qkv"}


@dataclass(frozen=True)
class Architecture:
    """How a general.architecture is stored."""

    names: Mapping[str, str]  # name of the tensor -> path of the leaf
    fixed: Mapping[str, Any]  # fields of Config that all its models have
    interleaved: tuple[str, ...] = ()  # tensors whose rows llama.cpp stores in the order of rope_layout "interleaved"


_FIXED = {"norm": "rms", "ffn": "swiglu", "rope_layout": "half"}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture({**_OUTSIDE, **_BLOCK, **_BEFORE}, _FIXED, ("attn_q", "attn_k")),
    "qwen2": Architecture({**_OUTSIDE, **_BLOCK, **_BEFORE, **_BIASES}, {**_FIXED, "biases": "qkv"}),
    "qwen3": Architecture({**_OUTSIDE, **_BLOCK, **_BEFORE, **_QK_NORMS}, {**_FIXED, "qk_norm": "head"}),
    "olmo2": Architecture(
        {**_OUTSIDE, **_BLOCK, **_BEHIND, **_QK_NORMS}, {**_FIXED, "qk_norm": "full", "norm_position": "output"}
    ),
}
# Keys under the architecture's name -> fields of Config, and the others that are read or change nothing.
_FIELDS = {
    "context_length": "context_length",
    "embedding_length": "d_model",
    "block_count": "n_layers",
    "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads",
    "feed_forward_length": "d_ff",
    "attention.layer_norm_rms_epsilon": "norm_eps",
}
_OTHERS = (
    "attention.key_length", "attention.sliding_window", "attention.value_length", "rope.dimension_count",
    "rope.freq_base", "rope.scaling.attn_factor", "rope.scaling.factor", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "rope.scaling.type", "vocab_size",
)  # fmt: skip


def load(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Params, Config, BPE]:
    """(params, cfg, tokenizer) of a GGUF file; errors as for `load_weights`, and for a tokenizer of another kind."""
    params, cfg = load_weights(path, dtype=dtype, device=device)
    tokenizer = load_tokenizer(path)
    if vocab_size(tokenizer) > cfg.vocab_size:
        raise ValueError(f"{path}: has {vocab_size(tokenizer)} tokens, and embeddings of {cfg.vocab_size}")
    return params, cfg, tokenizer


def load_weights(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Params, Config]:
    """(params, cfg) of a GGUF file; one tensor is dequantised at a time.

    ValueError, which begins with the file's name, names everything that is not supported or does not fit together.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"load_weights: dtype must be floating, got {dtype}")
    what = str(path)
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    reader = open_gguf(path)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    stored = {t.name: t for t in reader.tensors}
    cfg = _config(values, stored, what)
    return _read(stored, ARCHITECTURES[values["general.architecture"]], cfg, what, dtype, device), cfg


def _config(values: Mapping[str, Any], stored: Mapping[str, Any], what: str) -> Config:
    name = values.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(f"{what}: architecture {name!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    own = {key.removeprefix(f"{name}."): x for key, x in values.items() if key.startswith(f"{name}.")}
    if unknown := sorted({*own} - {*_FIELDS} - {*_OTHERS}):
        raise ValueError(f"{what}: {', '.join(f'{name}.{key}' for key in unknown)}: not supported")
    missing = sorted({*_FIELDS} - {*own} - {"attention.head_count_kv"})
    missing += [] if "token_embd.weight" in stored else ["token_embd.weight"]
    if missing:
        raise ValueError(f"{what}: lacks {', '.join(missing)}")
    fields = {ours: _plain(own[theirs]) for theirs, ours in _FIELDS.items() if theirs in own}
    heads = fields["n_heads"]
    odd = [key for key in ("attention.value_length", "rope.dimension_count")
           if own.get(key, _width(own, fields, heads)) != _width(own, fields, heads)]  # fmt: skip
    if odd:
        raise ValueError(f"{what}: {', '.join(odd)} other than attention.key_length is not supported")
    window = own.get("attention.sliding_window")
    try:
        return Config(
            vocab_size=int(stored["token_embd.weight"].shape[1]),
            head_dim=_width(own, fields, heads),
            rope_theta=_plain(own.get("rope.freq_base", 10000.0)),
            rope_scaling=_scaling(own, stored, what),
            window=None if window is None else int(window) - 1,
            tie_embeddings="output.weight" not in stored,
            **fields,
            **ARCHITECTURES[name].fixed,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from None


def _width(own: Mapping[str, Any], fields: Mapping[str, Any], heads: Any) -> int:
    """Features of a head."""
    given = own.get("attention.key_length")
    return int(given) if given is not None else int(fields["d_model"]) // max(int(heads), 1)


def _plain(x: Any) -> Any:
    """An int, or the shortest decimal that is x in float32: 1e-05 is stored as 9.999999747378752e-06."""
    return float(str(np.float32(x))) if isinstance(x, float) else int(x)


def _scaling(own: Mapping[str, Any], stored: Mapping[str, Any], what: str) -> RopeScaling | None:
    if "rope_freqs.weight" in stored:
        raise ValueError(
            f"{what}: rope_freqs.weight: frequencies as a tensor are not supported; models.hf reads the model's folder"
        )
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{what}: rope.scaling.type {kind!r} is not supported; supported are linear and yarn")
    if "rope.scaling.factor" not in own:
        raise ValueError(f"{what}: lacks rope.scaling.factor")
    length = own.get("rope.scaling.original_context_length", own["context_length"])
    factor = own.get("rope.scaling.attn_factor")
    return RopeScaling(
        kind,
        _plain(float(own["rope.scaling.factor"])),
        int(length) if kind == "yarn" else None,
        attention_factor=None if factor is None else _plain(float(factor)),
    )


def _read(
    stored: Mapping[str, Any],
    architecture: Architecture,
    cfg: Config,
    what: str,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Params:
    import gguf

    table = leaves(cfg)
    named = {
        name.format(i=i): path.format(i=i)
        for name, path in architecture.names.items()
        for i in range(cfg.n_layers if "{i}" in name else 1)
        if path.format(i=i) in table
    }
    problems = [f"lacks {', '.join(missing)}"] if (missing := sorted({*named} - {*stored})) else []
    unknown = sorted({*stored} - {*named})
    problems += [f"has {', '.join(unknown)}, unknown to the architecture"] if unknown else []
    for name, path in named.items():
        if name in stored and (shape := tuple(int(n) for n in stored[name].shape[::-1])) != table[path].shape:
            problems.append(f"{name} has shape {shape}, and the metadata say {table[path].shape}")
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems)}")
    flat: dict[str, Tensor] = {}
    for name, path in named.items():
        t = stored[name]
        try:
            values = np.array(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"{what}: {name}: {t.tensor_type.name} cannot be dequantised ({error})") from None
        x = torch.from_numpy(values).view(table[path].shape)
        if name.split(".")[-2] in architecture.interleaved:  # features 2j, 2j + 1 of a head become j, K/2 + j
            x = x.unflatten(0, (-1, cfg.head_width // 2, 2)).transpose(1, 2).flatten(0, 2)
        flat[path] = torch.empty(x.shape, dtype=dtype, device=device).copy_(x)
    return tree.from_flat({path: flat[path] for path in table})
