"""What a device multiplies natively.

Oracles: hardware without units for bf16 (AVX2, to which oneDNN is limited in a process of its own), and stop-watches
that are given.
"""

import os
import subprocess
import sys

import pytest
import torch

from purelm import devices
from purelm.devices import multiplies_natively
from purelm.optim import orthogonalize


def test_fp32_is_the_measure():
    assert multiplies_natively(torch.float32, "cpu") and multiplies_natively(torch.float64, torch.device("cpu"))


@pytest.mark.parametrize(("ratio", "native"), [(0.5, True), (1.1, True), (2.7, False), (60.0, False)])
def test_decided_by_the_clock(monkeypatch, ratio, native):
    """Whatever the CPU: ratios as AMX or bf16 units, fp32 speed, AVX-512 without them, and scalar loops have them."""
    devices._measured.cache_clear()
    asked = []

    def seconds(x, device):
        asked.append(x.dtype)
        return 1e-3 * (ratio if x.dtype == torch.bfloat16 else 1.0) * (1 + 0.3 * (len(asked) % 3 == 0))

    monkeypatch.setattr(devices, "_seconds", seconds)
    try:
        assert multiplies_natively(torch.bfloat16, "cpu") == native
        n = len(asked)
        assert multiplies_natively(torch.bfloat16, torch.device("cpu")) == native and len(asked) == n  # measured once
    finally:
        devices._measured.cache_clear()


def test_muon_takes_what_is_native():
    x = torch.randn(5, 3)
    right = torch.bfloat16 if multiplies_natively(torch.bfloat16, "cpu") else torch.float32
    assert orthogonalize(x).dtype == right
    compiled = torch.compile(orthogonalize, backend="eager", fullgraph=True)
    assert compiled(x).dtype == right


def test_without_units_for_bf16():
    """The gap is 30 to 60 times there, so that a busy machine finds it too."""
    code = """
import torch
from purelm.devices import multiplies_natively
from purelm.optim import orthogonalize
assert not multiplies_natively(torch.bfloat16, "cpu")
assert orthogonalize(torch.randn(3, 5)).dtype == torch.float32
"""
    limited = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **limited}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
