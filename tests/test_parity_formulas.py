"""verl's and verl-agent's definitions, as loops of numbers, against ours; and where the two are known to differ.

Neither is installed: the definitions are those their code publishes (verl: trainer/ppo/core_algos.py and
utils/torch_functional.py; verl-agent: gigpo/core_gigpo.py). docs/parity.md lists the settings and the differences.
"""

import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign import advantages, losses

RNG = np.random.default_rng
LOW, HIGH, DUAL = 0.2, 0.28, 3.0
# verl's sequence means, and ours at a response length of 5
AGGREGATES = {
    "token-mean": {"aggregate": "token"},
    "seq-mean-token-mean": {"aggregate": "sequence"},
    "seq-mean-token-sum-norm": {"aggregate": "constant", "max_length": 5},
}


def close(got, want, tolerance=1e-12):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def members(*keys):
    """Row numbers by key, in order of appearance."""
    out = {}
    for n, key in enumerate(zip(*keys, strict=True)):
        out.setdefault(key, []).append(n)
    return list(out.values())


def verl_normalised(values, rows, out, *, std, eps, single):
    """(x - mean) / (std + eps) over `rows`, ddof 1; `single` is what is subtracted from the only one of its kind."""
    values = [float(v) for v in values]
    mean, deviation = single, 1.0
    if len(values) > 1:
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
    for n, v in zip(rows, values, strict=True):
        out[n] = (v - mean) / (deviation + eps) if std else v - mean


def verl_grpo(reward, group, std=True):
    out = np.zeros(len(reward))
    for rows in members(group):
        verl_normalised(reward[rows], rows, out, std=std, eps=1e-6, single=0.0)
    return out


def verl_rloo(reward, group):
    out = np.array(reward, float)  # a single response keeps its reward
    for rows in members(group):
        for n in rows:
            others = [reward[m] for m in rows if m != n]
            if others:
                out[n] = reward[n] - statistics.fmean(others)
    return out


def verl_whitened(values, mask):
    """masked_whiten: (x - mean) * rsqrt(var + 1e-8), ddof 1, over all True tokens."""
    flat = [float(v) for row, live in zip(values, mask, strict=True) for v, ok in zip(row, live, strict=True) if ok]
    mean, variance = statistics.fmean(flat), statistics.variance(flat)
    return np.where(mask, (values - mean) / math.sqrt(variance + 1e-8), 0)


def verl_aggregate(x, mask, how):
    rows = [[float(v) for v, ok in zip(row, live, strict=True) if ok] for row, live in zip(x, mask, strict=True)]
    rows = [row for row in rows if row]  # newer releases leave out rows without a token; older ones are 0/0 there
    if how == "token-mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if how == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(map(sum, rows)) / len(rows) / len(mask[0])


def verl_policy_loss(logp, old_logp, advantage, mask, how):
    x = np.zeros(np.shape(logp))
    for n, t in zip(*np.nonzero(mask), strict=True):
        a, ratio = advantage[n], math.exp(min(max(logp[n][t] - old_logp[n][t], -20), 20))
        x[n][t] = max(-a * ratio, -a * min(max(ratio, 1 - LOW), 1 + HIGH))
        if a < 0:
            x[n][t] = min(x[n][t], -a * DUAL)
    return verl_aggregate(x, mask, how)


def verl_low_var_kl(logp, ref_logp):
    d = min(max(ref_logp - logp, -20), 20)
    return min(max(math.exp(d) - d - 1, -10), 10)


def rewards(seed, sizes=(4, 3, 5, 2)):
    """Rewards and groups in any order; no group's rewards are all equal."""
    rng = RNG(seed)
    group = np.repeat(np.arange(len(sizes)), sizes)
    reward = rng.integers(0, 3, len(group)) / 2
    reward[np.unique(group, return_index=True)[1]] = 2.5
    order = rng.permutation(len(group))
    return reward[order], group[order], {"num_groups": len(sizes)}


def tokens(seed, samples=6, length=5, spread=1.0):
    rng = RNG(seed)
    case = {k: rng.normal(0, spread, (samples, length)) for k in ("logp", "old_logp", "ref_logp")}
    return case | {"mask": rng.random((samples, length)) < 0.7, "advantage": rng.normal(0, 1, samples)}


@functools.partial(jax.jit, static_argnames="num_groups")
def by_group(reward, group, *, num_groups):
    """Ours of verl's grpo, its form without the deviation, and rloo."""
    grpo = functools.partial(advantages.group_relative, reward, group, num_groups=num_groups)
    rloo = advantages.leave_one_out(reward, group, num_groups=num_groups)
    return grpo(ddof=1, eps=1e-6), grpo(scale="none"), rloo


@pytest.mark.parametrize("seed", range(5))
def test_verl_grpo_and_rloo_advantages(x64, seed):
    reward, group, how = rewards(seed)
    wanted = verl_grpo(reward, group), verl_grpo(reward, group, std=False), verl_rloo(reward, group)
    for got, want in zip(by_group(reward, group, **how), wanted, strict=True):
        close(got, want)


def test_verl_grpo_of_four_numbers_and_of_one(x64):
    # mean 1/2, deviation sqrt(4 * (1/2)^2 / 3) = 0.57735; 0.5 / 0.577351 = 0.8660239
    reward, group = np.array([1.0, 0.0, 0.0, 1.0, 0.7]), np.array([0, 0, 0, 0, 1])
    got, unscaled, rloo = (np.asarray(a) for a in by_group(reward, group, num_groups=2))
    close(got[:4], [0.8660239, -0.8660239, -0.8660239, 0.8660239], 1e-7)
    # A group of one keeps its reward there and carries no signal here.
    close([verl_grpo(reward, group)[4], verl_rloo(reward, group)[4]], [0.7 / (1 + 1e-6), 0.7])
    assert [got[4], unscaled[4], rloo[4]] == [0, 0, 0]


@pytest.mark.parametrize("how", AGGREGATES)
def test_verl_policy_loss_with_dual_clip(x64, how):
    options = {"clip_low": LOW, "clip_high": HIGH, "dual_clip": DUAL, **AGGREGATES[how]}
    loss = jax.jit(lambda *args: losses.policy_gradient(*args, **options)[0])
    for seed in range(10):
        case = tokens(seed)
        case["mask"][0] = False  # a row without a token
        args = [case[k] for k in ("logp", "old_logp", "advantage", "mask")]
        close(loss(*map(jnp.asarray, args)), verl_policy_loss(*args, how))


def test_verl_gspo_has_the_gradient_of_the_sequence_ratio(x64):
    """verl writes log pi - stopgrad(log pi) + stopgrad(mean log-ratio): another expression, the same slope."""
    case = tokens(3, spread=0.1)
    case["mask"][:, 0] = True
    case = {k: jnp.asarray(v) for k, v in case.items()}
    mask, stop = case["mask"], jax.lax.stop_gradient

    def verl(logp):
        log_ratio = jnp.where(mask, logp - case["old_logp"], 0)
        mean = jnp.sum(log_ratio, axis=1, keepdims=True) / jnp.sum(mask, axis=1, keepdims=True)
        ratio = jnp.exp(logp - stop(logp) + stop(mean))
        a = case["advantage"][:, None]
        x = jnp.where(mask, jnp.maximum(-a * ratio, -a * jnp.clip(ratio, 1 - 0.05, 1 + 0.08)), 0)
        return jnp.mean(jnp.sum(x, axis=1) / jnp.sum(mask, axis=1))

    def ours(logp):
        options = {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.08, "aggregate": "sequence"}
        return losses.policy_gradient(logp, case["old_logp"], case["advantage"], mask, **options)[0]

    for got, want in zip(jax.value_and_grad(ours)(case["logp"]), jax.value_and_grad(verl)(case["logp"]), strict=True):
        close(got, want)


def test_verl_low_var_kl_up_to_its_limit_of_ten(x64):
    case = tokens(4, spread=0.6)
    got = losses.kl_estimate(*(jnp.asarray(case[k]) for k in ("logp", "ref_logp", "mask")), kind="k3")
    close(got, np.where(case["mask"], np.vectorize(verl_low_var_kl)(case["logp"], case["ref_logp"]), 0))
    # d = 3: e^3 - 3 - 1 = 16.0855 is cut to 10 there and kept here; d = -12: 11 + e^-12
    got = losses.kl_estimate(jnp.zeros((1, 2)), jnp.array([[3.0, -12.0]]), jnp.ones((1, 2), bool), kind="k3")
    close(got, [[16.085537, 11.000006]], 1e-6)
    assert [verl_low_var_kl(0, 3.0), verl_low_var_kl(0, -12.0)] == [10, 10]


def test_verl_reinforce_pp_whitens_the_returns(x64):
    rng = RNG(5)
    reward, group, how = rewards(6)
    length = rng.integers(1, 6, len(reward))
    mask = np.arange(5) < length[:, None]
    penalty = np.where(mask, rng.normal(0, 0.1, mask.shape), 0)
    returns = np.zeros(mask.shape)
    for n in range(len(reward)):
        later = 0.0
        for t in reversed(range(length[n])):
            later = penalty[n, t] + (reward[n] if t == length[n] - 1 else 0) + 0.9 * later
            returns[n, t] = later
    args = jnp.asarray(reward), jnp.asarray(group)
    got = advantages.reinforce_pp(
        *args, mask=jnp.asarray(mask), token_reward=jnp.asarray(penalty), gamma=0.9, eps=1e-8, **how
    )
    close(got, verl_whitened(returns, mask), 1e-10)
    # its baseline form: the reward less the group's mean stands at every token
    centred = np.array([reward[n] - reward[group == group[n]].mean() for n in range(len(reward))])
    got = advantages.reinforce_pp(*args, mask=jnp.asarray(mask), baseline="group", eps=1e-8, **how)
    close(got, verl_whitened(np.where(mask, centred[:, None], 0), mask), 1e-10)


def test_verl_reinforce_pp_forgets_what_comes_after_a_gap_and_ours_does_not(x64):
    # A tool's token stands in the middle of the first response: verl's return starts anew there, so its first token
    # sees nothing of the reward of 1.
    mask = np.array([[True, False, True], [True, True, False]])
    reward, group = jnp.array([1.0, 0.0]), jnp.array([0, 0])
    got = advantages.reinforce_pp(reward, group, mask=jnp.asarray(mask), num_groups=1)
    close(got, verl_whitened(np.array([[1.0, 0, 1], [0, 0, 0]]), mask), 1e-10)
    assert not np.allclose(got, verl_whitened(np.array([[0.0, 0, 1], [0, 0, 0]]), mask))


def test_verl_remax(x64):
    reward, group = np.array([1.0, 0.0, 2.0]), np.array([0, 1, 1])
    got = advantages.remax(jnp.asarray(reward), jnp.asarray(group), baseline=jnp.array([0.5, 1.5]), num_groups=2)
    close(got, [0.5, -1.5, 0.5])


def verl_agent_gigpo(batch, *, gamma, step_weight, std):
    """(A, A_E, A_S) as the released code has them: statistics over rows, and the penalty taken off before."""
    reward, penalty = batch["reward"], batch["penalty"]
    score, later = np.zeros(len(reward)), np.zeros(len(reward))
    for rows in members(batch["trajectory"]):
        running = 0.0
        for n in sorted(rows, key=lambda n: -batch["step"][n]):
            running = later[n] = reward[n] + gamma * running
        score[rows] = sum(reward[rows])
    score, later = score - penalty, later - penalty
    episode, step = np.zeros(len(reward)), np.zeros(len(reward))
    for rows in members(batch["group"]):
        verl_normalised(score[rows], rows, episode, std=std, eps=1e-6, single=0.0)
    for rows in members(batch["group"], batch["anchor"]):
        verl_normalised(later[rows], rows, step, std=std, eps=1e-6, single=later[rows[0]])
    return episode + step_weight * step, episode, step


def trajectories(seed):
    """3 groups of 4 trajectories of 1 to 5 steps, rows in any order; success is paid at the end, some fail."""
    rng, rows = RNG(seed), []
    for k in range(12):
        length = rng.integers(1, 6)
        for step in range(length):
            won = 10.0 * (step == length - 1) * (k % 4 < 2)
            rows.append((won, k // 4, k, 3 * step, rng.integers(0, 4), 0.1 * (rng.random() < 0.2)))
    rng.shuffle(rows)
    names = ("reward", "group", "trajectory", "step", "anchor", "penalty")
    return {k: np.array(v) for k, v in zip(names, zip(*rows, strict=True), strict=True)}


def gigpo(batch, *, gamma, step_weight, std):
    rest = {k: jnp.asarray(v) for k, v in batch.items() if k != "reward"}
    total, parts = advantages.group_in_group(
        jnp.asarray(batch["reward"]),
        num_groups=3,
        gamma=gamma,
        step_weight=step_weight,
        scale="std" if std else "none",
        episode_stat="step",
        **rest,
    )
    return total, parts["episode"], parts["step"]


@pytest.mark.parametrize("std", [True, False], ids=["mean_std_norm", "mean_norm"])
@pytest.mark.parametrize("seed", range(5))
def test_verl_agent_gigpo(x64, seed, std):
    batch, how = trajectories(seed), {"gamma": 0.95, "step_weight": 1.0, "std": std}
    for got, want in zip(gigpo(batch, **how), verl_agent_gigpo(batch, **how), strict=True):
        close(got, want, 1e-8)  # where an anchor's returns are all equal, theirs is a rounding error over 1e-6


def test_verl_agent_gigpo_of_five_numbers(x64):
    # One group: a trajectory of three steps that wins 1, one of two that wins nothing; they share the anchors 0 and 1.
    # Scores of the rows 1 1 1 0 0: mean 0.6, so 0.4 and -0.6. Returns at gamma 1/2: 1/4 1/2 1 and 0 0.
    # Anchor 0 holds 1/4 and 0, anchor 1 holds 1/2 and 0, anchor 2 is alone.
    batch = {
        "reward": np.array([0.0, 0, 1, 0, 0]),
        "group": np.zeros(5, int),
        "trajectory": np.array([0, 0, 0, 1, 1]),
        "step": np.array([0, 1, 2, 0, 1]),
        "anchor": np.array([0, 1, 2, 0, 1]),
        "penalty": np.zeros(5),
    }
    episode, step = np.array([0.4, 0.4, 0.4, -0.6, -0.6]), np.array([0.125, 0.25, 0, -0.125, -0.25])
    how = {"gamma": 0.5, "step_weight": 2.0, "std": False}
    for function in (verl_agent_gigpo, gigpo):
        for got, want in zip(function(batch, **how), (episode + 2 * step, episode, step), strict=True):
            close(got, want)


def test_where_verl_agent_gigpo_differs(x64):
    how = {"gamma": 0.95, "step_weight": 1.0, "std": True}
    # Nobody wins and one action was invalid: deviation 0.1 / sqrt(2), so the penalty of 0.1 becomes 0.707 there.
    batch = {k: np.array(v) for k, v in {"reward": [0.0, 0.0], "penalty": [0.1, 0.0]}.items()}
    batch |= {"group": np.zeros(2, int), "trajectory": np.arange(2), "step": np.zeros(2, int), "anchor": np.arange(2)}
    close(verl_agent_gigpo(batch, **how)[1], [-0.7071, 0.7071], 1e-4)
    assert gigpo(batch, **how)[1].tolist() == [0, 0]
    # A group of one row keeps its score there.
    batch = {k: v[:1] for k, v in batch.items()} | {"reward": np.array([10.0])}
    close(verl_agent_gigpo(batch, **how)[1], [9.9 / (1 + 1e-6)])
    assert gigpo(batch, **how)[1].tolist() == [0]
