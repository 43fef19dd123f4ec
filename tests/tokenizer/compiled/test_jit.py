"""Machine code on disk. Oracle: what the functions say after one of their files was changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_a_change_of_any_file_makes_the_machine_code_stale(tmp_path):
    """A loop calls a function of another file; when that changes, the loop gives the new result."""
    pytest.importorskip("numba")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "top.py").write_text(
        "from purelm.tokenizer.compiled.jit import loop\nfrom package.leaf import leaf\n\n"
        "@loop\ndef top(x):\n    return leaf(x)\n"
    )
    code = "from package.top import top; print(top(1), sum(top.stats.cache_hits.values()))"
    env = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[3]}{os.pathsep}{tmp_path}", "NUMBA_CACHE_DIR": ""}
    printed = []
    for added in (1, 1, 20):
        leaf = f"from purelm.tokenizer.compiled.jit import part\n\n@part\ndef leaf(x):\n    return x + {added}\n"
        path = tmp_path / "package" / "leaf.py"
        if not path.exists() or path.read_text() != leaf:
            path.write_text(leaf)
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        printed.append(done.stdout.split())
    assert printed == [["2", "0"], ["2", "1"], ["21", "0"]]
