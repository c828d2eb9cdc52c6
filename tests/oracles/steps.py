"""Rewards of several steps or tokens: returns, GiGPO's two advantages, its anchors, REINFORCE++.

Totals are math.fsum's, which no order of the terms can change: whether two are equal decides between 0 and not 0.
"""

import difflib
import math

import numpy as np

from tests.oracles.groups import everyone, rows_of


def discounted_return(reward, trajectory, step, *, gamma, valid=None):
    """GiGPO eq. 5: R_t = r_t + gamma R_{t+1}; an invalid row is as if it were absent."""
    valid, out = everyone(valid, len(reward)), np.zeros(len(reward))
    for name in {int(t) for t in trajectory}:
        later = 0.0
        for i in sorted(rows_of(trajectory, name, valid), key=lambda i: int(step[i]), reverse=True):
            later = float(reward[i]) + gamma * later
            out[i] = later
    return out


def spread(values):
    """Mean and deviation (ddof 1) of at least two numbers."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def group_in_group(
    reward,
    *,
    group,
    trajectory,
    step,
    anchor,
    num_groups,
    gamma=0.95,
    step_weight=1.0,
    scale="std",
    episode_stat="trajectory",
    valid=None,
    penalty=None,
    eps=1e-6,
):
    """(A, {"episode": A_E, "step": A_S}); GiGPO eq. 3 and 5 to 8."""
    valid = everyone(valid, len(reward))
    cost = [0.0] * len(reward) if penalty is None else [float(p) for p in penalty]
    returns = discounted_return(reward, trajectory, step, gamma=gamma, valid=valid)
    advantage, episode, local = (np.zeros(len(reward)) for _ in range(3))

    def scaled(value, mean, deviation):
        return (value - mean) / (deviation + eps) if scale == "std" else value - mean

    for number in range(num_groups):
        rows = rows_of(group, number, valid)
        if any(math.isnan(reward[i]) or math.isnan(cost[i]) for i in rows):
            for i in rows:
                advantage[i] = episode[i] = local[i] = math.nan
            continue

        # eq. 3. The score of a trajectory is undiscounted; a row pays its own penalty, after the sum.
        score = {}
        for name in {int(trajectory[i]) for i in rows}:
            score[name] = math.fsum(float(reward[i]) for i in rows if trajectory[i] == name)
        paid = {i: score[int(trajectory[i])] - cost[i] for i in rows}
        if episode_stat == "trajectory":
            population = list(score.values())  # each trajectory once, without penalties
        else:
            population = [paid[i] for i in rows]
        # Trajectories that score the same say nothing about each other, and one has nothing to be compared with. What
        # penalties alone make of such a group is the step part's. Rows that penalties make equal are equal rewards.
        if len(set(score.values())) > 1 and len(set(population)) > 1:
            mean, deviation = spread(population)
            for i in rows:
                episode[i] = scaled(paid[i], mean, deviation)

        # eq. 6 and 7. A penalty is taken off its own row's return, after discounting.
        for state in {int(anchor[i]) for i in rows}:
            members = [i for i in rows if anchor[i] == state]
            reached = {i: returns[i] - cost[i] for i in members}
            if len(set(reached.values())) > 1:
                mean, deviation = spread(list(reached.values()))
                for i in members:
                    local[i] = scaled(reached[i], mean, deviation)

        for i in rows:  # eq. 8
            advantage[i] = episode[i] + step_weight * local[i]
    return advantage, {"episode": episode, "step": local}


def hierarchy_of_groups(
    reward, group, *, num_groups, trajectory, step, past, gamma=0.95, alpha=1.0, valid=None, penalty=None, eps=1e-6
):
    """HGPO: of each level's subgroup (R - mean) / (population deviation + eps), levels weighed by (l + 1)^alpha."""
    valid = everyone(valid, len(reward))
    cost = [0.0] * len(reward) if penalty is None else [float(p) for p in penalty]
    returns = discounted_return(reward, trajectory, step, gamma=gamma, valid=valid)
    out = np.zeros(len(reward))
    for number in range(num_groups):
        rows = rows_of(group, number, valid)
        if any(math.isnan(reward[i]) or math.isnan(cost[i]) for i in rows):
            for i in rows:
                out[i] = math.nan
            continue
        for i in rows:
            parts = []
            for level in range(len(past[i])):
                alike = [returns[j] - cost[j] for j in rows if past[j][level] == past[i][level]]
                if len(set(alike)) < 2:
                    continue
                mean = math.fsum(alike) / len(alike)
                deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in alike) / len(alike))
                value = (returns[i] - cost[i] - mean) / (deviation + eps)
                if value != 0:
                    parts.append(((level + 1) ** alpha, value))
            if parts:
                out[i] = math.fsum(w * v for w, v in parts) / math.fsum(w for w, _ in parts)
    return out


def past_ids(anchors, trajectory, step, *, length):
    """By first appearance in the order given: of each level, ids of the state and up to so many states before it."""
    out = []
    for level in range(length + 1):
        keys = []
        for i in range(len(anchors)):
            earlier = sorted(
                (j for j in range(len(anchors)) if trajectory[j] == trajectory[i] and step[j] <= step[i]),
                key=lambda j: step[j],
            )
            keys.append(tuple(anchors[j] for j in earlier[-level - 1 :]))
        names = list(dict.fromkeys(keys))
        out.append([names.index(key) for key in keys])
    return np.array(out).T


def per_trajectory(advantage, reward, group, *, num_groups, trajectory, step, valid=None, penalty=None):
    """An advantage (of lists: rewards, groups) over scores of trajectories, given to each of their rows."""
    valid = everyone(valid, len(reward))
    cost = [0.0] * len(reward) if penalty is None else [float(p) for p in penalty]
    names = sorted({int(trajectory[i]) for i in range(len(reward)) if valid[i]})
    score = [math.fsum(float(reward[i]) - cost[i] for i in rows_of(trajectory, name, valid)) for name in names]
    of = [next(int(group[i]) for i in rows_of(trajectory, name, valid)) for name in names]
    every = [True] * len(names)
    found = dict(zip(names, advantage(score, of, num_groups=num_groups, valid=every), strict=True)) if names else {}
    return np.array([found[int(trajectory[i])] if valid[i] else 0.0 for i in range(len(reward))])


def step_metrics(parts, *, group, anchor, valid=None):
    """Share of rows that share their anchor, mean size of its groups, the step part beside the episode part."""
    valid = everyone(valid, len(group))
    sizes = {}
    rows = [i for i in range(len(group)) if valid[i]]
    for i in rows:
        sizes[int(group[i]), int(anchor[i])] = sizes.get((int(group[i]), int(anchor[i])), 0) + 1
    shared = [i for i in rows if sizes[int(group[i]), int(anchor[i])] > 1]
    whole = sum(abs(float(parts["episode"][i])) for i in rows)
    return {
        "anchor_share": len(shared) / max(len(rows), 1),
        "anchor_size": len(rows) / max(len(sizes), 1),
        "step_to_episode": sum(abs(float(parts["step"][i])) for i in rows) / whole if whole else 0.0,
    }


def anchor_ids(anchors, group, *, similarity=None):
    """Ids by first appearance: of equal anchors, or of clusters that their first member stands for; inside a group."""
    first = []  # (group, representative) of every id, in the order of creation
    out = []
    for anchor, number in zip(anchors, group, strict=True):
        for name, (home, representative) in enumerate(first):
            if home != number:
                continue
            if similarity is None:
                same = anchor == representative
            else:
                same = difflib.SequenceMatcher(None, anchor, representative).ratio() >= similarity
            if same:
                out.append(name)
                break
        else:
            out.append(len(first))
            first.append((number, anchor))
    return np.array(out, int)


def reinforce_pp(
    reward, group, *, mask, num_groups, valid=None, token_reward=None, gamma=1.0, baseline="none", eps=1e-8
):
    """REINFORCE++: the return-to-go of every token, whitened over the batch's tokens."""
    valid = everyone(valid, len(reward))
    paid = [float(r) for r in reward]
    if baseline == "group":
        for number in range(num_groups):
            rows = rows_of(group, number, valid)
            values = [float(reward[i]) for i in rows]
            # The mean of equal numbers is that number; summing them and dividing may miss it by a rounding.
            mean = values[0] if len(set(values)) == 1 else math.fsum(values) / max(len(values), 1)
            for i in rows:
                paid[i] = float(reward[i]) - mean

    out, to_go = np.zeros(np.shape(mask)), {}
    bad = any(math.isnan(reward[n]) for n in range(len(reward)) if valid[n])
    for n in range(len(reward)):
        tokens = [t for t in range(len(mask[n])) if mask[n][t] and valid[n]]
        later = 0.0
        for t in reversed(tokens):  # the token before t is the one before it in `tokens`: holes cost no discount
            now = paid[n] if t == tokens[-1] else 0.0
            if token_reward is not None:
                now += float(token_reward[n][t])
                bad = bad or math.isnan(token_reward[n][t])
            later = now + gamma * later
            to_go[n, t] = later
    if bad:
        for place in to_go:
            out[place] = math.nan
    elif len(set(to_go.values())) > 1:
        mean = math.fsum(to_go.values()) / len(to_go)
        variance = math.fsum((g - mean) ** 2 for g in to_go.values()) / max(len(to_go) - 1, 1)
        for place, g in to_go.items():
            out[place] = (g - mean) / math.sqrt(variance + eps)
    return out
