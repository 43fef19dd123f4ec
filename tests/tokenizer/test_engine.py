"""The choice of the engine. Oracle: the rule as it is stated, and sys.modules of a fresh process."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.tokenizer import encode, engine, make
from purelm.tokenizer.engine import PAYS_FROM, choose
from purelm.tokenizer.patterns import NAMES

TASKS = st.sampled_from(sorted(PAYS_FROM))


@given(task=TASKS, n_bytes=st.integers(0, 2**40), pattern=st.sampled_from([*NAMES, None]))
def test_auto_is_by_size_alone(task, n_bytes, pattern):
    """A known pattern, or a task without one: the machine code from the threshold on, whatever came before."""
    pytest.importorskip("numba")
    assert choose("auto", task, n_bytes, pattern) == ("numba" if n_bytes >= PAYS_FROM[task] else "python")
    assert choose("python", task, n_bytes, pattern) == "python"
    assert choose("numba", task, n_bytes, pattern) == "numba"


@given(task=TASKS, n_bytes=st.integers(0, 2**40))
def test_what_the_machine_code_cannot_split_is_for_python(task, n_bytes):
    assert choose("auto", task, n_bytes, r"\w+|\W+") == "python"


@given(task=TASKS, n_bytes=st.integers(0, 2**40))
def test_where_there_is_no_machine_code(task, n_bytes):
    """Not installed, or on a machine whose words begin with their highest byte."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.sys, "byteorder", "big")
        assert choose("auto", task, n_bytes, "gpt2") == "python"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "has_numba", lambda: False)
        assert choose("auto", task, n_bytes, "gpt2") == "python"
        with pytest.raises(ImportError, match=r"purelm\[fast\]"):
            choose("numba", task, n_bytes, "gpt2")


def test_what_cannot_be_chosen():
    with pytest.raises(ValueError, match="engine is 'rust'; allowed"):
        choose("rust", "encode", 1)
    pytest.importorskip("numba")
    with pytest.raises(ValueError, match="no compiled splitter"):
        choose("numba", "encode", 1, r"\w+|\W+")


def test_the_past_does_not_count():
    """Many small texts never load the machine code; once it is loaded, a small text still goes to Python."""
    pytest.importorskip("numba")
    code = (
        "import sys; from purelm.tokenizer import encode, engine, make, tables\n"
        "engine.PAYS_FROM['encode'] = 100_000\n"
        "bpe = make({i: bytes([i]) for i in range(256)}, [])\n"
        "ids = [encode(bpe, 'the words of a text ' * 50) for _ in range(200)]\n"
        "assert 'numba' not in sys.modules\n"
        "encode(bpe, 'the', engine='numba')\n"
        "other = make({i: bytes([i]) for i in range(256)}, [])\n"
        "encode(other, 'the words of a text ' * 50)\n"
        "assert 'memos' not in tables._MEMO[id(other)]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_both_sides_of_the_threshold_give_the_same_ids(monkeypatch):
    """Oracle: the bytes; the threshold between two lengths of one text."""
    monkeypatch.setitem(PAYS_FROM, "encode", 1000)
    bpe = make({i: bytes([i]) for i in range(256)}, [])
    for n in (999, 1000, 1001):
        assert encode(bpe, ("caf\u00e9 of " * 200)[:n]).tolist() == list(("caf\u00e9 of " * 200)[:n].encode())
