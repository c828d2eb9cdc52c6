"""Which actions are left and what they bring, against loops; what a rollout promises; the learning of a toy world."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign.clinical import asker, baselines, choice, imitation, training
from rlalign.clinical.ddxplus import NaiveBayes
from rlalign.clinical.inquiry import Cases, Rules, allowed, learn, new_tests, panels_of, redundant, take

GROUPS = [[0, 1, 2], [3], [0], [2]]
RULES = Rules(panels_of(GROUPS), columns=12, horizon=3)


def left(known, recorded, asked):
    """The actions by their definition."""
    out = []
    for group in GROUPS:
        new = [k for k in group if not known[k] and (recorded is None or recorded[k])]
        out.append(bool(new) and asked < RULES.horizon)
    return [*out, True, True]


def effects(known, action):
    tests = new_tests(RULES, known, action)
    return tests, learn(known, tests), redundant(RULES, known, action)


def test_actions_that_are_left_are_those_of_the_loop():
    rng = np.random.default_rng(0)
    known, recorded = rng.random((2, 64, 4)) < 0.5
    asked = rng.integers(0, 5, 64)
    for record in (None, recorded):
        got = jax.jit(lambda known, asked, record=record: allowed(RULES, known, recorded=record, asked=asked))(
            known, asked
        )
        want = [left(known[n], None if record is None else record[n], asked[n]) for n in range(64)]
        np.testing.assert_array_equal(got, want)
    action = rng.integers(0, 6, 64)
    tests, after, waste = jax.tree.map(np.asarray, jax.jit(effects)(known, action))
    for n in range(64):
        new = [k for k in (GROUPS[action[n]] if action[n] < 4 else []) if not known[n, k]]
        assert [k for k in tests[n] if k >= 0] == new
        assert set(np.flatnonzero(after[n])) == set(np.flatnonzero(known[n])) | set(new)
        assert waste[n] == (action[n] < 4 and not new)


def toy(count, seed):
    """Three diseases, the third one rare; only test 4 of six tells them apart, and test 1 a little."""
    rng = np.random.default_rng(seed)
    disease = rng.choice(3, count, p=[0.55, 0.35, 0.1])
    label = rng.integers(0, 3, (count, 6))
    label[:, 4] = np.where(rng.random(count) < 0.9, disease, label[:, 4])
    label[:, 1] = np.where(rng.random(count) < 0.3, disease, label[:, 1])
    no = np.zeros((count, 6), bool)
    column = (3 * np.arange(6) + label).astype(np.int32)
    return Cases(np.ones((count, 1), np.float32), column, ~no, no, disease[:, None] == np.arange(3), disease * 0)


TOY = Rules(panels_of([[k] for k in range(6)]), columns=18, horizon=2)


def toy_posterior():
    table = np.full((3, 18), 1 / 3, np.float32)
    for d in range(3):
        for k, sure in ((4, 0.9), (1, 0.3)):
            table[d, 3 * k : 3 * k + 3] = (1 - sure) / 3
            table[d, 3 * k + d] += sure
    news = np.log(np.append(table.T, np.ones((1, 3)), axis=0)).astype(np.float32)
    return NaiveBayes(np.log([0.55, 0.35, 0.1]).astype(np.float32), news, table, np.arange(18) // 3)


HOW = {"patients": 16, "samples": 8, "steps": 80, "warm_up_steps": 40, "learning_rate": 3e-2}


@pytest.fixture(scope="module")
def learned():
    cases, config = toy(512, 0), training.Training(**HOW, confirmation=1.0)
    net = asker.network(TOY, cases, 16)
    begun = training.init(config, net, cases)
    params, curve = training.reinforce(config, net, TOY, cases, begun, weight=jnp.ones(3), posterior=toy_posterior())
    return net, begun, params, curve


def test_a_policy_learns_from_rewards_what_to_ask_and_what_it_means(learned):
    net, begun, params, curve = learned
    assert curve["found"][-5:].mean() > curve["found"][:5].mean() + 0.15
    cases = jax.tree.map(jnp.asarray, toy(256, 1))
    play = jax.jit(lambda p: asker.rollout(net, p, TOY, cases, jax.random.key(0), greedy=True, on_record=False))
    asked = play(params)
    assert np.mean(np.any(np.asarray(asked.action) == 4, axis=1)) > 0.9
    right = np.take_along_axis(np.asarray(cases.gold), np.asarray(asked.ranked[:, :1]), axis=1).mean()
    assert right > 0.8
    before = play(begun)
    assert np.take_along_axis(np.asarray(cases.gold), np.asarray(before.ranked[:, :1]), axis=1).mean() < right - 0.15


def test_what_a_rollout_promises(learned):
    net, _, params, _ = learned
    cases = jax.tree.map(jnp.asarray, toy(64, 2))
    cases = cases._replace(recorded=cases.recorded.at[:, 4].set(False))

    @jax.jit
    def play(params):
        played = asker.rollout(net, params, TOY, cases, jax.random.key(1), places=2)
        said = net.apply(params, asker.states(net, params, cases, played.column), method="heads")
        logits = said.logits[:, :3].reshape(-1, TOY.actions)
        logp = choice.renormalised(logits, played.allowed.reshape(-1, TOY.actions))
        chosen = choice.chosen(logp, played.action.reshape(-1)).reshape(-1, 3)
        return played, chosen, choice.rank_logps(said.ranking[:, -1], played.ranked[:, :2])

    played, logp, places = play(params)
    live, action = np.asarray(played.live), np.asarray(played.action)
    assert not np.asarray(played.redundant).any()
    assert not (live & (action == 4)).any()  # no result of it on record
    assert live[:, 0].all()
    for n in range(64):
        end = int(live[n].sum())
        assert action[n, end - 1] >= TOY.stop
        assert (action[n, : end - 1] < TOY.stop).all()
        assert len(set(action[n, : end - 1])) == end - 1
    np.testing.assert_allclose(played.logp, logp, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(played.rank_logp, places, rtol=1e-4, atol=1e-5)


def test_without_reject_sampling_orders_repeat_themselves(learned):
    net, begun, _, _ = learned
    cases = jax.tree.map(jnp.asarray, toy(256, 3))
    played = jax.jit(lambda p: asker.rollout(net, p, TOY, cases, jax.random.key(1), reject=False))(begun)
    assert np.asarray(played.redundant).mean() > 0.02


def test_advantages_compare_one_patients_episodes_at_one_decision():
    rng = np.random.default_rng(4)
    config = training.Training(patients=3, samples=4, gamma=0.9, advantage="none")
    live = np.arange(3)[None] < rng.integers(1, 4, 12)[:, None]
    step, found = np.where(live, rng.normal(size=(12, 3)), 0), rng.normal(size=12)
    abstains = rng.random(12) < 0.3
    empty = jnp.zeros((12, 3))
    played = asker.Episodes(
        empty, empty, empty, jnp.asarray(live), *[empty] * 2, jnp.zeros((12, 2)), abstains, *[empty] * 3
    )
    rewards = training.Rewards(jnp.asarray(step), jnp.asarray(found))
    got, taken = jax.jit(lambda played, rewards: training.advantages(config, played, rewards))(played, rewards)
    worth = np.zeros((12, 5))
    for n in range(12):
        for t in range(3):
            worth[n, t] = sum(0.9 ** (s - t) * step[n, s] for s in range(t, 3))
        worth[n, 3:] = found[n]
    mask = np.concatenate([live, np.repeat(~abstains[:, None], 2, axis=1)], axis=1)
    np.testing.assert_array_equal(taken, mask)
    for n in range(12):
        for slot in range(5):
            others = [m for m in range(12) if m // 4 == n // 4 and mask[m, slot]]
            want = worth[n, slot] - np.mean(worth[others, slot]) if mask[n, slot] and len(others) > 1 else 0.0
            assert got[n, slot] == pytest.approx(want, abs=1e-5)


def test_who_asks_what_tells_most_asks_it_first():
    cases, posterior = jax.tree.map(jnp.asarray, toy(200, 5)), toy_posterior()
    told = baselines.play(TOY, cases, posterior, "information gain", seed=0)
    assert (told.action[:, 0] == 4).all()
    assert (told.action[:, 1] == 1).all()
    lot = baselines.play(TOY, cases, posterior, "random", seed=0)
    often = baselines.play(TOY, cases, posterior, "frequency", seed=0, frequency=np.array([0, 1.0, 0, 2.0, 0, 0]))
    assert (often.action == [3, 1]).all()
    nats = lambda p: -np.log(p[np.asarray(cases.gold)]).mean()
    every = baselines.ceiling(cases, posterior)
    assert nats(every) <= nats(told.posterior[:, -1]) + 1e-5 < nats(lot.posterior[:, -1])
    np.testing.assert_allclose(every, told.posterior[:, -1], atol=1e-5)  # the other tests tell nothing


def test_imitation_follows_the_expert():
    cases, posterior = toy(512, 0), toy_posterior()
    told = baselines.play(TOY, cases, posterior, "information gain", seed=0)
    config = training.Training(**HOW | {"warm_up_steps": 120}, warm_up_rate=2e-2)
    net = asker.network(TOY, cases, 16)
    params, curve = imitation.warm_up(config, net, TOY, cases, told.action, training.init(config, net, cases))
    assert curve["action"][-1] < 0.1 < curve["action"][0]
    some = jax.tree.map(jnp.asarray, take(cases, slice(0, 64)))
    played = jax.jit(lambda p: asker.rollout(net, p, TOY, some, jax.random.key(0), greedy=True))(params)
    np.testing.assert_array_equal(played.action, np.tile([4, 1, TOY.stop], (64, 1)))


def test_what_an_expert_does_after_it_stops_is_not_imitated():
    cases = toy(256, 0)
    config = training.Training(**HOW | {"warm_up_steps": 120}, warm_up_rate=2e-2)
    net = asker.network(TOY, cases, 16)
    action = np.tile(np.array([[TOY.stop, 3]], np.int32), (256, 1))
    params, _ = imitation.warm_up(config, net, TOY, cases, action, training.init(config, net, cases))
    some = jax.tree.map(jnp.asarray, take(cases, slice(0, 8)))
    known = asker.states(net, params, some, imitation.expert_columns(TOY, some, jnp.asarray(action[:8])))
    act = jax.nn.softmax(net.apply(params, known, method="heads").logits)
    assert (act[:, 0, TOY.stop] > 0.9).all()
    assert (act[:, 1, 3] < 0.5).all()


def test_whole_dialogues_above_a_threshold(learned):
    net, begun, *_ = learned
    cases, config = toy(256, 6), training.Training(**HOW)
    how = {"weight": jnp.ones(3), "posterior": toy_posterior()}
    kept, action = imitation.dialogues_above(0.9, config, net, TOY, cases, begun, **how)
    every, _ = imitation.dialogues_above(-9.0, config, net, TOY, cases, begun, **how)
    assert 0 < len(kept.column) < len(every.column) < len(cases.column)  # who abstains is never imitated
    assert action.shape == (len(kept.column), TOY.horizon)
    assert ((action[:, 0] < TOY.stop) | (action[:, 1] == TOY.stop)).all()
    params, _ = imitation.warm_up(config, net, TOY, kept, action, begun, pool=cases)
    test = jax.tree.map(jnp.asarray, toy(512, 7))
    play = jax.jit(lambda p: asker.rollout(net, p, TOY, test, jax.random.key(0)))
    earned = [training.rewards_of(config, TOY, test, play(p), jnp.ones(3)).diagnosis.mean() for p in (begun, params)]
    assert earned[1] > earned[0] + 0.1
    with pytest.raises(ValueError, match=r"^threshold is 99.0, and no dialogue earned more than \d"):
        imitation.dialogues_above(99.0, config, net, TOY, cases, begun, **how)


def test_rewards_against_the_record_are_those_of_new_results():
    rules = Rules(panels_of([[0, 1], [1], [2]]), columns=9, horizon=3)
    cases = jax.tree.map(jnp.asarray, toy(2, 0))
    action = jnp.array([[1, 0, 1, 3], [0, 2, 3, 3]])
    live = jnp.array([[True] * 4, [True, True, True, False]])
    empty = jnp.zeros((2, 4))
    played = asker.Episodes(
        action, empty, empty, live, empty, jnp.array([[0, 1, 2]] * 2), empty, jnp.zeros(2, bool), *[empty] * 3
    )
    match = jnp.array([[1.0, 0.5, -0.1, 0, 0, 0], [0.5, 0.0, 1.0, 0, 0, 0]])
    config = training.Training(confirmation=2.0, cost=0.01)
    step = jax.jit(lambda played: training.rewards_of(config, rules, cases, played, jnp.ones(3), match).step)(played)
    np.testing.assert_allclose(step[0, :3], [2 * 0.5 - 0.01, 2 * 1.0 - 0.01, 2 * -0.1 - 0.01], rtol=1e-5)
    np.testing.assert_allclose(step[1, :2], [2 * 0.25 - 0.01, 2 * 1.0 - 0.01], rtol=1e-5)


def test_settings_that_are_refused():
    with pytest.raises(ValueError, match=r"^advantage is 'mean': 'none', 'std' or 'leave_one_out'$"):
        training.Training(advantage="mean")
    with pytest.raises(ValueError, match=r"^patients=4 and samples=1: at least 1, and 2 to compare with each other$"):
        training.Training(patients=4, samples=1)
    with pytest.raises(ValueError, match=r"^asker is 'oracle': one of information gain, random, frequency, the last"):
        baselines.play(TOY, toy(4, 0), toy_posterior(), "oracle", seed=0)
