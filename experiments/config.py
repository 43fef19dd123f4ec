"""What a training run is made of, as frozen dataclasses; every field is a flag of `experiments.pretrain`."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments.limits import Beta, Count, Epsilon, Factor, Place, Seed, Share, Text, Whole
from experiments.ops import OpsName
from experiments.parallel import Parallel
from purelm.models import transformer


@dataclass(frozen=True)
class Optim:
    """Optimizer and schedule."""

    name: Literal["adamw", "muon", "rmsprop"] = "adamw"
    """muon: hidden matrices by Muon, the rest by AdamW; rmsprop: with decay as L2, without betas"""
    lr: Factor = 1e-3
    """peak learning rate"""
    adamw_lr_ratio: Factor = 0.5
    """muon: AdamW's learning rate for the other parameters, as a part of lr"""
    lr_min_ratio: Share = 0.1
    """final learning rate, as a part of the peak"""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: Whole = 100
    decay_ratio: Share = 0.2
    """wsd: fraction of the steps that the final decay takes"""
    weight_decay: Factor = 0.1
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Epsilon = 1e-8
    alpha: Beta | None = None
    """rmsprop: the share of the old mean square that is kept, default 0.99"""
    momentum: Beta | None = None
    """rmsprop: default 0"""
    clip: Factor = 1.0
    """largest global gradient norm; 0: no clipping"""


@dataclass(frozen=True)
class Pretrain:
    """Train a Transformer on a token file."""

    run: Place
    """folder of the run"""
    train: Place
    """token file (.bin with .json), or a folder of shards"""
    heldout: Place | None = None
    token_dtype: Literal["uint16", "uint32"] | None = None
    """format of the ids in token files without a .json, which would tell it"""
    verify: bool = False
    """read the token files whole and compare them with the checksums in their .json files"""
    tokenizer: Place | None = None
    """tokenizer.json; needed for bits per byte, samples and `experiments.generate`"""
    model: transformer.Config = field(
        default_factory=lambda: transformer.Config(vocab_size=1, context_length=256, d_model=256, n_layers=4, n_heads=4)
    )
    """vocab_size 1 means the token file's"""
    optim: Optim = field(default_factory=Optim)
    steps: Count = 1000
    batch_size: Count = 32
    """sequences in one step"""
    microbatches: Count = 1
    """number of parts in which gradients of a batch are accumulated; same result, less memory"""
    order: Literal["windows", "shuffled"] = "windows"
    """random windows, or every window once an epoch"""
    seed: Seed = 0
    eval_every: Whole = 250
    """steps from one evaluation to the next; 0: only at the end"""
    eval_tokens: Count | None = 100_000
    """held-out tokens in each evaluation during training; None: all"""
    last_eval_tokens: Count | None = None
    """held-out tokens in the evaluation after the last step; None: all"""
    eval_stride: Count | None = None
    """distance between windows of an evaluation: tokens that count in each, after context_length - eval_stride tokens
    of context. None: half of the context length"""
    save_every: Whole = 500
    """steps from one checkpoint to the next; 0: only at the end"""
    keep_last: Count = 2
    """number of checkpoints kept, the newest"""
    log_every: Count = 10
    device: str = "auto"
    compute: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU with units for it, else fp32"""
    ops: OpsName = "sdpa"
    """sdpa: PyTorch's attention, everything else in torch primitives; fused: the kernels of purelm.kernels (on a CPU
    their references); reference: everything in torch primitives, attention too"""
    compile: Literal["auto", "yes", "no"] = "auto"
    graph: Literal["auto", "yes", "no"] = "auto"
    """record a step as one CUDA graph and replay it, without Python; auto: yes on a GPU if the step is compiled"""
    deterministic: bool = True
    """the same result to the last bit in every run on one machine, and after --resume; without it the order of sums in
    some kernels varies"""
    remat: bool = False
    """recompute each block in the backward pass"""
    parallel: Parallel = field(default_factory=Parallel)
    resume: bool = False
    """go on from the newest checkpoint. These flags may differ from the checkpoint's: steps (more), log_every,
    save_every, eval_every, keep_last, sample, tensorboard, device, ops, compile, graph, deterministic, remat,
    microbatches, the number of processes and their mode. All others, and the files' contents, must be the same"""
    resume_anyway: bool = False
    """go on even if others differ; the differences are written to metrics.jsonl"""
    tensorboard: bool = False
    sample: tuple[Text, ...] = ()
    """prompts sampled after training"""

    @property
    def goes_on(self) -> bool:
        """Whether the run has begun before."""
        return self.resume or self.resume_anyway


def config_json(cfg: Pretrain, model: transformer.Config) -> dict[str, Any]:
    """The configuration as in config.json and checkpoints; `model` is the resolved one, whose vocabulary is known."""
    out = dataclasses.asdict(cfg)
    out["model"] = dataclasses.asdict(model)
    return {k: str(v) if isinstance(v, Path) else v for k, v in out.items()}
