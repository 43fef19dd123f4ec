"""Importing purelm is light: no optional dependency, no CUDA, and little time beyond torch's own import.

Oracle: sys.modules and -X importtime of a fresh interpreter.
"""

import subprocess
import sys

HEAVY = (
    "triton",
    "datasets",
    "transformers",
    "numba",
    "matplotlib",
    "tyro",
    "rich",
    "tiktoken",
    "tokenizers",
    "jax",
    "zstandard",
    "pandas",
)
EVERYTHING = (
    "import purelm, purelm.tree, purelm.random, purelm.transforms, purelm.ops, purelm.models.transformer, "
    "purelm.optim, purelm.train, purelm.checkpoint, purelm.track, purelm.generate, purelm.tokenizer, "
    "purelm.data, purelm.accounting, purelm.evals"
)


def python(code, *flags):
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_import_pulls_in_nothing_heavy():
    # torch itself may import numpy or triton stubs: only what purelm adds on top of torch counts.
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        f"{EVERYTHING}\n"
        f"heavy = [m for m in {HEAVY!r} if m in set(sys.modules) - before]\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()"
    )
    python(code)


def test_warning_free_import():
    python(EVERYTHING, "-W", "error")
