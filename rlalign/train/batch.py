"""From rollouts and rewards to what a train step consumes: advantage, then pack."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlalign.algorithms import NEEDS, Algorithm
from rlalign.forest import pack
from rlalign.types import Array, Batch, Packed, Rewards, Rollouts

MAX_LOG_WEIGHT = 20.0  # where log pi_ref / pi_old of a whole response is cut


@functools.lru_cache(maxsize=64)
def _advantage(algorithm: Algorithm, num_groups: int):
    assert algorithm.advantage is not None
    return jax.jit(functools.partial(algorithm.advantage, num_groups=num_groups))


@functools.lru_cache(maxsize=64)
def _correction(algorithm: Algorithm):
    assert algorithm.correction is not None
    return jax.jit(algorithm.correction)


def make_batch(
    algorithm: Algorithm,
    prompts: Sequence,
    rollouts: Rollouts,
    rewards: Rewards | np.ndarray,
    *,
    row_length: int = 4096,
    parts: int = 1,
    num_rows: int | None = None,
    reference: Callable[[Packed], np.ndarray] | None = None,
    fields: Mapping[str, Array] | None = None,
) -> Batch:
    """Advantages of the whole batch, and its samples packed with their prompts stored once.

    Args:
      algorithm: an entry of ALGORITHMS with data="rollouts".
      prompts: what was sampled from; sample n answers prompts[rollouts.prompt[n]].
      rollouts: N samples.
      rewards: Rewards, or plain f[N] where NaN marks an invalid sample.
      row_length, parts, num_rows: see pack.
      reference: packed -> log-probs f[N, R] of the frozen reference (make_scorer with its parameters); called once,
        where the algorithm needs it.
      fields: the arrays that `algorithm.needs` names, besides "mask" and "weight"; "group" replaces the prompt as the
        group of each sample.

    Returns:
      Batch of N samples in the order of `rollouts`, with the weights of algorithm.correction: exactly 1 without top-k
      and top-p. Invalid samples have an empty mask and advantage 0: they are in no statistic and no loss.

    Raises:
      ValueError: an algorithm without advantage, rewards of another length, or something that it needs and is missing.
    """
    if algorithm.data != "rollouts":
        raise ValueError(f"make_batch is for algorithms that learn from rewards, this one has data={algorithm.data!r}")
    values = np.asarray(rewards.reward if isinstance(rewards, Rewards) else rewards, np.float32)
    valid = rewards.valid if isinstance(rewards, Rewards) else np.isfinite(values)
    if values.shape != rollouts.prompt.shape:
        raise ValueError(f"{values.shape} rewards for {rollouts.prompt.shape} samples: one each")
    packed = pack_rollouts(prompts, rollouts, valid, row_length=row_length, parts=parts, num_rows=num_rows)
    if algorithm.needs_reference and reference is None:
        raise ValueError("this algorithm compares with a reference: make_batch needs reference=, a scorer of it")
    ref_logp = reference(packed) if reference is not None and algorithm.needs_reference else None
    given = {"mask": packed.mask, "weight": _reference_ratio(rollouts, ref_logp, packed.mask), **(fields or {})}
    for name in algorithm.needs:
        if given.get(name) is None:
            raise ValueError(f"this algorithm needs {name} {NEEDS[name]}: make_batch(..., fields={{{name!r}: ...}})")
    advantage = _advantage(algorithm, len(prompts))(
        jnp.asarray(values),
        group=jnp.asarray(given.get("group", rollouts.prompt)),
        valid=jnp.asarray(valid),
        **{name: jnp.asarray(given[name]) for name in algorithm.needs},
    )
    weight = None
    if algorithm.correction is not None:
        weight = np.asarray(_correction(algorithm)(rollouts.logp, rollouts.behaviour_logp, packed.mask)[0])
    return Batch(packed, advantage=np.asarray(advantage), old_logp=rollouts.logp, ref_logp=ref_logp, weight=weight)


def _reference_ratio(rollouts: Rollouts, ref_logp: np.ndarray | None, mask: np.ndarray) -> np.ndarray | None:
    """pi_ref / pi_old f[N] of whole responses (GPRS, eq. 10)."""
    if ref_logp is None:
        return None
    log_ratio = np.where(mask, ref_logp, 0).sum(axis=1) - np.where(mask, rollouts.logp, 0).sum(axis=1)
    return np.exp(np.clip(log_ratio, -MAX_LOG_WEIGHT, MAX_LOG_WEIGHT))


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
