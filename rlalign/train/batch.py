"""From rollouts and rewards to what a train step consumes: advantage, then pack."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlalign.algorithms import Algorithm
from rlalign.forest import pack
from rlalign.types import Batch, Packed, Rewards, Rollouts

MAX_WEIGHT = 2.0  # where importance weights are cut (truncated importance sampling)


@functools.lru_cache(maxsize=64)
def _advantage(algorithm: Algorithm, num_groups: int):
    assert algorithm.advantage is not None
    return jax.jit(functools.partial(algorithm.advantage, num_groups=num_groups))


def make_batch(
    algorithm: Algorithm,
    prompts: Sequence,
    rollouts: Rollouts,
    rewards: Rewards | np.ndarray,
    *,
    row_length: int = 4096,
    parts: int = 1,
    num_rows: int | None = None,
) -> Batch:
    """Advantages of the whole batch, and its samples packed with their prompts stored once.

    Args:
      algorithm: an entry of ALGORITHMS with data="rollouts".
      prompts: what was sampled from; sample n answers prompts[rollouts.prompt[n]].
      rollouts: N samples.
      rewards: Rewards, or plain f[N] where NaN marks an invalid sample.
      row_length, parts, num_rows: see pack.

    Returns:
      Batch of N samples in the order of `rollouts`, with weight = min(exp(logp - behaviour_logp), 2), exactly 1 without
      top-k and top-p. Invalid samples have an empty mask and advantage 0: they are in no statistic and no loss.

    Raises:
      ValueError: an algorithm without advantage, or rewards of another length.
    """
    if algorithm.data != "rollouts":
        raise ValueError(f"make_batch is for algorithms that learn from rewards, this one has data={algorithm.data!r}")
    values = np.asarray(rewards.reward if isinstance(rewards, Rewards) else rewards, np.float32)
    valid = rewards.valid if isinstance(rewards, Rewards) else np.isfinite(values)
    if values.shape != rollouts.prompt.shape:
        raise ValueError(f"{values.shape} rewards for {rollouts.prompt.shape} samples: one each")
    group = jnp.asarray(rollouts.prompt)
    advantage = _advantage(algorithm, len(prompts))(jnp.asarray(values), group, valid=jnp.asarray(valid))
    packed = pack_rollouts(prompts, rollouts, valid, row_length=row_length, parts=parts, num_rows=num_rows)
    # Top-k and top-p sample from another distribution than the policy that is trained (1 exactly without them).
    weight = np.minimum(np.exp(rollouts.logp - rollouts.behaviour_logp), MAX_WEIGHT)
    return Batch(packed, advantage=np.asarray(advantage), old_logp=rollouts.logp, weight=weight)


def pack_rollouts(
    prompts: Sequence,
    rollouts: Rollouts,
    valid: np.ndarray,
    *,
    row_length: int,
    parts: int = 1,
    num_rows: int | None = None,
) -> Packed:
    """pack() of prompt + response; samples that are not valid keep their place with an empty response."""
    tokens = [np.asarray(p) for p in prompts]
    length = np.where(valid, np.sum(rollouts.mask, axis=1), 0)
    owner = np.asarray(rollouts.prompt)
    return pack(
        [np.concatenate([tokens[p], row[:n]]) for p, row, n in zip(owner, rollouts.tokens, length, strict=True)],
        row_length=row_length,
        response_start=[len(tokens[p]) for p in owner],
        parts=parts,
        num_rows=num_rows,
        response_length=rollouts.tokens.shape[1],
    )
