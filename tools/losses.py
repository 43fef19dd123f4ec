"""Losses of the programs under a fixed seed, to the last bit: what a change that changes no result must leave as it is.

    python tools/losses.py before.json                  # in the checkout before the change
    python tools/losses.py after.json --like before.json  # after it: says which rows differ, and fails if any do

Runs of a few steps on this machine's CPU: quickstart, pretrain alone (eager and compiled), and by ddp, zero1 and fsdp
on two processes, with AdamW and with Muon where that can be. Bits depend on the machine and on torch's version, so
both runs must be made on one machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
MODEL = (
    "--model.vocab-size 61 --model.d-model 32 --model.n-layers 2 --model.n-heads 4 --model.context-length 32 "
    "--batch-size 8 --log-every 1 --eval-every 4 --eval-tokens 2000 --eval-stride 16 --save-every 0 --steps 8 "
    "--device cpu --optim.warmup-steps 4 --optim.lr 1e-2 --token-dtype uint16"
).split()
GEMMA = (
    "--model.norm-position sandwich --model.ffn geglu --model.qk-norm head --model.biases all --model.norm layer "
    "--model.n-kv-heads 2 --model.tie-embeddings --model.logit-softcap 30 --model.window 7"
).split()
PRETRAIN = {
    "eager": (1, ["--compile", "no"]),
    "compiled": (1, ["--compile", "yes"]),
    "compiled muon, microbatches, remat": (
        1,
        ["--compile", "yes", "--optim.name", "muon", "--microbatches", "2", "--remat"],
    ),
    "another model": (1, ["--compile", "no", *GEMMA]),
    "another model, compiled": (1, ["--compile", "yes", *GEMMA]),
    "ddp": (2, ["--compile", "no"]),
    "ddp compiled": (2, ["--compile", "yes"]),
    "ddp microbatches bf16 wire": (2, ["--compile", "no", "--microbatches", "2", "--parallel.wire", "bf16"]),
    "zero1": (2, ["--compile", "no", "--parallel.mode", "zero1"]),
    "zero1 muon": (2, ["--compile", "no", "--parallel.mode", "zero1", "--optim.name", "muon"]),
    "zero1 compiled": (2, ["--compile", "yes", "--parallel.mode", "zero1"]),
    "fsdp": (2, ["--compile", "no", "--parallel.mode", "fsdp"]),
    "fsdp compiled, remat, microbatches": (
        2,
        ["--compile", "yes", "--parallel.mode", "fsdp", "--remat", "--microbatches", "2"],
    ),
    "fsdp bf16, another model": (2, ["--compile", "no", "--parallel.mode", "fsdp", "--compute", "bf16", *GEMMA]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--like", type=Path, help="an earlier result to compare with")
    parser.add_argument("--only", default="", help="runs whose name has this in it")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, losses in runs(Path(folder), args.only):
            found[name] = losses
            print(f"{name:40} {losses[-1]}", flush=True)
    args.out.write_text(json.dumps(found, indent=1))
    if args.like is not None:
        expected = json.loads(args.like.read_text())
        other = [name for name in found if found[name] != expected.get(name)]
        print("all as before" if not other else f"other losses than before: {', '.join(other)}")
        sys.exit(bool(other))


def runs(folder: Path, only: str):
    walk = np.cumsum(np.random.default_rng(0).integers(0, 3, 20000)) % 61
    walk.astype("uint16").tofile(folder / "train.bin")
    walk[:3001].astype("uint16").tofile(folder / "heldout.bin")
    files = ["--train", folder / "train.bin", "--heldout", folder / "heldout.bin"]
    for i, (name, (n_ranks, flags)) in enumerate(PRETRAIN.items()):
        if only in name:
            call(n_ranks, "experiments.pretrain", "--run", folder / str(i), *files, *MODEL, *flags)
            yield name, losses_of(folder / str(i))
    if only in "quickstart":
        small = "--stories 300 --vocab-size 400 --steps 6 --batch-size 4 --context-length 64 --d-model 64 --n-layers 2"
        call(1, "experiments.quickstart", "--run", folder / "quick", *small.split(), "--n-heads", "2")
        yield "quickstart", losses_of(folder / "quick")


def call(n_ranks: int, module: str, *flags: object) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)] if n_ranks > 1 else []
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *torchrun, "-m", *(["--"] if torchrun else []), module, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def losses_of(run: Path) -> list[str]:
    """Every number of the run's rows that is no measure of speed, exactly."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speed = ("seconds", "tokens_per_second", "mfu")
    return [" ".join(f"{k}={v!r}" for k, v in row.items() if k not in speed) for row in rows]


if __name__ == "__main__":
    main()
