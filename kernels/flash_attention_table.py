"""Measured tiles: made by `python -m experiments.tune_kernels --write`, not by hand."""

# (architecture, pass, padded head dim, bytes of an element, causal) -> (m, n, warps, stages)
TABLE: dict[tuple[str, str, int, int, bool], tuple[int, int, int, int]] = {}
