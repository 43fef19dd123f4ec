"""Checkpoints of optimizer state that is spread over ranks leaf by leaf, row by row, or both, saved as it lies.

Oracle: zero_state, which puts the whole state together by messages and cuts it; purelm.checkpoint reads the files.
"""

import pytest
import torch

from purelm import checkpoint as one_process
from purelm import tree
from purelm.dist import checkpoint, zero, zero_state
from purelm.dist.world import rank_of, size_of
from purelm.optim import adamw, hidden_matrix, muon, muon_adamw, partitioned
from tests.dist.models import equal, params_of
from tests.dist.processes import RankError, run

ONE = {"owned": muon_adamw, "both": lambda: partitioned(hidden_matrix, muon(), adamw())}
MANY = {
    "owned": lambda: zero.whole_tensors(muon_adamw()),
    "both": lambda: partitioned(hidden_matrix, zero.whole_tensors(muon()), zero.sharded(adamw())),
}


def state_of_one(how):
    """The whole state, every element another number."""
    count = iter(range(1000))
    return tree.map(lambda x: (torch.arange(x.numel()) + 1000 * next(count)).to(x.dtype).view(x.shape), like_of(how))


def like_of(how):
    return ONE[how]().init(params_of())


def on_rank_saves(root, how):
    whole, mine = state_of_one(how), MANY[how]().init(params_of())
    mine = zero_state.cut_state(whole, mine)
    checkpoint.save(root, 1, {"params": params_of(), "o": mine}, like={"params": params_of(), "o": like_of(how)})
    return sum(x.nbytes for x in tree.leaves(mine))


def on_rank_loads(root, how):
    mine = MANY[how]().init(params_of())
    held = {f"o.{path}" for path in tree.paths(mine)}
    like = {"o": like_of(how)}
    found, _ = checkpoint.load(root, like, absent=lambda path, x: path not in held, sharded=is_part(how))
    assert tree.structure(found["o"]) == tree.structure(mine)
    assert equal(found["o"], zero_state.cut_state(state_of_one(how), mine))


def is_part(how):
    """Muon's leaves, and all of whole_tensors', have owners."""
    adamws = {f"o.{p}" for p in tree.paths(like_of(how)) if p.startswith("no.")}
    return lambda path, x: how == "both" and size_of(None) > 1 and x.ndim > 0 and path in adamws


@pytest.mark.parametrize("how", ["owned", "both"])
@pytest.mark.parametrize("n_saved", [2, 3])
def test_saved_on_n_ranks_loaded_on_m(tmp_path, n_saved, how):
    held = run(on_rank_saves, tmp_path, how, size=n_saved)
    whole, _ = one_process.load(tmp_path, like={"o": like_of(how)})
    assert equal(whole["o"], state_of_one(how))
    for size in (2, 3):
        run(on_rank_loads, tmp_path, how, size=size)
    # Each rank wrote what it has: of the state no byte twice, and no rank wrote another one's.
    once = sum(x.nbytes for x in tree.leaves((state_of_one(how), params_of())))
    folder = tmp_path / "step-00000001"
    written = [(folder / entry["file"]).stat().st_size for entry in one_process.read_manifest(tmp_path)["shards"]]
    assert once <= sum(written) <= once + n_saved * 16_384  # headers
    assert max(held) < sum(x.nbytes for x in tree.leaves(state_of_one(how)))


def on_rank_writes(root):
    rank = rank_of(None)
    like = {"t": {name: torch.empty(4, 3) for name in "abcd"}}
    mine = {"t": {name: torch.full((4, 3), float(rank)) if i % 2 == rank else None for i, name in enumerate("abcd")}}
    checkpoint.save(root, 1, mine, like=like)


def test_a_rank_writes_what_it_has(tmp_path):
    run(on_rank_writes, tmp_path)
    leaves = one_process.read_manifest(tmp_path)["files"]["t"]["leaves"]
    assert {name: entry["shard"] for name, entry in leaves.items()} == {"a": 0, "b": 1, "c": 0, "d": 1}
    found = one_process.load(tmp_path)[0]["t"]
    assert all(torch.equal(x, torch.full((4, 3), float(leaves[name]["shard"]))) for name, x in found.items())


def test_what_a_rank_alone_has_counts_where_the_rest_is_spread():
    like = {"t": {"big": torch.empty(90), "x": torch.empty(30), "y": torch.empty(20)}}
    plan, common = checkpoint._placed(checkpoint._plan(like, like, False, 2), [[], ["t.big"]])
    assert {p.path: p.shard for p in plan} == {"big": 0, "x": 1, "y": 1} and set(common) == {"t.x", "t.y"}


def on_rank_wrong(root, kind):
    rank = rank_of(None)
    mine = {"a": torch.ones(4, 3), "b": torch.ones(2)}
    if kind == "nobody" or (kind == "several" and rank == 1) or (kind == "part" and rank != 1):
        mine["a"] = None
    if kind == "part" and rank == 1:
        mine["a"] = torch.ones(2, 3)
    if kind == "tree":
        mine["a"] = {"x": torch.ones(4, 3)}
    checkpoint.save(root, 1, {"t": mine}, like={"t": {"a": torch.ones(4, 3), "b": torch.ones(2)}})


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("nobody", 2, r"save: no rank has t\.a, the others None: it must be on one rank, or on all"),
        ("several", 3, r"save: ranks 0, 2 have t\.a, the others None: it must be on one rank, or on all"),
        ("part", 2, r"rank 1: ValueError: save: t\.a is \(2, 3\); no other rank has it, so it must be whole, \(4, 3\)"),
        ("tree", 2, r"save: t\.a is dict; like says .*\(4, 3\) torch\.float32"),
    ],
)
def test_what_is_neither_is_refused_on_all_ranks(tmp_path, kind, size, message):
    with pytest.raises(RankError, match=message) as error:
        run(on_rank_wrong, tmp_path, kind, size=size)
    assert sorted(error.value.errors) == list(range(size))
    assert not list(tmp_path.iterdir())
