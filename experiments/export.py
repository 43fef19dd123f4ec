"""The model of a run as open weights."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from purelm import tree
from purelm.models import hf, transformer
from purelm.tokenizer import BPE
from purelm.tokenizer.chat import Chat

__all__ = ["export"]


def export(
    run: Path, params: Any, cfg: transformer.Config, bpe: BPE, fields: Mapping[str, Any], chat: Chat | None
) -> None:
    """export/ of a run, in place of an earlier one: a folder that transformers' from_pretrained loads."""
    new, place = run / "export.new", run / "export"
    shutil.rmtree(new, ignore_errors=True)
    hf.save(new, tree.to(params, "cpu"), cfg, bpe, fields=dict(fields), chat=chat)
    shutil.rmtree(place, ignore_errors=True)
    new.rename(place)
