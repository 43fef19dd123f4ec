"""Trees as bytes. Oracles: the tree itself, safetensors' own reader, and what a file or a pipe gives back."""

import io
import json
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import checkpoint, tree
from purelm.checkpoint import from_bytes, to_bytes
from purelm.testing import strategies as plm


class State(NamedTuple):
    step: torch.Tensor
    m: dict


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint8]
keys = st.text("abc_0", min_size=1, max_size=3)
leaves = st.builds(
    lambda shape, dtype: torch.ones(shape).to(dtype), st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES)
)
strided = plm.tensors(dtype=plm.FLOATS, values=("normal", "special"), layouts=("transposed", "sliced", "expanded"))
trees = plm.trees(leaves | strided, names=keys, containers=("dict", "list", "tuple"), max_leaves=8)


def same(a, b):
    assert tree.structure(a) == tree.structure(b)
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert torch.equal(tree.as_bytes(x), tree.as_bytes(y))


@given(trees, st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=3))
def test_round_trip(value, meta):
    found, back = from_bytes(to_bytes(value, meta=meta))
    same(found, value)
    assert back == meta


def test_any_program_reads_the_leaves():
    """Oracle: safetensors' own reader; strided, aliased and conjugate leaves are stored by value."""
    base = torch.arange(6.0).view(2, 3)
    value = {"t": base.T, "same": [base, base], "expanded": torch.ones(1).expand(3)}
    data = to_bytes(value)
    for path, x in safetensors.torch.load(data).items():
        assert torch.equal(x, tree.to_flat(value)[path])
    same(from_bytes(data)[0], value)


def test_file_objects(tmp_path):
    value = {"w": torch.randn(3)}
    file = io.BytesIO(b"before")
    file.seek(6)
    file.write(to_bytes(value))
    file.seek(6)
    same(from_bytes(file.read())[0], value)
    (tmp_path / "tree").write_bytes(to_bytes(value))
    same(from_bytes(memoryview((tmp_path / "tree").read_bytes()))[0], value)


def test_like_device_and_dtype():
    value = {"state": State(torch.tensor(3), {"w": torch.ones(2)})}
    data = to_bytes(value)
    assert set(from_bytes(data)[0]["state"]) == {"step", "m"}
    found, _ = from_bytes(data, like=value)
    assert isinstance(found["state"], State)
    same(found, value)
    same(
        from_bytes(data, like=tree.cast(value, torch.bfloat16), dtype=torch.bfloat16)[0],
        tree.cast(value, torch.bfloat16),
    )
    assert from_bytes(data, device="meta")[0]["state"]["step"].is_meta
    with pytest.raises(ValueError, match=r"from_bytes: data: state.m.w is \(2,\) torch.float32, .* needs \(3,\)"):
        from_bytes(data, like={"state": State(torch.tensor(3), {"w": torch.ones(3)})})
    with pytest.raises(ValueError, match=r"dtype is torch\.int64"):
        from_bytes(data, dtype=torch.int64)


@given(st.data())
def test_no_changed_byte_is_taken(data):
    """Law: whatever byte is changed, or wherever the end is cut off, it is refused. (Spelled in
    another way, a header may say the same.)"""
    value = {"w": torch.arange(4.0), "n": torch.tensor(3)}
    whole = to_bytes(value, meta={"a": 1})
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        broken = whole[:at]
    else:
        broken = bytearray(whole)
        broken[at] ^= data.draw(st.integers(1, 255))
        if json_equal(bytes(broken), whole):
            return
    with pytest.raises(ValueError, match="from_bytes: "):
        from_bytes(bytes(broken))


def json_equal(a, b):
    """Whether two streams say the same: a header that was respelled, and equal data."""
    heads = []
    for x in (a, b):
        n = int.from_bytes(x[:8], "little")
        try:
            heads.append((json.loads(x[8 : 8 + n]), x[8 + n :]))
        except ValueError:
            return False
    return heads[0] == heads[1]


def test_streams_of_other_programs_are_refused_and_told_how_to_be_read():
    """Oracle: the advice, followed."""
    layers = {"layers.0.w": torch.ones(2), "layers.1.w": torch.zeros(2), "b": torch.ones(1)}
    data = safetensors.torch.save(layers, {"format": "pt"})
    with pytest.raises(ValueError, match=r"tree\.from_flat\(safetensors\.torch\.load\(data\)\) reads another"):
        from_bytes(data)
    found = tree.from_flat(safetensors.torch.load(data))
    same(found, {"layers": [{"w": torch.ones(2)}, {"w": torch.zeros(2)}], "b": torch.ones(1)})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_bytes({"n": 3}), "tree.n is 3, a int: leaves are tensors"),
        (lambda: to_bytes({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}), "have the path 'a.b'"),
        (lambda: to_bytes({}, meta={"x": torch.ones(1)}), "meta must be JSON values"),
        (lambda: from_bytes(b""), "not a safetensors stream, or cut short"),
        (lambda: from_bytes("text"), "data is of type str; bytes are needed"),
        (lambda: from_bytes(safetensors.torch.save({}, {"purelm": "x"})), 'metadata "purelm" is not what to_bytes'),
        (
            lambda: from_bytes(safetensors.torch.save({}, {"purelm": '{"meta": {}, "tree": 5}'})),
            "not the shape of a tree",
        ),
        (
            lambda: from_bytes(safetensors.torch.save({}, {"purelm": '{"meta": {}, "tree": "leaf"}'})),
            "SHA-256 does not",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_meta_may_have_a_step():
    """Of a stream it is the caller's own; a checkpoint has its own step."""
    assert from_bytes(to_bytes({}, meta={"step": 9}))[1] == {"step": 9}
    assert checkpoint.from_bytes is from_bytes
