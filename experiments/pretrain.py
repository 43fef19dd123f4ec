"""Train a Transformer on a token file: resumable, evaluated in bits per byte, with checkpoints, curves and a report.

    python -m experiments.pretrain --run runs/tiny --train data/train.bin --heldout data/heldout.bin \
        --tokenizer data/tokenizer.json --model.d-model 256 --model.n-layers 4 --steps 2000
    python -m experiments.pretrain ... --resume        # goes on from the newest checkpoint, bit for bit
    torchrun --nproc-per-node 4 -m -- experiments.pretrain ... --parallel.mode fsdp    # the same run on four processes

(`--` keeps torchrun from reading the program's flags as its own.) A checkpoint does not depend on how many processes
wrote it, nor in which mode: any number can resume it, in any mode. With `torchrun --max-restarts 3`, when a process
dies all are started again and go on from the newest checkpoint.

On SIGTERM or Ctrl-C the step is finished and saved, and the exit status is 128 + the signal's number; a second signal
ends the program at once. One process at a time may write into the folder of a run. On --resume the configuration and
the data must be the checkpoint's (experiments/resume.py lists what may change); --resume-anyway goes on in spite of
differences.

Everything the run needs is in `Pretrain`; every hyper-parameter is a flag. The batch of step i is a pure function of
(token file, seed, i), so the position in the data is the step.
"""

import os
from contextlib import nullcontext
from dataclasses import replace

import tyro

from experiments.config import Pretrain
from experiments.console import program, say
from experiments.generate import complete
from experiments.lock import locked
from experiments.loop import train
from experiments.processes import joined
from experiments.report import finish, summarise
from experiments.setup import start
from purelm import checkpoint
from purelm.dist import world
from purelm.tokenizer import load as load_tokenizer


@program
def main(cfg: Pretrain) -> None:
    with joined(cfg.device, cfg.parallel.timeout) as here:
        run(cfg, here)


def run(cfg: Pretrain, here: world.World) -> None:
    with locked(cfg.run) if here.rank == 0 else nullcontext():
        _run(cfg, here)


def _run(cfg: Pretrain, here: world.World) -> None:
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        there = checkpoint.latest(cfg.run / "checkpoints") is not None
        cfg = replace(cfg, resume=there, resume_anyway=there and cfg.resume_anyway)
    ready = start(cfg, here)
    if ready.finished:
        if ready.first:
            say(f"run {cfg.run} is finished: {ready.done:,} of {cfg.steps:,} steps; with more --steps it goes on")
        return
    result = train(cfg, ready)
    samples = []
    if cfg.sample and cfg.tokenizer is not None:
        params = ready.run.whole(result.state.params)
        if ready.first:
            bpe = load_tokenizer(cfg.tokenizer)
            samples = [(p, complete(params, ready.model, bpe, p, seed=cfg.seed)) for p in cfg.sample]
    if not ready.first:
        return
    finish(cfg, ready.model, summarise(cfg, ready.model, result), title=f"purelm run {cfg.run.name}", samples=samples)


if __name__ == "__main__":
    main(tyro.cli(Pretrain))
