"""What a training run is made of, as frozen dataclasses; every field is a flag of `experiments.pretrain`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from experiments.ops import OpsName
from experiments.parallel import Parallel
from purelm.models import transformer


@dataclass(frozen=True)
class Optim:
    """Optimizer and schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: hidden matrices by Muon, the rest by AdamW"""
    lr: float = 1e-3
    """peak learning rate"""
    adamw_lr_ratio: float = 0.5
    """muon: AdamW's learning rate for the other parameters, as a part of lr"""
    lr_min_ratio: float = 0.1
    """final learning rate, as a part of the peak"""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int = 100
    decay_ratio: float = 0.2
    """wsd: the part of the steps spent in the final decay"""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    """largest global gradient norm; 0: no clipping"""


@dataclass(frozen=True)
class Pretrain:
    """Train a Transformer on a token file."""

    run: Path
    """folder of the run"""
    train: Path
    """token file (.bin with .json), or a folder of shards"""
    heldout: Path | None = None
    tokenizer: Path | None = None
    """tokenizer.json, for bytes, samples and `experiments.generate`"""
    model: transformer.Config = field(
        default_factory=lambda: transformer.Config(vocab_size=1, context_length=256, d_model=256, n_layers=4, n_heads=4)
    )
    """vocab_size 1 means: that of the token file"""
    optim: Optim = field(default_factory=Optim)
    steps: int = 1000
    batch_size: int = 32
    """sequences in one step"""
    microbatches: int = 1
    """parts in which a batch is computed; same result, less memory"""
    order: Literal["windows", "shuffled"] = "windows"
    """random windows, or every window once an epoch"""
    seed: int = 0
    eval_every: int = 250
    eval_tokens: int | None = 100_000
    """held-out tokens of the evaluations on the way; None: all"""
    last_eval_tokens: int | None = None
    """held-out tokens of the last evaluation; None: all"""
    eval_stride: int | None = None
    """new tokens in each window of an evaluation: all but these of the context length are there to be seen first.
    None: half of the context length"""
    save_every: int = 500
    keep_last: int = 2
    log_every: int = 10
    device: str = "auto"
    compute: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU"""
    ops: OpsName = "sdpa"
    """sdpa: PyTorch's attention, and what torch.compile makes of the rest; fused: the kernels of purelm.kernels (for
    GPUs; a CPU runs their references); reference: all written out"""
    compile: Literal["auto", "yes", "no"] = "auto"
    graph: Literal["auto", "yes", "no"] = "auto"
    """replay a step as one CUDA graph, which spares Python its launches; auto: where it is compiled, on a GPU"""
    deterministic: bool = True
    """the same bits in every run on one machine, and after --resume; without it some kernels add in any order"""
    remat: bool = False
    """recompute each block in the backward pass"""
    parallel: Parallel = field(default_factory=Parallel)
    resume: bool = False
    tensorboard: bool = False
    sample: tuple[str, ...] = ()
    """prompts sampled after training"""
