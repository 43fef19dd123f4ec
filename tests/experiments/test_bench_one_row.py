"""experiments.bench.one_row with a small model. Oracle: its rows, of each other."""

import math

import pytest
import torch

from experiments.bench import one_row
from purelm import random
from purelm.models import hf, transformer
from purelm.tokenizer import make

pytest.importorskip("transformers")


def test_rows(tmp_path, capfd):
    cfg = transformer.Config(vocab_size=256, context_length=32, d_model=32, n_layers=1, n_heads=2)
    vocab = {i: bytes([i]) for i in range(256)}
    hf.save(tmp_path / "model", transformer.init(random.key(0), cfg), cfg, make(vocab, []))
    args = one_row.Args(tmp_path / "model", prompt=5, new_tokens=4, rounds=1, device="cpu")
    rows = one_row.measure(args, torch.device("cpu"))
    assert [r["unit"] for r in rows] == ["tokens/s", ""] * 2
    assert all(math.isfinite(r["value"]) and r["value"] > 0 for r in rows)
    assert rows[0]["peer_value"] == rows[2]["peer_value"] > 0
    assert capfd.readouterr().err.count("tokens are those of transformers") == 3
