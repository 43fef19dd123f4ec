"""The training loop's own parts; the programs around it are in test_programs.py."""

import gc

import pytest

from experiments.loop import _collector_at_rest


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_objects_of_before_are_out_of_collections_until_the_loop_ends(ends):
    """Oracle: gc.get_freeze_count."""
    assert gc.get_freeze_count() == 0
    try:
        with _collector_at_rest() as rest:
            assert gc.get_freeze_count() == 0
            rest()
            assert gc.get_freeze_count() > 10_000
            if ends == "badly":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert gc.get_freeze_count() == 0
