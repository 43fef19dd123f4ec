"""Hypothesis strategies for code that stands on purelm: tensors, trees, keys, configurations, batches, texts.

    from hypothesis import given
    from purelm.testing import strategies as plm

    @given(plm.configs(causal=True).flatmap(lambda cfg: st.tuples(st.just(cfg), plm.batches(cfg))))
    def test_my_loss(case): ...

Values of tensors are made from a drawn seed through purelm.random, all elements at once: an example is reproduced by
what hypothesis prints, takes microseconds, and shrinks in shape, layout and kind of values, not element by element.
A draw of the simplest kind with seed 0 is all zeros, so that is what a failing example shrinks to where it can.
"""

try:
    import hypothesis  # noqa: F401
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "purelm.testing.strategies needs hypothesis: pip install 'purelm[testing]'", name="hypothesis"
    ) from None

from purelm.testing.strategies.batch import batches
from purelm.testing.strategies.config import configs, rope_scalings
from purelm.testing.strategies.tensor import FLOATS, INTEGERS, keys, shapes, tensors
from purelm.testing.strategies.text import BYTE_PIECES, PIECES, byte_strings, texts
from purelm.testing.strategies.tree import Pair, alike, like, trees

__all__ = [
    "BYTE_PIECES",
    "FLOATS",
    "INTEGERS",
    "PIECES",
    "Pair",
    "alike",
    "batches",
    "byte_strings",
    "configs",
    "keys",
    "like",
    "rope_scalings",
    "shapes",
    "tensors",
    "texts",
    "trees",
]
