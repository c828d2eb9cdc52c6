"""Losses: minus the objective, over rectangular [N, R] log-probs; they never see the forest.

Each returns (loss, metrics): a scalar in float32 or wider and a dict of scalars. What the mask hides enters nothing,
not even as 0 * NaN; samples without a True token do not count.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from rlalign.checks import expect
from rlalign.types import Array

Metrics = dict[str, jax.Array]
MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8: where a ratio is cut so that it stays finite in float32


def _wide(x: Array) -> jax.Array:
    return jnp.asarray(x).astype(jnp.promote_types(jnp.result_type(x), jnp.float32))


def token_mean(x: Array, mask: Array) -> jax.Array:
    """Mean of x f[N, R] over the True tokens; 0 if there is none."""
    x = jnp.where(mask, x, 0)
    return jnp.sum(x) / jnp.maximum(jnp.sum(mask), 1).astype(x.dtype)


def count_for(aggregate: str, mask: Array) -> jax.Array:
    """The denominator of `aggregate` for mask b[N, R]: tokens for "token", samples with a True token otherwise."""
    return jnp.sum(mask) if aggregate == "token" else jnp.sum(jnp.any(mask, axis=1))


def aggregate_tokens(
    x: Array,
    mask: Array,
    aggregate: Literal["token", "sequence", "constant"],
    *,
    max_length: int | None = None,
    denominator: Array | None = None,
) -> jax.Array:
    """One number from x f[N, R].

        token       sum x / tokens                                   DAPO, arXiv 2503.14476, eq. 8
        sequence    mean over samples of their token means           GRPO, arXiv 2402.03300, eq. 3
        constant    sum x / (samples * max_length)                   Dr. GRPO, arXiv 2503.20783

    Args:
      x: f[N, R].
      mask: b[N, R].
      aggregate: see above.
      max_length: for "constant".
      denominator: tokens ("token") or samples of the whole batch, where a step sees only a part of it; then the sum
        over parts is the value of the whole.
    """
    if aggregate not in ("token", "sequence", "constant"):
        raise ValueError(f"aggregate must be 'token', 'sequence' or 'constant', got {aggregate!r}")
    if aggregate == "constant" and (max_length is None or max_length < 1):
        raise ValueError(f"aggregate='constant' divides by max_length, which must be at least 1, got {max_length}")
    x = jnp.where(mask, _wide(x), 0)
    count = count_for(aggregate, mask) if denominator is None else jnp.asarray(denominator)
    count = jnp.maximum(count, 1).astype(x.dtype)
    if aggregate == "token":
        return jnp.sum(x) / count
    total = jnp.sum(x, axis=1)
    if aggregate == "constant" and max_length is not None:
        return jnp.sum(total) / (count * max_length)
    return jnp.sum(total / jnp.maximum(jnp.sum(mask, axis=1), 1).astype(x.dtype)) / count


def _ratio(log_ratio: jax.Array, mask: jax.Array, ratio: str) -> tuple[jax.Array, jax.Array]:
    """The importance ratio f[N, R] and the share of its terms that were cut at +-20."""
    total = jnp.sum(log_ratio, axis=1, keepdims=True)
    if ratio == "token":
        power, live = log_ratio, mask
    elif ratio == "sequence":
        power = total / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1).astype(total.dtype)
        live = jnp.any(mask, axis=1, keepdims=True)
    elif ratio == "product":
        power, live = total, jnp.any(mask, axis=1, keepdims=True)
    else:
        raise ValueError(f"ratio must be 'token', 'sequence' or 'product', got {ratio!r}")
    cut = token_mean((jnp.abs(power) > MAX_LOG_RATIO).astype(power.dtype), live)
    power = jnp.clip(power, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.broadcast_to(jnp.exp(power), log_ratio.shape), cut


def _objective(f, advantage, logp, clip: str, low: float, high: float, dual_clip: float | None):
    """What each token contributes, f[N, R], and where the clip is what decides, b[N, R]."""
    clipped = jnp.clip(f, 1 - low, 1 + high)
    if clip == "none":
        value, active = f * advantage, jnp.zeros(f.shape, bool)
    elif clip == "cispo":
        value, active = jax.lax.stop_gradient(clipped) * advantage * logp, clipped != f
    elif clip == "literal":
        value, active = advantage * jnp.minimum(f, clipped), clipped < f
    elif clip == "ppo":
        value = jnp.minimum(f * advantage, clipped * advantage)
        active = clipped * advantage < f * advantage
    else:
        raise ValueError(f"clip must be 'ppo', 'literal', 'cispo' or 'none', got {clip!r}")
    if dual_clip is not None:
        value = jnp.where(advantage < 0, jnp.maximum(value, dual_clip * advantage), value)
    return value, active


def policy_gradient(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    weight: Array | None = None,
    clip: Literal["ppo", "literal", "cispo", "none"] = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio: Literal["token", "sequence", "product"] = "token",
    aggregate: Literal["token", "sequence", "constant"] = "token",
    max_length: int | None = None,
    denominator: Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The clipped surrogate of the whole GRPO family, negated.

        f          exp(logp - old_logp)            ratio="token"       PPO, arXiv 1707.06347; GRPO
                   exp(mean_t log-ratio)           ratio="sequence"    GSPO, arXiv 2507.18071, eq. 7
                   exp(sum_t log-ratio)            ratio="product"     GPRS, EMNLP 2025 main.1085, eq. 8
        objective  min(f A, clip(f) A)             clip="ppo"          PPO, eq. 7
                   A min(f, clip(f))               clip="literal"      GPRS, eq. 8 as printed
                   stopgrad(clip(f)) A logp        clip="cispo"        CISPO, arXiv 2506.13585, eq. 4
                   f A                             clip="none"
        dual clip  max(objective, c A) where A < 0                     arXiv 1912.09729, eq. 5

    with clip(f) in [1 - clip_low, 1 + clip_high].

    Args:
      logp: f[N, R], under the policy that learns.
      old_logp: f[N, R], under the policy that sampled, at the same temperature. No gradient.
      advantage: f[N] or f[N, R]. No gradient.
      mask: b[N, R].
      weight: f[N, R] or f[N], importance correction that multiplies each term. No gradient.
      clip, clip_low, clip_high, dual_clip, ratio: see above. Log-ratios are cut at +-20 and the share reported.
      aggregate, max_length, denominator: see aggregate_tokens.

    Returns:
      (loss, metrics): clip_share, ratio_cut_share (shares of tokens), approx_kl (k3 of old against new, nats a token)
      and ratio_error (largest |f - 1| of the token ratio).

    Raises:
      ValueError: options that make no sense, with their values.
    """
    expect(
        mask=(mask, "b[N, R]"),
        logp=(logp, "f[N, R]"),
        old_logp=(old_logp, "f[N, R]"),
        advantage=(advantage, "f[N]|f[N, R]"),
        weight=(weight, "f[N]|f[N, R]"),
    )
    _check_clip(clip, clip_low, clip_high, dual_clip)
    advantage = _per_token(advantage, mask)
    logp = jnp.where(mask, _wide(logp), 0)
    old = jax.lax.stop_gradient(jnp.where(mask, _wide(old_logp), 0))
    log_ratio = logp - old
    f, cut = _ratio(log_ratio, mask, ratio)
    value, active = _objective(f, advantage, logp, clip, clip_low, clip_high, dual_clip)
    if weight is not None:
        value = value * _per_token(weight, mask)
    loss = -aggregate_tokens(value, mask, aggregate, max_length=max_length, denominator=denominator)
    near = jnp.clip(jax.lax.stop_gradient(log_ratio), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    metrics = {
        "clip_share": token_mean(active.astype(logp.dtype), mask),
        "ratio_cut_share": cut,
        "approx_kl": token_mean(jnp.exp(near) - near - 1, mask),
        "ratio_error": jnp.max(jnp.where(mask, jnp.abs(jnp.expm1(near)), 0)),
    }
    return loss, metrics


def _check_clip(clip: str, low: float, high: float, dual_clip: float | None) -> None:
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(f"need 0 <= clip_low <= 1 and clip_high >= 0, got {low} and {high}")
    if dual_clip is not None and (clip != "ppo" or dual_clip <= 1):
        raise ValueError(f"dual_clip={dual_clip} must be above 1 and goes with clip='ppo' only, got clip={clip!r}")


def _per_token(x: Array, mask: Array) -> jax.Array:
    """f[N] or f[N, R] as f[N, R] without gradient, 0 under the mask."""
    x = jax.lax.stop_gradient(_wide(x))
    x = x[:, None] if x.ndim == 1 else x
    return jnp.where(mask, jnp.broadcast_to(x, mask.shape), 0)


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
    d = jax.lax.stop_gradient(jnp.where(mask, _wide(ref_logp), 0)) - jnp.where(mask, _wide(logp), 0)
    d = jnp.clip(d, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return jnp.where(mask, -d, 0)
    if kind == "k2":
        return jnp.where(mask, d * d / 2, 0)
    if kind == "k3":
        return jnp.where(mask, jnp.expm1(d) - d, 0)
    raise ValueError(f"kind must be 'k1', 'k2' or 'k3', got {kind!r}")


def negative_log_likelihood(
    logp: Array,
    mask: Array,
    *,
    aggregate: Literal["token", "sequence", "constant"] = "token",
    max_length: int | None = None,
    denominator: Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Supervised fine-tuning: minus the mean log-prob of the response tokens, nats.

    Args:
      logp: f[N, R].  mask: b[N, R].
      aggregate, max_length, denominator: see aggregate_tokens.

    Returns:
      (loss, {}).
    """
    expect(mask=(mask, "b[N, R]"), logp=(logp, "f[N, R]"))
    return -aggregate_tokens(logp, mask, aggregate, max_length=max_length, denominator=denominator), {}
