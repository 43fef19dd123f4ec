"""Which engine does the work: plain Python, or the machine code of `purelm.tokenizer.compiled`. `choose` is the rule.

Both engines give equal results; only time is at stake. The machine code is faster by an order of magnitude, but a
process must load it first, which takes about a second (some seconds more the first time on a machine, which compiles
it). So it is used from the amount of work on at which loading it has paid, and a small input never waits for it.
"""

import importlib.util
import sys
from typing import Literal

from purelm.caches import memo
from purelm.tokenizer.patterns import Pattern, family, known_family

Task = Literal["encode", "count", "merge"]

# Bytes of input that take Python about as long as loading the machine code: of text to "encode" or to "count" the
# pre-tokens of, of distinct pre-tokens to learn merges from ("merge"; a superlinear task).
PAYS_FROM: dict[Task, int] = {"encode": 8_000_000, "count": 8_000_000, "merge": 400_000}


def choose(engine: str, task: Task, n_bytes: int, pattern: Pattern | None = None) -> Literal["python", "numba"]:
    """The engine for a task on an input of `n_bytes`: what `engine` asks for, or by size where it is "auto".

    "auto" is "numba" for at least PAYS_FROM[task] bytes, where numba is installed, the machine is little-endian, and
    `pattern` (None for a task without one) is one that the compiled splitter knows; else it is "python". Nothing else
    counts: not what was called before, and not whether the machine code is loaded already. So a program that encodes
    many small texts should ask for "numba" itself, or hand them over at once (`encode_iterable`, `encode_documents`).

    Raises ValueError for another engine and for a pattern that "numba" cannot split, ImportError where "numba" is asked
    for and not installed.

    >>> choose("auto", "encode", 1000, "gpt2"), choose("python", "encode", 10**9, "gpt2")
    ('python', 'python')
    """
    if engine not in ("auto", "python", "numba"):
        raise ValueError(f'engine is {engine!r}; allowed: "auto", "python", "numba"')
    if engine == "numba":
        if not has_numba():
            raise ImportError("engine='numba' needs numba, which is not installed: pip install 'purelm[fast]'")
        if pattern is not None:
            known_family(pattern)
        return "numba"
    if engine == "python" or n_bytes < PAYS_FROM[task]:
        return "python"
    able = sys.byteorder == "little" and (pattern is None or family(pattern) is not None) and has_numba()
    return "numba" if able else "python"


@memo(1)
def has_numba() -> bool:
    """Whether numba is installed; it is not imported."""
    return importlib.util.find_spec("numba") is not None
