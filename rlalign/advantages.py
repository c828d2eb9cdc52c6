"""Advantages of a group of responses to one prompt: arrays in, arrays out, no model.

Groups are data: `group` i[N] names the group of each sample, so ragged groups and filtered samples need no reshape.
Every function keeps three promises:

* an invalid sample gets exactly 0 and enters no statistic, whatever its reward holds (NaN included);
* a group whose valid rewards are all equal, or that has one valid sample, gets exactly 0;
* a NaN in a valid sample makes its own group NaN and no other.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from rlalign.checks import expect
from rlalign.types import Array


def _check(reward: Array, group: Array, num_groups: int, valid: Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """reward in float32 or wider with 0 where invalid, group, and valid as an array."""
    expect(reward=(reward, "f[N]"), group=(group, "i[N]"), valid=(valid, "b[N]"))
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}")
    if valid is None:
        valid = jnp.ones(reward.shape, bool)
    reward = jnp.where(valid, reward, 0)
    wide = jnp.promote_types(reward.dtype, jnp.float32)
    return reward.astype(wide), jnp.asarray(group), jnp.asarray(valid)


def segment_sum(x: Array, group: Array, num_groups: int) -> jax.Array:
    """f[num_groups]: sum of x f[N] by group."""
    return jax.ops.segment_sum(x, group, num_segments=num_groups)


def _all_equal(reward: jax.Array, group: jax.Array, num_groups: int, valid: jax.Array) -> jax.Array:
    """b[num_groups]: True where the valid rewards are all the same number (one or none included); False with a NaN."""
    top = jax.ops.segment_max(jnp.where(valid, reward, -jnp.inf), group, num_segments=num_groups)
    low = jax.ops.segment_min(jnp.where(valid, reward, jnp.inf), group, num_segments=num_groups)
    bad = segment_sum((valid & jnp.isnan(reward)).astype(jnp.int32), group, num_groups) > 0
    return (top <= low) & ~bad


def _deviation(reward: jax.Array, group: jax.Array, num_groups: int, valid: jax.Array):
    """(reward - group mean) f[N], valid samples a group f[num_groups], and where the group carries a signal b[N]."""
    count = segment_sum(valid.astype(reward.dtype), group, num_groups)
    mean = segment_sum(reward, group, num_groups) / jnp.maximum(count, 1)
    signal = valid & ~_all_equal(reward, group, num_groups, valid)[group]
    return reward - mean[group], count, signal


def group_relative(
    reward: Array,
    group: Array,
    *,
    num_groups: int,
    valid: Array | None = None,
    scale: Literal["std", "none"] = "std",
    ddof: int = 1,
    eps: float = 1e-6,
) -> jax.Array:
    """GRPO's advantage; with scale="none", Dr. GRPO's.

        A_i = (r_i - mean(r)) / (std(r) + eps)     within each group          GRPO, arXiv 2402.03300, section 4.1.2
        A_i =  r_i - mean(r)                                                  Dr. GRPO, arXiv 2503.20783, eq. 3

    Args:
      reward: f[N].
      group: i[N], in [0, num_groups).
      num_groups: static.
      valid: b[N].
      scale: "std" or "none".
      ddof: of the standard deviation: 1 is the sample's, 0 the population's.
      eps: added to the standard deviation, in units of reward.

    Returns:
      f[N], in float32 or wider; see the module for what is guaranteed.

    >>> group_relative(jnp.array([1., 0., 0., 1.]), jnp.array([0, 0, 1, 1]), num_groups=2, scale="none").tolist()
    [0.5, -0.5, -0.5, 0.5]
    """
    reward, group, valid = _check(reward, group, num_groups, valid)
    if scale not in ("std", "none"):
        raise ValueError(f"scale must be 'std' or 'none', got {scale!r}")
    away, count, signal = _deviation(reward, group, num_groups, valid)
    if scale == "none":
        return jnp.where(signal, away, 0)
    square = segment_sum(jnp.where(valid, away * away, 0), group, num_groups)
    flat = square <= 0  # the root has no slope there
    std = jnp.where(flat, 0, jnp.sqrt(jnp.where(flat, 1, square) / jnp.maximum(count - ddof, 1)))
    return jnp.where(signal, away / (std[group] + eps), 0)


def leave_one_out(reward: Array, group: Array, *, num_groups: int, valid: Array | None = None) -> jax.Array:
    """RLOO's advantage: the reward less the mean of the group's others.

        A_i = r_i - 1/(G-1) sum_{j != i} r_j = G/(G-1) (r_i - mean(r))        RLOO, arXiv 2402.14740, section 3.2

    Args:
      reward: f[N].
      group: i[N], in [0, num_groups).
      num_groups: static.
      valid: b[N]; G counts valid samples.

    Returns:
      f[N], in float32 or wider.

    >>> leave_one_out(jnp.array([3., 0., 0.]), jnp.zeros(3, int), num_groups=1).tolist()
    [3.0, -1.5, -1.5]
    """
    reward, group, valid = _check(reward, group, num_groups, valid)
    away, count, signal = _deviation(reward, group, num_groups, valid)
    return jnp.where(signal, away * (count / jnp.maximum(count - 1, 1))[group], 0)


def group_preference(
    reward: Array, group: Array, *, num_groups: int, valid: Array | None = None, weight: Array | None = None
) -> jax.Array:
    """GPRS: how often a response is preferred within its group, less the group's mean.

        B_j = 1/K sum_i     1[r_j >= r_i],    A_j = B_j - mean_i B_i          GPRS, EMNLP 2025 main.1085, eq. 7
        B_j = 1/K sum_i w_i 1[r_j >= r_i],    w_i = pi_ref(y_i) / pi_old(y_i)                             eq. 10

    The self-comparison counts and a tie gives both full credit. Only the order of rewards matters: an increasing map
    of them leaves the result bitwise unchanged. K counts valid samples; the weights of eq. 10 are not normalised, and
    its result is centred like eq. 7's (the paper is silent).

    Args:
      reward: f[N].
      group: i[N], in [0, num_groups).
      num_groups: static.
      valid: b[N].
      weight: f[N], eq. 10's w; None is eq. 7.

    Returns:
      f[N], in float32 or wider. Compares all N x N pairs.

    >>> group_preference(jnp.array([1., 0., 0., 2.]), jnp.zeros(4, int), num_groups=1).tolist()
    [0.0625, -0.1875, -0.1875, 0.3125]
    """
    reward, group, valid = _check(reward, group, num_groups, valid)
    together = (group[:, None] == group[None, :]) & valid[:, None] & valid[None, :]
    wins = together & (reward[:, None] >= reward[None, :])
    if weight is None:
        credit = jnp.sum(wins, axis=1, dtype=reward.dtype)
    else:
        expect(reward=(reward, "f[N]"), weight=(weight, "f[N]"))
        credit = jnp.sum(jnp.where(wins, jnp.asarray(weight, reward.dtype)[None, :], 0), axis=1)
    # K B_j and its sum are whole numbers for eq. 7: one rounding an advantage, and a group sums to 0.
    credit = jnp.where(valid, credit, 0)
    count = segment_sum(valid.astype(reward.dtype), group, num_groups)[group]
    away = (count * credit - segment_sum(credit, group, num_groups)[group]) / jnp.square(jnp.maximum(count, 1))
    signal = valid & ~_all_equal(reward, group, num_groups, valid)[group]
    # Comparisons with NaN are false and would hide it.
    bad = segment_sum((valid & jnp.isnan(reward)).astype(reward.dtype), group, num_groups)[group] > 0
    return jnp.where(valid & bad, jnp.nan, jnp.where(signal, away, 0))
