"""Reject sampling over a large action space, exactly: which actions a policy may take, and what it then prefers.

A test that was asked already, or lies inside a panel that was done, is rejected, and so is, in training, one without a
result on record (our reading of DiaLLM's reject sampling, arXiv 2506.20059). Drawing until an action is allowed gives
the policy renormalised over what is allowed: that is the distribution that acted, so its log-prob is what enters the
gradient. The log-prob of the unrestricted policy beside such draws would bias PPO's ratio.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlalign.checks import expect
from rlalign.types import Array

SMALLEST = -80.0  # of log masses: exp of less is 0 in float32


class Draw(NamedTuple):
    """Actions, and what they were drawn with.

    Attributes:
      action: i32[N], an allowed one.
      logp: f[N], of the distribution that it was drawn from.
      rejects: f[N], candidates rejected on the way; where the draw is exact, q, the chance that one is.
    """

    action: jax.Array
    logp: jax.Array
    rejects: jax.Array


def renormalised(logits: Array, allowed: Array) -> jax.Array:
    """The policy given that its action is allowed.

        log pi(a | allowed) = logits_a - logsumexp_{b allowed} logits_b

    Args:
      logits: f[N, A].
      allowed: b[N, A].

    Returns:
      f[N, A], in float32 or wider; -inf where not allowed, and in the whole of a row that allows nothing. The gradient
      of what is not allowed is exactly 0, whatever its logits hold.

    >>> renormalised(jnp.zeros((1, 3)), jnp.array([[True, False, True]])).round(3).tolist()
    [[-0.6930000185966492, -inf, -0.6930000185966492]]
    """
    expect(logits=(logits, "f[N, A]"), allowed=(allowed, "b[N, A]"))
    logits = jnp.asarray(logits, jnp.promote_types(jnp.result_type(logits), jnp.float32))
    low = jnp.finfo(logits.dtype).min / 4
    logp = jax.nn.log_softmax(jnp.where(allowed, logits, low), axis=-1)
    return jnp.where(allowed, logp, -jnp.inf)


def several_draws(logits: Array, allowed: Array, draws: int) -> jax.Array:
    """The policy that draws up to M times, takes the first allowed action, and after M rejects its best allowed one.

        P(a) = (1 - q^M) pi(a | allowed) + q^M 1[a = argmax_{b allowed} logits_b],     q = sum_{b not allowed} pi(b)

    For M -> infinity this is `renormalised`.

    Args:
      logits: f[N, A].
      allowed: b[N, A]; at least one a row.
      draws: M >= 1.

    Returns:
      f[N, A], log P; -inf where not allowed.

    Raises:
      ValueError: draws below 1.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    kept = renormalised(logits, allowed)
    all_rejected = draws * log_rejected(logits, allowed)
    accepted = jnp.log(-jnp.expm1(jnp.minimum(all_rejected, -jnp.finfo(kept.dtype).tiny)))
    best = jnp.argmax(kept, axis=-1)[:, None] == jnp.arange(kept.shape[1])[None, :]
    first = jnp.where(allowed, accepted[:, None] + jnp.where(allowed, kept, 0), -jnp.inf)
    last = jnp.where(jnp.isfinite(all_rejected), all_rejected, SMALLEST)[:, None]
    both = jnp.logaddexp(jnp.where(allowed, first, 0), jnp.broadcast_to(last, kept.shape))
    reached = best & jnp.isfinite(all_rejected)[:, None]
    return jnp.where(reached, both, first)


def log_rejected(logits: Array, allowed: Array) -> jax.Array:
    """log q f[N]: the log of the policy's mass on what is not allowed; -inf where everything is allowed."""
    expect(logits=(logits, "f[N, A]"), allowed=(allowed, "b[N, A]"))
    logits = jnp.asarray(logits, jnp.promote_types(jnp.result_type(logits), jnp.float32))
    logp = jax.nn.log_softmax(logits, axis=-1)
    inside, outside = _log_mass(logp, allowed), _log_mass(logp, ~jnp.asarray(allowed))
    mostly = outside > jnp.log(0.5)  # 1 - q keeps its digits where q is near 1
    return jnp.where(mostly, jnp.log1p(-jnp.exp(jnp.where(mostly, inside, -1.0))), outside)


def _log_mass(logp: jax.Array, member: Array) -> jax.Array:
    """f[N]: log of the sum over members; -inf without a member; at least SMALLEST otherwise."""
    some = jnp.any(member, axis=-1)
    total = jax.nn.logsumexp(jnp.where(member, logp, SMALLEST * 2), axis=-1)
    return jnp.where(some, jnp.maximum(total, SMALLEST), -jnp.inf)


def draw(key: jax.Array, logits: Array, allowed: Array, *, draws: int | None = None) -> Draw:
    """An allowed action a row, and the log-prob that enters the gradient.

    Args:
      key: of jax.random.
      logits: f[N, A].
      allowed: b[N, A]; at least one a row.
      draws: None draws from `renormalised`; M draws candidates as `several_draws` describes.

    Returns:
      Draw.
    """
    if draws is None:
        logp = renormalised(logits, allowed)
        action = jax.random.categorical(key, logp, axis=-1)
        return Draw(action.astype(jnp.int32), chosen(logp, action), jnp.exp(log_rejected(logits, allowed)))
    logp = several_draws(logits, allowed, draws)
    candidates = jax.random.categorical(key, logits, axis=-1, shape=(draws, logits.shape[0]))
    fits = jnp.take_along_axis(allowed, candidates.T, axis=-1)
    some, first = jnp.any(fits, axis=-1), jnp.argmax(fits, axis=-1)
    taken = jnp.take_along_axis(candidates.T, first[:, None], axis=-1)[:, 0]
    action = jnp.where(some, taken, jnp.argmax(renormalised(logits, allowed), axis=-1))
    rejects = jnp.where(some, first, draws).astype(logp.dtype)
    return Draw(action.astype(jnp.int32), chosen(logp, action), rejects)


def chosen(logp: Array, action: Array) -> jax.Array:
    """f[N]: the log-prob of each row's action, of f[N, A]."""
    return jnp.take_along_axis(logp, action[:, None], axis=-1)[:, 0]


def log_policy(draws: int | None) -> Callable[[Array, Array], jax.Array]:
    """The log-probs, (logits, allowed) -> f[N, A], of what `draw` with so many draws samples from."""
    return renormalised if draws is None else functools.partial(several_draws, draws=draws)


def rank(key: jax.Array, logits: Array, count: int) -> tuple[jax.Array, jax.Array]:
    """A ranked list without repetitions: each place is drawn from what is left (Plackett-Luce).

        P(a_1 .. a_k) = prod_j pi(a_j | a_j not in {a_1 .. a_{j-1}})

    which is again a policy renormalised over what is allowed.

    Args:
      key: of jax.random.
      logits: f[N, C].
      count: k, at most C.

    Returns:
      (i32[N, C], f[N, k]): k drawn classes, the others behind them by their logits, and the log-probs of the drawn.
    """
    place = jnp.arange(logits.shape[1])[None, :]
    left, listed, logps = jnp.ones(logits.shape, bool), [], []
    for one in jax.random.split(key, count):
        drawn = draw(one, logits, left)
        listed.append(drawn.action[:, None])
        logps.append(drawn.logp[:, None])
        left = left & (place != drawn.action[:, None])
    rest = jnp.argsort(jnp.where(left, -logits, jnp.inf), axis=-1)[:, : logits.shape[1] - count]
    return jnp.concatenate([*listed, rest], axis=1).astype(jnp.int32), jnp.concatenate(logps, axis=1)


def rank_logps(logits: Array, ranked: Array) -> jax.Array:
    """f[N, k]: the log-prob of each place of a ranked list i[N, k] that `rank` may have drawn."""
    place = jnp.arange(logits.shape[1])[None, :]
    left, logps = jnp.ones(logits.shape, bool), []
    for j in range(ranked.shape[1]):
        logps.append(chosen(renormalised(logits, left), ranked[:, j])[:, None])
        left = left & (place != ranked[:, j : j + 1])
    return jnp.concatenate(logps, axis=1)


def keep_above(reward: Array, threshold: float, *, valid: Array | None = None) -> jax.Array:
    """b[N]: the whole dialogues to imitate, those whose reward is above a threshold (rejection-sampling SFT).

    Args:
      reward: f[N]; NaN is never kept.
      threshold: in units of reward; one that is equal is not above.
      valid: b[N].
    """
    expect(reward=(reward, "f[N]"), valid=(valid, "b[N]"))
    above = jnp.asarray(reward) > threshold
    return above if valid is None else above & jnp.asarray(valid)
