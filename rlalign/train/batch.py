"""From rollouts and rewards to what a train step consumes: advantage, then pack."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlalign.algorithms import NEEDS, Algorithm
from rlalign.forest import pack
from rlalign.strings import Allowed, states
from rlalign.types import Array, Batch, Packed, Rewards, Rollouts

MAX_LOG_WEIGHT = 20.0  # where log pi_ref / pi_old of a whole response is cut
MOST_NAMED = 8  # rows with a bad term that are logged, each
log = logging.getLogger(__name__)


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
    reference: Callable[..., np.ndarray] | None = None,
    old_policy: Callable[..., np.ndarray] | None = None,
    fields: Mapping[str, Array] | None = None,
    allowed: Allowed | None = None,
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
      old_policy: the same of the parameters that sampled, where the sampler's log-probs are not the trainer's (another
        engine, another precision): they become old_logp, and algorithm.correction weighs the difference.
      fields: the arrays that `algorithm.needs` (besides "mask" and "weight") and `algorithm.optional` name; "group"
        replaces the prompt as the group of each sample. "terms" are by default those of `rewards`, in their order.
      allowed: what `sample` was given, of the same prompts; reference and old_policy are then called with
        allowed=Batch.allowed.

    Returns:
      Batch of N samples in the order of `rollouts`, with the weights of algorithm.correction: exactly 1 without top-k,
      top-p and old_policy. Invalid samples, and those with a term that is not finite, have an empty mask and advantage
      0: they are in no statistic and no loss.

    Raises:
      ValueError: an algorithm without advantage, rewards of another length, or something that it needs and is missing.
    """
    if algorithm.data != "rollouts":
        raise ValueError(f"make_batch is for algorithms that learn from rewards, this one has data={algorithm.data!r}")
    values = np.asarray(rewards.reward if isinstance(rewards, Rewards) else rewards)
    if values.shape != rollouts.prompt.shape:
        raise ValueError(f"{values.shape} rewards for {rollouts.prompt.shape} samples: one each")
    values = values.astype(jnp.result_type(float))
    valid = np.isfinite(values) & (rewards.valid if isinstance(rewards, Rewards) else True)
    fields = _check_given(algorithm, _terms(algorithm, rewards, valid) | dict(fields or {}), len(values), len(prompts))
    valid &= _whole_terms(fields)
    packed = pack_rollouts(prompts, rollouts, valid, row_length=row_length, parts=parts, num_rows=num_rows)
    if algorithm.needs_reference and reference is None:
        raise ValueError("this algorithm compares with a reference: make_batch needs reference=, a scorer of it")
    table = None if allowed is None else (allowed.table, states(allowed, rollouts))
    how = {} if table is None else {"allowed": table}
    ref_logp = reference(packed, **how) if reference is not None and algorithm.needs_reference else None
    old_logp = rollouts.logp if old_policy is None else old_policy(packed, **how)
    given = {"mask": packed.mask, "weight": _reference_ratio(old_logp, ref_logp, packed.mask), **fields}
    for name in algorithm.needs:
        if given.get(name) is None:
            raise ValueError(f"this algorithm needs {name} {NEEDS[name]}: make_batch(..., fields={{{name!r}: ...}})")
    taken = [name for name in (*algorithm.needs, *algorithm.optional) if name in given]
    group = np.asarray(given.get("group", rollouts.prompt))
    advantage = np.asarray(
        _advantage(algorithm, len(prompts))(
            jnp.asarray(values),
            group=jnp.asarray(group),
            valid=jnp.asarray(valid),
            **{name: jnp.asarray(given[name]) for name in taken},
        )
    )
    if advantage.shape not in (values.shape, packed.mask.shape):
        raise ValueError(f"advantage gave {advantage.shape} for {values.shape} rewards: expected f[N] or f[N, R]")
    if algorithm.drop_without_signal:
        packed = _drop(packed, ~_signal(advantage, group, len(prompts)))
    weight = None
    if algorithm.correction is not None:
        weight = np.asarray(_correction(algorithm)(old_logp, rollouts.behaviour_logp, packed.mask)[0])
    return Batch(packed, advantage=advantage, old_logp=old_logp, ref_logp=ref_logp, weight=weight, allowed=table)


def _terms(algorithm: Algorithm, rewards: Rewards | np.ndarray, valid: np.ndarray) -> dict[str, Array]:
    """The columns of the rewards' terms, in their order, where the algorithm takes them."""
    named = rewards.terms if isinstance(rewards, Rewards) else None
    if not named or "terms" not in (*algorithm.needs, *algorithm.optional):
        return {}
    return {
        "terms": np.where(valid[:, None], np.stack(list(named.values()), axis=1), 0.0).astype(jnp.result_type(float))
    }


def _check_given(algorithm: Algorithm, fields: Mapping[str, Array], samples: int, groups: int) -> dict[str, np.ndarray]:
    """The caller's fields as arrays that the advantage can index with."""
    known = {"group", *algorithm.needs, *algorithm.optional} - {"mask", "weight"}
    out = {name: np.asarray(value) for name, value in fields.items()}
    for name, value in out.items():
        if name not in known:
            raise ValueError(f"fields has {name!r}, which this algorithm does not take: {', '.join(sorted(known))}")
        rows = groups if name == "baseline" else samples
        if value.ndim == 0 or len(value) != rows:
            raise ValueError(f"fields[{name!r}] has shape {value.shape}, expected {rows} rows")
    group = out.get("group")
    if group is not None and len(group) and not 0 <= group.min() <= group.max() < groups:
        raise ValueError(f"fields['group'] holds {group.min()} to {group.max()}: ids must lie in [0, {groups})")
    for name in ("trajectory", "anchor"):  # compared by equality only: any ids become small ones
        if name in out:
            out[name] = np.unique(out[name], return_inverse=True)[1].reshape(-1).astype(np.int32)
    return out


def _whole_terms(fields: Mapping[str, np.ndarray]) -> Any:
    """b[N] (or True), False where a term of the reward is not finite; each is logged by row and term."""
    if "terms" not in fields:
        return True
    whole = np.isfinite(fields["terms"])
    for row, term in np.argwhere(~whole)[:MOST_NAMED]:
        log.warning("sample %d is invalid: term %d of its reward is %s", row, term, fields["terms"][row, term])
    return whole.all(axis=1)


def _signal(advantage: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """b[N], whether the sample's group has an advantage that is not 0."""
    pulls = (advantage != 0).reshape(len(advantage), -1).any(axis=1)
    return (np.bincount(group, weights=pulls, minlength=groups) > 0)[group]


def _drop(packed: Packed, gone: np.ndarray) -> Packed:
    """The same forest without the responses b[N] `gone`."""
    mask = packed.mask & ~gone[:, None]
    return packed._replace(mask=mask, node=np.where(mask, packed.node, -1))


def _reference_ratio(old_logp: np.ndarray, ref_logp: np.ndarray | None, mask: np.ndarray) -> np.ndarray | None:
    """pi_ref / pi_old f[N] of whole responses (GPRS, eq. 10)."""
    if ref_logp is None:
        return None
    log_ratio = np.where(mask, ref_logp, 0).sum(axis=1) - np.where(mask, old_logp, 0).sum(axis=1)
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
