"""experiments.overlap. Oracles: sets of unit cells of time; lanes written by hand; two Gloo processes at toy size."""

import doctest
import gzip
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile, record_function

from experiments import overlap
from experiments.overlap import (
    STEP,
    Lanes,
    Times,
    intersection,
    lanes,
    length,
    median_step,
    merged,
    of_step,
    steps_of,
    table,
    times,
    to_rows,
)
from tests.dist import processes

ROOT = Path(__file__).resolve().parents[2]
points = st.integers(0, 20)
intervals = st.lists(st.tuples(points, points), max_size=8)


def cells(found):
    """The unit cells [k, k + 1) that intervals of integers cover."""
    return {k for begin, end in found for k in range(begin, end)}


def disjoint(found):
    """In order, none empty, none that touch."""
    return all(b < e for b, e in found) and all(x[1] < y[0] for x, y in pairwise(found))


@given(intervals)
def test_merged_is_the_union_of_cells(a):
    assert cells(merged(a)) == cells(a) and disjoint(merged(a))
    assert length(a) == len(cells(a))


@given(intervals, intervals)
def test_intersection_is_that_of_cells(a, b):
    both = intersection(a, b)
    assert cells(both) == cells(a) & cells(b) and disjoint(both)


@given(intervals, intervals, points, points)
def test_times_of_a_step_are_counts_of_cells(compute, comm, x, y):
    """exposed = |C - K| within the step, cell by cell, and lanes begin at the step's begin."""
    begin, end = min(x, y), max(x, y)
    found = of_step(Lanes(compute, comm), (begin, end))
    inside = set(range(begin, end))
    K, C = cells(compute) & inside, cells(comm) & inside
    assert {k + begin for k in cells(found.comm)} == C and {k + begin for k in cells(found.compute)} == K
    t = times(found, end - begin)
    assert t == (end - begin, len(K), len(C), len(C - K))
    assert t.hidden == (pytest.approx(100 * len(C & K) / len(C)) if C else None)


def event(name, begin, end, device="CPU", annotation=False):
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=begin, end=end),
        device_type=f"DeviceType.{device}",
        is_user_annotation=annotation,
    )


EVENTS = [
    event("aten::mm", 0, 1),
    event("c10d::allreduce_", 1, 2),
    event("gloo:all_reduce", 2, 6, annotation=True),
    event("aten::add", 3, 4),
    event("cudaLaunchKernel", 4, 5),
    event("FSDP::pre_forward", 0, 9, annotation=True),
    event("FSDP::pre_forward", 0, 99, "CUDA", annotation=False),  # mirrored, and known by its name on the host
    event("nccl:all_reduce", 0, 99, "CUDA"),
    event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 10, 20, "CUDA"),
    event("nvjet_tst_128x256", 12, 14, "CUDA"),
    event("Memcpy DtoD (Device -> Device)", 14, 15, "CUDA"),
    event("triton_poi_fused_add", 30, 31, "CUDA"),
]


def test_lanes_by_hand():
    assert lanes(EVENTS, cuda=True) == Lanes([(12, 15), (30, 31)], [(10, 20)])
    assert lanes(EVENTS, cuda=False) == Lanes([(0, 1), (3, 4)], [(2, 6)])
    assert lanes([], cuda=True) == Lanes([], [])


def test_the_step_of_median_length():
    """Three steps of 10, 30 and 20 long: the last, whose kernels are cut at its end; a mirror of a range is no step."""
    marks = [event(STEP, b, e, annotation=True) for b, e in ((0, 10), (50, 80), (100, 120))]
    marks.append(event(STEP, 0, 500, "CUDA"))
    spans = (("ncclDevKernel_X", 105, 115), ("gemm", 110, 130), ("gemm", 55, 56))
    kernels = [event(*span, "CUDA") for span in spans]
    assert steps_of(marks[::-1]) == [(0, 10), (50, 80), (100, 120)]
    found, t = median_step([*marks, *kernels], cuda=True)
    assert found == Lanes([(10, 20)], [(5, 15)])
    assert t == Times(20, 10, 10, 5) and t.hidden == 50.0
    assert median_step([*marks[:2], *kernels], cuda=True)[1].step == 10  # of two the shorter
    with pytest.raises(RuntimeError, match="the profile has no range 'phase/step'"):
        median_step(kernels, cuda=True)


def test_lanes_of_a_real_profile():
    """Operators inside the range are compute; those outside, and the range itself, are not."""
    x = torch.ones(64, 64)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        x @ x
        with record_function(STEP):
            with record_function("gloo:pretended"):
                x @ x
            x + x
    found, t = median_step(prof.events(), cuda=False)
    assert 0 < t.compute < t.step and 0 < t.comm < t.step
    assert 0 <= t.exposed < t.comm and len(steps_of(prof.events())) == 1
    assert max(end for _, end in found.compute) <= t.step


def test_rows_and_table_by_hand():
    """Half as much exposed is twice as good; more hidden is better; peers have no rows; nothing sent is none hidden."""
    found = {
        "overlapped": Times(4000.0, 3000.0, 2000.0, 500.0),
        "torch_ddp": Times(8000.0, 3000.0, 2000.0, 1000.0),
        "fsdp": Times(1000.0, 1000.0, 0.0, 0.0),
    }
    rows = {r["metric"]: r for r in to_rows(found, "toy", "cpu")}
    assert len(rows) == 5 + 4
    exposed, hidden = rows["toy, overlapped, exposed"], rows["toy, overlapped, hidden"]
    assert (exposed["value"], exposed["unit"], exposed["peer_value"], exposed["ratio"]) == (0.5, "ms", 1.0, 2.0)
    assert (hidden["value"], hidden["unit"], hidden["peer_value"], hidden["ratio"]) == (75.0, "%", 50.0, 1.5)
    assert rows["toy, fsdp, step"]["peer"] == "torch_fsdp2" and rows["toy, fsdp, step"]["peer_value"] is None
    lines = table(found).splitlines()
    assert lines[2] == "| overlapped | 4.000 | 3.000 | 2.000 | 0.500 | 75.0 |" and lines[4].endswith("| none sent |")


def program(*args, n_ranks=2):
    small = ["--device", "cpu", "--size", "3m", "--batch-size", "1", "--context-length", "16", "--steps", "1"]
    return processes.program("experiments.overlap", *small, *args, n_ranks=n_ranks)


def test_program_leaves_rows_a_picture_and_traces(tmp_path):
    ways = ("per_leaf", "fsdp", "torch_ddp")
    out = ("--json", tmp_path / "rows.json", "--plot", tmp_path / "p" / "o.png", "--traces", tmp_path / "t")
    done = program("--warmup", 1, *out, "--ways", *ways)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {r["metric"]: r for r in json.loads((tmp_path / "rows.json").read_text())}
    for way in ways[:2]:
        step, compute, comm, exposed, hidden = (
            rows[f"3m, 1 x 16 a rank, {way}, {kind}"]["value"] for kind in (*Times._fields, "hidden")
        )
        assert 0 < comm < step and 0 < compute < step and 0 <= exposed <= comm
        assert hidden == pytest.approx(100 * (1 - exposed / comm))
    assert rows["3m, 1 x 16 a rank, per_leaf, comm"]["peer_value"] > 0
    assert (tmp_path / "p" / "o.png").read_bytes()[:4] == b"\x89PNG"
    traces = {p.name for p in (tmp_path / "t").iterdir()}
    assert traces == {f"{way}_rank{rank}.json.gz" for way in ways for rank in (0, 1)}
    events = json.loads(gzip.open(tmp_path / "t" / "fsdp_rank1.json.gz").read())["traceEvents"]
    assert sum(e.get("name") == STEP for e in events) == 1  # the profiler's own warm-up is not in the trace
    assert done.stdout.count("hidden, %") == 1


def test_errors_are_one_line():
    assert "error: one process has nobody to talk to" in program(n_ranks=1).stderr
    done = program("--steps", 0, n_ranks=1)
    assert "error: steps must be at least 1, got 0" in done.stderr


def test_examples():
    assert doctest.testmod(overlap).failed == 0 < doctest.testmod(overlap).attempted
