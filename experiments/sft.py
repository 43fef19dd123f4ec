r"""Fine-tune a language model on prompts and responses: open weights (a folder, a .gguf file) or a run of `pretrain`.

    python -m experiments.sft --run runs/math --model SmolLM2-135M-Instruct --train gsm8k-train.jsonl \
        --heldout gsm8k-test.jsonl --prompt "Question: {question}\nAnswer:" --response " {answer}" --grade number \
        --steps 200
    python -m experiments.sft ... --lora.rank 8            # low-rank updates of every matrix of the blocks
    python -m experiments.sft ... --packing --max-length 1024         # several examples in a row
    python -m experiments.sft ... --resume                 # goes on from the newest checkpoint, bit for bit
    torchrun --nproc-per-node 2 -m -- experiments.sft ... --parallel.mode fsdp     # the same run on two processes

The data are JSON lines; {name} in a template is a field of the row, and \n a new line. The loss is the mean over the
tokens of responses in a step's batch, whatever the number of microbatches and processes. The batch of step i is a pure
function of (data, seed, i). On SIGTERM or Ctrl-C the step is finished and saved.

It leaves in the run's folder: config.json, metrics.jsonl, generations.jsonl (held-out prompts continued by the model,
graded), curves.png and report.html, checkpoints/, and export/, a folder that transformers' from_pretrained loads.
"""

import tyro

from experiments.console import program
from experiments.finetune.config import Sft
from experiments.finetune.heldout import Heldout
from experiments.finetune.supervised import measure, start
from experiments.finetune.training import fine_tune
from experiments.grading import grader_named

PANELS = (
    ("loss", "training loss, nats per token of responses"),
    ("heldout_loss", "held-out loss, nats per token of responses"),
    ("reward", "mean reward of held-out continuations"),
    ("grad_norm", "gradient norm"),
)


@program
def main(cfg: Sft) -> None:
    fine_tune(cfg, start, lambda cfg, ready: Heldout(cfg, ready, measure(cfg, ready), grader_named(cfg.grade)), PANELS)


if __name__ == "__main__":
    main(tyro.cli(Sft))
