"""What is estimated from samples beside the surrogate: the KL to a reference, and the sampler's correction."""

from typing import Literal

import jax
import jax.numpy as jnp

from rlalign.checks import expect
from rlalign.losses.aggregate import MAX_LOG_RATIO, Metrics, token_mean, wide
from rlalign.types import Array


def kl_estimate(logp: Array, ref_logp: Array, mask: Array, *, kind: Literal["k1", "k2", "k3"] = "k1") -> jax.Array:
    """Per-token estimates of KL(pi || ref) from samples of pi, with d = ref_logp - logp.

        k1 = -d        k2 = d^2 / 2        k3 = exp(d) - d - 1                 Schulman 2020, "Approximating KL"

    Args:
      logp: f[N, R].  ref_logp: f[N, R], no gradient.  mask: b[N, R].
      kind: k1 is unbiased, k3 unbiased and never negative; k2's gradient is the unbiased one. |d| is cut at 20.

    Returns:
      f[N, R], nats; 0 under the mask.
    """
    expect(mask=(mask, "b[N, R]"), logp=(logp, "f[N, R]"), ref_logp=(ref_logp, "f[N, R]"))
    d = jax.lax.stop_gradient(jnp.where(mask, wide(ref_logp), 0)) - jnp.where(mask, wide(logp), 0)
    d = jnp.clip(d, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return jnp.where(mask, -d, 0)
    if kind == "k2":
        return jnp.where(mask, d * d / 2, 0)
    if kind == "k3":
        return jnp.where(mask, jnp.expm1(d) - d, 0)
    raise ValueError(f"kind must be 'k1', 'k2' or 'k3', got {kind!r}")


def importance_weight(
    logp: Array,
    behaviour_logp: Array,
    mask: Array,
    *,
    level: Literal["token", "sequence"] = "token",
    beyond: Literal["truncate", "mask"] = "truncate",
    cap: float = 2.0,
    floor: float = 0.0,
) -> tuple[jax.Array, Metrics]:
    """Truncated importance sampling between the sampler's distribution and the trainer's.

        w = exp(logp - behaviour_logp)                 level="token"
            exp(sum_t log-ratio) at each token         level="sequence"
            min(w, cap)                                beyond="truncate"     Yao et al. 2025, "Off-policy RL training"
            0 where w > cap or w < floor               beyond="mask"

    Args:
      logp: f[N, R], under the policy as the trainer computes it.
      behaviour_logp: f[N, R], under what was sampled from.
      mask: b[N, R].
      level, beyond: see above.
      cap: at least 1.
      floor: for "mask", in [0, 1].

    Returns:
      (f[N, R], metrics), without gradient, for policy_gradient's `weight`; 0 under the mask. Log-ratios are cut at
      +-20. Metrics: weight_mean and weight_beyond_share over tokens, weight_min.
    """
    expect(mask=(mask, "b[N, R]"), logp=(logp, "f[N, R]"), behaviour_logp=(behaviour_logp, "f[N, R]"))
    if level not in ("token", "sequence"):
        raise ValueError(f"level must be 'token' or 'sequence', got {level!r}")
    if beyond not in ("truncate", "mask"):
        raise ValueError(f"beyond must be 'truncate' or 'mask', got {beyond!r}")
    if not cap >= 1:
        raise ValueError(f"cap must be at least 1, got {cap}: a lower one shrinks samples that need no correction")
    if not 0 <= floor <= 1 or (floor > 0 and beyond == "truncate"):
        raise ValueError(f"floor must be in [0, 1] and goes with beyond='mask', got {floor} with {beyond!r}")
    log_ratio = jnp.where(mask, wide(logp), 0) - jnp.where(mask, wide(behaviour_logp), 0)
    if level == "sequence":
        log_ratio = jnp.broadcast_to(jnp.sum(log_ratio, axis=1, keepdims=True), log_ratio.shape)
    raw = jnp.exp(jnp.clip(jax.lax.stop_gradient(log_ratio), -MAX_LOG_RATIO, MAX_LOG_RATIO))
    outside = (raw > cap) | (raw < floor)
    weight = jnp.minimum(raw, cap) if beyond == "truncate" else jnp.where(outside, 0, raw)
    weight = jnp.where(mask, weight, 0)
    metrics = {
        "weight_mean": token_mean(weight, mask),
        "weight_beyond_share": token_mean(outside.astype(weight.dtype), mask),
        "weight_min": jnp.where(jnp.any(mask), jnp.min(jnp.where(mask, weight, jnp.inf), initial=jnp.inf), 0),
    }
    return weight, metrics
