"""Rows of the conformance table about losses: aggregation, ratios, advantages, number formats."""

import math
from functools import partial

import torch

from purelm.align import aggregation, divergences, filters, ratios, regions, shaping, weights
from purelm.align.advantages import centered, multi_reward
from purelm.align.collect import Collected, add_round, full, take
from purelm.align.logits import entropy, target_log_probs
from purelm.align.masked import masked_mean
from purelm.align.objective import Objective, policy_loss
from purelm.align.preferences import dpo
from purelm.generate.sampling import distribution
from tests.align.conformance import Case, Row

F64 = partial(torch.tensor, dtype=torch.float64)
ON_POLICY = Objective(centered, ratios.none, regions.clip, aggregation.sequence_mean)


def accumulation() -> Case:
    """Four microbatches of one row of two tokens, all losses -lp: a token's gradient is -1/8."""
    log_probs = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    parts = [aggregation.token_mean(-row, torch.ones(1, 2), denominator=8.0) for row in log_probs.split(1)]
    (grad,) = torch.autograd.grad(sum(parts), log_probs)
    return Case(float(grad[0, 0]), -1 / 8, float(grad[0, 0]) / 4)


def microbatches() -> Case:
    """Losses 4 and 1, 1, 1 of two rows, each a microbatch."""
    losses, mask = F64([[4.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), F64([[1, 0, 0], [1, 1, 1]])
    rows = list(zip(losses.split(1), mask.split(1), strict=True))
    whole = sum(masked_mean(x, m, denominator=mask.sum()) for x, m in rows)
    return Case(float(whole), 7 / 4, float(sum((x * m).sum() / m.sum() for x, m in rows) / 2))


def token_for_sequence() -> Case:
    """Rows of 1 and 9 tokens: the weight of the short row's token."""
    mask = F64([[1] + 8 * [0], 9 * [1]])
    loss = torch.zeros_like(mask).index_put((torch.tensor([0]), torch.tensor([0])), F64(1.0))
    return Case(float(aggregation.token_mean(loss, mask)), 1 / 10, float(aggregation.sequence_mean(loss, mask)))


def generation_batch() -> Case:
    """Two optimizer steps of 4 tokens each from one batch of 8 that was sampled together."""
    ones = torch.ones(2, 2, dtype=torch.float64)
    return Case(float(aggregation.token_mean(ones, ones, denominator=4.0)), 1.0, float(ones.sum() / 8))


def sum_norm() -> Case:
    """Two rows of three tokens of loss 1, L = 4."""
    ones = torch.ones(2, 3, dtype=torch.float64)
    return Case(float(aggregation.constant(ones, ones, length=4.0)), 6 / 8, float(ones.sum() / 4))


def group_or_batch() -> Case:
    """A group of one token of loss 4, and one of three of loss 0."""
    loss, mask = F64([[4.0, 0, 0], [0, 0, 0]]), F64([[1, 0, 0], [1, 1, 1]])
    return Case(float(aggregation.group_token_mean(loss, mask, group_size=1)), 2.0, float((loss * mask).sum() / 4))


def two_denominators() -> Case:
    """KL of 1 on the one token of the first row, 0 on three of the second; advantages 0."""
    lp, mask = F64([[0.0, 0, 0], [-1, -1, -1]]), F64([[1, 0, 0], [1, 1, 1]])
    made = Objective(
        centered, ratios.none, regions.reinforce, aggregation.token_mean, kl=divergences.k1, kl_coefficient=1.0
    )
    batch = {"log_probs": lp, "ref_log_probs": F64([[-1.0, 0, 0], [-1, -1, -1]]), "mask": mask,
             "advantages": torch.zeros(2, dtype=torch.float64)}  # fmt: skip
    return Case(float(policy_loss(made, batch)[0]), 1 / 4, 1 / 2)


def zero_loss() -> Case:
    """Advantages 1/2 and -1/2, one token each, before any update: the gradient of the first, at a loss of 0."""
    lp = F64([[-1.0], [-2.0]]).requires_grad_()
    a = centered(F64([[1.0, 0.0]]))[0].reshape(2)
    loss, _ = policy_loss(ON_POLICY, {"log_probs": lp, "mask": torch.ones(2, 1), "advantages": a})
    assert float(loss.detach()) == 0.0
    return Case(float(torch.autograd.grad(loss, lp)[0][0, 0]), -1 / 4, 0.0)


def empty_row() -> Case:
    """Rows of two tokens of loss 1 and of none."""
    loss, mask = F64([[1.0, 1.0], [5.0, 5.0]]), F64([[1, 1], [0, 0]])
    by_rows = (loss * mask).sum(1) / mask.sum(1)
    return Case(float(aggregation.sequence_mean(loss, mask)), 1 / 2, float(by_rows.mean()))


def rejected() -> Case:
    """Three tokens of loss 1 and weight 1, one of weight 0."""
    lp = torch.full((1, 4), -1.0, dtype=torch.float64)
    made = Objective(centered, ratios.none, regions.reinforce, aggregation.token_mean,
                     weight=weights.masked, count_rejected=False)  # fmt: skip
    sampler = lp - F64([[0, 0, 0, math.log(100.0)]])
    batch = {"log_probs": lp, "old_log_probs": lp, "sampler_log_probs": sampler, "mask": torch.ones(1, 4)}
    batch["advantages"] = torch.ones(1, dtype=torch.float64)
    stays, _ = policy_loss(Objective(**{**vars(made), "count_rejected": True}), batch)
    return Case(float(policy_loss(made, batch)[0]), 1.0, float(stays))


def overflow() -> Case:
    """k3 of a token with lp - lr = -200, in fp32; ours bounds |lp - lr| by 20."""
    lp, lr, mask = torch.tensor([[-200.0]]), torch.zeros(1, 1), torch.ones(1, 1)
    d = lr - lp
    return Case(float(divergences.k3(lp, lr, mask)), math.exp(20) - 21, float(d.exp() - d - 1), 1e-6)


def ratio_overflow() -> Case:
    """-w A with log w = 100 and A = -1, in fp32; ours bounds log w by 20."""
    lp, lo, mask = torch.zeros(1, 1), torch.full((1, 1), -100.0), torch.ones(1, 1)
    log_ratio, _ = ratios.token(lp, lo, mask)
    ours, _ = regions.clip(lp, log_ratio, -torch.ones(1, 1), mask)
    return Case(float(ours), math.exp(20), float((lp - lo).exp()), 1e-6)


def half_precision() -> Case:
    """log softmax of fp16 logits 0 and -20, at the second."""
    logits = torch.tensor([[0.0, -20.0]], dtype=torch.float16)
    narrow = (logits.exp() / logits.exp().sum(-1, keepdim=True)).log()
    return Case(float(target_log_probs(logits, torch.tensor([1]))), -20 - math.log1p(math.exp(-20)),
                float(narrow[0, 1]), 1e-6)  # fmt: skip


def excluded_token() -> Case:
    """Entropy of logits 0, 0 and -inf."""
    logits = F64([0.0, 0.0, -math.inf])
    log_p = logits.log_softmax(-1)
    return Case(float(entropy(logits)), math.log(2), float(-(log_p.exp() * log_p).sum()))


def far_margin() -> Case:
    """DPO with beta 0.1 of d = -10000, in fp32."""
    far, zero = torch.tensor([-1e4]), torch.zeros(1)
    return Case(float(dpo(far, zero, zero, zero, beta=0.1)[0]), 1000.0, float(-torch.sigmoid(0.1 * far).log()), 1e-6)


def temperature() -> Case:
    """Logits 2, 1, 0 at temperature 0.6: the ratio of the first token, before any update."""
    logits, token = F64([[2.0, 1.0, 0.0]]), torch.tensor([0])
    sampled = distribution(logits, temperature=0.6)[:, 0]
    here = target_log_probs(logits / 0.6, token) - sampled
    return Case(float(here.exp()), 1.0, float((target_log_probs(logits, token) - sampled).exp()))


def top_p() -> Case:
    """Probabilities 0.5, 0.3, 0.2 cut at top_p 0.8: the mean ratio of the first token, before any update."""
    logits, token, mask = F64([[0.5, 0.3, 0.2]]).log(), torch.tensor([0]), torch.ones(1, 1)
    lp = target_log_probs(logits, token)[None]
    sampled = distribution(logits, top_p=0.8)[:, :1]
    batch = {"log_probs": lp, "old_log_probs": lp, "sampler_log_probs": sampled, "mask": mask,
             "advantages": torch.ones(1, dtype=torch.float64)}  # fmt: skip
    made = Objective(centered, ratios.token, regions.clip, aggregation.token_mean)
    metrics = policy_loss(made, batch)[1]
    return Case(float(metrics["ratio_mean"]), 1.0, float(metrics["sampler_ratio_mean"]))


def long_sequence() -> Case:
    """A gap of 0.012 on each of 100 tokens: the weight of the sequence."""
    lo, ls, mask = torch.zeros(1, 100, dtype=torch.float64), F64([100 * [-0.012]]), torch.ones(1, 100)
    whole, _ = weights.sequence_truncated(lo, ls, mask, cap=100.0)
    return Case(float(weights.geometric(lo, ls, mask)[0][0, 0]), math.exp(0.012), float(whole[0, 0]))


def logged_ratio() -> Case:
    """Ratios 1 and 3 under a clip of 0.2: the mean that is logged."""
    log_ratio = F64([[1.0, 3.0]]).log()
    _, aux = regions.clip(log_ratio, log_ratio, torch.ones(1, 1), torch.ones(1, 2))
    return Case(float(aux["ratio_mean"]), 2.0, float(log_ratio.exp().clamp(0.8, 1.2).mean()))


def flat_by_std() -> Case:
    """0.1 + 0.3 + 0.4 and 0.4 + 0.3 + 0.1 in fp32, which differ by rounding."""
    a, b, c = torch.tensor([0.1, 0.3, 0.4])
    r = torch.stack([a + b + c, c + b + a])[None]
    return Case(bool(filters.zero_gradient(r)), True, not bool(r.std(1) != 0))


def flat_by_mean() -> Case:
    """Four rewards of 0.5: no right or wrong answers, and no gradient."""
    r = torch.full((1, 4), 0.5)
    return Case(bool(filters.zero_gradient(r)), True, not 0 < float(r.mean()) < 1)


def shrunk_batch() -> Case:
    """Rounds of four groups, two of them flat: the groups of a batch of four."""
    rewards = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    state = Collected()
    while not full(state, 4):
        state = add_round(state, range(4), rewards)
    return Case(len(take(state, 4)[0]), 4, int((rewards.amax(1) != rewards.amin(1)).sum()))


def summed_rewards() -> Case:
    """Rewards (1, 0) and (0, 1) of two parts that sum to 1 in both answers, weights 1 and 1/2."""
    r, w = F64([[[1.0, 0.0], [0.0, 1.0]]]), F64([1.0, 0.5])
    # z is +-1/sqrt 2 in both parts, so w z sums to +-(1 - 1/2)/sqrt 2, and normalised again it is 1/sqrt 2.
    summed = r.sum(2)
    return Case(float(multi_reward(r, w, eps=0.0)[0][0, 0]), math.sqrt(0.5), float((summed - summed.mean())[0, 0]))


def beyond_the_cosine() -> Case:
    """A right answer of twice the longest length, rewards 1 (short) to 0.5 (long)."""
    right, length = torch.tensor([True]), torch.tensor([200])
    there = 0.5 + 0.5 * (1 + math.cos(math.pi * 2)) / 2
    return Case(float(shaping.cosine(right, length, longest=100)), 0.5, there, 1e-6)


ROWS = [
    Row("ms-swift#10117", "a sum over the step's tokens is divided by the accumulation steps again",
        "gradient of one of 8 tokens, 4 microbatches", "token_mean(denominator=)", accumulation),
    Row("SkyRL#1504, open-instruct PR#1161", "a mean of microbatches' means", "losses 4; 1, 1, 1 in two microbatches",
        "masked_mean(denominator=)", microbatches),
    Row("trl PR#6024", "the denominator of what was sampled, not of the step", "4 of 8 sampled tokens of loss 1 a step",
        "token_mean(denominator=)", generation_batch),
    Row("MaxText PR#4025", "sequence mean where the recipe has token mean; training stalls",
        "weight of a row's one token beside a row of 9", "token_mean", token_for_sequence),
    Row("verl#3741", "Dr. GRPO's mean without 1/B", "2 rows of 3 tokens of loss 1, L = 4", "constant", sum_norm),
    Row("verl#2776", "DAPO's equation 8 as a mean over the batch", "groups of 1 token (4) and 3 tokens (0)",
        "group_token_mean", group_or_batch),
    Row("trl#2995", "loss by tokens, KL by sequences", "KL 1 on a row's one token, 0 on a row of 3", "policy_loss",
        two_denominators),
    Row("trl#2703, trl#3452, open-r1#239", "a loss of 0 taken for no training", "centred advantages before an update",
        "policy_loss", zero_loss),
    Row("CS336's masked_mean", "the mean of an empty response is nan", "losses 1, 1 and an empty row", "sequence_mean",
        empty_row),
    Row("slime PR#657", "rejected tokens stay in the denominator", "3 tokens of loss 1, one rejected",
        "Objective(count_rejected=False)", rejected),
    Row("verl#747, verl#751, verl#891", "k3 overflows", "lp - lr = -200, fp32", "divergences.k3", overflow),
    Row("verl#1197, prime-rl PR#2973", "the ratio overflows", "log w = 100, A = -1, fp32", "ratios.token",
        ratio_overflow),
    Row("trl#878", "log of an fp16 softmax", "fp16 logits 0, -20", "target_log_probs", half_precision),
    Row("0 log 0", "nan in the entropy of logits that were cut", "logits 0, 0, -inf", "entropy", excluded_token),
    Row("log(sigmoid(x))", "the logarithm of an underflow", "b d = -1000, fp32", "preferences.dpo", far_margin),
    Row("trl#4159", "the trainer's log-probabilities have no temperature",
        "logits 2, 1, 0 at T = 0.6: w before an update",
        "target_log_probs(logits / T)", temperature),
    Row("trl#6789", "the mass that top-p keeps enters the ratio", "p = 0.5, 0.3, 0.2, top-p 0.8: w before an update",
        "policy_loss, old_log_probs", top_p),
    Row("trl#4772", "a sequence's weight explodes with length", "100 tokens of gap 0.012", "weights.geometric",
        long_sequence),
    Row("trl#5231", "only ratios after the clip are logged", "w = 1, 3, clip 0.2", 'aux["ratio_mean"]', logged_ratio),
    Row("NeMo-RL PR#4158", "std != 0 as a test of equal rewards", "0.1 + 0.3 + 0.4 in two orders, fp32: flat",
        "zero_gradient", flat_by_std),
    Row("OpenRLHF#1270, PR#1272", "0 < mean < 1 as that test", "four rewards of 0.5: flat", "zero_gradient",
        flat_by_mean),
    Row("AReaL#450", "the batch shrinks by what is filtered", "rounds of 4 groups, 2 flat: a batch of 4", "add_round",
        shrunk_batch),
    Row("GDPO, 2601.05242", "rewards summed before they are normalised", "(1, 0), (0, 1) of two parts, weights 1, 0.5",
        "multi_reward", summed_rewards),
    Row("open-r1 (cosine reward)", "the cosine goes on beyond the longest", "T = 2 L, right, 1 to 0.5",
        "shaping.cosine", beyond_the_cosine),
]  # fmt: skip
