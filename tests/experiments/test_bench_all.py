"""The list of benchmarks. Oracle: each program's own arguments."""

from importlib import import_module
from itertools import pairwise

import pytest
import tyro

from experiments.bench.all import Args, launcher, programs, programs_of_many


@pytest.mark.parametrize(
    "found", [programs(Args("cuda")), programs(Args("cpu")), programs_of_many(2)], ids=["cuda", "cpu", "two"]
)
def test_every_program_understands_its_flags(found):
    assert found
    for name, flags in found:
        args = tyro.cli(import_module(f"experiments.bench.{name}").Args, args=flags)
        for flag, value in pairwise(flags):
            if flag.startswith("--") and not value.startswith("--"):
                got = getattr(args, flag[2:].replace("-", "_"))
                assert value in (map(str, got) if isinstance(got, tuple) else [str(got)])


def test_how_many_processes():
    assert programs_of_many(1) == []
    assert {name for name, _ in programs_of_many(2)} - {name for name, _ in programs_of_many(4)} == {"step_8b"}
    assert launcher(1)[1:] == ["-m"]
    assert launcher(4)[-4:] == ["--nproc-per-node", "4", "-m", "--"]
