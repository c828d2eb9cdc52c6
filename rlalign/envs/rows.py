"""From episodes to what a train step consumes: a row for each step, what makes rows comparable, advantages, pack."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from rlalign.advantages import anchor_ids, group_in_group, past_ids, per_trajectory, step_metrics
from rlalign.algorithms import Algorithm
from rlalign.algorithms.registry import episode_and_step
from rlalign.envs.episodes import Episode, Episodes, admissible_strings
from rlalign.forest import bucket
from rlalign.strings import Allowed
from rlalign.train.batch import make_batch
from rlalign.types import Batch, Prompt, Rewards, Rollouts


class Rows(NamedTuple):
    """The steps of episodes, one a row, and padding behind them.

    Attributes:
      prompts: N, one a row.
      rollouts: Rollouts of N.
      rewards: Rewards of N: each step's own; steps of lost episodes and padding are invalid.
      group, trajectory, step: i32[N].
      anchor: i32[N].
      past: i32[N, K + 1], for hierarchy_of_groups.
      penalty: f32[N].
      count: rows that are steps; the others are padding.
      allowed: the strings that answers were drawn from; None where any text could be said.
    """

    prompts: list[Prompt]
    rollouts: Rollouts
    rewards: Rewards
    group: np.ndarray
    trajectory: np.ndarray
    step: np.ndarray
    anchor: np.ndarray
    past: np.ndarray
    penalty: np.ndarray
    count: int
    allowed: Allowed | None = None


def rows_of(
    episodes: Sequence[Episode],
    config: Episodes,
    *,
    write: Callable[[str], Iterable[int]] | None = None,
    vocab_size: int = 0,
) -> Rows:
    """The rows of episodes, padded to what the longest ones would give, so that all batches have one shape.

    Args:
      episodes, write: of `play`.
      config: theirs.
      vocab_size: V, where there is `write`.

    Raises:
      ValueError: no episodes.
    """
    if not episodes:
        raise ValueError("no episodes: play some")
    turns = [(e, t, turn) for e, episode in enumerate(episodes) for t, turn in enumerate(episode.turns)]
    count, size, width = len(turns), bucket(len(episodes) * config.max_steps), config.sampling.max_new_tokens
    token, mask = np.zeros((size, width), np.int32), np.zeros((size, width), bool)
    logp, behaviour = np.zeros((2, size, width), np.float32)
    stop, group, trajectory, step = np.zeros((4, size), np.int32)
    reward, penalty = np.full(size, np.nan), np.zeros(size, np.float32)
    reason = ["padding"] * size
    for row, (e, t, turn) in enumerate(turns):
        length = len(turn.response)
        token[row, :length], mask[row, :length] = turn.response, True
        logp[row, :length], behaviour[row, :length], stop[row] = turn.logp, turn.behaviour_logp, turn.stop
        group[row], trajectory[row], step[row] = episodes[e].group, e, t
        reason[row] = episodes[e].reason
        if not episodes[e].end.lost:
            reward[row] = turn.reward
        penalty[row] = 0.0 if turn.valid else config.penalty
    trajectory[count:] = len(episodes)
    prompts = [Prompt(row, turn.prompt) for row, (*_, turn) in enumerate(turns)]
    prompts += [Prompt(row, prompts[0].tokens if prompts else np.zeros(1, np.int32)) for row in range(count, size)]
    allowed = None
    if write is not None:
        allowed = admissible_strings([turn.observation for *_, turn in turns], write, vocab_size, config.sampling)
        allowed = allowed._replace(start=np.pad(allowed.start, (0, size - count)))
    anchor, past = _states(episodes, turns, trajectory[:count], step[:count], config)
    pad = lambda x: np.concatenate([x, np.zeros((size - count, *x.shape[1:]), x.dtype)])
    return Rows(
        prompts,
        Rollouts(token, mask, logp, behaviour, stop, np.arange(size, dtype=np.int32)),
        Rewards(reward, np.isfinite(reward), tuple(reason)),
        group,
        trajectory,
        step,
        pad(anchor),
        pad(past),
        penalty,
        count,
        allowed,
    )


def _states(
    episodes: Sequence[Episode], turns: Sequence, trajectory: np.ndarray, step: np.ndarray, config: Episodes
) -> tuple[np.ndarray, np.ndarray]:
    """(anchor i32[n], past i32[n, K + 1])."""
    seen = [turn.observation for *_, turn in turns]
    states = [x.text if config.anchor == "observation" or x.anchor is None else x.anchor for x in seen]
    past = past_ids(states, trajectory, step, length=config.history)
    if config.anchor == "history":
        return past[:, -1], past
    # Lost episodes behind the others: which texts are similar depends on the order, and they are to change nothing.
    order = np.argsort([episodes[e].end.lost for e, *_ in turns], kind="stable")
    group = np.array([episodes[e].group for e, *_ in turns], int)
    anchor = np.zeros(len(turns), np.int32)
    anchor[order] = anchor_ids([states[i] for i in order], group[order], similarity=config.similarity)
    return anchor, past


@functools.lru_cache(maxsize=64)
def of_steps(algorithm: Algorithm) -> Algorithm:
    """The algorithm with an advantage of steps: as it is (gigpo, hgpo), or, where it compares answers, of episodes.

    Raises:
      ValueError: one that learns from something else than rewards, or needs what episodes do not give.
    """
    if algorithm.data != "rollouts":
        raise ValueError(
            f"episodes have rewards, and this algorithm learns from {algorithm.data}: use gigpo, grpo, rloo"
        )
    given = {"trajectory", "step", "anchor", "past", "penalty"}
    if "trajectory" not in algorithm.needs:
        if algorithm.needs:
            raise ValueError(
                f"this algorithm needs {algorithm.needs[0]}, which episodes do not give: use gigpo, hgpo, grpo or rloo"
            )
        assert algorithm.advantage is not None
        how = {"needs": ("trajectory", "step"), "optional": ("penalty",), "grouped": False}
        return dataclasses.replace(algorithm, advantage=per_trajectory(algorithm.advantage), **how)
    if lacking := set(algorithm.needs) - given:
        raise ValueError(f"this algorithm needs {min(lacking)}, which episodes do not give")
    return algorithm


def episode_batch(
    algorithm: Algorithm,
    rows: Rows,
    *,
    row_length: int,
    parts: int = 1,
    num_rows: int | None = None,
    reference: Callable[..., np.ndarray] | None = None,
) -> Batch:
    """Advantages of all steps, and their prompts and answers packed; see make_batch.

    Args:
      algorithm: `of_steps` of an entry of ALGORITHMS.
      rows: rows_of episodes.
    """
    taken = {"group", *algorithm.needs, *algorithm.optional} & {
        "group",
        "trajectory",
        "step",
        "anchor",
        "past",
        "penalty",
    }
    return make_batch(
        algorithm,
        rows.prompts,
        rows.rollouts,
        rows.rewards,
        row_length=row_length,
        parts=parts,
        num_rows=num_rows,
        reference=reference,
        fields={name: getattr(rows, name) for name in taken},
        allowed=rows.allowed,
    )


@functools.lru_cache(maxsize=64)
def _parts(algorithm: Algorithm, num_groups: int):
    options = getattr(algorithm.advantage, "keywords")  # noqa: B009  a partial of episode_and_step
    return jax.jit(functools.partial(group_in_group, num_groups=num_groups, **options))


def advantage_parts(algorithm: Algorithm, rows: Rows) -> dict[str, np.ndarray]:
    """{"episode": f[N], "step": f[N]} of an algorithm whose advantage is GiGPO's; {} of others."""
    if getattr(algorithm.advantage, "func", None) is not episode_and_step:
        return {}
    fields = {name: getattr(rows, name) for name in ("group", "trajectory", "step", "anchor", "penalty")}
    reward, valid = rows.rewards.reward.astype(np.float32), rows.rewards.valid
    _, parts = _parts(algorithm, len(rows.prompts))(reward, **fields, valid=valid)
    return {name: np.asarray(part) for name, part in parts.items()}


@jax.jit
def _figures(parts, group, anchor, valid):
    return step_metrics(parts, group=group, anchor=anchor, valid=valid)


def group_metrics(algorithm: Algorithm, rows: Rows) -> dict[str, float]:
    """What tells whether step-level groups do anything; see step_metrics. Of other algorithms than gigpo the shares of
    anchors alone."""
    parts = advantage_parts(algorithm, rows)
    none = np.zeros(len(rows.prompts), np.float32)
    found = _figures(parts or {"episode": none, "step": none}, rows.group, rows.anchor, rows.rewards.valid)
    return {name: float(value) for name, value in found.items() if parts or name != "step_to_episode"}
