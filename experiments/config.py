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

    name: Literal["adamw", "muon"] = "adamw"
    """muon: hidden matrices by Muon, the rest by AdamW"""
    lr: Factor = 1e-3
    """peak learning rate"""
    adamw_lr_ratio: Factor = 0.5
    """muon: AdamW's learning rate for the other parameters, as a part of lr"""
    lr_min_ratio: Share = 0.1
    """final learning rate, as a part of the peak"""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: Whole = 100
    decay_ratio: Share = 0.2
    """wsd: the part of the steps spent in the final decay"""
    weight_decay: Factor = 0.1
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Epsilon = 1e-8
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
    """of token files without a .json, which do not say it"""
    verify: bool = False
    """read all of the token files and compare them with the checksums that their .json files have"""
    tokenizer: Place | None = None
    """tokenizer.json, for bytes, samples and `experiments.generate`"""
    model: transformer.Config = field(
        default_factory=lambda: transformer.Config(vocab_size=1, context_length=256, d_model=256, n_layers=4, n_heads=4)
    )
    """vocab_size 1 means: that of the token file"""
    optim: Optim = field(default_factory=Optim)
    steps: Count = 1000
    batch_size: Count = 32
    """sequences in one step"""
    microbatches: Count = 1
    """parts in which a batch is computed; same result, less memory"""
    order: Literal["windows", "shuffled"] = "windows"
    """random windows, or every window once an epoch"""
    seed: Seed = 0
    eval_every: Whole = 250
    """steps from one evaluation to the next; 0: only at the end"""
    eval_tokens: Count | None = 100_000
    """held-out tokens of the evaluations on the way; None: all"""
    last_eval_tokens: Count | None = None
    """held-out tokens of the last evaluation; None: all"""
    eval_stride: Count | None = None
    """new tokens in each window of an evaluation: all but these of the context length are there to be seen first.
    None: half of the context length"""
    save_every: Whole = 500
    """steps from one checkpoint to the next; 0: only at the end"""
    keep_last: Count = 2
    """checkpoints that stay"""
    log_every: Count = 10
    device: str = "auto"
    compute: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU with units for it, else fp32"""
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
    """go on from the newest checkpoint. What may be another then: steps (more), log_every, save_every, eval_every,
    keep_last, sample, tensorboard; device, ops, compile, graph, deterministic, remat, microbatches, the number of
    processes and their mode. The rest, and the files' contents, must be the checkpoint's"""
    resume_anyway: bool = False
    """go on where it is not, which is written to metrics.jsonl"""
    tensorboard: bool = False
    sample: tuple[Text, ...] = ()
    """prompts sampled after training"""

    @property
    def goes_on(self) -> bool:
        """Whether the run has begun before."""
        return self.resume or self.resume_anyway


def config_json(cfg: Pretrain, model: transformer.Config) -> dict[str, Any]:
    """The configuration as config.json and checkpoints hold it, with the model that it comes to."""
    out = dataclasses.asdict(cfg)
    out["model"] = dataclasses.asdict(model)
    return {k: str(v) if isinstance(v, Path) else v for k, v in out.items()}
