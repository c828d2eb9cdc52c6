"""Advantages of rows that are steps of trajectories: discounted returns, GiGPO's two levels, HGPO's many.

One row is one environment step. Rows come in any order; `trajectory` says whose step it is and only the order of `step`
counts, so duplicated padding (valid False) and shuffled rows change nothing.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from rlalign.advantages.groups import Statistics, any_nan, check_gamma, check_scale, checked, segment_sum, statistics
from rlalign.checks import expect
from rlalign.types import Array


def _linked(ids: Sequence[jax.Array]) -> jax.Array:
    """b[N], True where a row has the same ids as the row before it."""
    same = functools.reduce(jnp.logical_and, [x[1:] == x[:-1] for x in ids])
    return jnp.zeros(ids[0].shape, bool).at[1:].set(same)


def _returns(reward: jax.Array, order: jax.Array, linked: jax.Array, gamma: float) -> jax.Array:
    """R_t = r_t + gamma R_{t+1} of rows in `order`, `linked` where a row continues the one before; f[N] as given.

    One row after the other, from the last: however rows are shuffled, a trajectory's sums are the same bit for bit, so
    equal ones stay equal and are not blown up by their deviation.
    """

    def back(later, row):
        r, continues = row
        total = r + jnp.where(continues, gamma * later, 0)
        return total, total

    continues = jnp.zeros(linked.shape, bool).at[:-1].set(linked[1:] & (gamma > 0))
    _, total = jax.lax.scan(back, jnp.zeros((), reward.dtype), (reward[order], continues), reverse=True)
    return jnp.zeros_like(total).at[order].set(total)


def discounted_return(
    reward: Array, trajectory: Array, step: Array, *, gamma: float, valid: Array | None = None
) -> jax.Array:
    """The discounted sum of a trajectory's rewards from each row on.

        R_t = r_t + gamma R_{t+1}                                             GiGPO, arXiv 2505.10978, eq. 5

    Args:
      reward: f[N].
      trajectory: i[N], unique in the batch, compared by equality only.
      step: i[N], orders the rows of a trajectory; gaps do not count, equal steps are not allowed.
      gamma: in [0, 1].
      valid: b[N]; a row that is not valid is taken out of its trajectory.

    Returns:
      f[N], in float32 or wider, in the order of the rows; 0 where invalid. NaN reaches the steps before it only.

    >>> discounted_return(jnp.array([8., 0., 0.]), jnp.zeros(3, int), jnp.array([2, 1, 0]), gamma=0.5).tolist()
    [8.0, 4.0, 2.0]
    """
    expect(reward=(reward, "f[N]"), trajectory=(trajectory, "i[N]"), step=(step, "i[N]"), valid=(valid, "b[N]"))
    check_gamma(gamma)
    reward, trajectory, valid = checked(reward, trajectory, 1, valid)
    order = jnp.lexsort((step, trajectory, ~valid))
    linked = _linked([trajectory[order], valid[order]])
    return jnp.where(valid, _returns(reward, order, linked, gamma), 0)


def _segments(ids: Sequence[jax.Array], valid: jax.Array) -> jax.Array:
    """i[N] in [0, N): equal for valid rows with equal ids, in every array of `ids`."""
    order = jnp.lexsort((*ids, ~valid))
    number = jnp.cumsum(~_linked([x[order] for x in ids] + [valid[order]])) - 1
    return jnp.zeros_like(number).at[order].set(number)


def _scaled(away: jax.Array, of: Statistics, segment: jax.Array, live: jax.Array, scale: str, eps: float) -> jax.Array:
    """away / F f[N]; 0 where not live b[N], and where all members of the segment are equal."""
    part = away / (of.std[segment] + eps) if scale == "std" else away
    return jnp.where(live & ~of.equal[segment], part, 0)


class _Scores(NamedTuple):
    """Of trajectories, on their rows.

    Attributes:
      order: i[N], rows by trajectory and step; invalid ones at the end.
      linked: b[N], in that order, whether a row continues the one before it.
      first: b[N], the first step of each trajectory.
      score: f[N], undiscounted return of the row's trajectory.
    """

    order: jax.Array
    linked: jax.Array
    first: jax.Array
    score: jax.Array


def _scores(reward: jax.Array, trajectory: jax.Array, step: jax.Array, valid: jax.Array) -> _Scores:
    order = jnp.lexsort((step, trajectory, ~valid))
    linked = _linked([trajectory[order], valid[order]])
    first = jnp.zeros_like(linked).at[order].set(~linked) & valid
    whole = jnp.where(first, _returns(reward, order, linked, 1.0), 0)
    return _Scores(order, linked, first, segment_sum(whole, trajectory, reward.size)[trajectory])


def per_trajectory(advantage: Callable[..., Array]) -> Callable[..., jax.Array]:
    """An advantage of answers, made one of steps: it compares whole episodes, and each step gets its episode's.

        A_row = advantage(scores of the trajectories)[its trajectory]       score = sum of (reward - penalty) over steps

    So GRPO and RLOO stand beside GiGPO: a trajectory counts once in its group, however many steps it has.

    Args:
      advantage: (reward f[M], group i[M], *, num_groups, valid) -> f[M], such as group_relative or leave_one_out.

    Returns:
      (reward f[N], group i[N], *, num_groups, valid, trajectory i[N], step i[N], penalty f[N]) -> f[N]; arguments as in
      group_in_group.

    >>> from rlalign.advantages import group_relative
    >>> grpo = per_trajectory(functools.partial(group_relative, scale="none"))
    >>> steps = {"trajectory": jnp.array([0, 0, 1]), "step": jnp.array([0, 1, 0])}
    >>> grpo(jnp.array([0.0, 1.0, 0.0]), jnp.zeros(3, int), num_groups=1, **steps).tolist()
    [0.5, 0.5, -0.5]
    """

    def of_steps(reward, group, *, num_groups, trajectory, step, valid=None, penalty=None):
        n = "i[N]"
        expect(reward=(reward, "f[N]"), group=(group, n), trajectory=(trajectory, n), step=(step, n))
        expect(reward=(reward, "f[N]"), valid=(valid, "b[N]"), penalty=(penalty, "f[N]"))
        reward, group, valid = checked(reward, group, num_groups, valid)
        trajectory = jnp.asarray(trajectory)
        if penalty is not None:
            reward = reward - jnp.where(valid, penalty, 0).astype(reward.dtype)
        found = _scores(reward, trajectory, jnp.asarray(step), valid)
        one = advantage(jnp.where(found.first, found.score, 0), group, num_groups=num_groups, valid=found.first)
        if one.shape != reward.shape:
            raise ValueError(
                f"the advantage gave {one.shape} for {reward.shape} scores: only those of f[N] fit episodes"
            )
        each = segment_sum(jnp.where(found.first, one, 0), trajectory, reward.size)[trajectory]
        return jnp.where(valid, each, 0)

    return of_steps


def group_in_group(
    reward: Array,
    *,
    group: Array,
    trajectory: Array,
    step: Array,
    anchor: Array,
    num_groups: int,
    gamma: float = 0.95,
    step_weight: float = 1.0,
    scale: Literal["std", "none"] = "std",
    episode_stat: Literal["trajectory", "step"] = "trajectory",
    valid: Array | None = None,
    penalty: Array | None = None,
    eps: float = 1e-6,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """GiGPO: how good the episode was within its group, plus how good the step was among those from the same state.

        A_E = (score - mean of the group) / F        score = undiscounted return of the trajectory       GiGPO, arXiv
        A_S = (R_t - mean of the anchor group) / F                                                  2505.10978, eq. 3,
        A   = A_E + step_weight A_S                                                                 eq. 6-7 and eq. 8

    F is std + eps (ddof 1) or 1. An anchor group is the rows of one group whose step began in the same state.

    Args:
      reward: f[N], of each step.
      group: i[N], in [0, num_groups): the copies of one task.
      trajectory: i[N], in [0, N), unique in the batch.
      step: i[N]; only its order within a trajectory counts.
      anchor: i[N], the state that the step was taken in (see anchor_ids); compared inside a group only.
      num_groups: static.
      gamma: discount of R_t.
      step_weight: omega.
      scale: "std" or "none" (F = 1), for both parts.
      episode_stat: "trajectory": each trajectory counts once in the group's mean and deviation (the paper); "step":
        each row does, so long trajectories weigh more (the official code's default).
      valid: b[N].
      penalty: f[N], for invalid actions: lowers the row's score and its R_t, after discounting. The group's statistics
        leave it out with "trajectory" and hold it with "step".
      eps: added to standard deviations.

    Returns:
      (advantage f[N], {"episode": A_E, "step": A_S}), in float32 or wider. A_E is exactly 0 where all scores of the
      group are equal (unpenalised, or as they are counted) or it has one valid trajectory; A_S where the anchor group
      has one row or equal returns.
      Shuffled rows give shuffled results.
    """
    n = "i[N]"
    expect(reward=(reward, "f[N]"), group=(group, n), trajectory=(trajectory, n), step=(step, n), anchor=(anchor, n))
    expect(reward=(reward, "f[N]"), valid=(valid, "b[N]"), penalty=(penalty, "f[N]"))
    check_scale(scale, eps=eps)
    check_gamma(gamma)
    if episode_stat not in ("trajectory", "step"):
        raise ValueError(f"episode_stat must be 'trajectory' or 'step', got {episode_stat!r}")
    reward, group, valid = checked(reward, group, num_groups, valid)
    trajectory, step, rows = jnp.asarray(trajectory), jnp.asarray(step), reward.size
    less = jnp.zeros_like(reward) if penalty is None else jnp.where(valid, penalty, 0).astype(reward.dtype)
    bad = valid & any_nan(reward + less, group, num_groups, valid)[group]

    order, linked, first, score = _scores(reward, trajectory, step, valid)
    scores = statistics(score, group, num_groups, first)
    if episode_stat == "trajectory":
        of = scores
        away = segment_sum(scores.away, trajectory, rows)[trajectory] - less  # of the first row, on each of its rows
    else:
        of = statistics(score - less, group, num_groups, valid)
        away = of.away
    episode = _scaled(away, of, group, valid & ~scores.equal[group], scale, eps)

    state = _segments([jnp.asarray(anchor), group], valid)
    of = statistics(_returns(reward, order, linked, gamma) - less, state, rows, valid)
    among = _scaled(of.away, of, state, valid, scale, eps)

    episode, among = (jnp.where(bad, jnp.nan, x) for x in (episode, among))
    return episode + step_weight * among, {"episode": episode, "step": among}


def hierarchy_of_groups(
    reward: Array,
    group: Array,
    *,
    num_groups: int,
    trajectory: Array,
    step: Array,
    past: Array,
    gamma: float = 0.95,
    alpha: float = 1.0,
    valid: Array | None = None,
    penalty: Array | None = None,
    eps: float = 1e-6,
) -> jax.Array:
    """HGPO: a step among those from the same state, and more so the more of the past they share.

        A = sum_l w_l A_l / sum_l w_l,   w_l = (l + 1)^alpha        HGPO, arXiv 2602.22817, as its code has it
        A_l = (R_t - mean) / (std + eps)                            of the rows of one group with equal past[:, l]

    A level counts for a row where its subgroup has two rows or more and its A_l is not 0. std has ddof 0; episodes as a
    whole are not compared.

    Args:
      reward, group, num_groups, trajectory, step, gamma, valid, penalty, eps: as in group_in_group.
      past: i[N, K + 1], ids of (the state, the last l observations) for l = 0 to K, in [0, N).
      alpha: >= 0; 0 weighs all levels alike.

    Returns:
      f[N], in float32 or wider; 0 where no level counts.
    """
    n = "i[N]"
    expect(reward=(reward, "f[N]"), group=(group, n), trajectory=(trajectory, n), step=(step, n))
    expect(reward=(reward, "f[N]"), past=(past, "i[N, L]"), valid=(valid, "b[N]"), penalty=(penalty, "f[N]"))
    check_gamma(gamma)
    check_scale("std", eps=eps)
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be >= 0, got {alpha}")
    reward, group, valid = checked(reward, group, num_groups, valid)
    trajectory, step, past = jnp.asarray(trajectory), jnp.asarray(step), jnp.asarray(past)
    less = jnp.zeros_like(reward) if penalty is None else jnp.where(valid, penalty, 0).astype(reward.dtype)
    bad = valid & any_nan(reward + less, group, num_groups, valid)[group]
    order, linked, *_ = _scores(reward, trajectory, step, valid)
    reached = _returns(reward, order, linked, gamma) - less
    total, weights = jnp.zeros_like(reward), jnp.zeros_like(reward)
    for level in range(past.shape[1]):
        state = _segments([past[:, level], group], valid)
        of = statistics(reached, state, reward.size, valid, ddof=0)
        part = _scaled(of.away, of, state, valid, "std", eps)
        weight = jnp.where(part != 0, (level + 1.0) ** alpha, 0)
        total, weights = total + weight * part, weights + weight
    return jnp.where(bad, jnp.nan, total / jnp.where(weights > 0, weights, 1))


def step_metrics(
    parts: dict[str, jax.Array], *, group: Array, anchor: Array, valid: Array | None = None
) -> dict[str, jax.Array]:
    """What tells whether step-level groups do anything: GiGPO's figures of one batch.

    Args:
      parts: {"episode": f[N], "step": f[N]}, what group_in_group gave.
      group, anchor: i[N], as it got them.
      valid: b[N].

    Returns:
      Scalars: anchor_share (of valid rows in anchor groups of two or more), anchor_size (mean rows of an anchor group)
      and step_to_episode (mean |A_S| over mean |A_E|; 0 where no episode part is).
    """
    episode, group, valid = checked(parts["episode"], group, 1, valid)
    expect(episode=(episode, "f[N]"), step=(parts["step"], "f[N]"), anchor=(anchor, "i[N]"))
    state = _segments([jnp.asarray(anchor), group], valid)
    size = segment_sum(valid.astype(episode.dtype), state, episode.size)
    count = jnp.maximum(jnp.sum(valid), 1)
    mean = lambda x: jnp.sum(jnp.where(valid, x, 0)) / count
    whole = mean(jnp.abs(episode))
    return {
        "anchor_share": mean((size[state] > 1).astype(episode.dtype)),
        "anchor_size": jnp.sum(size) / jnp.maximum(jnp.sum(size > 0), 1),
        "step_to_episode": mean(jnp.abs(parts["step"])) / jnp.where(whole == 0, jnp.inf, whole),
    }
