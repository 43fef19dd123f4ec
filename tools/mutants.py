"""Mutants of purelm.align: each is the library with one fault, and some test must fail on it.

    python tools/mutants.py               # all, one after the other: a table, and exit status 1 if any survives
    python tools/mutants.py --only clip   # those with "clip" in their name

They are listed in tools/mutants_align.toml. Each runs in a copy of the sources in a temporary folder: the checkout is
left as it is. A mutant whose text is no longer in its file is an error: adapt it there. With losses of 0.004 each of
these faults passes a comparison at 1e-2, which is why the tests compare at 1e-9 in float64.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tools" / "mutants_align.toml"


def main() -> int:
    """Runs them and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the names of those to run")
    only = parser.parse_args().only
    chosen = [row for row in tomllib.loads(LIST.read_text())["mutant"] if only in row["name"]]
    if not chosen:
        parser.error(f"no mutant has {only!r} in its name")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "copy"
        hidden = shutil.ignore_patterns(".*", "runs", "build", "__pycache__", "results")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=hidden)
        survivors = [row["name"] for row in chosen if not killed(copy, **row)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed", *(f"survives: {x}" for x in survivors), sep="\n")
    return bool(survivors)


def killed(copy: Path, name: str, file: str, old: str, new: str, tests: str) -> bool:
    """Whether a test fails on it; SystemExit where none ran."""
    path = copy / "purelm" / "align" / f"{file}.py"
    right = path.read_text()
    if old not in right:
        raise SystemExit(f"mutant {name!r}: its text is not in {file}.py any more")
    path.write_text(right.replace(old, new))
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        # A fork has torch imported already, which takes longer than most tests; it starts without the library.
        process = multiprocessing.get_context("fork").Process(target=run, args=(copy, tests, said.fileno()))
        process.start()
        process.join()
        said.seek(0)
        output = said.read()
    seconds = time.perf_counter() - begin
    path.write_text(right)
    if process.exitcode not in (0, 1):
        raise SystemExit(f"mutant {name!r}: no test ran\n{output[-2000:]}")
    failed = re.search(r"^FAILED \S*?::(.+?)( - |$)", output, re.MULTILINE)
    verdict = failed[1] if failed else "SURVIVES"
    print(f"{name:60} {verdict:60} {seconds:4.0f} s", flush=True)
    return failed is not None


def run(copy: Path, tests: str, output: int) -> None:
    """In a process of its own: pytest on the copy, what it says to a file, its exit status as the process's."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = True  # compiled code counts as current by the size and second of its source
    torch.set_num_threads(1)
    status = pytest.main([f"tests/align/{tests}.py", "-x", "-m", "not compile and not slow", "--tb=no"])
    sys.stdout.flush()
    os._exit(int(status))


if __name__ == "__main__":
    sys.exit(main())
