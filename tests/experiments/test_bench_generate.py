"""experiments.bench.generate at toy size. Oracle: its rows, of each other; the number of tokens that were asked for."""

import json
import math

import torch

from experiments.bench import generate
from purelm import random
from purelm.models import transformer
from tests.dist import processes


def test_rows(tmp_path):
    flags = [
        "--device", "cpu", "--size", "tiny", "--prompts", "5", "--new-tokens", "6", "--batch-size", "2",
        "--longest", "20", "--warm", "0", "--rounds", "1", "--no-peer", "--json", tmp_path / "rows.json",
    ]  # fmt: skip
    done = processes.under_torchrun("experiments.bench.generate", *flags, n_ranks=1)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [r["unit"] for r in rows] == ["tokens/s", ""] * 3
    assert all(math.isfinite(r["value"]) and r["value"] > 0 for r in rows)
    assert rows[0]["peer"] == "transformers" and rows[0]["peer_value"] is None


def test_what_a_run_did():
    """By hand: without stops all tokens are generated; two rows at a time need half of four rows' steps."""
    cfg = transformer.Config(vocab_size=64, context_length=32, d_model=32, n_layers=1, n_heads=2)
    model = transformer.make(cfg)
    params = model.init(random.key(0))
    task = generate.Task("", [torch.tensor([1] * n) for n in (3, 4, 5, 6)], 4, 2, [])
    for refill in (True, False):
        work = generate.ours(model, params, task, refill, None, torch.device("cpu"), {})
        assert work.tokens == 16 and work.steps == 6
        assert work.kv_tokens == sum(n + j for n in (3, 4, 5, 6) for j in (1, 2, 3))
