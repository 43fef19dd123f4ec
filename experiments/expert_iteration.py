r"""Expert iteration: a model answers problems, and is fine-tuned on those of its own answers that are right; again.

    python -m experiments.expert_iteration --run runs/ei --model runs/math/export --train train.jsonl \
        --heldout test.jsonl --prompt "Question: {prompt}\nAnswer:" --gold "{response}" --grade number \
        --steps 5 --prompts 512 --group-size 8 --epochs 2
    python -m experiments.expert_iteration ... --resume    # goes on from the newest checkpoint, bit for bit
    torchrun --nproc-per-node 2 -m -- experiments.expert_iteration ... --parallel.mode fsdp    # on two processes

CS336 (2025), assignment 5, section 5. Flags are those of `grpo` where they mean the same. An iteration samples
`group-size` answers to each of `prompts` problems from the current policy, keeps those of reward 1, and trains on them
for `epochs` by `sft`'s loss; the optimizer's state goes on. Answers stay ids, and one that was cut off but is right is
kept as it is. Where no answer is right, nothing is trained in that iteration, and it is said. Iteration i is a pure
function of (parameters, data, seed, i), so a run that goes on is the run without a break.

It leaves in the run's folder: config.json, metrics.jsonl (a row an iteration: reward by part, kept answers, loss,
entropy on these, lengths of right and wrong ones, held-out reward), rollouts.jsonl, curves.png and report.html,
checkpoints/ and export/.
"""

import tyro

from experiments.console import program
from experiments.rl.config import ExpertIteration
from experiments.rl.expert import start
from experiments.rl.training import learn_from_rewards


@program
def main(cfg: ExpertIteration) -> None:
    learn_from_rewards(cfg, start, "expert iteration")


if __name__ == "__main__":
    main(tyro.cli(ExpertIteration))
