"""Shared fixtures: where real text may lie, hypothesis profile, and one torch thread per worker."""

import getpass
import os
import tempfile
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels then run on the CPU, step by step
    os.environ["TRITON_INTERPRET"] = "1"

# Inductor's cache of compiled code does not know of this variable (torch 2.11-2.13): code for wider vectors than it
# allows would be taken from there, and not compile.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    cache = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))

from hypothesis import HealthCheck, settings

# Timings of a shared machine are no property of the code: no deadline. Derandomised so that a red run can be repeated.
settings.register_profile(
    "purelm", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("purelm")

SHARED_DATA = Path(os.environ.get("PURELM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real text (../shared/data beside the project, or $PURELM_DATA); skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real text not found at {SHARED_DATA} (set PURELM_DATA)")
    return SHARED_DATA


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_worker():
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)
