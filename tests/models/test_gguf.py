"""GGUF files. Oracle: the tensors that the package gguf wrote, and transformers' models with the same weights."""

import gguf
import numpy as np
import pytest
import torch

from purelm import tree
from purelm.models import hf, transformer
from purelm.models.gguf import ARCHITECTURES, load_weights
from tests.models.hf.small import made

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
IDS = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))
FILES = {"llama": "llama", "llama tied": "llama tied, llama3", "qwen2": "qwen2", "qwen3": "qwen3", "olmo2": "olmo2"}
Q8 = gguf.GGMLQuantizationType.Q8_0


def rows_of_llama_cpp(x, n_heads):
    """Halves of a head's features in turn, as its converter of Llama writes q and k (the inverse of what is read)."""
    return x.reshape(n_heads, 2, x.shape[0] // n_heads // 2, -1).swapaxes(1, 2).reshape(x.shape)


def in_blocks(x):
    """Whether Q8_0 can hold it: rows of whole blocks of 32."""
    return x.ndim == 2 and x.shape[1] % 32 == 0


def written(path, name, kind=None, change=lambda keys, tensors: None):
    """The parameters of transformers' small model as a GGUF file; (params, cfg) as hf reads them."""
    model = made(FILES[name])
    model.save_pretrained(path / "hf")
    params, cfg = hf.load_weights(path / "hf")
    cfg = transformer.Config(**{**cfg.__dict__, "rope_scaling": None})
    arch = model.config.model_type
    keys = {
        "context_length": cfg.context_length, "embedding_length": cfg.d_model, "block_count": cfg.n_layers,
        "feed_forward_length": cfg.d_ff, "attention.head_count": cfg.n_heads,
        "attention.head_count_kv": cfg.kv_heads, "attention.layer_norm_rms_epsilon": cfg.norm_eps,
        "rope.freq_base": cfg.rope_theta, "attention.key_length": cfg.head_width,
    }  # fmt: skip
    flat = dict(zip(tree.paths(params), tree.leaves(params), strict=True))
    tensors = {}
    for stored, leaf in ARCHITECTURES[arch].names.items():
        for i in range(cfg.n_layers if "{i}" in stored else 1):
            if (at := leaf.format(i=i)) in flat:
                x = flat[at].numpy()
                part = stored.split(".")[-2]
                if arch == "llama" and part in ("attn_q", "attn_k"):
                    x = rows_of_llama_cpp(x, cfg.n_heads if part == "attn_q" else cfg.kv_heads)
                tensors[stored.format(i=i)] = x
    change(keys, tensors)
    writer = gguf.GGUFWriter(path / "model.gguf", arch)
    for key, value in keys.items():
        key = key if key.startswith("general") else f"{arch}.{key}"
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    for stored, x in tensors.items():
        if kind is not None and in_blocks(x):
            writer.add_tensor(stored, gguf.quants.quantize(np.ascontiguousarray(x), kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return params, cfg


@pytest.mark.parametrize("name", FILES)
def test_the_parameters_of_the_folder(tmp_path, name):
    """fp32: to the last bit, with the Config that the folder has."""
    params, cfg = written(tmp_path, name)
    found, same = load_weights(tmp_path / "model.gguf")
    assert same == cfg
    assert tree.paths(found) == tree.paths(params)
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(found), tree.leaves(params), strict=True))


def test_quantised(tmp_path):
    """Oracle: the package's own dequantisation of what was written; in bf16, rounded once."""
    params, cfg = written(tmp_path, "qwen3", Q8)
    found, same = load_weights(tmp_path / "model.gguf", dtype=torch.bfloat16)
    assert same == cfg
    for path, x, y in zip(tree.paths(params), tree.leaves(params), tree.leaves(found), strict=True):
        wanted = x.numpy()
        if in_blocks(x):
            wanted = gguf.quants.dequantize(gguf.quants.quantize(wanted, Q8), Q8)
        assert torch.equal(torch.from_numpy(wanted).to(torch.bfloat16), y), path


WRONG = {
    "unknown key": (lambda k, t: k.update({"expert_count": 8}), "llama.expert_count: not supported"),
    "missing key": (lambda k, t: k.pop("block_count"), "lacks block_count"),
    "unknown tensor": (
        lambda k, t: t.update({"blk.0.extra.weight": np.ones((2, 2), np.float32)}), "has blk.0.extra.weight, unknown"
    ),
    "missing tensors": (
        lambda k, t: [t.pop(f"blk.{i}.ffn_up.weight") for i in (0, 2)], "lacks blk.0.ffn_up.weight, blk.2.ffn_up.weight"
    ),
    "shape": (
        lambda k, t: t.update({"output_norm.weight": np.ones(8, np.float32)}),
        r"output_norm.weight has shape \(8,\), and the metadata say \(32,\)",
    ),
    "frequencies": (
        lambda k, t: t.update({"rope_freqs.weight": np.ones(4, np.float32)}), "rope_freqs.weight: frequencies as a ten"
    ),
    "scaling": (lambda k, t: k.update({"rope.scaling.type": "longrope"}), "rope.scaling.type 'longrope' is not supp"),
    "head": (lambda k, t: k.update({"rope.dimension_count": 4}), "rope.dimension_count other than attention"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_supported_is_named(tmp_path, name):
    change, message = WRONG[name]
    written(tmp_path, "llama", change=change)
    with pytest.raises(ValueError, match=message) as error:
        load_weights(tmp_path / "model.gguf")
    assert str(error.value).startswith(str(tmp_path))


def test_broken_files(tmp_path):
    written(tmp_path, "qwen2")
    file = tmp_path / "model.gguf"
    data = file.read_bytes()
    for cut in (0, 3, 20, 300, len(data) - 5000):
        file.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"model\.gguf: not a GGUF file, or cut short"):
            load_weights(file)
    file.write_bytes(data.replace(b"qwen2", b"rwkv7", 1))
    with pytest.raises(ValueError, match="architecture 'rwkv7' is not supported; supported are llama, qwen2"):
        load_weights(file)
    with pytest.raises(ValueError, match=r"none.gguf: no such file"):
        load_weights(tmp_path / "none.gguf")
    with pytest.raises(ValueError, match=r"dtype must be floating, got torch.int8"):
        load_weights(file, dtype=torch.int8)
