"""Advantages of a group of responses to one prompt."""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from rlalign.checks import expect
from rlalign.types import Array


class Statistics(NamedTuple):
    """Of the members of each segment.

    Attributes:
      count: f[segments].
      away: f[N], the member less the mean of its segment; 0 where it is none.
      std: f[segments], 0 where fewer than two.
      equal: b[segments], all members are the same number (one or none included); False with a NaN.
    """

    count: jax.Array
    away: jax.Array
    std: jax.Array
    equal: jax.Array


def segment_sum(x: Array, segment: Array, num_segments: int) -> jax.Array:
    """f[num_segments]: sum of x f[N] by segment."""
    return jax.ops.segment_sum(x, segment, num_segments=num_segments)


def statistics(x: jax.Array, segment: jax.Array, num_segments: int, member: jax.Array, *, ddof: int = 1) -> Statistics:
    """Count, mean and standard deviation of x f[N] where member b[N], by segment i[N].

    Sums are of the distance from the segment's least member, and squares of its share of the largest: rewards of any
    offset and size keep the digits of their differences.
    """
    x = jnp.where(member, x, 0)
    top = jax.ops.segment_max(jnp.where(member, x, -jnp.inf), segment, num_segments=num_segments)
    low = jax.ops.segment_min(jnp.where(member, x, jnp.inf), segment, num_segments=num_segments)
    equal = (top <= low) & ~any_nan(x, segment, num_segments, member)
    count = segment_sum(member.astype(x.dtype), segment, num_segments)
    low = jax.lax.stop_gradient(jnp.where(jnp.isfinite(low), low, 0))
    above = jnp.where(member, x - low[segment], 0)
    over = segment_sum(above, segment, num_segments) / jnp.maximum(count, 1)
    away = jnp.where(member, above - over[segment], 0)
    size = jax.lax.stop_gradient(jax.ops.segment_max(jnp.abs(away), segment, num_segments=num_segments))
    size = jnp.where(size > 0, size, 1)
    square = segment_sum(jnp.square(away / size[segment]), segment, num_segments)
    flat = square <= 0  # the root has no slope there
    std = jnp.where(flat, 0, size * jnp.sqrt(jnp.where(flat, 1, square) / jnp.maximum(count - ddof, 1)))
    return Statistics(count, away, std, equal)


def any_nan(x: jax.Array, segment: jax.Array, num_segments: int, member: jax.Array) -> jax.Array:
    """b[num_segments]: whether a member is NaN."""
    return segment_sum((member & jnp.isnan(x)).astype(jnp.int32), segment, num_segments) > 0


def checked(
    reward: Array, group: Array, num_groups: int, valid: Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """reward in float32 or wider with 0 where invalid, group, and valid as an array."""
    expect(reward=(reward, "f[N]"), group=(group, "i[N]"), valid=(valid, "b[N]"))
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}")
    if valid is None:
        valid = jnp.ones(reward.shape, bool)
    reward = jnp.where(valid, reward, 0)
    wide = jnp.promote_types(reward.dtype, jnp.float32)
    return reward.astype(wide), jnp.asarray(group), jnp.asarray(valid)


def check_scale(scale: str, ddof: int = 1, eps: float = 1e-6) -> None:
    """Raises ValueError for a way to scale that there is not."""
    if scale not in ("std", "none"):
        raise ValueError(f"scale must be 'std' or 'none', got {scale!r}")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}: a tiny deviation would make infinite advantages")


def check_gamma(gamma: float) -> None:
    """Raises ValueError for a discount outside of [0, 1]."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")


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
    reward, group, valid = checked(reward, group, num_groups, valid)
    check_scale(scale, ddof, eps)
    of = statistics(reward, group, num_groups, valid, ddof=ddof)
    away = of.away / (of.std[group] + eps) if scale == "std" else of.away
    return jnp.where(valid & ~of.equal[group], away, 0)


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
    reward, group, valid = checked(reward, group, num_groups, valid)
    of = statistics(reward, group, num_groups, valid)
    away = of.away * (of.count / jnp.maximum(of.count - 1, 1))[group]
    return jnp.where(valid & ~of.equal[group], away, 0)


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
    reward, group, valid = checked(reward, group, num_groups, valid)
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
    signal = valid & ~statistics(reward, group, num_groups, valid).equal[group]
    seen = reward if weight is None else reward + jnp.where(jnp.isnan(weight), weight, 0).astype(reward.dtype)
    bad = valid & any_nan(seen, group, num_groups, valid)[group]  # comparisons with NaN are false and would hide it
    return jnp.where(bad, jnp.nan, jnp.where(signal, away, 0))


def remax(reward: Array, group: Array, *, baseline: Array, num_groups: int, valid: Array | None = None) -> jax.Array:
    """ReMax: the reward less that of the prompt's greedy response.

        A_i = r_i - r(greedy response to the prompt of i)                     ReMax, arXiv 2310.10505, eq. 5

    Args:
      reward: f[N].
      group: i[N], in [0, num_groups).
      baseline: f[num_groups], the reward of each prompt's greedy response; NaN makes its group NaN.
      num_groups: static.
      valid: b[N].

    Returns:
      f[N], in float32 or wider. A group of equal rewards is not 0 here: they can be better than the greedy response.

    >>> remax(jnp.array([1., 0.]), jnp.zeros(2, int), baseline=jnp.array([1.]), num_groups=1).tolist()
    [0.0, -1.0]
    """
    reward, group, valid = checked(reward, group, num_groups, valid)
    expect(bind={"E": num_groups}, baseline=(baseline, "f[E]"))
    bad = valid & any_nan(reward, group, num_groups, valid)[group]
    away = jnp.where(valid, reward - jnp.asarray(baseline, reward.dtype)[group], 0)
    return jnp.where(bad, jnp.nan, away)


def per_objective(
    reward: Array,
    group: Array,
    *,
    terms: Array,
    term_weight: Sequence[float],
    num_groups: int,
    valid: Array | None = None,
    scale: Literal["std", "none"] = "std",
    ddof: int = 1,
    eps: float = 1e-6,
) -> jax.Array:
    """Several reward terms, each normalised within its group, then summed.

        A_i = sum_c term_weight_c (r_ic - mean(r_c)) / (std(r_c) + eps)      instead of CRPO, arXiv 2512.00601, eq. 4

    CRPO sums its terms first and normalises once (group_relative of the total): in a group that is all right or all
    wrong that blows the small terms up to full size. Here each term keeps its weight.

    Args:
      reward: f[N], the total; only the terms count.
      group: i[N], in [0, num_groups).
      terms: f[N, C].
      term_weight: C numbers.
      num_groups: static.
      valid: b[N].
      scale, ddof, eps: as in group_relative.

    Returns:
      f[N], in float32 or wider.

    >>> terms, total = jnp.array([[1., 0.], [0., 0.]]), jnp.array([10., 0.])
    >>> how = {"num_groups": 1, "scale": "none"}
    >>> per_objective(total, jnp.zeros(2, int), terms=terms, term_weight=(10., 1.), **how).tolist()
    [5.0, -5.0]
    """
    expect(reward=(reward, "f[N]"), group=(group, "i[N]"), terms=(terms, "f[N, C]"), valid=(valid, "b[N]"))
    if len(term_weight) != terms.shape[1]:
        raise ValueError(f"term_weight has {len(term_weight)} numbers for {terms.shape[1]} terms: one each")
    how = {"num_groups": num_groups, "valid": valid, "scale": scale, "ddof": ddof, "eps": eps}
    each = [group_relative(terms[:, c], group, **how) * weight for c, weight in enumerate(term_weight)]
    return functools.reduce(jnp.add, each)


def term_spread(terms: Array, group: Array, *, num_groups: int, valid: Array | None = None) -> jax.Array:
    """How much each reward term varies within groups: a term that never does teaches nothing, whatever its weight.

    Args:
      terms: f[N, C].
      group: i[N], in [0, num_groups).
      num_groups: static.
      valid: b[N].

    Returns:
      f[C], the standard deviation (ddof 1) averaged over the groups with two valid samples or more, in units of reward.

    >>> term_spread(jnp.array([[1., 5.], [3., 5.]]), jnp.zeros(2, int), num_groups=1).round(3).tolist()
    [1.4140000343322754, 0.0]
    """
    expect(terms=(terms, "f[N, C]"), group=(group, "i[N]"), valid=(valid, "b[N]"))
    out = []
    for c in range(terms.shape[1]):
        of = statistics(*_term(terms[:, c], group, num_groups, valid))
        several = of.count > 1
        out.append(jnp.sum(jnp.where(several, of.std, 0)) / jnp.maximum(jnp.sum(several), 1))
    return jnp.stack(out)


def _term(term, group, num_groups, valid):
    term, group, valid = checked(term, group, num_groups, valid)
    return term, group, num_groups, valid


def informative_groups(reward: Array, group: Array, *, num_groups: int, valid: Array | None = None) -> jax.Array:
    """DAPO's dynamic sampling: the groups that teach something.

        0 < |{i : r_i right}| < G, for any rewards: not all valid rewards equal       DAPO, arXiv 2503.14476, eq. 11

    Args:
      reward: f[N].
      group: i[N], in [0, num_groups).
      num_groups: static.
      valid: b[N].

    Returns:
      b[num_groups]; False for a group without two valid samples and for one with a NaN.

    >>> informative_groups(jnp.array([1., 0., 1., 1.]), jnp.array([0, 0, 1, 1]), num_groups=2).tolist()
    [True, False]
    """
    reward, group, valid = checked(reward, group, num_groups, valid)
    return ~statistics(reward, group, num_groups, valid).equal & ~any_nan(reward, group, num_groups, valid)
