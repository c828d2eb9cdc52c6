"""Rewards and measures against loops over their definitions, in float64."""

import doctest
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.advantages import group_relative
from rlalign.clinical import choice, consultation, healthy, inquiry, scores
from tests.conftest import enable_x64

LISTS = st.lists(st.lists(st.integers(-1, 5), min_size=6, max_size=6), min_size=4, max_size=4)
GOLD = st.sets(st.integers(0, 5), max_size=4)


def unique_top(ranked, k):
    seen = []
    for c in ranked:
        if c >= 0 and c not in seen:
            seen.append(c)
    return seen[:k]


def reward(ranked, gold, weight, k, penalty):
    top = unique_top(ranked, k)
    gain = sum(weight[c] for c in gold if c in top) / len(gold) if gold else 0.0
    false = sum(c not in gold for c in top) / len(top) if top else 0.0
    return gain - penalty * false


def weights(count, power):
    total, classes = sum(count), len(count)
    raw = [(total / (classes * n)) ** power if n else None for n in count]
    mean = sum(n * v for n, v in zip(count, raw, strict=True) if n) / total
    return [4.0 if v is None else min(max(v / mean, 0.25), 4.0) for v in raw]


def members(golds, classes=6):
    return np.array([[c in gold for c in range(classes)] for gold in golds])


@functools.cache
def program(k):
    def every(count, ranked, gold):
        weight = scores.class_weights(count)
        reward = scores.diagnosis_reward(ranked, gold, weight, k=k, penalty=0.1)
        return weight, reward, scores.recall_at_k(ranked, gold, k), scores.recalls(ranked, gold, k)

    return jax.jit(every)


@settings(max_examples=80, deadline=None)
@given(LISTS, st.data(), st.sampled_from([1, 2, 5, 7]))
def test_rewards_and_recalls_are_those_of_the_loops(ranked, data, k):
    golds = [data.draw(GOLD) for _ in ranked]
    count = data.draw(st.lists(st.integers(0, 1000), min_size=6, max_size=6).filter(any))
    with enable_x64():
        out = program(k)(jnp.asarray(count, jnp.float64), jnp.asarray(ranked), jnp.asarray(members(golds)))
        weight, got, each, of = jax.tree.map(np.asarray, out)
    np.testing.assert_allclose(weight, weights(count, 0.5), rtol=1e-12)
    want = [reward(r, g, weights(count, 0.5), k, 0.1) for r, g in zip(ranked, golds, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    tops = [unique_top(r, k) for r in ranked]
    found = [len(set(t) & g) for t, g in zip(tops, golds, strict=True)]
    np.testing.assert_allclose(each, [f / len(g) if g else math.nan for f, g in zip(found, golds, strict=True)])
    by_class = {}
    for c in range(6):
        if any(c in g for g in golds):
            hit = [c in t for t, g in zip(tops, golds, strict=True) if c in g]
            by_class[c] = sum(hit) / len(hit)
            assert of.by_class[c] == pytest.approx(by_class[c])
    assert float(of.micro) == pytest.approx(sum(found) / max(sum(map(len, golds)), 1))
    assert float(of.macro) == pytest.approx(sum(by_class.values()) / max(len(by_class), 1))


def test_a_list_that_repeats_itself_gains_nothing():
    gold, ones = jnp.array([[False, True, False]]), jnp.ones(3)
    honest = scores.diagnosis_reward(jnp.array([[0, 1, -1]]), gold, ones, k=2)
    assert float(honest[0]) == pytest.approx(1 - 0.1 / 2)
    for copy in ([0, 0, 1], [1, 1, 0], [1, 0, 1]):
        assert scores.diagnosis_reward(jnp.array([copy]), gold, ones, k=2).tolist() == honest.tolist()
    assert scores.diagnosis_reward(jnp.array([[-1, -1, -1]]), gold, ones).tolist() == [0.0]


def test_class_weights_are_one_on_average_and_cut():
    assert scores.class_weights(jnp.array([5, 5, 5])).tolist() == pytest.approx([1.0] * 3)
    w = np.asarray(scores.class_weights(jnp.array([10_000, 1000, 1, 0])))
    assert (w[2], w[3]) == (4.0, 4.0)
    np.testing.assert_allclose(w[1] / w[0], 10**0.5, rtol=1e-5)
    assert scores.class_weights(jnp.array([7, 1, 0]), power=0.0).tolist() == [1.0] * 3


def test_the_confirmation_reward_telescopes():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), (3, 6))
    truth = np.eye(4)[[0, 2, 3]]
    truth[1] = [0.5, 0, 0.5, 0]
    live = np.arange(5)[None] < np.array([5, 3, 0])[:, None]
    for gamma in (1.0, 0.9):
        with enable_x64():
            got = np.asarray(scores.confirmation(jnp.asarray(p), jnp.asarray(truth), jnp.asarray(live), gamma=gamma))
        ce = lambda n, t: -sum(truth[n, c] * math.log(p[n, t, c] + 1e-10) for c in range(4))
        for n in range(3):
            for t in range(5):
                want = ce(n, t) - gamma * ce(n, t + 1) if live[n, t] else 0.0
                assert got[n, t] == pytest.approx(want, rel=1e-12)
            total = sum(gamma**t * got[n, t] for t in range(5))
            end = int(live[n].sum())
            assert total == pytest.approx(ce(n, 0) - gamma**end * ce(n, end), abs=1e-12)
    with pytest.raises(ValueError, match=r"^posterior has 6 moments for 3 tests: one more than tests$"):
        scores.confirmation(jnp.asarray(p), jnp.asarray(truth), jnp.asarray(live[:, :3]))


def test_the_reward_against_the_record():
    ordered, normal, abnormal = (jnp.array(x) for x in ([1, 1, 1, 0, 0], [0, 1, 0, 1, 0], [1, 0, 0, 0, 1]))
    got = scores.ehr_match(ordered > 0, normal > 0, abnormal > 0)
    assert got.tolist() == pytest.approx([1.0, 0.5, -0.1, -0.1, -0.1])


def test_calibration_is_that_of_the_loop():
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(3) * 0.4, 500)
    gold = rng.random((500, 3)) < p
    with enable_x64():
        got = jax.tree.map(np.asarray, scores.calibration(jnp.asarray(p), jnp.asarray(gold), bins=5))
    bins = [[] for _ in range(5)]
    for row, right in zip(p, gold, strict=True):
        bins[min(max(math.ceil(row.max() * 5) - 1, 0), 4)].append((row.max(), bool(right[row.argmax()])))
    error = sum(abs(sum(s for s, _ in b) - sum(r for _, r in b)) for b in bins) / 500
    brier = np.mean([sum((row[c] - right[c]) ** 2 for c in range(3)) for row, right in zip(p, gold, strict=True)])
    assert float(got.error) == pytest.approx(error)
    assert float(got.brier) == pytest.approx(brier)
    assert float(got.share.sum()) == pytest.approx(1)


def test_division_by_the_groups_deviation_cancels_class_weights():
    """Two patients, four answers each, right or wrong: weights show without the division and vanish with it."""
    gold = jnp.array([[True, False]] * 4 + [[False, True]] * 4)
    ranked = jnp.array([[0], [1], [1], [1], [1], [0], [0], [0]])
    group = jnp.repeat(jnp.arange(2), 4)
    of = lambda weight, scale: np.asarray(
        group_relative(
            scores.diagnosis_reward(ranked, gold, jnp.asarray(weight), k=1), group, num_groups=2, scale=scale
        )
    )
    rare, even = [0.5, 3.0], [1.0, 1.0]
    np.testing.assert_allclose(of(rare, "std"), of(even, "std"), atol=1e-4)
    assert of(rare, "none")[4] > 2 * of(even, "none")[4] > 0


def test_abstaining():
    got = scores.abstained(jnp.array([1.0, 0.3]), jnp.array([False, True]), 0.2)
    assert got.tolist() == pytest.approx([1.0, 0.2])
    with pytest.raises(ValueError, match=r"^k must be at least 1, got 0$"):
        scores.in_top(jnp.zeros((1, 2), int), 0)


@pytest.mark.parametrize("module", [choice, consultation, healthy, inquiry, scores], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0
