"""A model to start from: open weights, a GGUF file, or a run."""

from pathlib import Path
from typing import Any

import torch

from experiments.generate import load_run
from purelm.models import gguf, hf, transformer
from purelm.tokenizer import BPE
from purelm.tokenizer import load as load_tokenizer

__all__ = ["open_model"]


def open_model(
    model: Path, tokenizer: Path | None, device: torch.device
) -> tuple[Any, transformer.Config, BPE]:
    """(params in fp32, configuration, tokenizer) of a folder of open weights, a .gguf file or a run's folder."""
    given = load_tokenizer(tokenizer, text_only=True) if tokenizer is not None else None
    if model.suffix == ".gguf":
        return gguf.load(model, device=device) if given is None else (*gguf.load_weights(model, device=device), given)
    if (model / "checkpoints").is_dir():
        params, cfg, bpe = load_run(model, None, device)
        return params, cfg, given or bpe
    if given is not None:
        return *hf.load_weights(model, dtype=torch.float32, device=device), given
    return hf.load(model, dtype=torch.float32, device=device)
