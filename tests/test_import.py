"""Importing purelm is light: no optional dependency, no CUDA, and little time beyond torch's own import.

Oracle: sys.modules and -X importtime of a fresh interpreter.
"""

import pkgutil
import subprocess
import sys

import pytest

import purelm

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
    "hypothesis",
    "math_verify",
    "fastwarc",
    "resiliparse",
    "py3langid",
    "publicsuffixlist",
)
EVERYTHING = (
    "import purelm, purelm.tree, purelm.random, purelm.transforms, purelm.ops, purelm.models.transformer, "
    "purelm.optim, purelm.train, purelm.checkpoint, purelm.track, purelm.generate, purelm.tokenizer, "
    "purelm.data, purelm.accounting, purelm.evals.tasks, purelm.align.lora, purelm.align.graders, "
    "purelm.align.data.openr1, purelm.align.recipes, purelm.testing"
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


def test_import_purelm_alone_imports_nothing():
    """Rooms come with the first use of their names."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "import purelm; added = set(sys.modules) - before\n"
        "assert added == {'purelm'}, added\n"
        "assert {'tree', 'optim', '__version__'} <= set(dir(purelm)) and 'torch' not in sys.modules\n"
        "assert purelm.tree.n_params({}) == 0 and 'purelm.optim' not in sys.modules\n"
        "assert purelm.optim is sys.modules['purelm.optim'] and purelm.optim.ema.__name__ == 'purelm.optim.ema'"
    )
    python(code)


def test_every_room_is_listed():
    """Oracle: the folders and files on disk (pkgutil does not see the two links): a new one belongs in __all__ of
    purelm/__init__.py, and in its docstring."""
    assert {m.name for m in pkgutil.iter_modules(purelm.__path__)} | {"kernels", "dist"} == {*purelm.__all__}
    assert purelm.__all__ == sorted(purelm.__all__)
    for name in purelm.__all__:
        assert getattr(purelm, name).__name__ == f"purelm.{name}"
        assert name in purelm.__doc__


def test_help_and_tab_list_the_rooms():
    """Oracle: pydoc and rlcompleter, which is what help() and the prompt use. Neither needs Triton."""
    code = (
        "import sys, pydoc, rlcompleter, purelm\n"
        "text = pydoc.render_doc(purelm)\n"
        "assert all(name in text for name in purelm.__all__), text\n"
        "completer = rlcompleter.Completer({'purelm': purelm})\n"
        "names = [completer.complete('purelm.', i) for i in range(100)]\n"
        "found = {name.rstrip('(').split('.')[1] for name in names if name}\n"
        "assert found >= {*purelm.__all__}, found\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules and m != 'triton']\n"
        "assert not heavy, heavy"
    )
    python(code)


def test_what_is_no_room_is_an_attribute_error():
    assert not hasattr(purelm, "trees")
    with pytest.raises(AttributeError, match="module 'purelm' has no attribute 'trees'; its rooms are accounting"):
        purelm.trees  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'trees'"):
        from purelm import trees  # noqa: F401


@pytest.mark.slow
def test_types_see_the_rooms(tmp_path):
    """Oracle: mypy of a program that uses them by attribute."""
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text("import purelm\nreveal_type(purelm.tree.n_params({}))\npurelm.optim.nothing\n")
    flags = ["--config-file", "pyproject.toml", "--cache-dir", str(tmp_path / "cache"), "--follow-imports", "silent"]
    done = subprocess.run([sys.executable, "-m", "mypy", *flags, str(program)], capture_output=True, text=True)
    assert 'int"' in done.stdout.splitlines()[0], done.stdout + done.stderr
    assert 'Module has no attribute "nothing"' in done.stdout and "2: error" not in done.stdout, done.stdout
