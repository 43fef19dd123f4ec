"""experiments.bench.fsdp_host at toy size. Oracle: its rows, of each other."""

import json

import pytest

from tests.dist import processes


def test_rows(tmp_path):
    flags = ["--n-layers", "2", "--n-ranks", "3", "--steps", "2", "--no-compile", "--json", tmp_path / "rows.json"]
    done = processes.under_torchrun("experiments.bench.fsdp_host", *flags, n_ranks=1)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, sharded, layer = json.loads((tmp_path / "rows.json").read_text())
    assert whole["peer"] == "nn.Module" and sharded["peer"] == layer["peer"] == "fully_shard"
    for name in ("value", "peer_value"):
        assert layer[name] == pytest.approx(1e3 * (sharded[name] - whole[name]) / 2)


def test_what_cannot_be_shared_is_said():
    done = processes.under_torchrun("experiments.bench.fsdp_host", "--n-ranks", "1", n_ranks=1)
    assert done.returncode == 2 and "error: two ranks, a layer and a step are least: 1 ranks" in done.stderr
