"""Rewards and measures of asking for tests and diagnosing: arrays in, arrays out.

DiaLLM (arXiv 2506.20059) has a confirmation reward for tests and a class-sensitive reward for diagnoses. Their formulas
are not public; those here are our choice, and so is `abstain`. A trap lies in the weights of classes: they are constant
among the answers to one patient, so an advantage that divides by the group's standard deviation cancels them. Use
group_relative(scale="none") or leave_one_out.

Ranked lists are i[N, M], the likeliest class first; -1 is no class. Gold classes are b[N, C].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlalign.checks import expect
from rlalign.types import Array

EPSILON = 1e-10  # inside of logarithms
WEIGHTS = (0.25, 4.0)  # least and largest weight of a class


class Recalls(NamedTuple):
    """Recall@k of many patients.

    Attributes:
      micro: f[], gold classes found of all gold classes.
      macro: f[], the mean of `by_class` over the classes that occur.
      by_class: f[C], NaN for a class that does not occur.
      count: f[C], how often a class occurs.
    """

    micro: jax.Array
    macro: jax.Array
    by_class: jax.Array
    count: jax.Array


class Calibration(NamedTuple):
    """How far confidence is what it says.

    Attributes:
      error: f[], the expected calibration error: |accuracy - confidence| of each bin, by its share of patients.
      brier: f[], the mean of sum_c (p_c - [c is gold])^2.
      confidence, accuracy, share: f[bins]; the first two are NaN in an empty bin.
    """

    error: jax.Array
    brier: jax.Array
    confidence: jax.Array
    accuracy: jax.Array
    share: jax.Array


def cross_entropy(truth: Array, p: Array) -> jax.Array:
    """CE(p*, p) = -sum_c p*_c ln(p_c + 1e-10), over the last axis: f[...] nats of f[..., C] twice."""
    return -jnp.sum(truth * jnp.log(p + EPSILON), axis=-1)


def confirmation(posterior: Array, truth: Array, live: Array, *, gamma: float = 1.0) -> jax.Array:
    """Confirmation reward in its potential form: what a test brings towards the true diagnosis.

        r_t = CE(p*, p_{t-1}) - gamma CE(p*, p_t)

    Its discounted sum telescopes to CE_0 - gamma^T CE_T: what the last posterior says of the truth. It is shaping by a
    potential (Ng et al. 1999), our choice, but for the end: stopping does not pay gamma^T CE_T back. So it does favour
    policies that end better informed and, with gamma < 1, longer dialogues; a cost of orders weighs against that.

    Args:
      posterior: f[N, T + 1, C], p_0 before any test.
      truth: f[N, C], p*: 1 / |gold| on each gold class.
      live: b[N, T], where a test was done.
      gamma: discount.

    Returns:
      f[N, T] in nats; 0 where not live.
    """
    expect(posterior=(posterior, "f[N, S, C]"), truth=(truth, "f[N, C]"), live=(live, "b[N, T]"))
    if posterior.shape[1] != live.shape[1] + 1:
        raise ValueError(f"posterior has {posterior.shape[1]} moments for {live.shape[1]} tests: one more than tests")
    potential = cross_entropy(truth[:, None, :], posterior)
    return jnp.where(live, potential[:, :-1] - gamma * potential[:, 1:], 0)


def ehr_match(ordered: Array, normal: Array, abnormal: Array) -> jax.Array:
    """Confirmation reward against the record: 1 for an abnormal test that the doctor ordered, 0.5 for an ordered and
    normal one, -0.1 otherwise, also where the result is unknown (unknown is never normal); b[...] thrice, f[...]."""
    return jnp.where(ordered & abnormal, 1.0, jnp.where(ordered & normal, 0.5, -0.1))


def class_weights(count: Array, *, power: float = 0.5) -> jax.Array:
    """Weights that lift rare classes.

        w_c = clip(v_c / m, 0.25, 4),    v_c = (N / (C n_c))^b,    m = sum_c n_c v_c / N,    N = sum_c n_c

    The mean over the data is 1 before clipping; it is not rescaled again after it. A class that never occurs gets the
    largest weight and enters no mean.

    Args:
      count: f[C] or i[C], n_c: how often a class occurs.
      power: b; 0 gives every class 1.

    Returns:
      f[C].

    >>> [round(float(w), 4) for w in class_weights(jnp.array([4, 1]))]
    [0.8333, 1.6667]
    """
    expect(count=(count, "f[C]|i[C]"))
    n = jnp.asarray(count, jnp.promote_types(jnp.result_type(count), jnp.float32))
    seen, total = n > 0, jnp.sum(n)
    raw = jnp.where(seen, (total / (n.shape[0] * jnp.where(seen, n, 1))) ** power, 0)
    mean = jnp.sum(n * raw) / total
    return jnp.where(seen, jnp.clip(raw / mean, *WEIGHTS), WEIGHTS[1] if power else 1.0)


def in_top(ranked: Array, k: int) -> jax.Array:
    """b[N, M]: the places that count of ranked lists i[N, M]: no -1, no repetition, and k of them at most."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    same = ranked[:, :, None] == ranked[:, None, :]
    place = jnp.arange(ranked.shape[1])
    first = ~jnp.any(same & (place[None, None, :] < place[None, :, None]), axis=-1) & (ranked >= 0)
    return first & (jnp.cumsum(first, axis=1) <= k)


def _hits(ranked: Array, gold: Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    expect(ranked=(ranked, "i[N, M]"), gold=(gold, "b[N, C]"))
    place, right = in_top(ranked, k), jnp.take_along_axis(gold, jnp.maximum(ranked, 0), axis=1)
    return place, place & right, jnp.sum(gold, axis=1)


def diagnosis_reward(ranked: Array, gold: Array, weight: Array, *, k: int = 5, penalty: float = 0.1) -> jax.Array:
    """Class-sensitive diagnosis reward.

        r = 1/|gold| sum_{c in gold, c in top-k} w_c  -  lambda FP / |top-k|,     FP = |top-k without gold|

    Args:
      ranked: i[N, M]; repetitions go before the cut at k, and |top-k| counts what is left.
      gold: b[N, C].
      weight: f[C], class_weights or ones.
      k: places that count.
      penalty: lambda.

    Returns:
      f[N]; an empty list and a patient without gold classes have nothing to gain.

    >>> gold = jnp.array([[True, False, True]])
    >>> round(float(diagnosis_reward(jnp.array([[0, 0, 1]]), gold, jnp.ones(3), k=2)[0]), 4)
    0.45
    """
    place, hit, size = _hits(ranked, gold, k)
    weight = jnp.asarray(weight)
    gain = jnp.sum(jnp.where(hit, weight[jnp.maximum(ranked, 0)], 0), axis=1) / jnp.maximum(size, 1)
    false = jnp.sum(place & ~hit, axis=1) / jnp.maximum(jnp.sum(place, axis=1), 1)
    return gain - penalty * false


def recall_at_k(ranked: Array, gold: Array, k: int) -> jax.Array:
    """f[N]: |gold in top-k| / |gold| over unique predictions, also where |gold| > k; NaN without gold classes."""
    _, hit, size = _hits(ranked, gold, k)
    return jnp.where(size > 0, jnp.sum(hit, axis=1) / jnp.maximum(size, 1), jnp.nan)


def recalls(ranked: Array, gold: Array, k: int) -> Recalls:
    """Recall@k of many patients, over all gold classes and by class; see Recalls.

    Args:
      ranked: i[N, M].
      gold: b[N, C].
      k: places that count.
    """
    place, _, _ = _hits(ranked, gold, k)
    named = jnp.any((ranked[:, :, None] == jnp.arange(gold.shape[1])[None, None, :]) & place[:, :, None], axis=1)
    found, count = jnp.sum(named & gold, axis=0), jnp.sum(gold, axis=0)
    by_class = jnp.where(count > 0, found / jnp.maximum(count, 1), jnp.nan)
    macro = jnp.nansum(by_class) / jnp.maximum(jnp.sum(count > 0), 1)
    return Recalls(jnp.sum(found) / jnp.maximum(jnp.sum(count), 1), macro, by_class, count.astype(by_class.dtype))


def calibration(p: Array, gold: Array, *, bins: int = 10) -> Calibration:
    """Whether the likeliest class is right as often as its probability says; see Calibration.

    Args:
      p: f[N, C], the probabilities of each patient.
      gold: b[N, C].
      bins: of equal width over [0, 1] (Guo et al. 2017, arXiv 1706.04599, eq. 3).
    """
    expect(p=(p, "f[N, C]"), gold=(gold, "b[N, C]"))
    sure, top = jnp.max(p, axis=1), jnp.argmax(p, axis=1)
    right = jnp.take_along_axis(gold, top[:, None], axis=1)[:, 0].astype(p.dtype)
    into = jnp.clip(jnp.ceil(sure * bins).astype(jnp.int32) - 1, 0, bins - 1)
    total = lambda x: jax.ops.segment_sum(x, into, num_segments=bins)
    count = total(jnp.ones_like(sure))
    mean = lambda x: jnp.where(count > 0, total(x) / jnp.maximum(count, 1), jnp.nan)
    confidence, accuracy, share = mean(sure), mean(right), count / p.shape[0]
    brier = jnp.mean(jnp.sum((p - gold) ** 2, axis=1))
    return Calibration(jnp.nansum(share * jnp.abs(accuracy - confidence)), brier, confidence, accuracy, share)


def abstained(reward: Array, abstains: Array, value: float) -> jax.Array:
    """f[N]: the reward, or `value` where b[N] says that no diagnosis was given: below it, guessing does not pay."""
    expect(reward=(reward, "f[N]"), abstains=(abstains, "b[N]"))
    return jnp.where(abstains, value, reward)
