"""Seconds to import purelm beside torch alone: medians over fresh interpreters, interleaved.

python -m experiments.bench.import_time [--json FILE]
"""

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.bench.report import publish, row
from experiments.console import program

PROGRAMS = {
    "empty": "",
    "torch": "import torch",
    "purelm": "import purelm",
    "all of purelm": "import purelm.transforms, purelm.models.transformer, purelm.optim, purelm.train, "
    "purelm.checkpoint, purelm.track, purelm.generate, purelm.tokenizer, purelm.data, purelm.accounting, purelm.evals",
}


@dataclass(frozen=True)
class Args:
    """Import times."""

    rounds: int = 9
    json: Path | None = None


@program
def main(args: Args) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for i in range(args.rounds + 1):
        for name, code in PROGRAMS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            if i > 0:  # the first round, which reads files from disk, does not count
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        row(f"import {name}", median[name], "s", peer="import torch", peer_value=median["torch"])
        for name in ("purelm", "all of purelm")
    ]
    rows += [
        row(f"{name}: over torch alone", median[name] - median["torch"], "s") for name in ("purelm", "all of purelm")
    ]
    publish(rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
