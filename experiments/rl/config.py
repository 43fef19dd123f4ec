"""What runs of `experiments.grpo`, `expert_iteration` and `prepare_pairs` are made of; every field is a flag."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from experiments.config import Optim
from experiments.grading import GradeName
from experiments.limits import Count, Place, Range, Seed, Text, Whole
from experiments.parallel import Parallel

# May differ when a run goes on; files and the model are compared by what they hold.
MAY_CHANGE = (
    "steps", "save_every", "eval_every", "eval_prompts", "log_every", "keep_last", "export", "shown", "device",
    "rows_per_pass", "sample_rows", "resume", "run", "train", "heldout", "tokenizer", "remat", "loss_chunk",
    "graph", "parallel.mode", "parallel.bucket_mb", "parallel.timeout",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Answers:
    """How problems are answered and graded."""

    model: Place
    """folder of open weights, .gguf file, or folder of a run"""
    train: Place
    """JSON lines of problems"""
    tokenizer: Place | None = None
    prompt: Text = "{prompt}"
    """template of a prompt; {name} is a field of the row"""
    gold: Text = "{response}"
    """template of the right answer"""
    grade: GradeName = "number"
    """reward of an answer, as for `sft`"""
    chat: bool = False
    """the prompt is a user's message, written by the chat template of the model's folder"""
    begin: Text = ""
    """special token before the prompt"""
    end: Text = "<|endoftext|>"
    """special token that ends an answer"""
    stop: tuple[Text, ...] = ()
    """strings that end an answer, </answer> say"""
    group_size: Count = 8
    """answers to each"""
    max_new_tokens: Count = 64
    temperature: Annotated[float, Range(1e-6, 1e3)] = 1.0
    """of sampling"""
    exact: bool = False
    """sampler and trainer compute the same log-probabilities, to the last bit: one order of summation for all batches,
    at a price in time; on a GPU"""
    sample_rows: Count = 128
    """rows that a process samples at a time"""
    seed: Seed = 0
    compute: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class FromRewards(Answers):
    """What both programs that train are asked."""

    run: Place
    """folder of the run"""
    heldout: Place | None = None
    """JSON lines of problems that are answered greedily at each evaluation"""
    steps: Count = 100
    """rollout batches"""
    prompts: Count = 16
    """prompts of a rollout batch"""
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-5, schedule="constant", warmup_steps=0, weight_decay=0.0))
    rows_per_pass: Count = 32
    """rows of a process in a forward and backward pass: same result, less memory"""
    eval_every: Whole = 10
    """rollout batches from one evaluation to the next; 0: only at the end"""
    eval_prompts: Count = 64
    shown: Whole = 4
    """rollouts written to rollouts.jsonl at each evaluation"""
    save_every: Whole = 50
    keep_last: Count = 2
    log_every: Count = 1
    remat: bool = False
    loss_chunk: Count | None = None
    """as for `sft`"""
    graph: Literal["auto", "yes", "no"] = "auto"
    """passes of rows_per_pass rows each, recorded as CUDA graphs and replayed; auto: yes in one process on a GPU
    without --exact. Rows without weight fill the last pass. Each length of rows, in steps of 64, holds memory of its
    own"""
    parallel: Parallel = field(default_factory=Parallel)
    export: bool = True
    resume: bool = False


@dataclass(frozen=True, kw_only=True)
class Grpo(FromRewards):
    """Train a language model on rewards of its own answers."""

    recipe: Text = "course2026_grpo"
    """of `python -m experiments.recipes`: the objective, epochs, minibatches, what becomes of flat groups. Its
    optimizer's settings are for its own models, and not taken"""
    temperature: Annotated[float, Range(1e-6, 1e3)] = 1.0
    """of sampling, and of the log-probabilities that are trained"""
    epochs: Count | None = None
    """passes over a rollout batch; default the recipe's"""
    minibatches: Count | None = None
    """optimizer steps that divide a rollout batch; default the recipe's"""
    old_log_probs: Literal["recomputed", "sampler"] = "recomputed"
    """of the policy before the update: by the trainer, or as the sampler had them"""
    max_rounds: Count = 10
    """recipes that replace flat groups: rounds of prompts for one batch"""


@dataclass(frozen=True, kw_only=True)
class ExpertIteration(FromRewards):
    """Fine-tune a language model on its own right answers, several times."""

    steps: Count = 5
    """iterations, each of one rollout batch"""
    prompts: Count = 512
    """prompts of an iteration"""
    min_new_tokens: Count = 4
    """no answer ends before"""
    duplicates: Literal["keep", "drop"] = "keep"
    """right answers to a prompt with the same ids, within an iteration: all are trained, or the first alone"""
    epochs: Count = 2
    """passes over the right answers of an iteration"""
    batch_size: Count = 32
    """answers in an optimizer step, at most; an epoch's are dealt into steps as equal as can be"""
    mean_over: Literal["tokens", "answers"] = "tokens"
    """the loss of a step: the mean over all tokens, as of `sft`; or of each answer's mean, so that long ones weigh no
    more"""
    optim: Optim = field(default_factory=lambda: Optim(lr=2e-5, schedule="constant", warmup_steps=0, weight_decay=0.0))
    """a schedule that ends does so with as many steps as there are if all answers are right"""
    eval_every: Whole = 1
    save_every: Whole = 1


@dataclass(frozen=True, kw_only=True)
class Pairs(Answers):
    """Make pairs of a right and a wrong answer from a model's own answers."""

    out: Place
    """the .jsonl to write"""
    pairs: Count = 1
    """most pairs of a problem; of different texts"""
    problems: Count | None = None
    """the first ones; default all"""
