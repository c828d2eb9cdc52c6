"""Reject sampling: the distribution that acts against loops over its definition, and what a gradient sees of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlalign.clinical import choice
from tests.conftest import enable_x64

# Equal, or an eighth apart and more: which of two is the best must not hang on the last bit of a softmax.
LOGITS = arrays(np.float64, (2, 5), elements=st.integers(-240, 240).map(lambda n: n / 8))
ALLOWED = arrays(np.bool_, (2, 5))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def m_draws(logits, allowed, draws):
    """P of each action, by playing every way that the candidates can fall."""
    pi, out = softmax(logits), np.zeros(len(logits))
    best = max((a for a in range(len(logits)) if allowed[a]), key=lambda a: logits[a])
    reached = 1.0
    for _ in range(draws):
        for a in range(len(logits)):
            if allowed[a]:
                out[a] += reached * pi[a]
        reached *= sum(pi[a] for a in range(len(logits)) if not allowed[a])
    out[best] += reached
    return out


@functools.cache
def program(draws):
    return jax.jit(lambda x, ok: (choice.renormalised(x, ok), choice.several_draws(x, ok, draws)))


@settings(max_examples=60, deadline=None)
@given(LOGITS, ALLOWED, st.sampled_from([1, 2, 4]))
def test_distributions_are_those_of_the_loops(logits, allowed, draws):
    allowed = allowed.copy()
    allowed[:, 0] |= ~allowed.any(axis=1)
    with enable_x64():
        exact, several = jax.tree.map(np.exp, program(draws)(jnp.asarray(logits), jnp.asarray(allowed)))
    for row in range(2):
        pi = softmax(logits[row]) * allowed[row]
        np.testing.assert_allclose(exact[row], pi / pi.sum(), rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(several[row], m_draws(logits[row], allowed[row], draws), rtol=1e-6, atol=1e-9)


def test_many_draws_are_the_exact_form():
    logits, allowed = jnp.array([[0.3, -1.0, 2.0, 0.1]]), jnp.array([[True, True, False, True]])
    far = choice.several_draws(logits, allowed, 10**4)
    np.testing.assert_allclose(far[:, [0, 1, 3]], choice.renormalised(logits, allowed)[:, [0, 1, 3]], rtol=1e-5)


def test_gradients_are_finite_and_zero_where_rejected():
    logits = jnp.array([[0.0, jnp.nan, 1.0], [0.0, 200.0, -1.0], [0.5, 0.2, 0.1]])
    allowed = jnp.array([[True, False, True], [True, False, True], [True, True, True]])
    slope = jax.grad(lambda x: choice.chosen(choice.renormalised(x, allowed), jnp.array([0, 2, 1])).sum())(logits)
    assert np.isfinite(slope).all()
    assert not slope[:2, 1].any()
    several = jax.grad(lambda x: choice.chosen(choice.several_draws(x, allowed, 3), jnp.array([0, 2, 1])).sum())
    assert np.isfinite(several(jnp.where(jnp.isnan(logits), 0, logits))).all()


def test_the_gradient_of_what_acted_is_unbiased():
    """E[grad log P] = 0 under the distribution that acted; with the unrestricted policy's log-prob it is not."""
    logits, allowed = jnp.array([[0.4, 1.2, -0.3, 0.0]]), jnp.array([[True, False, True, True]])
    for form in (choice.renormalised, lambda x, ok: choice.several_draws(x, ok, 2)):
        p = jnp.where(allowed, jnp.exp(form(logits, allowed)), 0)[0]
        of = lambda log_policy, p=p: sum(p[a] * jax.grad(lambda x, a=a: log_policy(x)[0, a])(logits) for a in (0, 2, 3))
        np.testing.assert_allclose(of(lambda x, form=form: form(x, allowed)), 0, atol=1e-6)
        assert np.abs(of(lambda x: jax.nn.log_softmax(x, axis=-1))).max() > 0.1


@pytest.mark.parametrize("draws", [None, 1, 3])
def test_draws_follow_the_distribution_whose_logp_they_carry(draws):
    count = 6_000
    logits = jnp.tile(jnp.array([[1.0, 2.0, 0.0, -1.0]]), (count, 1))
    allowed = jnp.tile(jnp.array([[True, False, True, True]]), (count, 1))
    drawn = choice.draw(jax.random.key(0), logits, allowed, draws=draws)
    want = np.exp(choice.log_policy(draws)(logits[:1], allowed[:1])[0])
    share = np.bincount(drawn.action, minlength=4) / count
    np.testing.assert_allclose(share, want, atol=0.02)
    np.testing.assert_allclose(np.exp(drawn.logp), want[drawn.action], rtol=1e-5)
    q = softmax(np.array([1.0, 2.0, 0.0, -1.0]))[1]
    expected = q if draws is None else sum(q**i for i in range(1, draws + 1))
    np.testing.assert_allclose(drawn.rejects.mean(), expected, rtol=0.08)


def test_ranked_lists_and_their_logps():
    logits = jnp.array([[0.0, 1.0, 2.0, -1.0], [3.0, 1.0, 1.5, 0.0]])
    ranked, logp = choice.rank(jax.random.key(3), logits, 2)
    assert [sorted(row) for row in ranked.tolist()] == [[0, 1, 2, 3]] * 2
    np.testing.assert_allclose(choice.rank_logps(logits, ranked[:, :2]), logp, rtol=1e-6)
    for n in range(2):
        weights, left = np.exp(np.asarray(logits[n], np.float64)), list(range(4))
        for j in range(2):
            a = int(ranked[n, j])
            np.testing.assert_allclose(np.exp(logp[n, j]), weights[a] / weights[left].sum(), rtol=1e-5)
            left.remove(a)
        behind = [float(logits[n, a]) for a in ranked[n, 2:]]
        assert behind == sorted(behind, reverse=True)


def test_dialogues_to_imitate():
    reward = jnp.array([0.5, 0.7, jnp.nan, 0.9])
    assert choice.keep_above(reward, 0.5).tolist() == [False, True, False, True]
    assert (
        choice.keep_above(reward, 0.5, valid=jnp.array([True, True, True, False])).tolist()
        == [False, True] + [False] * 2
    )


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"^draws must be at least 1, got 0$"):
        choice.several_draws(jnp.zeros((1, 2)), jnp.ones((1, 2), bool), 0)
    with pytest.raises(ValueError, match=r"^allowed is bool\[1, 3\], expected b\[N, A\] with N=1, A=2"):
        choice.renormalised(jnp.zeros((1, 2)), jnp.ones((1, 3), bool))
    assert np.isneginf(choice.renormalised(jnp.zeros((1, 2)), jnp.zeros((1, 2), bool))).all()
