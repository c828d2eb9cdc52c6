"""make_batch: rewards to advantages, prompts stored once, invalid samples nowhere."""

import dataclasses

import jax
import numpy as np
import pytest

from rlalign.algorithms import ALGORITHMS
from rlalign.train import make_batch
from rlalign.types import Prompt, Rewards, Rollouts
from tests import oracles

PROMPTS = [np.array([3, 1, 4, 1]), Prompt(id=9, tokens=np.array([2, 7])), np.array([5, 5, 5, 5, 5])]
GRPO = ALGORITHMS["grpo"]


def rollouts(seed=0, samples=3, longest=4):
    """Ragged responses to PROMPTS, as sample() returns them."""
    rng = np.random.default_rng(seed)
    count = samples * len(PROMPTS)
    length = rng.integers(1, longest + 1, count)
    mask = np.arange(longest)[None, :] < length[:, None]
    tokens = np.where(mask, rng.integers(1, 30, mask.shape), 0).astype(np.int32)
    logp = np.where(mask, -rng.random(mask.shape), 0).astype(np.float32)
    owner = np.repeat(np.arange(len(PROMPTS), dtype=np.int32), samples)
    return Rollouts(tokens, mask, logp, 2 * logp, np.zeros(count, np.int32), owner)


REWARD = np.array([1.0, 0.0, 2.0, 5.0, 5.0, 5.0, 0.0, 0.25, 1.0])


def relative(reward, valid):
    """(r - mean) / (std + 1e-6) within each group of three, by hand."""
    out = np.zeros(9)
    for group in range(3):
        members = [i for i in range(3 * group, 3 * group + 3) if valid[i]]
        values = np.array([reward[i] for i in members])
        if len(members) > 1 and np.ptp(values) > 0:
            out[members] = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
    return out


def response_tokens(batch):
    flat = batch.packed.forest.token.reshape(-1)
    return [flat[node[mask]].tolist() for node, mask in zip(batch.packed.node, batch.packed.mask, strict=True)]


def test_order_fields_and_advantages():
    sampled = rollouts()
    batch = make_batch(GRPO, PROMPTS, sampled, REWARD, row_length=32)
    np.testing.assert_allclose(batch.advantage, relative(REWARD, np.ones(9, bool)), rtol=1e-5, atol=1e-7)
    assert not batch.advantage[3:6].any()  # no signal in the second group
    np.testing.assert_array_equal(batch.old_logp, sampled.logp)  # not what truncation made of it
    np.testing.assert_array_equal(batch.packed.mask, sampled.mask)
    assert response_tokens(batch) == [t[m].tolist() for t, m in zip(sampled.tokens, sampled.mask, strict=True)]
    assert batch.ref_logp is batch.pair is None


def test_prompts_are_stored_once():
    """In every row exactly the distinct prefixes, and each response behind its own prompt."""
    sampled = rollouts()
    forest = make_batch(GRPO, PROMPTS, sampled, REWARD, row_length=64).packed.forest
    paths = set()
    for n, owner in enumerate(sampled.prompt):
        whole = (*np.asarray(PROMPTS[owner]).tolist(), *sampled.tokens[n][sampled.mask[n]].tolist())
        paths |= {whole[: i + 1] for i in range(len(whole))}
    stored = []
    for row in range(len(forest.token)):
        for column in np.flatnonzero(forest.visible_until[row]):
            path, at = [], column
            while at >= 0:
                path.append(int(forest.token[row, at]))
                at = forest.parent[row, at]
            stored.append(tuple(path[::-1]))
    assert len(stored) == len(set(stored)) == len(paths)
    assert set(stored) == paths


@pytest.mark.parametrize("form", ["Rewards", "array"])
def test_invalid_rewards_are_in_no_statistic_and_no_loss(form):
    """Their mask is empty and their advantage 0; the others' advantage is that of the group without them."""
    sampled, reward = rollouts(), REWARD.copy()
    valid = np.ones(9, bool)
    valid[[1, 6, 7]] = False
    reward[~valid] = [np.nan, 1e9, -np.inf] if form == "Rewards" else [np.nan, np.inf, -np.inf]
    given = Rewards(reward, valid, ("",) * 9) if form == "Rewards" else reward
    batch = make_batch(GRPO, PROMPTS, sampled, given, row_length=32)
    np.testing.assert_allclose(batch.advantage, relative(reward, valid), rtol=1e-5, atol=1e-7)
    assert batch.advantage[0] < 0 < batch.advantage[2]
    assert not batch.advantage[~valid].any()
    assert not batch.advantage[6:].any()  # one valid sample is left
    assert not batch.packed.mask[~valid].any()
    assert (batch.packed.node[~valid] == -1).all()
    np.testing.assert_array_equal(batch.packed.mask[valid], sampled.mask[valid])
    kept = [tokens for tokens, ok in zip(response_tokens(batch), valid, strict=True) if ok]
    assert kept == [t[m].tolist() for t, m, ok in zip(sampled.tokens, sampled.mask, valid, strict=True) if ok]


def test_no_valid_reward_at_all():
    batch = make_batch(GRPO, PROMPTS, rollouts(), np.full(9, np.nan), row_length=32)
    assert not batch.packed.mask.any()
    assert not batch.advantage.any()


def test_shapes_are_those_of_the_settings():
    """Any rewards, the same shapes: nothing is compiled again for a batch with failures."""
    options = {"row_length": 32, "parts": 2, "num_rows": 4}
    bad = np.where(np.arange(9) % 2, np.nan, REWARD)
    batches = [make_batch(GRPO, PROMPTS, rollouts(seed), r, **options) for seed, r in ((0, REWARD), (1, bad))]
    assert len({tuple(x.shape for x in jax.tree.leaves(b)) for b in batches}) == 1
    assert batches[0].packed.forest.token.shape == (4, 32)


def test_refusals():
    with pytest.raises(ValueError, match="learn from rewards, this one has data='demonstrations'"):
        make_batch(ALGORITHMS["sft"], PROMPTS, rollouts(), REWARD)
    with pytest.raises(ValueError, match=r"\(4,\) rewards for \(9,\) samples: one each"):
        make_batch(GRPO, PROMPTS, rollouts(), REWARD[:4])
    with pytest.raises(ValueError, match="sequence 6 has 6 tokens and row_length is 5"):
        make_batch(GRPO, PROMPTS, rollouts(longest=1), REWARD, row_length=5)


def test_the_weight_corrects_for_truncated_sampling():
    sampled = rollouts()
    mask = sampled.mask
    same = make_batch(GRPO, PROMPTS, sampled._replace(behaviour_logp=sampled.logp), REWARD, row_length=32)
    np.testing.assert_array_equal(same.weight, mask)
    weight = make_batch(GRPO, PROMPTS, sampled, REWARD, row_length=32).weight
    np.testing.assert_allclose(weight[mask], np.minimum(np.exp(-sampled.logp), 2.0)[mask], rtol=1e-6)
    assert (weight == 2).any()
    assert ((weight > 1) & (weight < 2)).any()


def test_what_an_advantage_needs_comes_from_the_batch_the_reference_and_the_caller():
    sampled = rollouts()
    whitened = make_batch(ALGORITHMS["reinforce_pp"], PROMPTS, sampled, REWARD, row_length=32)
    assert whitened.advantage.shape == sampled.mask.shape
    assert not whitened.advantage[~sampled.mask].any()
    remax = make_batch(ALGORITHMS["remax"], PROMPTS, sampled, REWARD, row_length=32, fields={"baseline": np.ones(3)})
    np.testing.assert_allclose(remax.advantage, REWARD - 1)

    asked = []

    def reference(packed):
        asked.append(packed)
        return np.where(packed.mask, -0.5, np.nan).astype(np.float32)

    weighted = make_batch(ALGORITHMS["gprs_weight"], PROMPTS, sampled, REWARD, row_length=32, reference=reference)
    log_weight = np.where(sampled.mask, -0.5 - sampled.logp, 0).sum(axis=1)
    group = {"group": np.asarray(sampled.prompt), "num_groups": 3, "weight": np.exp(log_weight)}
    want = oracles.group_preference(REWARD, valid=[True] * 9, **group)
    np.testing.assert_allclose(weighted.advantage, want, rtol=1e-4, atol=1e-6)
    assert weighted.ref_logp is not None
    assert len(asked) == 1
    make_batch(GRPO, PROMPTS, sampled, REWARD, row_length=32, reference=reference)
    assert len(asked) == 1  # no KL, no reference


def test_the_callers_groups_replace_the_prompts():
    sampled = rollouts()
    one = make_batch(ALGORITHMS["dr_grpo"], PROMPTS, sampled, REWARD, row_length=32, fields={"group": np.zeros(9, int)})
    np.testing.assert_allclose(one.advantage, REWARD - REWARD.mean(), rtol=1e-6)


def test_steps_of_trajectories():
    """GiGPO's rows are steps: the prompts are histories, the groups are tasks."""
    sampled = rollouts()
    steps = {
        "group": np.zeros(9, int),
        "trajectory": np.repeat(np.arange(3), 3),
        "step": np.tile(np.arange(3), 3),
        "anchor": np.tile(np.arange(3), 3),
    }
    batch = make_batch(ALGORITHMS["gigpo"], PROMPTS, sampled, REWARD, row_length=32, reference=zeros, fields=steps)
    want, _ = oracles.group_in_group(REWARD, num_groups=3, **steps)
    np.testing.assert_allclose(batch.advantage, want, rtol=1e-4, atol=1e-5)


def zeros(packed):
    return np.zeros(packed.mask.shape, np.float32)


def test_a_term_that_is_not_finite_makes_its_row_invalid_and_is_named(caplog):
    terms = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    terms[4, 1] = np.nan
    given = {"fields": {"terms": terms}, "reference": zeros}
    batch = make_batch(ALGORITHMS["crpo_per_objective"], PROMPTS, rollouts(), REWARD, row_length=32, **given)
    assert "sample 4 is invalid: term 1 of its reward is nan" in caplog.text
    assert np.isfinite(batch.advantage).all()
    assert batch.advantage[4] == 0
    assert not batch.packed.mask[4].any()
    assert batch.advantage[[3, 5]].all()


def test_the_terms_of_named_rewards_are_taken_in_their_order():
    terms = np.random.default_rng(0).normal(size=(9, 3))
    valid = np.arange(9) != 4
    terms[4] = np.nan
    named = dict(zip(("accuracy", "reasoning", "consistency"), terms.T, strict=True))
    rewards = Rewards(np.where(valid, REWARD, np.nan), valid, ("",) * 9, named)
    algorithm, how = ALGORITHMS["crpo_per_objective"], {"row_length": 32, "reference": zeros}
    batch = make_batch(algorithm, PROMPTS, rollouts(), rewards, **how)
    fields = {"terms": np.where(valid[:, None], terms, 0)}
    want = make_batch(algorithm, PROMPTS, rollouts(), rewards._replace(terms=None), fields=fields, **how)
    np.testing.assert_array_equal(batch.advantage, want.advantage)
    assert batch.advantage[[3, 5]].all()
    other = make_batch(algorithm, PROMPTS, rollouts(), rewards, fields={"terms": fields["terms"][:, ::-1]}, **how)
    assert (np.asarray(other.advantage) != np.asarray(batch.advantage)).any()
    assert make_batch(ALGORITHMS["crpo"], PROMPTS, rollouts(), rewards, **how).advantage is not None


@pytest.mark.parametrize("drop", [False, True])
def test_groups_without_signal_stay_or_leave(drop):
    """The second group's rewards are all equal."""
    algorithm = dataclasses.replace(GRPO, drop_without_signal=drop)
    packed = make_batch(algorithm, PROMPTS, rollouts(), REWARD, row_length=32).packed
    assert packed.mask.any(axis=1).tolist() == [True] * 3 + [not drop] * 3 + [True] * 3
    assert ((packed.node >= 0) == packed.mask).all()


def test_the_trainers_log_probs_replace_the_samplers_and_the_difference_is_weighed():
    sampled = rollouts()
    trainer = np.where(sampled.mask, sampled.behaviour_logp + 0.25, 0).astype(np.float32)
    batch = make_batch(GRPO, PROMPTS, sampled, REWARD, row_length=32, old_policy=lambda packed: trainer)
    np.testing.assert_array_equal(batch.old_logp, trainer)
    np.testing.assert_allclose(batch.weight[sampled.mask], np.exp(0.25), rtol=1e-5)


def test_any_trajectory_ids_are_the_same_as_small_ones():
    steps = {
        "trajectory": np.repeat(np.arange(3), 3),
        "step": np.tile(np.arange(3), 3),
        "anchor": np.tile([0, 1, 1], 3),
    }
    how = {"row_length": 32, "reference": zeros}
    steps["group"] = np.zeros(9, int)
    small = make_batch(ALGORITHMS["gigpo"], PROMPTS, rollouts(), REWARD, fields=steps, **how)
    large = steps | {"trajectory": 1000 - 17 * steps["trajectory"], "anchor": 10**9 + steps["anchor"]}
    again = make_batch(ALGORITHMS["gigpo"], PROMPTS, rollouts(), REWARD, fields=large, **how)
    np.testing.assert_array_equal(small.advantage, again.advantage)
    penalty = np.arange(9) / 8
    less = make_batch(ALGORITHMS["gigpo"], PROMPTS, rollouts(), REWARD, fields=steps | {"penalty": penalty}, **how)
    want, _ = oracles.group_in_group(REWARD, num_groups=3, penalty=penalty, **steps)
    np.testing.assert_allclose(less.advantage, want, rtol=1e-4, atol=1e-5)


MISSING = [
    (
        "gprs",
        {"fields": {"groups": np.zeros(9, int)}},
        r"fields has 'groups', which this algorithm does not take: group$",
    ),
    ("grpo", {"fields": {"group": np.arange(9)}}, r"fields\['group'\] holds 0 to 8: ids must lie in \[0, 3\)$"),
    ("remax", {"fields": {"baseline": np.zeros(9)}}, r"fields\['baseline'\] has shape \(9,\), expected 3 rows$"),
    (
        "gigpo",
        {"reference": zeros},
        r"needs trajectory i\[N\], the trajectory .*: make_batch\(\.\.\., fields={'trajectory'",
    ),
    ("remax", {}, r"needs baseline f\[num_groups\], the reward of each prompt's greedy response: make_batch"),
    ("gprs", {}, r"compares with a reference: make_batch needs reference=, a scorer of it"),
]


@pytest.mark.parametrize(("name", "options", "text"), MISSING)
def test_what_is_missing_is_named(name, options, text):
    with pytest.raises(ValueError, match=text):
        make_batch(ALGORITHMS[name], PROMPTS, rollouts(), REWARD, row_length=32, **options)
