"""jit: results that lie in the memory that they are written to. The plain call on copies is the oracle.

Two ways for a compiler to be wrong: to take a copy for nothing (inductor's clone) and to overwrite before all is read
(inductor 2.11 on a CPU, where loops were changed in order to fuse).
"""

import pytest
import torch
from torch.nn.functional import pad

from purelm import random, tree
from purelm.transforms import jit
from tests.test_transforms import clone

# Each of these functions returns results that lie in donated memory, are permuted, or are donated tensors themselves.
ALIASING = {
    "swap": lambda s: {"a": s["b"], "b": s["a"]},
    "rotate": lambda s: {"a": s["b"], "b": s["c"], "c": s["a"]},
    "pass on": lambda s: {"a": s["a"], "b": s["b"] + s["a"]},
    "all passed on": dict,
    "transpose": lambda s: {"a": s["a"].T, "b": s["b"].flip(0)},
    "shifted": lambda s: {"a": torch.roll(s["a"], 1, 0), "b": torch.cat([s["b"][1:], s["b"][:1]])},
    "view beside": lambda s: ({"a": s["a"] + 1, "b": s["b"] * 2}, s["a"][0], s["b"].view(-1)),
    "old beside": lambda s: ({"a": s["a"] + 1, "b": s["b"] * 2}, [s["a"], s["b"]]),
    "doubled": lambda s: ({"a": s["a"], "b": s["a"]}, s["a"]),
    "expanded": lambda s: {"a": s["a"][:1].expand(3, 3), "b": s["b"][:, :1].expand(3, 3)},
    "noop views": lambda s: {"a": s["b"].view(3, 3), "b": s["a"].detach()},
    "previous": lambda s: {"a": s["a"] * 2, "b": s["a"].clone()},
    "no change": lambda s: {"a": s["b"] * 1, "b": s["a"][:] + 0},
    "cross": lambda s: {"a": s["a"] + s["b"], "b": s["a"] - s["b"]},
    "product": lambda s: {"a": s["a"] @ s["b"], "b": s["b"] @ s["a"]},
    "metrics first": lambda s: (s["a"].sum(), {"b": s["b"] + 1, "a": s["a"] * s["b"]}),
    "numbers": lambda s: ({"a": s["a"] * 2, "b": s["b"]}, 3, "text", None, [True]),
    # Reads and writes of one tensor in unlike orders: these are no single loop.
    "crossed transposes": lambda s: {"a": s["b"].T, "b": s["a"].T},
    "transpose twice": lambda s: ({"a": s["b"].T, "b": s["b"].T}, s["b"].T),
    "crossed softmax": lambda s: {"a": s["b"].softmax(0), "b": s["a"].softmax(1)},
    "crossed sums": lambda s: {"a": s["a"] - s["b"].amax(0), "b": s["b"] * s["a"].sum(1, keepdim=True)},
    "crossed outer": lambda s: {"a": s["b"][0][:, None] * s["a"][1], "b": s["a"][0][:, None] - s["b"][:, 1]},
    "crossed triangles": lambda s: {"a": s["b"].tril() + s["a"].triu(), "b": s["a"].tril() - s["b"].triu()},
    "library calls": lambda s: {"a": s["b"].cumsum(0), "b": s["a"].sort(1).values},
    "gathered": lambda s: {"a": s["b"][(s["a"][0] > 0).long()], "b": s["a"].flip(1).gather(0, (s["b"] > 0).long())},
    "parts put together": lambda s: {"a": torch.stack(s["b"].unbind(1)), "b": torch.cat(s["a"].split(1, 1)[::-1], 1)},
    "bits": lambda s: ({"a": s["b"].view(torch.int32).view(torch.float32), "b": s["a"] * 2}, s["a"].view(torch.int32)),
    "newton": lambda s: {"a": 1.5 * s["a"] - s["a"] @ s["b"] @ s["a"], "b": s["b"] / (s["b"] @ s["a"].T).norm()},
    # Chains, each result in the place of the next one's source.
    "chain": lambda s: {"a": s["b"] + 1, "b": s["c"] * 2, "c": s["a"] - s["b"]},
    "chain of views": lambda s: {"a": s["b"].T.flip(1), "b": s["c"].reshape(9).view(3, 3).T, "c": s["a"].detach()[:]},
    # Parts of a larger tensor, d of 5 x 5.
    "overlapping slices": lambda s: {"a": s["d"][1:4, :3], "b": s["d"][2:, 1:4], "d": s["d"] * 2},
    "offsets": lambda s: {"a": s["d"].as_strided((3, 3), (5, 1), 6), "b": s["a"].T, "d": s["d"].roll(1, 1)},
    "strides": lambda s: {"a": s["d"][::2, ::2], "b": s["d"][1:4, ::2], "d": s["d"].T},
    "into a slice": lambda s: {"a": s["d"][2:, 2:], "b": s["a"], "d": s["d"].slice_scatter(pad(s["b"], (1, 1)), 0, 2)},
    "padded": lambda s: {"a": pad(s["b"][1:], (0, 0, 1, 0)), "b": s["d"][2:, 2:], "d": pad(s["a"], (1, 1, 1, 1))},
}
LARGER = ("overlapping slices", "offsets", "strides", "into a slice", "padded")


def start_of(name):
    keys = "abd" if name in LARGER else "abc" if name in ("rotate", "chain", "chain of views") else "ab"
    key = random.fold_in(random.key(0), list(ALIASING).index(name))
    return {k: random.normal(random.fold_in(key, ord(k)), (5, 5) if k == "d" else (3, 3)) for k in keys}


def assert_like(result, expected):
    assert tree.structure(result) == tree.structure(expected)
    for path, x, y in zip(tree.paths(result), tree.leaves(result), tree.leaves(expected), strict=True):
        if isinstance(x, torch.Tensor):
            # inductor orders sums otherwise
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=lambda m, path=path: f"{path}: {m}")
        else:
            assert x == y, path


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_results_that_alias_donated_memory_are_right(backend):
    """Oracle: the plain call on copies. One function for all cases, so that inductor compiles once."""
    start = {name: start_of(name) for name in ALIASING}

    def all_of_them(state):
        return {name: f(state[name]) for name, f in ALIASING.items()}

    expected = all_of_them(clone(start))
    result = jit(all_of_them, donate=0, backend=backend)(start)
    assert_like(result, expected)
    # No two results share memory, whatever f did.
    places = [x.untyped_storage().data_ptr() for x in tree.leaves(result) if isinstance(x, torch.Tensor)]
    assert len(set(places)) == len(places)


@pytest.mark.compile
@pytest.mark.parametrize(
    "name",
    [
        "swap",
        "transpose",
        "view beside",
        "doubled",
        "noop views",
        "previous",
        "crossed softmax",
        "library calls",
        "chain of views",
        "overlapping slices",
    ],
)
def test_one_aliasing_case_alone(name):
    """As above, with a graph of its own, which AOTAutograd may treat otherwise (no operation but the copies)."""
    expected = ALIASING[name](start_of(name))
    assert_like(jit(ALIASING[name], donate=0)(start_of(name)), expected)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["crossed transposes", "crossed softmax"])
def test_donated_parts_of_one_buffer_may_be_permuted(name):
    """As above; to AOTAutograd, parts of one buffer are aliases of each other. One is contiguous, one is not."""
    buffer = random.normal(random.key(1), (5, 5))
    start = {"a": buffer[:3, :3].T, "b": buffer.view(-1)[-9:].view(3, 3)}
    expected = ALIASING[name](clone(start))
    assert_like(jit(ALIASING[name], donate=0)(start), expected)
