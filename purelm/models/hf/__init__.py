"""Open weights: folders of Hugging Face's form, read into `(params, cfg, tokenizer)` and written.

    params, cfg, tokenizer = load("SmolLM2-135M-Instruct", dtype=torch.float32)
    model = transformer.make(cfg)
    logits_BTV = model.apply(params, tokens_BT)
    save("mine", params, cfg, tokenizer)      # transformers' from_pretrained("mine") loads it; chat=load_chat(...) too

Llama 3 (SmolLM2 is one), Mistral, Qwen 2.5, Qwen 3, OLMo 2, OLMo 3 and GPT-2. Nothing is downloaded. What a table
(`families.FAMILIES`) does not know is refused by name: an architecture, a field that could change the result, a tensor.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from purelm import tree
from purelm.files import staging
from purelm.models.config import Config
from purelm.models.hf.configs import from_json, to_json
from purelm.models.hf.families import FAMILIES, Family
from purelm.models.hf.weights import Stored, files_of, read, stored_by, write
from purelm.models.layers import leaves
from purelm.models.leaves import Params, check_params
from purelm.tokenizer import BPE, token_to_id, vocab_size
from purelm.tokenizer import load as load_tokenizer
from purelm.tokenizer import save as save_tokenizer
from purelm.tokenizer.chat import TOKENS, Chat

__all__ = ["FAMILIES", "Family", "chat_lacks", "load", "load_weights", "save", "stored_by", "with_layout"]


def load(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    ignore: Sequence[str] = (),
) -> tuple[Params, Config, BPE]:
    """(params, cfg, tokenizer) of a folder with config.json, safetensors files and tokenizer.json.

    One tensor is read at a time, so that hardly more memory is taken than by the parameters.

    Args:
        dtype: of the parameters; None: that of the files.
        ignore: fields of config.json that are unknown and are to be passed over.
    ValueError, which begins with the file's name, for what is not supported or does not fit together.
    """
    folder = Path(path)
    params, cfg = load_weights(folder, dtype=dtype, device=device, ignore=ignore)
    file = folder / "tokenizer.json"
    if not file.exists():
        raise ValueError(f"{folder}: has no tokenizer.json; load_weights(path) reads the weights alone")
    tokenizer = load_tokenizer(file, text_only=True)
    if vocab_size(tokenizer) > cfg.vocab_size:
        raise ValueError(
            f"{file}: has ids up to {vocab_size(tokenizer) - 1}, and config.json says vocab_size {cfg.vocab_size}"
        )
    return params, cfg, tokenizer


def load_weights(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    ignore: Sequence[str] = (),
) -> tuple[Params, Config]:
    """(params, cfg) of such a folder; arguments and errors as for `load`."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"load: dtype must be floating or None, got {dtype}")
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; nothing is downloaded here")
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder}: has no config.json") from None
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a JSON object")
    cfg = from_json(content, str(file), ignore)
    family = FAMILIES[content["model_type"]]
    return read(Stored(files_of(folder)), family, cfg, str(folder), dtype, device), cfg


def save(
    path: str | os.PathLike,
    params: Params,
    cfg: Config,
    tokenizer: BPE | None = None,
    *,
    model_type: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    fields: dict[str, Any] | None = None,
    chat: Chat | None = None,
) -> None:
    """Writes a new folder that transformers loads: config.json, safetensors files and, if given, tokenizer.json.

    It appears whole or not at all; a folder that is not empty is refused. Rotary features are put in the order of
    halves, whatever cfg.rope_layout is (`with_layout`).

    Args:
        model_type: a key of FAMILIES; None: the first family that has everything of cfg. ValueError says what it lacks.
        dtype: of the files; None: that of the parameters.
        max_shard_bytes: size of one file of several.
        fields: more fields of config.json, such as {"eos_token_id": 2}.
        chat: written as chat_template.jinja and, with its tokens, tokenizer_config.json; the ids of these tokens go
            into config.json, unless fields has them. They must be special tokens of the tokenizer.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder; save writes a new one")
    if max_shard_bytes < 1:
        raise ValueError(f"save: max_shard_bytes must be at least 1, got {max_shard_bytes}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"save: dtype must be floating or None, got {dtype}")
    check_params(params, leaves(cfg))
    content = to_json(cfg, model_type)
    family = FAMILIES[content["model_type"]]
    dtypes = {dtype} if dtype is not None else {x.dtype for x in tree.leaves(params)}
    if len(dtypes) == 1:
        content["dtype"] = str(next(iter(dtypes))).removeprefix("torch.")
    if tokenizer is not None and vocab_size(tokenizer) > cfg.vocab_size:
        raise ValueError(f"save: the tokenizer has {vocab_size(tokenizer)} ids, and cfg.vocab_size is {cfg.vocab_size}")
    if chat is not None:
        if tokenizer is None:
            raise ValueError("save: chat needs a tokenizer, whose special tokens its template writes")
        if lacks := chat_lacks(tokenizer, chat):
            raise ValueError(f"save: chat names {', '.join(lacks)}, no special token of the tokenizer")
        content |= {f"{name}_id": token_to_id(tokenizer, text) for name in TOKENS if (text := getattr(chat, name))}
    if cfg.position == "rope":
        params, cfg = with_layout(params, cfg, "half")
    with staging(folder.parent) as staged:
        made = staged / "made"
        made.mkdir()
        (made / "config.json").write_text(json.dumps({**content, **(fields or {})}, indent=2) + "\n")
        write(made, params, family, cfg, dtype, max_shard_bytes)
        if tokenizer is not None:
            save_tokenizer(tokenizer, made / "tokenizer.json")
        if chat is not None:
            _write_chat(made, chat, cfg)
        made.rename(folder)


def _write_chat(folder: Path, chat: Chat, cfg: Config) -> None:
    (folder / "chat_template.jinja").write_text(chat.template, encoding="utf-8", newline="")
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "model_max_length": cfg.context_length,
        "clean_up_tokenization_spaces": False,
        **{name: getattr(chat, name) for name in TOKENS},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")


def chat_lacks(tokenizer: BPE, chat: Chat) -> list[str]:
    """The tokens that a chat names and that are no special tokens of the tokenizer, as "eos_token '</s>'"."""
    named = {name: getattr(chat, name) for name in TOKENS}
    return [f"{name} {text!r}" for name, text in named.items() if text and text not in tokenizer.special_tokens]


def with_layout(params: Params, cfg: Config, layout: Any) -> tuple[Params, Config]:
    """The same model with the other `Config.rope_layout`: the rows of q and k of each head in another order.

    Feature 2j of "interleaved" is feature j of "half", and 2j + 1 is K/2 + j.
    """
    if cfg.position != "rope":
        raise ValueError(f'with_layout: cfg.position must be "rope", got {cfg.position!r}')
    new = replace(cfg, rope_layout=layout)
    if layout == cfg.rope_layout:
        return params, cfg
    K = cfg.head_width
    order = torch.arange(K).view(-1, 2).T.reshape(-1) if layout == "half" else torch.arange(K).view(2, -1).T.reshape(-1)

    def ordered(path: str, x: Tensor) -> Tensor:
        name = path.split(".")
        if len(name) < 3 or name[-3] != "attn" or name[-2] not in ("q_proj", "k_proj", "q_norm", "k_norm"):
            return x
        return x.unflatten(0, (-1, K))[:, order.to(x.device)].flatten(0, 1)

    return tree.map_with_path(ordered, params), new
