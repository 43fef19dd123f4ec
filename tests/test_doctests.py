"""Examples in docstrings give what they say. Oracle: doctest, in every module of the library."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import purelm

# Packages whose __init__ only gathers names, and links, which pkgutil does not walk into by itself.
NAMES = [m.name for m in pkgutil.walk_packages(purelm.__path__, "purelm.")]
NAMES += [f"purelm.{folder}.{m.name}" for folder in ("kernels", "dist") for m in pkgutil.iter_modules([f"{folder}"])]
NEEDS_TRITON = "_triton"  # what imports Triton where it is made


@pytest.mark.parametrize("name", sorted({n for n in NAMES if not n.endswith(NEEDS_TRITON)}))
def test_examples(name):
    flags = doctest.ELLIPSIS
    assert doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch}, optionflags=flags).failed == 0
