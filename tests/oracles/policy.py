"""The clipped surrogate, the KL estimates, the likelihood and the importance weight. A response is a list of tokens."""

import math

import numpy as np

LARGEST = 20.0  # where the library cuts a log-ratio


def cut(x):
    return min(max(x, -LARGEST), LARGEST)


def clipped(f, low, high):
    return min(max(f, 1 - low), 1 + high)


def aggregate(x, mask, how, max_length=None, denominator=None):
    """token: over all tokens; sequence: mean of the responses' means; constant: over responses * max_length."""
    responses = [[x[n][t] for t in range(len(x[n])) if mask[n][t]] for n in range(len(x))]
    responses = [r for r in responses if r]
    if how == "token":
        total, count = sum(sum(r) for r in responses), sum(len(r) for r in responses)
    elif how == "sequence":
        total, count = sum(sum(r) / len(r) for r in responses), len(responses)
    else:
        total, count = sum(sum(r) for r in responses) / max_length, len(responses)
    count = count if denominator is None else denominator
    return total / count if count else 0.0


def token_share(x, mask):
    tokens = [x[n][t] for n in range(len(x)) for t in range(len(x[n])) if mask[n][t]]
    return sum(tokens) / len(tokens) if tokens else 0.0


def importance(logp, old_logp, mask, ratio):
    """log f of every token, before the cut; a response's one number stands at each of its tokens."""
    out = []
    for n in range(len(logp)):
        differences = [float(logp[n][t]) - float(old_logp[n][t]) if mask[n][t] else 0.0 for t in range(len(logp[n]))]
        if ratio != "token":
            total, count = sum(differences), sum(bool(m) for m in mask[n])
            whole = total / max(count, 1) if ratio == "sequence" else total
            differences = [whole] * len(differences)
        out.append(differences)
    return out


def policy_gradient(
    logp,
    old_logp,
    advantage,
    mask,
    *,
    weight=None,
    clip="ppo",
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    ratio="token",
    aggregate="token",
    max_length=None,
    denominator=None,
    at=None,
):
    """(loss, metrics): minus the clipped surrogate."""
    log_f = importance(logp if clip != "cispo" or at is None else at, old_logp, mask, ratio)
    value, decided = np.zeros(np.shape(logp)), np.zeros(np.shape(logp))
    for n in range(len(logp)):
        for t in range(len(logp[n])):
            if not mask[n][t]:
                continue
            a = float(advantage[n] if np.ndim(advantage) == 1 else advantage[n][t])
            f = math.exp(cut(log_f[n][t]))
            c = clipped(f, clip_low, clip_high)
            if clip == "none":
                objective = f * a
            elif clip == "cispo":
                objective, decided[n][t] = c * a * float(logp[n][t]), c != f
            elif clip == "literal":
                objective, decided[n][t] = a * min(f, c), c < f
            else:
                objective, decided[n][t] = min(f * a, c * a), c * a < f * a
            if dual_clip is not None and a < 0:
                objective = max(objective, dual_clip * a)
            if weight is not None:
                objective *= float(weight[n] if np.ndim(weight) == 1 else weight[n][t])
            value[n][t] = objective
    loss = -_aggregate(value, mask, aggregate, max_length, denominator)
    near = [[cut(x) for x in row] for row in importance(logp, old_logp, mask, "token")]
    beyond = [[abs(x) > LARGEST for x in row] for row in log_f]
    if ratio != "token":  # one number a response, so a share of responses
        beyond = [row[:1] for row in beyond]
    live = mask if ratio == "token" else [[any(row)] for row in mask]
    metrics = {
        "clip_share": token_share(decided, mask),
        "ratio_cut_share": token_share(beyond, live),
        "approx_kl": token_share([[math.exp(x) - 1 - x for x in row] for row in near], mask),
        "ratio_error": max(
            (abs(math.exp(near[n][t]) - 1) for n in range(len(near)) for t in range(len(near[n])) if mask[n][t]),
            default=0.0,
        ),
    }
    return loss, metrics


_aggregate = aggregate  # policy_gradient has an argument of that name


def kl_estimate(logp, ref_logp, mask, *, kind):
    """d = ref - logp: k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1."""
    out = np.zeros(np.shape(logp))
    for n in range(len(logp)):
        for t in range(len(logp[n])):
            if mask[n][t]:
                d = cut(float(ref_logp[n][t]) - float(logp[n][t]))
                out[n][t] = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kind]
    return out


def negative_log_likelihood(logp, mask, *, aggregate="token", max_length=None, denominator=None):
    return -_aggregate(logp, mask, aggregate, max_length, denominator)


def importance_weight(logp, behaviour_logp, mask, *, level="token", beyond="truncate", cap=2.0, floor=0.0):
    """(weight, metrics): pi_trainer / pi_sampler, bounded; a constant of the gradient."""
    log_w = importance(logp, behaviour_logp, mask, "token" if level == "token" else "product")
    weight, outside = np.zeros(np.shape(logp)), np.zeros(np.shape(logp))
    for n in range(len(logp)):
        for t in range(len(logp[n])):
            if not mask[n][t]:
                continue
            w = math.exp(cut(log_w[n][t]))
            if beyond == "truncate":
                outside[n][t] = w > cap
                weight[n][t] = cap if w > cap else w
            else:
                outside[n][t] = w > cap or w < floor
                weight[n][t] = 0.0 if outside[n][t] else w
    metrics = {
        "weight_mean": token_share(weight, mask),
        "weight_beyond_share": token_share(outside, mask),
        "weight_min": min(
            (weight[n][t] for n in range(len(logp)) for t in range(len(logp[n])) if mask[n][t]), default=0.0
        ),
    }
    return weight, metrics
