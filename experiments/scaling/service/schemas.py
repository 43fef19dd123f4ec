"""What goes over the wire: the JSON of CS336's third assignment (Spring 2026, code 26.0.1), name for name.

A client of the course works with this service when its base URL is changed, so nothing here may gain or lose a field:
what the course lacks (rules, results of final runs) has routes of its own. Times are UTC, ISO 8601.
"""

import datetime as dt
import hashlib
import json
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

__all__ = [
    "AdamWConfig",
    "ArchitectureConfig",
    "BudgetSummary",
    "Completed",
    "Experiment",
    "ExperimentStatus",
    "Failed",
    "FinalSubmission",
    "FinalSubmissionRequest",
    "Queued",
    "Rules",
    "Running",
    "SGDConfig",
    "ServedRules",
    "SubmitResponse",
    "Timeout",
    "TrainingConfig",
    "Unexpected",
    "WarmupCosineDecay",
    "config_digest",
    "eval_steps",
    "problem",
    "total_steps",
]

MAX_TOKENS = 500_000_000_000
MAX_SECONDS = 12 * 60 * 60

Size = Annotated[int, Field(gt=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ArchitectureConfig(_Frozen):
    """A pre-norm decoder: RMSNorm, RMSNorm on q and k of each head, interleaved RoPE, SwiGLU."""

    attention_bias: bool
    head_dim: Size  # even
    hidden_size: Size  # num_attention_heads head_dim
    intermediate_size: Size  # at least hidden_size
    num_attention_heads: Size
    num_hidden_layers: Size
    num_key_value_heads: Size  # num_attention_heads: grouped queries are not offered
    rms_norm_eps: Annotated[FiniteFloat, Field(gt=0)]
    rope_theta: Size
    tie_word_embeddings: bool
    dtype: Literal["float32", "bfloat16"]  # of weights, activations and moments alike
    vocab_size: Size

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        heads, width = self.num_attention_heads, self.head_dim
        if self.hidden_size != heads * width:
            raise ValueError(f"hidden_size must be num_attention_heads * head_dim = {heads * width}")
        if self.num_key_value_heads != heads:
            raise ValueError(f"num_key_value_heads must equal num_attention_heads, {heads}: no grouped queries here")
        if width % 2:
            raise ValueError("head_dim must be even: RoPE turns pairs")
        if self.intermediate_size < self.hidden_size:
            raise ValueError(f"intermediate_size must be at least hidden_size, {self.hidden_size}")
        return self


class WarmupCosineDecay(_Frozen):
    """From init_value up to peak_value in a line, then down to final_lr_frac of it along half a cosine."""

    peak_value: Annotated[FiniteFloat, Field(gt=0)] = 3e-4
    final_lr_frac: Annotated[float, Field(ge=0, le=1)] = 0.1
    warmup_frac: Annotated[float, Field(ge=0, lt=1)] = 0.05
    init_value: Annotated[FiniteFloat, Field(ge=0)] = 0.0


Norm = Annotated[FiniteFloat, Field(gt=0)]


class SGDConfig(_Frozen):
    """Gradient descent without momentum."""

    lr_scheduler: WarmupCosineDecay
    grad_clip_norm: Norm | None = 1.0


class AdamWConfig(_Frozen):
    """AdamW with eps outside and eps_root inside of the root; every parameter decays."""

    lr_scheduler: WarmupCosineDecay = Field(default_factory=WarmupCosineDecay)
    weight_decay: Annotated[FiniteFloat, Field(ge=0)] = 1e-2
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[FiniteFloat, Field(gt=0)] = 1e-8
    eps_root: Annotated[FiniteFloat, Field(ge=0)] = 1e-8
    grad_clip_norm: Norm | None = 1.0


class TrainingConfig(_Frozen):
    """One run. The optimizer is SGD if it names nothing but lr_scheduler and grad_clip_norm: the course has no tag."""

    architecture_config: ArchitectureConfig
    optimizer_config: SGDConfig | AdamWConfig
    train_batch_size: Size  # sequences
    val_batch_size: Size
    n_evals: Size = 16
    total_train_tokens: Annotated[int, Field(gt=0, le=MAX_TOKENS)]
    max_runtime_seconds: Annotated[float, Field(ge=1, le=MAX_SECONDS)]
    model_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Rules(_Frozen):
    """What a server fixes for all runs; the defaults are the course's. Served by GET /rules."""

    seq_len: Annotated[int, Field(gt=0)] = 512
    n_val_tokens: Annotated[int, Field(gt=0)] = 2**18
    min_vocab_size: Annotated[int, Field(gt=0)] = 1  # more than the largest token of the data
    max_train_tokens: Annotated[int, Field(gt=0, le=MAX_TOKENS)] = MAX_TOKENS  # one pass over the data
    max_parameters: Annotated[int, Field(gt=0)] = 10**13  # what the device holds
    attention_bias: bool = True  # whether models may have it


class ServedRules(Rules):
    """Of GET /rules: what is fixed for runs, and what may be another when the server is started again."""

    final_budgets: Annotated[FiniteFloat, Field(gt=0)]  # of a key, that its final run may take


def total_steps(cfg: TrainingConfig, rules: Rules) -> int:
    """Updates of a run."""
    return cfg.total_train_tokens // (rules.seq_len * cfg.train_batch_size)


def eval_steps(cfg: TrainingConfig, rules: Rules) -> int:
    """Updates between evaluations."""
    return total_steps(cfg, rules) // cfg.n_evals


def problem(cfg: TrainingConfig, rules: Rules) -> str | None:
    """Why a server with these rules refuses cfg; None: it does not."""
    step = rules.seq_len * cfg.train_batch_size
    a = cfg.architecture_config
    if cfg.total_train_tokens % step:
        return f"total_train_tokens must be divisible by seq_len * train_batch_size = {step}"
    if total_steps(cfg, rules) % cfg.n_evals:
        return f"total optimizer steps, {total_steps(cfg, rules)}, must be divisible by n_evals, {cfg.n_evals}"
    if rules.n_val_tokens % (rules.seq_len * cfg.val_batch_size):
        return f"n_val_tokens, {rules.n_val_tokens}, must be divisible by seq_len * val_batch_size"
    if cfg.total_train_tokens > rules.max_train_tokens:
        return f"total_train_tokens must be at most {rules.max_train_tokens}: the data holds no more"
    if a.vocab_size < rules.min_vocab_size:
        return f"vocab_size must be at least {rules.min_vocab_size}, the vocabulary of the data"
    if a.attention_bias and not rules.attention_bias:
        return "attention_bias must be false: this server's models have none"
    if n_parameters(a) > rules.max_parameters:
        return f"the model has {n_parameters(a)} parameters, this server takes at most {rules.max_parameters}"
    return None


def n_parameters(a: ArchitectureConfig) -> int:
    """All of them, embeddings and norms included."""
    d, biases = a.hidden_size, 4 * a.hidden_size if a.attention_bias else 0
    layer = 4 * d * d + biases + 3 * d * a.intermediate_size + 2 * d + 2 * a.head_dim
    return a.num_hidden_layers * layer + d + (1 if a.tie_word_embeddings else 2) * a.vocab_size * d


def config_digest(cfg: TrainingConfig) -> str:
    """Of every field, defaults filled in: two submissions with one digest are one experiment."""
    text = json.dumps(cfg.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class BudgetSummary(_Frozen):
    """Device-seconds; what is queued or running counts with its max_runtime_seconds."""

    used_seconds: float
    remaining_seconds: float
    total_budget_seconds: float


class SubmitResponse(_Frozen):
    """To POST /submit; the budget is the one after it."""

    experiment_id: int
    budget_summary: BudgetSummary


class Queued(_Frozen):
    queued_at: dt.datetime
    status_type: Literal["queued"] = "queued"


class Running(_Frozen):
    queued_at: dt.datetime
    dispatched_at: dt.datetime
    run_id: str
    val_losses: list[float] = Field(default_factory=list)
    status_type: Literal["running"] = "running"


class Completed(_Frozen):
    queued_at: dt.datetime
    dispatched_at: dt.datetime
    run_id: str
    used_runtime_seconds: float
    val_losses: list[float]
    completed_at: dt.datetime
    status_type: Literal["completed"] = "completed"


class Timeout(_Frozen):
    partial_val_losses: list[float]
    reason: Literal["timeout"] = "timeout"


class Unexpected(_Frozen):
    failure: str
    reason: Literal["unexpected"] = "unexpected"


class Failed(_Frozen):
    queued_at: dt.datetime
    dispatched_at: dt.datetime
    run_id: str
    used_runtime_seconds: float
    reason: Annotated[Timeout | Unexpected, Field(discriminator="reason")]
    failed_at: dt.datetime
    status_type: Literal["failed"] = "failed"


ExperimentStatus = Annotated[Queued | Running | Completed | Failed, Field(discriminator="status_type")]


class Experiment(_Frozen):
    """To GET /experiment/{id}; GET /experiments has a list, oldest first."""

    experiment_id: int
    training_config: TrainingConfig
    status: ExperimentStatus


class FinalSubmissionRequest(_Frozen):
    """What POST /final_submission takes; a later one replaces it."""

    training_config: TrainingConfig
    predicted_final_loss: Annotated[FiniteFloat, Field(gt=0)]


class FinalSubmission(FinalSubmissionRequest):
    """To GET and POST /final_submission; GET may answer null."""

    submitted_at: dt.datetime
