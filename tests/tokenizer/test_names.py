"""The names of the package. Oracle: what a fresh process sees after importing every module."""

import subprocess
import sys

CODE = """
import importlib, importlib.util, pkgutil, types
import purelm.tokenizer as package
assert sorted(package.__all__) == package.__all__
for name in package.__all__:
    assert not isinstance(getattr(package, name), types.ModuleType), name
modules = []
for found in pkgutil.walk_packages(package.__path__, "purelm.tokenizer."):
    if found.name.startswith("purelm.tokenizer.compiled.") and importlib.util.find_spec("numba") is None:
        continue
    modules.append(importlib.import_module(found.name))
for module in modules:
    parent, _, name = module.__name__.rpartition(".")
    assert getattr(importlib.import_module(parent), name) is module, module.__name__
print(len(modules))
"""


def test_a_name_is_a_module_or_a_function():
    """`purelm.tokenizer.X` and `import purelm.tokenizer.X` are one thing, for every X, in whatever order."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 20
