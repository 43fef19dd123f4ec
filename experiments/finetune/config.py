"""What a fine-tuning run is made of; every field is a flag of `experiments.sft` or `experiments.dpo`."""

from dataclasses import dataclass, field
from typing import Literal

from experiments.config import Optim
from experiments.finetune.objectives import LossName
from experiments.grading import GradeName
from experiments.limits import Count, Factor, Place, Positive, Seed, Share, Text, Whole
from experiments.ops import OpsName
from experiments.parallel import Parallel
from purelm.align.data import ALPACA_PLAIN

# May differ when a run goes on; files and the model are compared by what they hold.
MAY_CHANGE = (
    "steps", "save_every", "eval_every", "log_every", "keep_last", "export", "generations", "max_new_tokens", "grade",
    "gold", "device", "microbatches", "resume", "run", "train", "heldout", "tokenizer", "ops", "compile", "remat",
    "loss_chunk", "parallel.mode", "parallel.bucket_mb", "parallel.timeout", "reference",
)  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """Low-rank updates in place of all parameters."""

    rank: Whole = 0
    """0: all parameters are trained"""
    alpha: Factor = 16.0
    """the update is alpha / rank B A"""


@dataclass(frozen=True)
class FineTuning:
    """What both programs are asked."""

    run: Place
    """folder of the run"""
    model: Place
    """folder of open weights, .gguf file, or folder of a run of `pretrain`"""
    train: Place
    """JSON lines"""
    heldout: Place | None = None
    """JSON lines of an evaluation"""
    tokenizer: Place | None = None
    """tokenizer.json; default that of the model's folder"""
    prompt: Text = "{prompt}"
    end: Text = "<|endoftext|>"
    """special token that ends a response, such as <|im_end|>"""
    begin: Text = ""
    """special token before the prompt"""
    steps: Count = 100
    batch_size: Count = 8
    """examples in one step; with packing, rows"""
    microbatches: Count = 1
    max_length: Count = 512
    """tokens of prompt and response together; with packing also the length of a row"""
    overlong: Literal["error", "truncate", "drop"] = "truncate"
    """what becomes of longer examples; truncate: the end of the response is cut"""
    optim: Optim = field(default_factory=lambda: Optim(lr=2e-5, warmup_steps=10, weight_decay=0.0, beta2=0.999))
    lora: Lora = field(default_factory=Lora)
    seed: Seed = 0
    eval_every: Whole = 50
    """steps from one evaluation to the next; 0: only at the end"""
    eval_pairs: Count = 64
    """held-out pairs in an evaluation"""
    generations: Whole = 4
    """held-out prompts that are continued at each evaluation"""
    max_new_tokens: Count = 128
    save_every: Whole = 100
    keep_last: Count = 2
    log_every: Count = 1
    compute: Literal["auto", "fp32", "bf16"] = "auto"
    ops: OpsName = "sdpa"
    """as for `pretrain`"""
    compile: Literal["auto", "yes", "no"] = "auto"
    """auto: with packing, where one length of rows is compiled for, on a device that can"""
    remat: bool = False
    """recompute each block in the backward pass"""
    loss_chunk: Count | None = None
    """tokens whose logits are held at a time; default: all, or as many as take 256 MiB where all would take 1 GiB"""
    parallel: Parallel = field(default_factory=Parallel)
    device: str = "auto"
    export: bool = True
    """write export/ at the end"""
    resume: bool = False


@dataclass(frozen=True)
class Sft(FineTuning):
    """Fine-tune a language model on prompts and responses."""

    chat: bool = False
    """rows are conversations, {"messages": [{"role", "content"}, ...]}, written by the chat template of the model's
    folder; all answers of the assistant are trained, and prompt, response and begin must not be given"""
    response: Text = "{response}"
    packing: bool = False
    """put several examples into a row, told apart so that none sees another: less padding, rows of one length"""
    grade: GradeName = "none"
    """reward of a continuation: exact: the text is the gold one; number: the last numbers are equal; boxed: what is in
    the last box equals the gold answer; r1_zero: the same for <answer> tags, after </think>"""
    gold: Text = ""
    """template of the gold answer; default: that of the response"""


@dataclass(frozen=True)
class Dpo(FineTuning):
    """Train a language model on pairs of answers, of which one was chosen and one rejected."""

    prompt: Text = ALPACA_PLAIN.replace("{instruction}", "{prompt}") + "\n"
    """default: Alpaca's words around the prompt"""
    chosen: Text = "{chosen}"
    rejected: Text = "{rejected}"
    turns: Literal["any", "one"] = "any"
    """one: chats of several turns are left out"""
    loss: LossName = "dpo"
    """as in `purelm.align.preferences` and `reference_free`"""
    beta: Positive | None = None
    """default: that of the loss: 0.1, of dpo_norm 5, of simpo 2"""
    label_smoothing: Share | None = None
    """cdpo, robust: how often labels are wrong, default 0.1"""
    gamma: Factor | None = None
    """simpo: the margin between rewards, default 0.5"""
    alpha: Factor | None = None
    """cpo: weight of the chosen answer's own loss, default 1"""
    reference: Place | None = None
    """another model than the start as the reference: open weights, a .gguf file or a run, with the same tokenizer; its
    shape may differ. --tokenizer, where it is given, is that of both"""
    length_normalize: bool | None = None
    """ipo, cpo: means over tokens in place of sums"""
    desirable_weight: Factor | None = None
    """kto: weight of chosen answers, default 1"""
    undesirable_weight: Factor | None = None
    """kto: weight of rejected answers, default 1"""
    ld_alpha: Share = 1.0
    """weight of the tokens by which an answer is longer than the other of its pair; below 1: LD-DPO, with loss dpo"""
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-6, warmup_steps=10, weight_decay=0.0, beta2=0.999))
    batch_size: Count = 64
    """pairs in one step; both answers of a pair are in one microbatch"""
    eval_pairs: Count = 200
