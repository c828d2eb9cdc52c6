"""The oracles against numbers worked out by hand: an oracle that is wrong judges nothing."""

import math

import numpy as np
import pytest

from tests import oracles


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_gprs_of_binary_rewards():
    # p = 2/3 right: B = 1, 1, 1/3 with mean 7/9, so p (1 - p) = 2/9 twice and -p^2 = -4/9
    out = oracles.group_preference([1, 1, 0], [0, 0, 0], num_groups=1, valid=[True] * 3)
    close(out, [2 / 9, 2 / 9, -4 / 9])


def test_returns_skip_invalid_rows_and_go_by_step():
    # trajectory 5: 1 at step 0, then 4 at step 9; the row between is absent: 1 + 4/2. Trajectory 2 is one step.
    out = oracles.discounted_return(
        [4.0, 1.0, math.nan, 7.0], [5, 5, 5, 2], [9, 0, 3, 1], gamma=0.5, valid=[True, True, False, True]
    )
    close(out, [4, 3, 0, 7])


TWO = {  # two trajectories of two steps, one anchor: scores 1 and 0; returns .5, 1, 0, 0 with mean .375
    "reward": [0.0, 1.0, 0.0, 0.0],
    "group": [0] * 4,
    "trajectory": [3, 3, 1, 1],
    "step": [0, 2, 5, 6],
    "anchor": [2] * 4,
    "num_groups": 1,
    "gamma": 0.5,
    "eps": 0.0,
}
COST = [0.0, 0.0, 0.25, 0.0]


def test_gigpo_of_two_trajectories():
    out, parts = oracles.group_in_group(**TWO, scale="none", step_weight=2.0)
    close(parts["episode"], [0.5, 0.5, -0.5, -0.5])
    close(parts["step"], [0.125, 0.625, -0.375, -0.375])
    close(out, [0.75, 1.75, -1.25, -1.25])
    _, parts = oracles.group_in_group(**TWO)
    # deviation of (1, 0): sqrt((1/4 + 1/4) / 1) = sqrt(1/2); of the returns: (1/64 + 25/64 + 9/64 + 9/64) / 3 = 11/48
    close(parts["episode"], np.array([1, 1, -1, -1]) / math.sqrt(2))
    close(parts["step"], np.array([1, 5, -3, -3]) / 8 / math.sqrt(11 / 48))


def test_gigpo_with_a_penalty():
    # the third row's score is -.25 and its return -.25, and no other row's: returns .5, 1, -.25, 0 with mean .3125
    _, parts = oracles.group_in_group(**TWO, penalty=COST, scale="none")
    close(parts["episode"], [0.5, 0.5, -0.75, -0.5])  # mean .5 and deviation sqrt(1/2) without the penalty
    close(parts["step"], [0.1875, 0.6875, -0.5625, -0.3125])
    _, parts = oracles.group_in_group(**TWO, penalty=COST)
    close(parts["episode"], np.array([0.5, 0.5, -0.75, -0.5]) * math.sqrt(2))
    # by rows the scores are 1, 1, -.25, 0: mean .4375
    _, parts = oracles.group_in_group(**TWO, penalty=COST, scale="none", episode_stat="step")
    close(parts["episode"], [0.5625, 0.5625, -0.6875, -0.4375])


def test_gigpo_counts_a_trajectory_once_or_by_its_rows():
    # scores 1 (three rows) and 0 (one row): mean 1/2, or 3/4 with deviation sqrt((3/16 + 9/16) / 3) = 1/2
    ragged = TWO | {"trajectory": [3, 3, 3, 1]}
    close(oracles.group_in_group(**ragged)[1]["episode"], np.array([1, 1, 1, -1]) / math.sqrt(2))
    close(oracles.group_in_group(**ragged, episode_stat="step")[1]["episode"], [0.5, 0.5, 0.5, -1.5])


@pytest.mark.parametrize("how", ["trajectory", "step"])
def test_gigpo_where_trajectories_say_nothing_about_each_other(how):
    # both score 1, so a penalty is the step part's alone; returns .5, 1, .75, 0 of the second anchor's rows 1 and 2
    equal = TWO | {"reward": [0.0, 1.0, 1.0, 0.0], "anchor": [0, 1, 1, 2], "scale": "none"}
    out, parts = oracles.group_in_group(**equal, penalty=COST, episode_stat=how)
    close(parts["episode"], [0, 0, 0, 0])
    close(out, [0, 0.125, -0.125, 0])  # anchors of one row: 0
    # one valid trajectory: no episode part, and its two rows of one anchor differ by .5
    out, parts = oracles.group_in_group(**(TWO | {"scale": "none"}), valid=[True, True, False, False], episode_stat=how)
    close(parts["episode"], [0, 0, 0, 0])
    close(out, [-0.25, 0.25, 0, 0])


def test_gigpo_keeps_anchors_and_nan_inside_their_group():
    apart = TWO | {"group": [0, 0, 1, 1], "num_groups": 3, "scale": "none", "reward": [0.0, 1.0, math.nan, 0.0]}
    out, parts = oracles.group_in_group(**apart)
    close(out, [-0.25, 0.25, math.nan, math.nan])
    close(parts["episode"], [0, 0, math.nan, math.nan])
    out, _ = oracles.group_in_group(**apart, valid=[True, True, False, True])
    close(out, [-0.25, 0.25, 0, 0])


def test_anchor_ids_by_equality_and_by_similarity():
    # ratio = 2 matches / 8 letters: abcd-abce .75, abce-abef .75, abcd-abef .5
    texts = ["abcd", "abce", "abef", "abcd", "abcd"]
    assert oracles.anchor_ids(texts, [0, 0, 0, 0, 1]).tolist() == [0, 1, 2, 0, 3]
    assert oracles.anchor_ids(texts, [0, 0, 0, 0, 1], similarity=0.75).tolist() == [0, 0, 1, 0, 2]
    # another order, other clusters: abce stands for both of the others
    assert oracles.anchor_ids(["abce", "abcd", "abef"], [4, 4, 4], similarity=0.75).tolist() == [0, 0, 0]


def test_reinforce_pp_whitens_three_tokens():
    # rewards 1 and 0, gamma 1/2, a hole that costs nothing: G = .5, 1, 0 with mean .5 and variance (0 + 1/4 + 1/4) / 2
    mask = np.array([[True, False, True], [True, False, False], [True, True, True]])
    how = {"mask": mask, "num_groups": 1, "valid": [True, True, False], "eps": 0.0}
    out = oracles.reinforce_pp([1.0, 0.0, math.nan], [0, 0, 0], gamma=0.5, **how)
    close(out, [[0, 0, 1], [-1, 0, 0], [0, 0, 0]])
    # less the group's mean 1/2: G = .5, .5, -.5 with mean 1/6; away 1/3, 1/3, -2/3, variance (6/9) / 2 = 1/3
    out = oracles.reinforce_pp([1.0, 0.0, math.nan], [0, 0, 0], baseline="group", **how)
    close(out, np.array([[1, 0, 1], [-2, 0, 0], [0, 0, 0]]) / math.sqrt(3))
    # equal rewards leave the rewards of tokens: G = 3, 2 and 1
    tokens = np.array([[1.0, math.nan, 2.0], [1.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    out = oracles.reinforce_pp([7.0, 7.0, 0.0], [0, 0, 0], baseline="group", token_reward=tokens, **how)
    close(out, [[1, 0, 0], [-1, 0, 0], [0, 0, 0]])
    assert not np.any(oracles.reinforce_pp([7.0, 7.0, 0.0], [0, 0, 0], **how))


def test_other_advantages():
    valid = [True, True, True, False]
    out = oracles.remax([1.0, 1.0, 3.0, 9.0], [0, 0, 1, 1], baseline=[0.5, math.nan], num_groups=2, valid=valid)
    close(out, [0.5, 0.5, math.nan, 0])
    # deviations: (2, 0) away +-1 by sqrt(2), ten times as large the same; weights 1 and 1/2 of opposite signs
    terms = [[2.0, 0.0], [0.0, 20.0], [5.0, 5.0], [9.0, 9.0]]
    out = oracles.per_objective(
        None, [0, 0, 1, 1], terms=terms, term_weight=[1.0, 0.5], num_groups=2, valid=valid, eps=0.0
    )
    close(out, [0.5 / math.sqrt(2), -0.5 / math.sqrt(2), 0, 0])
    reward, valid = [1.0, 0.0, 1.0, 1.0, math.nan, 1.0, 2.0, 3.0], [True] * 7 + [False]
    kept = oracles.informative_groups(reward, [0, 0, 1, 1, 2, 2, 3, 3], num_groups=5, valid=valid)
    assert kept.tolist() == [True, False, False, False, False]
    close(oracles.overlong_penalty([6, 7, 8, 10, 11], max_length=10, cache=4), [0, -0.25, -0.5, -1, -1])


E2, SIGMOID2 = math.exp(2), 1 / (1 + math.exp(-2))
AT_SHIFT_TWO = {  # f = 2 on both sides
    "bernoulli": (math.log(1 + 1 / E2), math.log(1 + E2)),  # 0.1269, 2.1269
    "brier": ((1 - SIGMOID2) ** 2, SIGMOID2**2),  # 0.0142, 0.7758
    "hinge": (0.0, 3.0),
    "kliep": (-2.0, E2),
    "lsif": (-E2, 0.5 * E2**2),  # -7.3891, 27.2991
}


@pytest.mark.parametrize("link", AT_SHIFT_TWO)
def test_links_at_zero_with_shift_two(link):
    loss, metrics = oracles.density_ratio([0.0], [0.0], link=link, scale=0.01, shift=2.0)
    close(loss, sum(AT_SHIFT_TWO[link]))
    assert metrics == {"logit_real": 2.0, "logit_generated": 2.0, "logit_cut_share": 0.0, "accuracy": 0.0}
    slopes = oracles.numerical_gradient(lambda x: oracles.density_ratio(*x, link=link, shift=2.0)[0], np.zeros((2, 1)))
    real, generated = slopes
    if link == "hinge":  # real data pulls only where f < 1
        close(real, 0)
    else:  # e^shift
        np.testing.assert_allclose(-generated / real, 7.389056, rtol=1e-6)


def test_density_ratio_cuts_and_counts():
    # real 3, -1 cut to 2, -1 and generated -5, -1 cut to -2, -1; hinge: 0 + 0 and 2 + 0
    valid = [True, True, False]
    loss, metrics = oracles.density_ratio(
        [3.0, -1.0, math.nan], [-5.0, -1.0, math.inf], valid=valid, link="hinge", max_logit=2.0
    )
    close(loss, 1.0)
    close([metrics[k] for k in ("logit_real", "logit_generated", "logit_cut_share", "accuracy")], [0.5, -1.5, 0.5, 0.5])
    own = (lambda f: -f, lambda f: f * f)
    close(oracles.density_ratio([3.0], [-5.0], link=own, denominator=4)[0], (-3 + 25) / 4)
    assert oracles.density_ratio([1.0], [1.0], valid=[False], link="kliep")[0] == 0
    assert oracles.density_ratio([0.0], [1000.0], link="kliep")[0] == math.inf


def test_pairs_at_zero_and_off_it():
    for loss in (oracles.dpo, oracles.bradley_terry):
        close(loss([0.0, 3.0], [0.0, 3.0])[0], math.log(2))
    slope = oracles.numerical_gradient(lambda x: oracles.dpo(x, [0.0], beta=0.1)[0], [0.0])
    np.testing.assert_allclose(slope, [-0.05], rtol=1e-6)  # -beta sigmoid(0)
    # beta m = log 3: softplus(-log 3) = log(4/3), softplus(log 3) = log 4
    third, m = math.log(4 / 3), math.log(3)
    loss, metrics = oracles.dpo([2 * m], [0.0], beta=0.5, label_smoothing=0.25)
    close(loss, 0.75 * third + 0.25 * math.log(4))
    close([metrics["margin"], metrics["accuracy"]], [m, 1])
    loss, metrics = oracles.spin([0.0, 5.0], [-2 * m, 0.0], scale=0.5, valid=[True, False])
    close([loss, metrics["margin"]], [third, 2 * m])
    loss, metrics = oracles.simpo([m], [0.0], beta=2.0, gamma=m)
    close([loss, metrics["margin"]], [third, m])
    loss, metrics = oracles.bradley_terry([m, 0.0], [0.0, 2 * m], margin=-m, denominator=1)
    close([loss, metrics["margin"], metrics["accuracy"]], [math.log(10 / 9) + math.log(4), -m / 2, 0.5])


def test_kto():
    # z = max(0, (1 - 3) / 2) = 0: both halves are 1 - sigmoid(0) = 1/2, the second twice as heavy
    how = {"beta": 1.0, "kl_logratio": [1.0, -3.0, 9.0], "kl_valid": [True, True, False]}
    loss, metrics = oracles.kto([0.0, 0.0], [True, False], weight_undesirable=2.0, **how)
    close([loss, metrics["kl"]], [0.75, 0])
    # z = log 3: 1 - sigmoid(-log 3) = 3/4 and 1 - sigmoid(log 3) = 1/4
    loss, metrics = oracles.kto([0.0, 0.0], [True, False], beta=1.0, weight_undesirable=2.0, kl_logratio=[math.log(3)])
    close([loss, metrics["kl"]], [(3 / 4 + 2 / 4) / 2, math.log(3)])
    # z of the batch itself is (2 + 0) / 2 = 1, kept fixed: slopes -+beta sigmoid'(1) / 2 with the batch's own count
    ratios, labels, valid = np.array([2.0, 0.0, math.nan]), [True, False, True], [True, True, False]
    _, metrics = oracles.kto(ratios, labels, valid=valid)
    assert metrics == {"kl": 1.0, "logratio_desirable": 2.0, "logratio_undesirable": 0.0}
    slope = oracles.numerical_gradient(lambda x: oracles.kto(x, labels, beta=1.0, valid=valid, at=ratios)[0], ratios)
    steep = math.exp(-1) / (1 + math.exp(-1)) ** 2 / 2
    np.testing.assert_allclose(slope, [-steep, steep, 0], rtol=1e-6, atol=1e-9)


def test_importance_weights_and_sums_of_a_response():
    logp, mask = np.log([[3.0, 0.5, 1.0], [1.0, 1.0, 1.0]]), np.array([[True, True, False], [False] * 3])
    junk = np.where(mask, 0.0, math.nan)
    weight, metrics = oracles.importance_weight(logp, junk, mask)
    close(weight, [[2, 0.5, 0], [0, 0, 0]])
    assert metrics == {"weight_mean": 1.25, "weight_beyond_share": 0.5, "weight_min": pytest.approx(0.5)}
    close(oracles.importance_weight(logp, junk, mask, level="sequence")[0], [[1.5, 1.5, 0], [0, 0, 0]])
    weight, metrics = oracles.importance_weight(logp, junk, mask, beyond="mask", cap=4.0, floor=0.75)
    close(weight, [[3, 0, 0], [0, 0, 0]])
    close([metrics["weight_mean"], metrics["weight_beyond_share"]], [1.5, 0.5])
    close(oracles.sequence_logratio(logp, junk, mask), [math.log(1.5), 0])
    close(oracles.sequence_mean(logp, mask), [math.log(1.5) / 2, 0])


def test_random_steps_hold_what_they_promise():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(60):
        case = oracles.random_steps(rng, 24, 4)
        ids, group = case["trajectory"], case["group"]
        assert all(len(case[k]) == 24 for k in case if k != "num_groups")
        assert all(case[k].min() >= 0 and case[k].max() < 24 for k in ("trajectory", "anchor"))
        for t in set(ids):
            assert len(set(group[ids == t])) == 1
            assert len(set(case["step"][ids == t])) == sum(ids == t)
        for a in set(case["anchor"]):
            of = [(group[i], ids[i]) for i in np.flatnonzero(case["anchor"] == a)]
            seen |= {"alone"} if len(of) == 1 else set()
            seen |= {"again in a trajectory"} if len(set(of)) < len(of) else set()
            seen |= {"in two groups"} if len({g for g, _ in of}) > 1 else set()
            seen |= {"in two trajectories"} if len(set(of)) > len({g for g, _ in of}) else set()
        seen |= {"one step"} if min(sum(ids == t) for t in set(ids)) == 1 else set()
        seen |= {"nothing valid"} if not case["valid"].any() else set()
        seen |= {"penalty"} if case["penalty"].any() else {"no penalty"}
        _, parts = oracles.group_in_group(**case)
        seen |= {k for k in parts if np.any(parts[k])}
        seen |= {"all tied"} if np.any((parts["episode"] == 0) & (parts["step"] != 0)) else set()
    assert len(seen) == 11, seen
