r"""Train a language model on pairs of answers, of which one was chosen: open weights (a folder, a .gguf file) or a run.

    python -m experiments.dpo --run runs/harmless --model runs/chat/export --train harmless-base-train.jsonl.gz \
        --heldout harmless-base-test.jsonl.gz --turns one --steps 600
    python -m experiments.dpo ... --prompt "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" \
        --end "<|im_end|>" --loss dpo_norm --beta 5 --lora.rank 8 --optim.lr 1e-4
    python -m experiments.dpo ... --loss simpo --gamma 1               # without a reference
    python -m experiments.dpo ... --reference runs/sft/export          # another one than the start
    python -m experiments.dpo ... --optim.name rmsprop                 # the optimizer of DPO's authors and of CS336
    python -m experiments.dpo ... --resume                            # goes on from the newest checkpoint, bit for bit
    torchrun --nproc-per-node 2 -m -- experiments.dpo ...             # the same run on two processes

The data are HH-RLHF's files, or JSON lines with "prompt" (or "messages"), "chosen" and "rejected", texts or chats
(`purelm.align.data.transcripts`); {name} in a template is a field of the row, and \n a new line. A chat of several
turns is what both sides share, and the last answers; pairs that cannot be used are left out and counted by reason.

The losses are dpo, cdpo, robust, ipo, hinge, dpo_norm (Olmo 3), apo_zero, apo_down, kto, simpo, orpo and cpo. The
reference is the model as it was at first, or that of --reference, whose tokenizer must be the same; its
log-probabilities are computed once, and kept in reference.safetensors in the run's folder. The loss is the mean over a
step's pairs, whatever the number of microbatches and processes. The batch of step i is a pure function of (data, seed,
i). On SIGTERM or Ctrl-C the step is finished and saved.

It leaves in the run's folder: config.json, metrics.jsonl, generations.jsonl (held-out prompts continued by the model),
curves.png and report.html, checkpoints/, reference.safetensors, and export/, a folder that transformers'
from_pretrained loads. heldout_accuracy is the share of pairs whose chosen answer has the greater implicit reward (0
before the first step, where all are equal, unless the reference is another model); heldout_policy_accuracy that to
which the model itself gives the greater probability. That both answers' log-probabilities fall is usual: the loss is of
their difference.
"""

import tyro

from experiments.console import program
from experiments.finetune.config import Dpo
from experiments.finetune.heldout import Heldout
from experiments.finetune.preferences import FILE, measure, start
from experiments.finetune.training import fine_tune

PANELS = (
    ("loss", "training loss"),
    ("heldout_margin", "mean margin of rewards, held-out"),
    ("heldout_accuracy", "accuracy of rewards, held-out"),
    ("grad_norm", "gradient norm"),
)


@program
def main(cfg: Dpo) -> None:
    fine_tune(cfg, start, lambda cfg, ready: Heldout(cfg, ready, measure(cfg, ready)), PANELS, f", {FILE}")


if __name__ == "__main__":
    main(tyro.cli(Dpo))
