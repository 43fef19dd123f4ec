"""zero's step on parts of parameters, gathered in place. Oracle: the step of one process."""

import pytest
import torch

from purelm import tree
from purelm.dist import zero, zero_state
from purelm.dist.sharding import shard
from purelm.kernels import adamw as kernels
from tests.dist.models import made
from tests.dist.processes import run


def on_rank_step(donate, bucket_bytes, dtype):
    """Oracle: the step of one process, to the bit, since AdamW is element-wise. With donation in the same memory."""
    params, options = made(0, (dtype,)), {"weight_decay": 0.1}
    state = kernels.adamw(**options).init(params)
    mine = zero.sharded(kernels.adamw(**options)).init(params)
    whole = kernels.adamw_step(**options)
    inner = kernels.adamw_step(**options, donate=donate)
    step = zero.sharded_step(inner, bucket_bytes=bucket_bytes, donate=donate)
    copy = tree.map(torch.clone, params)
    for i in range(3):
        grads = made(i + 1, (dtype,))
        if i == 1:
            grads["nest"][0]["w"] = None  # keeps its value
        given, at = copy, [x.data_ptr() for x in tree.leaves(copy)]
        params, state = whole(grads, state, params, 0.1)
        copy, mine = step(shard(grads), mine, copy, 0.1)
        assert ([x.data_ptr() for x in tree.leaves(copy)] == at) == donate
        assert tree.structure(copy) == tree.structure(params)
        found = tree.leaves((copy, zero_state.gather_state(mine, state)))
        for a, b in zip(found, tree.leaves((params, state)), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
        if donate:
            with pytest.raises(RuntimeError, match="was donated to sharded_step"):
                tree.leaves(given)[0].sum()
    if donate:
        leaves = tree.leaves(copy)
        with pytest.raises(ValueError, match="share memory"):
            step({"a": shard(leaves[0]), "b": None}, mine, {"a": leaves[0], "b": leaves[0]}, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bucket_bytes", "size"), [(1, 2), (100, 3), (10**9, 2)])
@pytest.mark.parametrize("donate", [False, True], ids=["new", "donated"])
def test_sharded_step(donate, bucket_bytes, size, dtype):
    run(on_rank_step, donate, bucket_bytes, dtype, size=size)


def on_rank_strides(donate):
    """Equal values in strides of their own: a message is one of all ranks, whatever they have."""
    rank = torch.distributed.get_rank()
    values = {name: torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("vwx")}
    params = {name: x.T.contiguous().T if rank == 0 and name == "w" else x.clone() for name, x in values.items()}
    assert params["w"].is_contiguous() == (rank != 0)
    grads, options = tree.map(torch.cos, values), {"weight_decay": 0.1}
    expected, _ = kernels.adamw_step(**options)(grads, kernels.adamw(**options).init(values), values, 0.1)
    state = zero.sharded(kernels.adamw(**options)).init(params)
    step = zero.sharded_step(kernels.adamw_step(**options, donate=donate), bucket_bytes=1, donate=donate)
    found, _ = step(shard(grads), state, params, 0.1)
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("donate", [False, True], ids=["new", "donated"])
def test_strides_may_differ_between_ranks(donate):
    run(on_rank_strides, donate)


def test_sharded_step_alone():
    """Oracle: the step itself."""
    params, grads = made(0, (torch.float32,)), made(1, (torch.float32,))
    state, step = kernels.adamw().init(params), kernels.adamw_step()
    for a, b in zip(*(tree.leaves(s(grads, state, params, 0.1)) for s in (step, zero.sharded_step(step))), strict=True):
        assert torch.equal(a, b)


def on_rank_whole_gradients():
    params = {"a": {"w": torch.ones(2, 3)}, "b": torch.ones(4)}
    optimizer = zero.sharded(kernels.adamw(), reduce="parts")
    state = optimizer.init(params)
    message = r"the gradient of a.w has shape \(2, 3\), this rank's part has \(1, 3\)"
    for update in (optimizer.update, zero.sharded_step(kernels.adamw_step())):
        with pytest.raises(ValueError, match=message):
            update({**params, "b": torch.ones(2)}, state, params, 0.1)


def test_whole_gradients_where_parts_are_asked_for():
    """A part of one row would be broadcast."""
    run(on_rank_whole_gradients)
