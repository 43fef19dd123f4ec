"""Workers. Oracles: the sequence of results, and the rule as it is stated. (Processes: tests/tokenizer.)"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.workers import BYTES_PER_PROCESS, check_workers, in_processes, in_threads


def test_processes_are_for_large_inputs():
    """None: one process for each BYTES_PER_PROCESS begun, no more than processors; a number is what it says."""
    assert check_workers(None, 1000) == 1
    assert 1 <= check_workers(None, 10 * BYTES_PER_PROCESS) <= check_workers(None)
    assert check_workers(2, 1000) == check_workers(2) == 2
    for wrong in (0, 1025, True, 2.0):
        with pytest.raises(ValueError, match=f"n_workers is {wrong}: allowed is None or an int from 1, at most 1024"):
            check_workers(wrong)


@given(items=st.lists(st.integers()), workers=st.integers(1, 4))
def test_results_come_in_order(items, workers):
    """Oracle: map."""
    assert list(in_threads(abs, iter(items), workers)) == [(item, abs(item)) for item in items]
    assert list(in_processes(pow, 2, (abs(item) % 50 for item in items), 1)) == [
        (abs(item) % 50, 2 ** (abs(item) % 50)) for item in items
    ]
