"""Advantages by token, and rewards that depend on the length."""

from typing import Literal

import jax
import jax.numpy as jnp

from rlalign.advantages.groups import check_gamma, checked, statistics
from rlalign.checks import expect
from rlalign.types import Array


def return_to_go(reward: jax.Array, mask: jax.Array, gamma: float) -> jax.Array:
    """G_t = r_t + gamma G_{t'} f[N, R], t' the next True token; 0 outside the mask."""

    def join(later, earlier):  # each is (c, r): the return before it is r + c * the return after it
        c, r = earlier
        return c * later[0], r + jnp.where(c == 0, 0, c * later[1])

    factor = jnp.where(mask, gamma, 1).astype(reward.dtype)
    _, total = jax.lax.associative_scan(join, (factor, jnp.where(mask, reward, 0)), reverse=True, axis=1)
    return jnp.where(mask, total, 0)


def reinforce_pp(
    reward: Array,
    group: Array,
    *,
    mask: Array,
    num_groups: int,
    valid: Array | None = None,
    token_reward: Array | None = None,
    gamma: float = 1.0,
    baseline: Literal["none", "group"] = "none",
    eps: float = 1e-8,
) -> jax.Array:
    """REINFORCE++: returns to go, whitened over all tokens of the batch.

        G_t = sum_{s >= t} gamma^(s - t) r_s           r at the last token is the response's reward
        A_t = (G_t - mean(G)) / sqrt(var(G) + eps)     over the batch's tokens          REINFORCE++, arXiv 2501.03262

    Args:
      reward: f[N], paid at the last True token.
      group: i[N], in [0, num_groups); for baseline="group".
      mask: b[N, R]; the exponent s - t counts True tokens.
      num_groups: static.
      valid: b[N].
      token_reward: f[N, R], paid at each token besides, such as -beta (old_logp - ref_logp).
      gamma: in [0, 1].
      baseline: "group" lowers each reward by the mean of its group first (REINFORCE++-baseline).
      eps: added to the variance (ddof 1), in units of reward squared.

    Returns:
      f[N, R], in float32 or wider; exactly 0 outside the mask, for invalid samples, and everywhere if all returns are
      equal. What couples all samples of a batch also spreads: a NaN in a valid sample makes all valid tokens NaN.

    >>> a = reinforce_pp(jnp.array([1., 0.]), jnp.array([0, 1]), mask=jnp.ones((2, 1), bool), num_groups=2)
    >>> (a * a).round(3).tolist()
    [[0.5], [0.5]]
    """
    expect(
        reward=(reward, "f[N]"), group=(group, "i[N]"), mask=(mask, "b[N, R]"), token_reward=(token_reward, "f[N, R]")
    )
    if baseline not in ("none", "group"):
        raise ValueError(f"baseline must be 'none' or 'group', got {baseline!r}")
    check_gamma(gamma)
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    reward, group, valid = checked(reward, group, num_groups, valid)
    bad = jnp.any(valid & jnp.isnan(reward))  # shows even where the sample has no token
    if baseline == "group":
        own = statistics(reward, group, num_groups, valid)
        reward = jnp.where(own.equal[group], 0, own.away)
    live = jnp.asarray(mask) & valid[:, None]
    column = jnp.arange(live.shape[1])[None, :]
    last = live & (column == jnp.max(jnp.where(live, column, -1), axis=1, keepdims=True, initial=-1))
    paid = jnp.where(last, reward[:, None], 0)
    if token_reward is not None:
        paid = paid + jnp.where(live, token_reward, 0).astype(reward.dtype)
    total = return_to_go(paid, live, gamma)
    top, low = (f(total, where=live, initial=edge) for f, edge in ((jnp.max, -jnp.inf), (jnp.min, jnp.inf)))
    # Not statistics(): one segment of half a million tokens would be added one by one.
    count = jnp.sum(live, dtype=total.dtype)
    above = jnp.where(live, total - jax.lax.stop_gradient(jnp.where(jnp.isfinite(low), low, 0)), 0)
    away = jnp.where(live, above - jnp.sum(above) / jnp.maximum(count, 1), 0)
    variance = jnp.sum(jnp.square(away)) / jnp.maximum(count - 1, 1)
    white = jnp.where(top <= low, 0, away * jax.lax.rsqrt(variance + eps))
    return jnp.where(live, jnp.where(bad, jnp.nan, white), 0)


def overlong_penalty(length: Array, *, max_length: int, cache: int) -> jax.Array:
    """DAPO's soft over-length penalty, added to the reward.

        0                                        length <= max_length - cache
        (max_length - cache - length) / cache    up to max_length
        -1                                       beyond                                DAPO, arXiv 2503.14476, eq. 13

    Args:
      length: i[N], tokens of each response.
      max_length: tokens.
      cache: tokens over which the penalty grows, in [1, max_length].

    Returns:
      f32[N], in [-1, 0].

    >>> overlong_penalty(jnp.array([40, 75, 200]), max_length=100, cache=50).tolist()
    [0.0, -0.5, -1.0]
    """
    expect(length=(length, "i[N]"))
    if not 1 <= cache <= max_length:
        raise ValueError(f"cache must be in [1, max_length={max_length}], got {cache}")
    over = (max_length - cache - jnp.asarray(length)).astype(jnp.float32)
    return jnp.clip(over / cache, -1, 0)
