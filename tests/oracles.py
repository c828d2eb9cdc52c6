"""The papers' formulas as slow float64 loops, apart from the code they judge, and random inputs for both.

A group is a list of row numbers, a response a list of token numbers; nothing here is vectorised. Where a formula holds
a stop-gradient, `at` is the point that it keeps: with `at` fixed, finite differences of the value are the gradient.
"""

import math

import numpy as np

LARGEST = 20.0  # where the library cuts a log-ratio


def rows_of(group, number, valid):
    return [i for i in range(len(group)) if group[i] == number and valid[i]]


def group_relative(reward, group, *, num_groups, valid, scale="std", ddof=1, eps=1e-6):
    """GRPO: A_i = (r_i - mean) / (std + eps); Dr. GRPO: A_i = r_i - mean."""
    out = np.zeros(len(reward))
    for number in range(num_groups):
        rows = rows_of(group, number, valid)
        values = [float(reward[i]) for i in rows]
        if any(math.isnan(v) for v in values):
            out[rows] = math.nan
        elif len(set(values)) > 1:
            mean = sum(values) / len(values)
            deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - ddof))
            for i, v in zip(rows, values, strict=True):
                out[i] = (v - mean) / (deviation + eps) if scale == "std" else v - mean
    return out


def leave_one_out(reward, group, *, num_groups, valid):
    """RLOO: A_i = r_i - the mean of the others of its group."""
    out = np.zeros(len(reward))
    for number in range(num_groups):
        rows = rows_of(group, number, valid)
        values = [float(reward[i]) for i in rows]
        if any(math.isnan(v) for v in values):
            out[rows] = math.nan
        elif len(set(values)) > 1:
            for i in rows:
                others = [float(reward[j]) for j in rows if j != i]
                out[i] = float(reward[i]) - sum(others) / len(others)
    return out


def group_preference(reward, group, *, num_groups, valid, weight=None):
    """GPRS: B_j = 1/K sum_i w_i 1[r_j >= r_i], A_j = B_j - mean B; eq. 7 (w = 1) and eq. 10."""
    out = np.zeros(len(reward))
    for number in range(num_groups):
        rows = rows_of(group, number, valid)
        if any(math.isnan(reward[i]) for i in rows):
            out[rows] = math.nan
            continue
        credit = {}
        for j in rows:
            credit[j] = 0.0
            for i in rows:
                if reward[j] >= reward[i]:
                    credit[j] += (1.0 if weight is None else float(weight[i])) / len(rows)
        for j in rows:
            out[j] = credit[j] - sum(credit.values()) / len(rows)
    return out


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


def clipped_surrogate(advantage, case, how, max_length=None):
    """PPO's loss at eps 0.2 with token ratios: what the entries below share."""
    return policy_gradient(
        case["logp"], case["old_logp"], advantage, case["mask"], aggregate=how, max_length=max_length
    )[0]


def groups_of(case):
    return {"num_groups": case["num_groups"], "valid": case["valid"]}


def grpo(case):
    return clipped_surrogate(group_relative(case["reward"], case["group"], **groups_of(case)), case, "sequence")


def dr_grpo(case):
    advantage = group_relative(case["reward"], case["group"], scale="none", **groups_of(case))
    return clipped_surrogate(advantage, case, "constant", max_length=len(case["logp"][0]))


def rloo(case):
    return clipped_surrogate(leave_one_out(case["reward"], case["group"], **groups_of(case)), case, "sequence")


def gprs(case):
    advantage = group_preference(case["reward"], case["group"], **groups_of(case))
    kl = kl_estimate(case["logp"], case["ref_logp"], case["mask"], kind="k3")
    return clipped_surrogate(advantage, case, "sequence") + 0.01 * aggregate(kl, case["mask"], "sequence")


def sft(case):
    return negative_log_likelihood(case["logp"], case["mask"])


# The whole algorithm: case -> loss. An entry of ALGORITHMS that is not here fails its test.
ORACLES = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo, "gprs": gprs, "sft": sft}


def random_groups(rng, samples, groups):
    """reward, group, valid: ragged groups, ids that nothing has, ties, groups all tied, invalid rows."""
    used = rng.permutation(groups)[: rng.integers(1, groups + 1)]
    group = rng.choice(used, samples, p=rng.dirichlet(np.ones(len(used))))
    style = rng.integers(3)
    if style == 0:
        reward = np.round(rng.normal(size=samples) * 16) / 16
    elif style == 1:
        reward = rng.integers(0, 2, samples).astype(float)
    else:
        reward = rng.integers(-2, 3, samples) / 2 + rng.integers(-4, 5, groups)[group]
    if rng.random() < 0.3:
        reward[group == rng.choice(used)] = rng.normal()
    return {"reward": reward, "group": group, "valid": rng.random(samples) < rng.choice([0.5, 0.85, 1.0])}


def random_tokens(rng, samples, length):
    """Log-probs, entropy, weights and a mask with holes, empty rows and, at times, nothing at all.

    On a grid of 1/256, so that float32 subtracts and adds them exactly; some rows lie beyond the cut of the ratio.
    """

    def grid(x):
        return np.round(x * 256) / 256

    shape = (samples, length)
    logp = -grid(np.abs(rng.normal(size=shape)) * 2)
    far = np.where(rng.random(samples) < 0.05, rng.choice([-25, -11, 11, 25], samples), 0)
    mask = np.arange(length)[None, :] < rng.integers(0, length + 1, samples)[:, None]
    mask &= rng.random(shape) < rng.choice([0.7, 1.0])
    if rng.random() < 0.04:
        mask[:] = False
    return {
        "logp": logp,
        "old_logp": logp - grid(rng.normal(size=shape) * 0.3) - far[:, None],
        "ref_logp": logp - grid(rng.normal(size=shape) * 0.5) + far[::-1, None],
        "entropy": grid(np.abs(rng.normal(size=shape))),
        "mask": mask,
        "advantage": grid(rng.normal(size=samples)),
        "advantage_token": grid(rng.normal(size=shape)),
        "weight": grid(rng.uniform(0, 3, samples)),
        "weight_token": grid(rng.uniform(0, 3, shape)),
    }


def random_case(rng, samples, length, groups):
    """Everything above for one batch; invalid rows have no token, as in a packed batch."""
    case = random_groups(rng, samples, groups) | random_tokens(rng, samples, length)
    case["mask"] &= case["valid"][:, None]
    return case | {"num_groups": groups}


def stack(cases):
    """Cases of one shape as one dict of arrays [C, ...]; plain numbers stay themselves."""
    return {k: np.stack([c[k] for c in cases]) if np.ndim(v) else v for k, v in cases[0].items()}


def numerical_gradient(function, x, step=1e-6):
    """Central differences of function(x) at every entry of x."""
    out = np.zeros(np.shape(x))
    for index in np.ndindex(*np.shape(x)):
        high, low = np.array(x, np.float64), np.array(x, np.float64)
        high[index] += step
        low[index] -= step
        out[index] = (function(high) - function(low)) / (2 * step)
    return out
