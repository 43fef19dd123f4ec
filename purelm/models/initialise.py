"""Initial standard deviations of matrices: rules (path, leaf) -> std of a normal distribution truncated at 3 std."""

import math

from purelm.models.leaves import Leaf, Std

__all__ = ["course_init", "gpt2_init", "scaled_residual"]


def course_init(path: str, leaf: Leaf) -> float:
    """sqrt(2 / (fan_in + fan_out)) for linear layers (Glorot and Bengio 2010, eq. 16), 1 for embeddings."""
    return 1.0 if leaf.kind == "embedding" else math.sqrt(2.0 / (leaf.shape[0] + leaf.shape[1]))


def gpt2_init(path: str, leaf: Leaf) -> float:
    """0.02 for every matrix (Radford et al. 2018, GPT, section 4.1). Use with tied embeddings."""
    return 0.02


def scaled_residual(std: Std, n_layers: int) -> Std:
    """The rule `std`, divided by sqrt(2 n_layers) for matrices that write to the residual stream (GPT-2, section 2.3).

    The stream is a sum over 2 n_layers sublayers; so scaled, the std of that sum does not grow with depth.

    >>> rule = scaled_residual(gpt2_init, n_layers=8)
    >>> rule("w1", Leaf((8, 4), "matrix", "ffn")), rule("w2", Leaf((4, 8), "matrix", "ffn", residual=True))
    (0.02, 0.005)
    """

    def rule(path: str, leaf: Leaf) -> float:
        return std(path, leaf) / math.sqrt(2.0 * n_layers) if leaf.residual else std(path, leaf)

    return rule
