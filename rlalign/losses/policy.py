"""The clipped surrogate of the GRPO family."""

from typing import Literal

import jax
import jax.numpy as jnp

from rlalign.checks import expect
from rlalign.losses.aggregate import MAX_LOG_RATIO, Metrics, aggregate_tokens, token_mean, wide
from rlalign.types import Array

CLIPS = ("ppo", "literal", "cispo", "none")
RATIOS = ("token", "sequence", "product")


def _ratio(log_ratio: jax.Array, mask: jax.Array, ratio: str) -> tuple[jax.Array, jax.Array]:
    """The importance ratio f[N, R] and the share of its terms that were cut at +-20."""
    total = jnp.sum(log_ratio, axis=1, keepdims=True)
    if ratio == "token":
        power, live = log_ratio, mask
    elif ratio == "sequence":
        power = total / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1).astype(total.dtype)
        live = jnp.any(mask, axis=1, keepdims=True)
    else:
        power, live = total, jnp.any(mask, axis=1, keepdims=True)
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
    else:
        value = jnp.minimum(f * advantage, clipped * advantage)
        active = clipped * advantage < f * advantage
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

    with clip(f) in [1 - clip_low, 1 + clip_high]. CISPO is read in two ways: verl cuts on both sides, TRL caps the
    ratio at an absolute value c: clip_low=1, clip_high=c - 1.

    Args:
      logp: f[N, R], under the policy that learns.
      old_logp: f[N, R], under the policy that sampled, at the same temperature. No gradient.
      advantage: f[N] or f[N, R]. No gradient.
      mask: b[N, R].
      weight: f[N, R] or f[N], importance correction that multiplies each term. No gradient.
      clip, clip_low, clip_high, dual_clip, ratio: see above. Log-ratios are cut at +-20 and the share reported; beyond
        the cut nothing pulls, so with A < 0 and clip="ppo" a dual clip is what bounds the gradient before it.
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
    check_options(clip=clip, ratio=ratio, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    advantage = per_token(advantage, mask)
    logp = jnp.where(mask, wide(logp), 0)
    old = jax.lax.stop_gradient(jnp.where(mask, wide(old_logp), 0))
    log_ratio = logp - old
    f, cut = _ratio(log_ratio, mask, ratio)
    value, active = _objective(f, advantage, logp, clip, clip_low, clip_high, dual_clip)
    if weight is not None:
        value = value * per_token(weight, mask)
    loss = -aggregate_tokens(value, mask, aggregate, max_length=max_length, denominator=denominator)
    near = jnp.clip(jax.lax.stop_gradient(log_ratio), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    metrics = {
        "clip_share": token_mean(active.astype(logp.dtype), mask),
        "ratio_cut_share": cut,
        "approx_kl": token_mean(jnp.exp(near) - near - 1, mask),
        "ratio_error": jnp.max(jnp.where(mask, jnp.abs(jnp.expm1(near)), 0), initial=0),
    }
    return loss, metrics


def check_options(
    *,
    clip: str = "ppo",
    ratio: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> None:
    """Raises ValueError, with the values, for options of policy_gradient that make no sense."""
    if clip not in CLIPS:
        raise ValueError(f"clip must be 'ppo', 'literal', 'cispo' or 'none', got {clip!r}")
    if ratio not in RATIOS:
        raise ValueError(f"ratio must be 'token', 'sequence' or 'product', got {ratio!r}")
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(f"need 0 <= clip_low <= 1 and clip_high >= 0, got {clip_low} and {clip_high}")
    if dual_clip is not None and (clip != "ppo" or not dual_clip > 1):
        raise ValueError(f"dual_clip={dual_clip} must be above 1 and goes with clip='ppo' only, got clip={clip!r}")


def per_token(x: Array, mask: Array) -> jax.Array:
    """f[N] or f[N, R] as f[N, R] without gradient, 0 under the mask."""
    x = jax.lax.stop_gradient(wide(x))
    x = x[:, None] if x.ndim == 1 else x
    return jnp.where(mask, jnp.broadcast_to(x, mask.shape), 0)
