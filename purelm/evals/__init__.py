"""Measures of a model: perplexity and bits per byte here; in modules of their own, question sets with graded answers
(`tasks`), worked examples before a question (`shots`), instructions without a known answer (`open_ended`), judges of
those (`judges`), and intervals, pass@k and maj@k (`accuracy`).
"""

from purelm.evals.perplexity import Score, bits_per_byte, score

__all__ = ["Score", "bits_per_byte", "score"]
