r"""Reinforcement learning from verifiable rewards: answers are sampled, graded, and made more or less probable.

    python -m experiments.grpo --run runs/rl --model runs/math/export --train train.jsonl --heldout test.jsonl \
        --prompt "Question: {prompt}\nAnswer:" --gold "{response}" --grade number --recipe dapo --steps 100
    python -m experiments.grpo ... --resume                # goes on from the newest checkpoint, bit for bit
    torchrun --nproc-per-node 2 -m -- experiments.grpo ... --parallel.mode fsdp    # the same run on two processes

The problems are JSON lines, {name} in a template is a field of the row. `--recipe` names an objective, epochs and
minibatches (`python -m experiments.recipes`). Answers stay ids from the sampler to the trainer, both of which are one
model and one tree of parameters. Rollout batch i is a pure function of (parameters, data, seed, i), so a run that goes
on samples what it would have sampled. Processes share problems and rows; what they compute together is what one would,
up to rounding, and a run saved by some goes on with any other number of them.

It leaves in the run's folder: config.json, metrics.jsonl (reward by part, lengths, ratios, shares clipped, entropy, gap
between sampler and trainer, ...), rollouts.jsonl, curves.png and report.html, checkpoints/ and export/.
"""

import tyro

from experiments.console import program
from experiments.rl.config import Grpo
from experiments.rl.policy import start
from experiments.rl.training import learn_from_rewards


@program
def main(cfg: Grpo) -> None:
    learn_from_rewards(cfg, start, "reinforcement learning")


if __name__ == "__main__":
    main(tyro.cli(Grpo))
