"""experiments.bench.collectives at toy size. Oracles: nccl-tests' table of factors; rows against each other."""

import doctest
import json

import pytest
import torch
import torch.distributed as dist

from experiments.bench import collectives
from tests.dist import processes
from tests.dist.processes import run

NAMES = collectives.NAMES
FACTORS = (1.75, 0.875, 0.875, 1.0, 0.875, 0.875)
SMALL = ("--device", "cpu", "--mib", "0.01", "0.1", "--runs", "3", "--calls", "2")


def program(*args, n_ranks=1):
    return processes.program("experiments.bench.collectives", *args, n_ranks=n_ranks)


@pytest.mark.parametrize(("name", "factor"), [*zip(NAMES, FACTORS, strict=True)])
def test_factors_of_eight_ranks(name, factor):
    """Oracle: nccl-tests, doc/PERFORMANCE.md, for n = 8."""
    assert collectives.bus_factor(name, 8) == factor
    assert collectives.bus_factor(name, 1) == 0.0


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_the_program(tmp_path, n_ranks):
    done = program(*SMALL, "--json", tmp_path / "rows.json", n_ranks=n_ranks)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| metric |") == 1  # rank 0 alone prints
    rows = {r["metric"]: r for r in json.loads((tmp_path / "rows.json").read_text())}
    assert len(rows) == 3 * 6 * 2
    for name in NAMES:
        for mib in (0.01, 0.1):
            time = rows[f"{name} {mib} MiB"]
            rate, bus = (rows[f"{name} {mib} MiB: {kind} bandwidth"]["value"] for kind in ("algorithm", "bus"))
            assert time["unit"] == "s" and time["peer"] == "torch.distributed" and time["value"] > 0
            # 2^20 bytes, cut to whole floats for each rank, of each of seven leaves
            assert rate * time["peer_value"] * 1e9 == pytest.approx(mib * 2**20, abs=8 if name in NAMES[:4] else 56)
            assert bus == pytest.approx(rate * collectives.bus_factor(name, n_ranks))
            assert time["device"] == f"{n_ranks} x cpu, gloo"


def on_rank(name):
    """Bytes of the larger buffer; both calls do the same."""
    size, ours, engine = collectives.calls(name, 100, torch.float32, torch.device("cpu"))
    buffers = engine.args
    largest = max(x.nbytes for x in buffers if isinstance(x, torch.Tensor))
    for x in buffers:
        if isinstance(x, torch.Tensor):
            x.copy_(torch.arange(len(x)) + 7 * dist.get_rank())  # ours has one of them as its argument
    got = ours()
    engine()
    assert torch.equal(got, buffers[0])
    return size, largest


@pytest.mark.parametrize("name", NAMES[:4])
def test_both_calls_do_the_same_to_buffers_of_the_stated_size(name):
    assert run(on_rank, name) == [(96, 96)] * 2


def on_rank_many(name):
    """Oracle: the flat message, whose ranks' parts hold the leaves one after another."""
    size, ours, engine = collectives.calls(name, 100, torch.float32, torch.device("cpu"))
    whole, part = engine.args if name == "gather_parts" else engine.args[::-1]
    given, N = (part if name == "gather_parts" else whole), dist.get_world_size()
    given.copy_(torch.arange(len(given)) + 7 * dist.get_rank())
    got = torch.stack(ours())
    if name == "gather_parts":
        engine()
        assert torch.equal(got.view(7, N, -1), whole.view(N, 7, -1).transpose(0, 1))
    else:
        whole.copy_(whole.view(7, N, -1).transpose(0, 1).reshape(-1).clone())
        engine()
        assert torch.equal(got.view(-1), part)
    return size, whole.nbytes


@pytest.mark.parametrize("name", NAMES[4:])
def test_many_leaves_are_what_the_flat_message_has(name):
    assert run(on_rank_many, name) == [(56, 56)] * 2


def on_rank_slow():
    import time

    return collectives.seconds(lambda: time.sleep(0.01 * dist.get_rank()), 8, 3, torch.device("cpu"))


def test_seconds_are_those_of_one_call_on_the_slowest_rank():
    first, second = run(on_rank_slow)
    assert first == second and len(first) == 3
    assert 0.01 <= min(first) < 0.04  # 0.08 are all eight


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--names", "gossip"), "names: 'gossip' is not one of"),
        (("--mib", "0"), "mib must be above 0, got (0.0,)"),
        (("--runs", "0"), "runs must be above 0"),
    ],
)
def test_errors_are_one_line(args, message):
    done = program("--device", "cpu", *args)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_examples():
    assert doctest.testmod(collectives).failed == 0
