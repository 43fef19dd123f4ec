"""Measured tiles: made by `python -m experiments.tune_kernels --write`, not by hand."""

# (architecture, pass, padded head dim, bytes of an element, causal) -> (m, n, warps, stages)
TABLE: dict[tuple[str, str, int, int, bool], tuple[int, int, int, int]] = {
    ("sm90", "backward_kv", 64, 2, False): (128, 64, 4, 2),
    ("sm90", "backward_kv", 64, 2, True): (128, 64, 4, 2),
    ("sm90", "backward_kv", 128, 2, False): (64, 64, 4, 2),
    ("sm90", "backward_kv", 128, 2, True): (64, 64, 4, 2),
    ("sm90", "backward_q", 64, 2, False): (128, 64, 8, 4),
    ("sm90", "backward_q", 64, 2, True): (64, 64, 4, 2),
    ("sm90", "backward_q", 128, 2, False): (128, 64, 8, 4),
    ("sm90", "backward_q", 128, 2, True): (64, 64, 4, 2),
    ("sm90", "forward", 64, 2, False): (64, 128, 4, 3),
    ("sm90", "forward", 64, 2, True): (64, 128, 4, 2),
    ("sm90", "forward", 128, 2, False): (128, 64, 4, 2),
    ("sm90", "forward", 128, 2, True): (64, 64, 4, 3),
}
