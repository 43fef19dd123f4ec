"""Measures of a model: perplexity and bits per byte."""

from purelm.evals.perplexity import Score, bits_per_byte, score

__all__ = ["Score", "bits_per_byte", "score"]
