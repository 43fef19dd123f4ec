"""A classifier in one safetensors file: its parameters, and in the metadata its configuration and their SHA-256."""

import dataclasses
import hashlib
import json
import math
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

from purelm.curate.classifier import Classifier, Config
from purelm.curate.features import Features
from purelm.files import sync

__all__ = ["load_classifier", "save_classifier"]

KEY, FORMAT = "purelm", "classifier 1"


def save_classifier(path: str | os.PathLike, model: Classifier) -> None:
    """Write a model, under a temporary name first: the file is whole or as it was. ValueError if it is not finite."""
    path = Path(path)
    _check(str(path), model)
    params = {name: value.detach().contiguous() for name, value in model.params.items()}
    told = {"format": FORMAT, "config": dataclasses.asdict(model.cfg), "temperature": model.temperature}
    meta = {KEY: json.dumps({**told, "sha256": _digest(params)})}  # one entry: the order of several would vary
    staged = path.with_name(f".{path.name}.new-{secrets.token_hex(8)}")
    try:
        staged.write_bytes(save_bytes(params, meta))
        sync(staged)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def load_classifier(path: str | os.PathLike) -> Classifier:
    """The model of a file; ValueError that names the file where it is damaged, or another kind of file."""
    name = os.fspath(path)
    if not Path(name).is_file():
        raise ValueError(f"{name}: no such file; experiments.train_classifier makes one")
    try:
        with safe_open(name, "pt") as opened:
            text = (opened.metadata() or {}).get(KEY, "{}")
        params = load_bytes(Path(name).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{name}: damaged, or no safetensors file: {error}") from None
    try:
        told = json.loads(text)
        kind = told.get("format")
        if kind == FORMAT:
            model = Classifier(params, _config(told["config"]), float(told["temperature"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: damaged: its configuration cannot be read: {error}") from None
    if kind != FORMAT:
        raise ValueError(f"{name}: not a classifier: its format is {kind!r}, not {FORMAT!r}")
    _check(name, model)
    if _digest(params) != told.get("sha256"):
        raise ValueError(f"{name}: damaged: its numbers do not have the SHA-256 that it names")
    return model


def _config(found: dict[str, Any]) -> Config:
    return Config(tuple(found["labels"]), Features(**found["features"]), found["dimension"])


def _digest(params: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(params):
        digest.update(f"{name} {tuple(params[name].shape)} ".encode() + params[name].numpy().tobytes())
    return digest.hexdigest()


def _check(name: str, model: Classifier) -> None:
    """ValueError unless names, shapes and dtypes are those of the configuration and all numbers are finite."""
    cfg = model.cfg
    n, D = len(cfg.labels), cfg.dimension
    shapes = {"rows": (cfg.features.buckets, D or n), "bias": (n,)} | ({"output": (D, n)} if D else {})
    found = {key: tuple(value.shape) for key, value in model.params.items()}
    if found != shapes:
        raise ValueError(f"{name}: parameters {found}; its configuration has {shapes}")
    for key, value in model.params.items():
        if value.dtype != torch.float32 or not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name}: {key}: {value.dtype}; allowed: finite numbers in float32")
    if not math.isfinite(model.temperature) or model.temperature <= 0:
        raise ValueError(f"{name}: temperature={model.temperature!r}: allowed is a finite number above 0")
