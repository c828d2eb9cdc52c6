"""Advantages of rows that are steps of trajectories: discounted returns and GiGPO's two levels.

One row is one environment step. Rows come in any order; `trajectory` says whose step it is and only the order of `step`
counts, so duplicated padding (valid False) and shuffled rows change nothing.
"""

import difflib
import functools
from collections.abc import Hashable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

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

    order = jnp.lexsort((step, trajectory, ~valid))
    linked = _linked([trajectory[order], valid[order]])
    first = jnp.zeros_like(linked).at[order].set(~linked) & valid  # the first step of each trajectory
    whole = jnp.where(first, _returns(reward, order, linked, 1.0), 0)
    score = segment_sum(whole, trajectory, rows)[trajectory]
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


def anchor_ids(
    anchors: Sequence[Hashable], group: Sequence[int] | np.ndarray, *, similarity: float | None = None
) -> np.ndarray:
    """Ids of environment states for group_in_group, on the host.

    What a state is, is the caller's choice: the observation, the observation with the inventory (equal texts with other
    inventories are other states), or with the last K observations: pass tuples.

    Args:
      anchors: N texts or hashables.
      group: i[N].
      similarity: None: equal anchors of one group share an id. A threshold in (0, 1]: texts are clustered greedily in
        the caller's order; a text joins the first cluster of its group whose first member it resembles, by
        difflib.SequenceMatcher(None, text, first).ratio() >= similarity. Depends on the order of rows.

    Returns:
      i32[N], numbered by first appearance, in [0, N).

    Raises:
      ValueError: lengths that differ, or a similarity of things that are no texts.

    >>> anchor_ids(["a door", "a key", "a door", "a door"], [0, 0, 0, 1]).tolist()
    [0, 1, 0, 2]
    """
    group = np.asarray(group)
    if group.shape != (len(anchors),):
        raise ValueError(f"group has shape {group.shape} for {len(anchors)} anchors: one id each")
    if similarity is None:
        known: dict[Hashable, int] = {}
        return np.array(
            [known.setdefault((g, a), len(known)) for g, a in zip(group.tolist(), anchors, strict=True)], np.int32
        )
    if not 0 < similarity <= 1:
        raise ValueError(f"similarity must be in (0, 1], got {similarity}")
    clusters: dict[int, list[tuple[str, int]]] = {}
    ids = np.zeros(len(anchors), np.int32)
    count = 0
    for row, (g, text) in enumerate(zip(group.tolist(), anchors, strict=True)):
        if not isinstance(text, str):
            raise ValueError(f"anchor {row} is a {type(text).__name__}: similarity compares texts")
        mine = clusters.setdefault(g, [])
        near = (number for first, number in mine if difflib.SequenceMatcher(None, text, first).ratio() >= similarity)
        ids[row] = next(near, count)
        if ids[row] == count:
            mine.append((text, count))
            count += 1
    return ids
