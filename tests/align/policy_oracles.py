"""Losses of policies once more, in numpy, one token at a time, with their derivatives by hand.

Nothing of the library is used. lp, lo, A, m are lists of rows; each region gives (l, D): l[i][t] the loss, and D a
function from upstream factors u[i][t] to d(sum u l)/dlp.
"""

import math

import numpy as np


def rows(lp, mask):
    """(i, t) of unmasked tokens."""
    return [(i, t) for i in range(lp.shape[0]) for t in range(lp.shape[1]) if mask[i, t]]


def per_token(rule):
    """A region of which token's loss and slope depend on that token alone: rule(lp, log w, A) -> (l, dl/dlp)."""

    def region(lp, lo, adv, mask):
        loss, slope = np.zeros(lp.shape), np.zeros(lp.shape)
        for i, t in rows(lp, mask):
            loss[i, t], slope[i, t] = rule(lp[i, t], lp[i, t] - lo[i, t], adv[i, t])
        return loss, lambda u: u * slope

    return region


def reinforce(x, z, a):
    return -a * x, -a


def unclipped(x, z, a):
    return -math.exp(z) * a, -math.exp(z) * a


def clip(low, high):
    def rule(x, z, a):
        w = math.exp(z)
        if a > 0:
            return (-w * a, -w * a) if w < 1 + high else (-(1 + high) * a, 0.0)
        return (-w * a, -w * a) if w > 1 - low else (-(1 - low) * a, 0.0)

    return rule


def dual_clip(low, high, c):
    def rule(x, z, a):
        if a < 0 and math.exp(z) > c:
            return c * abs(a), 0.0
        return clip(low, high)(x, z, a)

    return rule


def cispo(floor, cap):
    def rule(x, z, a):
        weight = max(floor, min(cap, math.exp(z)))
        return -weight * a * x, -weight * a

    return rule


def sapo(positive, negative):
    def rule(x, z, a):
        tau, w = (positive if a > 0 else negative), math.exp(z)
        gate = 1 / (1 + math.exp(-tau * (w - 1)))
        return -a * 4 / tau * gate, -a * 4 * gate * (1 - gate) * w

    return rule


def dro(beta):
    return lambda x, z, a: (-(a * x - beta / 2 * z * z), -a + beta * z)


def up_grpo(low, high, c):
    return lambda x, z, a: (-a * x, -a) if a > 0 else dual_clip(low, high, c)(x, z, a)


def dppo_tv(low, high, cap):
    def rule(x, z, a):
        change = math.exp(x) - math.exp(x - z)
        keep = change <= high if a > 0 else change >= -low
        return (-a * min(cap, math.exp(z)) * x, -a * min(cap, math.exp(z))) if keep else (0.0, 0.0)

    return rule


def dppo_kl(low, high, cap):
    def rule(x, z, a):
        pi, mu = math.exp(x), math.exp(x - z)
        d = mu * math.log(mu / pi) + (1 - mu) * math.log((1 - mu) / (1 - pi))
        drop = (pi > mu and d > high) if a > 0 else (pi < mu and d > low)
        return (0.0, 0.0) if drop else (-a * min(cap, math.exp(z)) * x, -a * min(cap, math.exp(z)))

    return rule


def probability_band(bound, cap):
    def rule(x, z, a):
        keep = abs(math.exp(x) - math.exp(x - z)) <= bound
        return (-a * min(cap, math.exp(z)) * x, -a * min(cap, math.exp(z))) if keep else (0.0, 0.0)

    return rule


def each_row(lp, lo, mask):
    """(i, its unmasked t, their log ratios) of rows that have any."""
    for i in range(lp.shape[0]):
        ts = [t for t in range(lp.shape[1]) if mask[i, t]]
        if ts:
            yield i, ts, [lp[i, t] - lo[i, t] for t in ts]


def gspo(low, high):
    def region(lp, lo, adv, mask):
        loss, back = np.zeros(lp.shape), []
        for i, ts, z in each_row(lp, lo, mask):
            s = math.exp(sum(z) / len(z))
            slopes = []
            for t in ts:
                loss[i, t], slope = clip(low, high)(None, math.log(s), adv[i, t])
                slopes.append(slope)
            back.append((i, ts, slopes))

        def derivative(u):
            g = np.zeros(lp.shape)
            for i, ts, slopes in back:
                total = sum(u[i, t] * slope for t, slope in zip(ts, slopes, strict=True))
                for t in ts:
                    g[i, t] = total / len(ts)
            return g

        return loss, derivative

    return region


def gspo_token(low, high):
    def region(lp, lo, adv, mask):
        loss, slope = np.zeros(lp.shape), np.zeros(lp.shape)
        for i, ts, z in each_row(lp, lo, mask):
            for t in ts:
                loss[i, t], slope[i, t] = clip(low, high)(None, sum(z) / len(z), adv[i, t])
        return loss, lambda u: u * slope

    return region


def gmpo(low, high):
    def region(lp, lo, adv, mask):
        loss, back = np.zeros(lp.shape), []
        for i, ts, z in each_row(lp, lo, mask):
            total, free = 0.0, []
            for t, x in zip(ts, z, strict=True):
                a = adv[i, t]
                total += min(x, high) if a > 0 else max(x, -low) if a < 0 else 0.0
                free.append((a > 0 and x < high) or (a < 0 and x > -low))
            s = math.exp(total / len(ts))
            for t in ts:
                loss[i, t] = -s * adv[i, t]
            back.append((i, ts, s, free))

        def derivative(u):
            g = np.zeros(lp.shape)
            for i, ts, s, free in back:
                total = sum(u[i, t] * adv[i, t] for t in ts)
                for t, is_free in zip(ts, free, strict=True):
                    g[i, t] = -s * total / len(ts) if is_free else 0.0
            return g

        return loss, derivative

    return region


def row_weighted(weight):
    """-weight A lp with a constant weight(z of the row, A of the token)."""

    def region(lp, lo, adv, mask):
        loss, slope = np.zeros(lp.shape), np.zeros(lp.shape)
        for i, ts, z in each_row(lp, lo, mask):
            for t in ts:
                slope[i, t] = -weight(z, adv[i, t]) * adv[i, t]
                loss[i, t] = slope[i, t] * lp[i, t]
        return loss, lambda u: u * slope

    return region


def topr():
    return row_weighted(lambda z, a: 1.0 if a > 0 else min(1.0, math.exp(sum(z) / len(z))))


def vespo(k_positive, decay_positive, k_negative, decay_negative):
    def weight(z, a):
        w = math.exp(sum(z))
        k, decay = (k_positive, decay_positive) if a >= 0 else (k_negative, decay_negative)
        return w**k * math.exp(decay * (1 - w))

    return row_weighted(weight)


def fipo(half_life, least, most, safe_ratio, safe_least, low, high, c):
    def region(lp, lo, adv, mask):
        loss, slope = np.zeros(lp.shape), np.zeros(lp.shape)
        for i, t in rows(lp, mask):
            future = 0.0
            for k in range(t, lp.shape[1]):
                if mask[i, k] and math.exp(lp[i, k] - lo[i, k]) <= c:
                    future += 2 ** (-(k - t) / half_life) * (lp[i, k] - lo[i, k])
            f, z, a = math.exp(future), lp[i, t] - lo[i, t], adv[i, t]
            unsafe = a < 0 and math.exp(z) > safe_ratio
            f = max(safe_least, min(1.0, f)) if unsafe else max(least, min(most, f))
            loss[i, t], slope[i, t] = dual_clip(low, high, c)(lp[i, t], z, a * f)
        return loss, lambda u: u * slope

    return region


def real(size, tau):
    def region(lp, lo, adv, mask):
        s = {i: (ts, sum(z) / len(z) / tau) for i, ts, z in each_row(lp, lo, mask)}
        loss, back = np.zeros(lp.shape), []
        for start in range(0, lp.shape[0], size):
            rows_here = [i for i in range(start, start + size) if i in s]
            right = [i for i in rows_here if sum(adv[i, t] for t in s[i][0]) > 0]
            wrong = [i for i in rows_here if i not in right]
            if not right or not wrong:
                continue
            plus, minus = (1 + sum(math.exp(k * s[i][1]) for i in of) for k, of in ((-1, right), (1, wrong)))
            scale = size / len(rows_here)
            for i in rows_here:
                for t in s[i][0]:
                    loss[i, t] = scale * (math.log(plus) + math.log(minus))
            for of, k, total in ((right, -1, plus), (wrong, 1, minus)):
                for i in of:
                    back.append((rows_here, i, scale * k * math.exp(k * s[i][1]) / total / tau / len(s[i][0])))

        def derivative(u):
            d = np.zeros(lp.shape)
            for rows_here, i, slope in back:
                upstream = sum(u[j, t] for j in rows_here for t in s[j][0])
                for t in s[i][0]:
                    d[i, t] += slope * upstream
            return d

        return loss, derivative

    return region


def off_policy_masked(rule, delta):
    def region(lp, lo, adv, mask):
        loss, slope = np.zeros(lp.shape), np.zeros(lp.shape)
        for i, ts, z in each_row(lp, lo, mask):
            for t, x in zip(ts, z, strict=True):
                if not (adv[i, t] < 0 and -sum(z) / len(z) > delta):
                    loss[i, t], slope[i, t] = rule(lp[i, t], x, adv[i, t])
        return loss, lambda u: u * slope

    return region


def covariances(lp, adv, mask):
    tokens = rows(lp, mask)
    a_mean = sum(adv[x] for x in tokens) / len(tokens)
    lp_mean = sum(lp[x] for x in tokens) / len(tokens)
    return {x: (adv[x] - a_mean) * (lp[x] - lp_mean) for x in tokens}


def clip_cov(fraction, least, most, low, high, draws=None):
    def region(lp, lo, adv, mask):
        cov, rule = covariances(lp, adv, mask), clip(low, high)
        loss, slope = np.zeros(lp.shape), np.zeros(lp.shape)
        for x in cov:
            loss[x], slope[x] = rule(lp[x], lp[x] - lo[x], adv[x])
        able = [x for x in cov if least < cov[x] < most and (slope[x] != 0 or adv[x] == 0)]
        able.sort(key=lambda x: -cov[x] if draws is None else draws[x])
        for x in able[: max(1, math.floor(fraction * len(cov)))]:
            loss[x] = slope[x] = 0.0
        return loss, lambda u: u * slope

    return region


def kl_cov(fraction, coefficient):
    def region(lp, lo, adv, mask):
        cov = covariances(lp, adv, mask)
        loss, slope = np.zeros(lp.shape), np.zeros(lp.shape)
        for x in cov:
            loss[x], slope[x] = unclipped(lp[x], lp[x] - lo[x], adv[x])
        for x in sorted(cov, key=lambda x: -cov[x])[: max(1, math.floor(fraction * len(cov)))]:
            z = lp[x] - lo[x]
            loss[x] += coefficient * abs(z)
            slope[x] += coefficient * np.sign(z)
        return loss, lambda u: u * slope

    return region


def high_entropy(fraction, entropy, rule):
    def region(lp, lo, adv, mask):
        loss, slope = np.zeros(lp.shape), np.zeros(lp.shape)
        tokens = sorted(rows(lp, mask), key=lambda x: -entropy[x])
        for x in tokens[: max(1, math.floor(fraction * len(tokens)))]:
            loss[x], slope[x] = rule(lp[x], lp[x] - lo[x], adv[x])
        return loss, lambda u: u * slope

    return region


# Aggregates: (loss, mask of weights) -> number, by loops.
def sequence_mean(loss, mask, count_empty=True):
    total, n = 0.0, 0
    for row, weights in zip(loss, mask, strict=True):
        size = sum(weights)
        n += bool(size) or count_empty
        total += sum(w * x for x, w in zip(row, weights, strict=True) if w) / size if size else 0.0
    return total / max(n, 1)


def summed(loss, mask):
    return sum(w * x for r, ws in zip(loss, mask, strict=True) for x, w in zip(r, ws, strict=True) if w)


def token_mean(loss, mask):
    return summed(loss, mask) / (mask.sum() or 1.0)


def group_token_mean(loss, mask, group_size):
    starts = range(0, len(loss), group_size)
    return sum(token_mean(loss[s : s + group_size], mask[s : s + group_size]) for s in starts) / len(starts)
