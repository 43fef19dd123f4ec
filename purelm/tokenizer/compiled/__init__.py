"""The compiled engine: the loops of splitting, merging, encoding, counting and training as machine code, by numba.

Results equal those of the plain Python next door; `purelm.tokenizer.engine` says when these are used. All modules but
`classes` import numba (the extra `fast`): import them inside functions only. The machine code is kept on disk, so a
machine compiles once (some seconds) and a process loads it in under a second. Little-endian machines only: the loops
read words of 8 bytes whose first byte must be the lowest.
"""
