"""The examples in the docstrings run and print what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["base", "sgd", "adamw", "lion", "muon", "clip", "schedules"])
def test_examples(name):
    result = doctest.testmod(importlib.import_module(f"purelm.optim.{name}"))
    assert result.failed == 0 and result.attempted > 0
