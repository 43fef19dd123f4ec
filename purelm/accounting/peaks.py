"""Peak FLOP/s of devices, and the share of the peak that a run reaches."""

import re

import torch

__all__ = [
    "mfu",
    "peak_flops",
    "train_seconds",
]


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation, flops / (seconds * peak) (Chowdhery et al., 2204.02311, appendix B).

    flops: useful FLOPs, without recomputation. peak: FLOP/s.
    """
    return flops / seconds / peak


def train_seconds(flops: float, peak: float, mfu: float) -> float:
    """Seconds for `flops` FLOPs at utilisation `mfu`, in (0, 1], of a peak in FLOP/s: flops / (peak * mfu)."""
    if not 0.0 < mfu <= 1.0:
        raise ValueError(f"mfu must be in (0, 1], got {mfu}")
    return flops / (peak * mfu)


# Peak FLOP/s of dense matrix products, by a pattern for torch.cuda.get_device_name and by precision; first match wins.
# NVIDIA states most figures with 2:4 sparsity, and half of these are given here. Sources are NVIDIA's unless named.
_HOPPER = {"bf16": 989.4e12, "fp16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12, "fp8": 1978.9e12}


_HOPPER_NVL = {"bf16": 835.5e12, "fp16": 835.5e12, "tf32": 417.5e12, "fp32": 60e12, "fp8": 1670.5e12}


_AMPERE = {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12}


_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # HGX B200: 36 PFLOP/s bf16 with sparsity for 8 (data sheet, 2024). GB200 is clocked higher and differs by system.
    (r"\bB200\b", {"bf16": 2250e12, "fp16": 2250e12, "tf32": 1125e12, "fp8": 4500e12}),
    (r"\bH200 NVL\b", _HOPPER_NVL),  # H200 data sheet (2024)
    (r"\bH100 NVL\b", _HOPPER_NVL),  # H100 data sheet (2023)
    # H100 architecture white paper (2022), table 2: PCIe, and SXM5 (_HOPPER), whose device names end in HBM3.
    (r"\bH100 PCIe\b", {"bf16": 756e12, "fp16": 756e12, "tf32": 378e12, "fp32": 51.2e12, "fp8": 1513e12}),
    (r"\b(H100|H200|GH200|H800)\b", _HOPPER),
    (r"\b(A100|A800)\b", _AMPERE),  # A100 data sheet (2021)
    (r"\bL40S\b", {"bf16": 362.05e12, "fp16": 362.05e12, "tf32": 183e12, "fp32": 91.6e12, "fp8": 733e12}),
    (r"\bL4\b", {"bf16": 121e12, "fp16": 121e12, "tf32": 60e12, "fp32": 30.3e12, "fp8": 242e12}),  # data sheet (2023)
    (r"\bA10\b", {"bf16": 125e12, "fp16": 125e12, "tf32": 62.5e12, "fp32": 31.2e12}),  # A10 data sheet (2021)
    (r"\bV100-SXM2\b", {"fp16": 125e12, "fp32": 15.7e12}),  # V100 data sheet (2020): no bf16
    # Ada and Ampere GA102 white papers: the figures for accumulation in fp32.
    (r"\bRTX 4090\b", {"bf16": 165.2e12, "fp16": 165.2e12, "tf32": 82.6e12, "fp32": 82.6e12}),
    (r"\bRTX 3090\b", {"bf16": 71e12, "fp16": 71e12, "tf32": 35.6e12, "fp32": 35.6e12}),
    (r"\bMI300X\b", {"bf16": 1307.4e12, "fp16": 1307.4e12, "fp32": 163.4e12, "fp8": 2614.9e12}),  # AMD data sheet
)


_PRECISIONS = ("bf16", "fp16", "tf32", "fp32", "fp8")


def peak_flops(device: torch.device | str, precision: str = "bf16") -> float | None:
    """Peak dense FLOP/s of a device, or of a device name, in bf16, fp16, tf32, fp32 or fp8; None if not in the table.

    CPUs are never in the table: their peak depends on clock and core count, which their names do not tell.

    >>> peak_flops("NVIDIA H100 80GB HBM3")
    989400000000000.0
    """
    if precision not in _PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(_PRECISIONS)}, got {precision!r}")
    name = str(device)
    if isinstance(device, torch.device) or re.fullmatch(r"(cpu|cuda)(:\d+)?", name):
        if torch.device(device).type != "cuda":
            return None
        name = torch.cuda.get_device_name(device)
    for pattern, peaks in _PEAKS:
        if re.search(pattern, name):
            return peaks.get(precision)
    return None
