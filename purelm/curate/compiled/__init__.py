"""The loops of the quality rules as machine code, by numba: the shared pass, and n-grams.

Results equal those of the plain Python in `words` and `repetition`. The modules import numba (the extra `fast`): import
them inside functions only.
"""
