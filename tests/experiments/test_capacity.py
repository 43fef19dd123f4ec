"""Memory that a run needs at the least. Oracles: counts by hand, tensors that are held, files written by hand."""

import doctest

import pytest
import torch

from experiments import capacity
from experiments.capacity import available, check_disk, check_fits, least_bytes
from purelm import tree
from purelm.models import transformer
from purelm.optim import adamw
from purelm.train import init_state

CFG = transformer.Config(vocab_size=50, context_length=8, d_model=16, n_layers=2, n_heads=2)
CPU = torch.device("cpu")


def test_examples():
    assert doctest.testmod(capacity).failed == 0 < doctest.testmod(capacity).attempted


def test_never_more_than_what_a_state_and_its_gradients_hold():
    """Parameters, two moments and gradients, in fp32, but for the optimizer's count of steps."""
    params = transformer.init(torch.tensor([0, 0]), CFG)
    state = init_state(params, adamw())
    held = tree.n_bytes(state.params) * 2 + tree.n_bytes(state.opt_state)
    without_inputs = least_bytes(CFG, 1) - CFG.n_layers * 8 * 16 * 4
    assert held - 8 <= without_inputs <= held


def test_shares_of_several_processes():
    n = least_bytes(CFG, 0, moments=0) / 8
    assert least_bytes(CFG, 0, param_share=1 / 4, state_share=1 / 4) == 16 * n / 4
    assert least_bytes(CFG, 0, moments=1, state_share=1 / 2) == (8 + 2) * n


def test_what_cannot_fit_is_refused_by_its_sizes(monkeypatch):
    monkeypatch.setattr(capacity, "available", lambda device: 1 << 20)
    check_fits(CFG, 4, CPU)
    with pytest.raises(ValueError, match=r"d_model 16, .*batch of 4,096 sequences: training needs .* GiB or more, cpu"):
        check_fits(CFG, 4096, CPU)
    need = least_bytes(CFG, 4)
    monkeypatch.setattr(capacity, "available", lambda device: int(need * 1.5))
    with pytest.raises(ValueError, match="training needs"):
        check_fits(CFG, 4, CPU, processes=2)
    monkeypatch.setattr(capacity, "available", lambda device: None)  # nothing says how much there is
    check_fits(CFG, 10**12, CPU)


def test_the_least_of_the_system_and_the_control_group_counts(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    monkeypatch.setattr(capacity, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(capacity, "CGROUPS", tmp_path)
    assert available(CPU) == 5000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100000\n")
    assert available(CPU) == 5000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    assert available(CPU) == 1_000_000 - 700_000 + 100_000
    monkeypatch.setattr(capacity, "MEMINFO", tmp_path / "absent")
    (tmp_path / "memory.max").unlink()
    assert available(CPU) is None


def test_disk(tmp_path):
    check_disk(1000, tmp_path / "not" / "there", "x")
    with pytest.raises(ValueError, match=r"stories 5 needs 9.31e.* GiB or so on disk"):
        check_disk(1e18, tmp_path, "stories 5")
