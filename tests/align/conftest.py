"""Fixtures of align's tests."""

import pytest


@pytest.fixture
def unchecked(request):
    """For tests that pass wrong shapes on purpose: skipped where jaxtyping checks signatures at run time."""
    if request.config.getoption("--jaxtyping-packages", None):
        pytest.skip("jaxtyping refuses these arguments before the function can")
