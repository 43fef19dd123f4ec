"""Beside TRL's own functions, where TRL is installed. Oracles: TRL 1.16, its trainers' loss methods, in float64.

    pip install "trl>=1.16"        # with accelerate, datasets and transformers; or --target FOLDER, and PYTHONPATH

TRL computes its losses in methods of trainers, which need a model and a data set. Here such a method is called on a
`Stub`, which holds the options and what the method logs, and nothing else: the log-probabilities come from the test.
"""

import warnings
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from purelm.align import aggregation, divergences, ratios, regions, regions_sequence, regions_token, weights
from purelm.align.advantages import batch_normalized, centered, group_normalized
from purelm.align.answers import length_desensitized, sequence_log_probs
from purelm.align.distillation import divergence, iw_opd
from purelm.align.objective import Objective, from_batch, policy_loss
from purelm.align.preferences import apo_down, apo_zero, dpo, dpo_norm, hinge, ipo, robust_dpo
from purelm.align.reference_free import cpo, orpo, simpo
from tests.align.policy_cases import B, T, batch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("trl", minversion="1.16")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.experimental.sdpo import loss_utils
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.utils import nanstd

CLOSE = dict(rtol=1e-9, atol=1e-9)
ALONE = SimpleNamespace(  # one process
    device=torch.device("cpu"), num_processes=1, sync_gradients=True, gather=lambda x: x,
    gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x, pad_across_processes=lambda x, **_: x,
)  # fmt: skip


class Stub(SimpleNamespace):
    """A trainer's options."""

    def __init__(self, **options):
        super().__init__(
            accelerator=ALONE, model=SimpleNamespace(training=True), aux_loss_enabled=False,
            _metrics={"train": defaultdict(list)}, **options,
        )  # fmt: skip


# --- preferences ---

P = 5  # pairs, of up to T tokens


def answers(seed):
    """lp and lr (2 P, T) with chosen answers first, and a mask in which each has a token."""
    draw = torch.Generator().manual_seed(seed)
    lp, lr = (-torch.rand(2 * P, T, generator=draw, dtype=torch.float64) * 3 for _ in range(2))
    mask = torch.arange(T) < torch.randint(1, T + 1, (2 * P, 1), generator=draw)
    return lp * mask, lr * mask, mask


def of_trl(loss_type, lp, lr, mask, *, beta=0.3, label_smoothing=0.0, ld_alpha=None):
    """DPOTrainer._compute_loss, the mean over pairs, with reference sums computed before."""
    sums = lr.sum(1) if ld_alpha is None else desensitized(lr, mask, ld_alpha)
    trainer = Stub(
        ld_alpha=ld_alpha, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[loss_type],
        loss_weights=[1.0], beta=beta, label_smoothing=label_smoothing, use_weighting=False, _total_train_tokens=0,
        _tp_size=1,
    )  # fmt: skip
    zeros = torch.zeros_like(lp)
    found = SimpleNamespace(log_probs=lp, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    padded = torch.nn.functional.pad(mask.long(), (1, 0))  # a prompt of one token
    data = {"input_ids": padded, "attention_mask": padded, "completion_mask": padded,
            "ref_chosen_logps": sums[:P], "ref_rejected_logps": sums[P:]}  # fmt: skip
    return DPOTrainer._compute_loss(trainer, lambda **_: found, data, False)


def desensitized(x, mask, alpha):
    n = mask.sum(1)
    shared = torch.minimum(n[:P], n[P:]).repeat(2)
    return length_desensitized(x, mask, shared, alpha=alpha)


def pairs_of(sums):
    return sums[:P], sums[P:]


PREFERENCES = {
    "sigmoid": dpo,
    "hinge": hinge,
    "ipo": ipo,
    "robust": partial(robust_dpo, label_smoothing=0.2),
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "sigmoid_norm": dpo_norm,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences(name, seed):
    """Value and gradient by each token's log-probability. IPO there is of means over tokens."""
    lp, lr, mask = answers(seed)
    n_chosen, n_rejected = pairs_of(mask.sum(1))
    lengths = {"n_chosen": n_chosen, "n_rejected": n_rejected} if name in ("ipo", "sigmoid_norm") else {}
    found = []
    for f in (
        lambda x: PREFERENCES[name](*pairs_of(sequence_log_probs(x, mask)), *pairs_of(lr.sum(1)), beta=0.3, **lengths)[
            0
        ].mean(),
        lambda x: of_trl(name, x * mask, lr, mask, label_smoothing=0.2),
    ):
        x = lp.clone().requires_grad_()
        loss = f(x)
        found.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    torch.testing.assert_close(*found, **CLOSE)
    assert found[0][1].any()


def test_length_desensitized():
    lp, lr, mask = answers(7)
    ours, _ = dpo(*pairs_of(desensitized(lp, mask, 0.4)), *pairs_of(desensitized(lr, mask, 0.4)), beta=0.3)
    torch.testing.assert_close(ours.mean(), of_trl("sigmoid", lp, lr, mask, ld_alpha=0.4), **CLOSE)


def test_without_a_reference():
    """SimPO, CPO, ORPO. CPO's second term and ORPO's are added elsewhere there; ORPO's odds are of fp32."""
    lp, _, mask = answers(4)
    n_w, n_l = pairs_of(mask.sum(1))
    w, l = pairs_of(lp.sum(1))
    of_cpo = lambda loss_type, a, b: CPOTrainer.cpo_loss(  # noqa: E731
        Stub(alpha=0.0, loss_type=loss_type, simpo_gamma=0.7, beta=2.0, label_smoothing=0.0), a, b
    )[0]
    ours, _ = simpo(w, l, n_chosen=n_w, n_rejected=n_l, beta=2.0, gamma=0.7)
    torch.testing.assert_close(ours, of_cpo("simpo", w / n_w, l / n_l), **CLOSE)
    torch.testing.assert_close(cpo(w, l, beta=2.0, alpha=0.0)[0], of_cpo("sigmoid", w, l), **CLOSE)
    theirs = ORPOTrainer.odds_ratio_loss(Stub(beta=0.1), w / n_w, l / n_l)[0]
    ours, _ = orpo(w, l, n_chosen=n_w, n_rejected=n_l, beta=0.1)
    torch.testing.assert_close(ours + w / n_w, -theirs.double(), rtol=1e-6, atol=1e-6)


# --- policies ---


def grpo_of_trl(loss_type, lp, data, **options):
    """GRPOTrainer._compute_loss of rows that are one optimizer step."""
    args = SimpleNamespace(
        delta=options.pop("delta", None), use_bias_correction_kl=options.pop("use_bias_correction_kl", False),
        sapo_temperature_pos=1.0, sapo_temperature_neg=1.0625, steps_per_generation=1, vespo_k_pos=2.0,
        vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
    )  # fmt: skip
    settings = {
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "importance_sampling_level": "token",
        "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.28, "use_vllm": False, "max_completion_length": 12,
        "vllm_importance_sampling_correction": False, "current_gradient_accumulation_steps": 1,
        "_entropy_bonus_enabled": False,
    } | options  # fmt: skip
    trainer = Stub(
        args=args, loss_type=loss_type, **settings, get_gamma_weights=GRPOTrainer.get_gamma_weights,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        _get_per_token_logps_and_entropies=lambda *_, **__: (lp, torch.zeros_like(lp), None),
    )  # fmt: skip
    mask = data["mask"].long()
    prompts = torch.zeros(len(mask), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": prompts, "prompt_mask": prompts, "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask, "advantages": data["advantages"], "old_per_token_logps": data["old_log_probs"],
        "ref_per_token_logps": data["ref_log_probs"], "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": data.get("weights"),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, None, inputs)


CLIP = partial(regions.clip, high=0.28)
CONSTANT = partial(aggregation.constant, length=12)
SEQUENCE = {"importance_sampling_level": "sequence"}
# name -> (ratio, region, aggregate, more of the objective), (TRL's loss type, its options)
POLICIES = {
    "grpo": ((ratios.token, CLIP, aggregation.sequence_mean), ("grpo", {})),
    "dapo": ((ratios.token, CLIP, aggregation.token_mean), ("dapo", {})),
    "bnpo, one microbatch": ((ratios.token, CLIP, aggregation.token_mean), ("bnpo", {})),
    "dr_grpo": ((ratios.token, CLIP, CONSTANT), ("dr_grpo", {})),
    "gspo": ((ratios.sequence, CLIP, aggregation.sequence_mean), ("grpo", SEQUENCE)),
    "luspo": ((ratios.sequence, CLIP, aggregation.length_weighted), ("luspo", SEQUENCE)),
    "two-sided": (
        (ratios.token, partial(regions.two_sided, high=0.28, delta=2.0), aggregation.sequence_mean),
        ("grpo", {"delta": 2.0}),
    ),
    "cispo": (
        (ratios.token, partial(regions.cispo, cap=1.5), aggregation.token_mean), ("cispo", {"epsilon_high": 1.5}),
    ),
    # TRL's temperatures are rounded to fp32: one that is exact there.
    "sapo": (
        (ratios.token, partial(regions_token.sapo, tau_negative=1.0625), aggregation.sequence_mean), ("sapo", {}),
    ),
    "vespo": ((ratios.token, regions_sequence.vespo, aggregation.token_mean), ("vespo", {})),
    "off-policy mask": (
        (ratios.token, partial(regions_sequence.off_policy_masked, region=CLIP, delta=0.1), aggregation.sequence_mean),
        ("grpo", {"off_policy_mask_threshold": 0.1}),
    ),
    "k3": ((ratios.token, CLIP, aggregation.token_mean, {"kl": divergences.k3}), ("dapo", {"beta": 0.05})),
    "unbiased k3": (
        (ratios.token, CLIP, aggregation.sequence_mean,
         {"kl": from_batch(divergences.unbiased_k3, old_log_probs_BT="old_log_probs")}),
        ("grpo", {"beta": 0.05, "use_bias_correction_kl": True}),
    ),
    "truncated weights": (
        (ratios.token, CLIP, aggregation.token_mean, {"weight": partial(weights.truncated, cap=1.1)}),
        ("dapo", {"use_vllm": True, "vllm_importance_sampling_correction": True}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", POLICIES)
def test_policies(name, seed):
    """Value and gradient by each token's log-probability, of ratios from 0.1 to 10."""
    (ratio, region, aggregate, *more), (loss_type, options) = POLICIES[name]
    lp, lo, adv, mask = batch(seed)
    mask[2, 0] = True  # TRL's logging divides by each row's tokens
    data = {"old_log_probs": lo, "ref_log_probs": lo.flip(0), "advantages": adv[:, 0], "mask": mask}
    if name == "truncated weights":
        data |= {"sampler_log_probs": lo + 0.3 * lp.sin(), "weights": torch.exp(-0.3 * lp.sin()).clamp(max=1.1)}
    made = Objective(centered, ratio, region, aggregate, kl_coefficient=0.05 if "kl" in str(more) else 0.0,
                     **(more[0] if more else {}))  # fmt: skip
    found = []
    for f in (
        lambda x: policy_loss(made, {**data, "log_probs": x})[0],
        lambda x: grpo_of_trl(loss_type, x, data, **options),
    ):
        x = lp.clone().requires_grad_()
        loss = f(x)
        found.append((loss.detach().double(), torch.autograd.grad(loss, x)[0]))
    torch.testing.assert_close(*found, **CLOSE)
    assert found[0][1].any()


def test_microbatches_of_bnpo_are_not_the_whole():
    """What the table of purelm.align's README says: two microbatches' means are another loss; ours are not."""
    lp, lo, adv, mask = batch(0)
    mask[2, 0] = True
    data = {"old_log_probs": lo, "ref_log_probs": lo, "advantages": adv[:, 0], "mask": mask, "log_probs": lp}
    halves = [{k: x[i : i + B // 2] for k, x in data.items()} for i in (0, B // 2)]
    options = {"current_gradient_accumulation_steps": 2}
    theirs = sum(grpo_of_trl("bnpo", half["log_probs"], half, **options) for half in halves)
    made = Objective(centered, ratios.token, CLIP, aggregation.token_mean)
    whole = policy_loss(made, data)[0]
    ours = sum(policy_loss(made, {**half, "denominator": mask.sum()})[0] for half in halves)
    torch.testing.assert_close(ours, whole, **CLOSE)
    assert abs(float(theirs - whole)) > 1e-3


def test_advantages():
    """By nanstd: unbiased, with 1e-4 beside it; n / (n - 1) is rounded to fp32 there, and exact for 3 and 9."""
    r = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = r.mean(1, keepdim=True)
    theirs = (r - mean) / (nanstd(r, dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_normalized(r, eps=1e-4)[0], theirs, **CLOSE)
    torch.testing.assert_close(batch_normalized(r, eps=1e-4)[0], (r - mean) / (nanstd(r) + 1e-4), **CLOSE)


# --- distillation ---


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("top_k", [None, 1, 4])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_divergence(alpha, top_k, tail):
    """SDPO's and SDFT's; the teacher's logits without gradient, as their trainers compute them."""
    draw = torch.Generator().manual_seed(1)
    z, other = (torch.randn(3, 4, 9, generator=draw, dtype=torch.float64) for _ in range(2))
    if top_k is None:
        theirs = partial(loss_utils.compute_full_logit_self_distillation_loss, distillation_alpha=alpha)
    else:
        theirs = partial(
            loss_utils.compute_topk_self_distillation_loss, distillation_topk=top_k, distillation_alpha=alpha,
            distillation_add_tail=tail,
        )  # fmt: skip
    found = []
    for f in (lambda x: divergence(x, other, torch.ones(3, 4), alpha=alpha, top_k=top_k, tail=tail)[0],
              lambda x: theirs(x, other)):  # fmt: skip
        x = z.clone().requires_grad_()
        loss = f(x)
        found.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
    torch.testing.assert_close(*found, **CLOSE)


def test_iw_opd():
    """The mean over tokens; there one logit row a token, whose log-softmax is the student's log-probability."""
    _, lo, _, mask = batch(2)
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(B, T, 7, generator=draw, dtype=torch.float64).requires_grad_()
    tokens = torch.randint(0, 7, (B, T), generator=draw)
    teacher = -torch.rand(B, T, generator=draw, dtype=torch.float64) * 4
    labels = torch.where(mask, tokens, -100)
    trainer = Stub(temperature=1.0, iw_opd_gamma=0.5, iw_opd_epsilon=1e-8)
    theirs = IWOPDTrainer._compute_iw_opd_loss(trainer, logits, tokens, labels, teacher, lo)
    lp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    log_w, _ = ratios.token(lp, lo, mask)
    ours = aggregation.token_mean(iw_opd(lp, log_w, None, mask, teacher_log_probs_BT=teacher)[0], mask)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours, theirs)), **CLOSE)
