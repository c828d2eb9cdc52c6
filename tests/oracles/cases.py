"""Random inputs of the library and its oracles alike, and gradients by finite differences."""

import numpy as np


def grid(x):
    """Multiples of 1/256, which float32 adds and subtracts exactly."""
    return np.round(x * 256) / 256


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


def random_steps(rng, rows, groups):
    """Trajectories of 1 to 6 steps, each in one group, their rows shuffled; steps with gaps, invalid rows.

    An anchor returns inside a trajectory, inside a group and in other groups; some stand alone. Trajectories tie, all
    of a group at times. Rewards are mostly a last one, on a grid of 1/16; penalties are rare, or there are none.
    """
    used = rng.permutation(groups)[: rng.integers(1, groups + 1)]
    trajectories, anchors = rng.permutation(rows), list(rng.permutation(rows))
    states = [anchors.pop() for _ in range(max(1, rows // 5))]
    scores = [(0.0, 1.0), (0.0, 10.0), (-0.5, 0.25, 1.0)][rng.integers(3)]
    tied = rng.choice(used) if rng.random() < 0.3 else -1
    out = {name: [] for name in ("reward", "group", "trajectory", "step", "anchor")}
    while len(out["reward"]) < rows:
        length = min(1 if rng.random() < 0.2 else int(rng.integers(2, 7)), rows - len(out["reward"]))
        group = rng.choice(used)
        reward = np.zeros(length)
        if group != tied:
            reward += np.where(rng.random(length) < 0.15, rng.integers(-8, 9, length) / 16, 0)
        reward[-1] += scores[-1] if group == tied else rng.choice(scores)
        out["reward"] += list(reward)
        out["group"] += [group] * length
        out["trajectory"] += [trajectories[len(out["reward"]) - 1]] * length
        out["step"] += list(rng.integers(0, 4) + np.cumsum(rng.integers(1, 4, length)))
        for t in range(length):
            alone = anchors and rng.random() < 0.2
            out["anchor"].append(anchors.pop() if alone else states[0] if t == 0 else rng.choice(states))
    order = rng.permutation(rows)
    out = {name: np.array(values)[order] for name, values in out.items()}
    wrong = rng.random(rows) < rng.choice([0.0, 0.2])
    out["penalty"] = np.where(wrong, rng.choice([0.0625, 0.125, 0.5], rows), 0.0)
    out["valid"] = rng.random(rows) < rng.choice([0.5, 0.85, 1.0])
    if rng.random() < 0.04:
        out["valid"][:] = False
    return out | {"num_groups": groups}


def random_pairs(rng, pairs):
    """Sums of log-ratios of responses: a few far ones, a few ties, at times nothing valid.

    real and generated [M] are pairs (chosen and rejected); logratio and desirable [N] are single responses, N = M and
    the same `valid`; kl_logratio and kl_valid [M + 2] are other responses, of either sign in the mean.
    """

    def ratios(size, mean=0.0):
        far = np.where(rng.random(size) < 0.06, rng.choice([-30, 30], size), 0)
        return grid(rng.normal(mean, 1.5, size)) + far

    def valid(size):
        return rng.random(size) < rng.choice([0.0, 0.5, 0.85, 1.0], p=[0.05, 0.2, 0.25, 0.5])

    real = ratios(pairs, 0.5)
    return {
        "real": real,
        "generated": np.where(rng.random(pairs) < 0.1, real, ratios(pairs, -0.5)),
        "valid": valid(pairs),
        "logratio": ratios(pairs),
        "desirable": rng.random(pairs) < rng.choice([0.0, 0.5, 1.0], p=[0.1, 0.8, 0.1]),
        "kl_logratio": ratios(pairs + 2, rng.choice([-0.5, 1.0])),
        "kl_valid": valid(pairs + 2),
    }


def random_case(rng, samples, length, groups):
    """Groups and tokens of one batch; invalid rows have no token, as in a packed batch.

    Beside them what some algorithms ask for: a greedy answer's reward a group, labels, pairs of samples that have
    tokens (-1 where there is none), and trajectories of up to three rows of one group with steps and anchors.
    """
    case = random_groups(rng, samples, groups) | random_tokens(rng, samples, length)
    case["mask"] &= case["valid"][:, None]
    trajectory = np.zeros(samples, int)
    for number in range(groups):
        rows = np.flatnonzero(case["group"] == number)
        cut = rng.integers(1, 4)
        for k in range(0, len(rows), cut):
            trajectory[rows[k : k + cut]] = rows[k]
    there = rng.permutation(np.flatnonzero(case["mask"].any(axis=1)))
    pair = np.full((samples // 2, 2), -1)
    count = len(there) // 2
    pair[:count] = there[: 2 * count].reshape(-1, 2)
    return case | {
        "num_groups": groups,
        "baseline": grid(rng.normal(size=groups)),
        "label": rng.choice([-1.0, 1.0], samples),
        "pair": pair,
        "trajectory": trajectory,
        "step": rng.permutation(3 * samples)[:samples],
        "anchor": rng.integers(0, 3, samples),
        "past": np.stack([rng.integers(0, 3, samples), rng.integers(0, 5, samples)], axis=1),
        "terms": grid(rng.normal(size=(samples, 3))),
        "token_reward": grid(rng.normal(size=(samples, length)) / 4),
        "penalty": rng.choice([0.0, 0.0, 0.125], samples),
    }


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
