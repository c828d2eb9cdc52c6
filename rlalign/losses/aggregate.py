"""From numbers a token to one number, and the simplest loss that is: minus a mean of log-probs."""

from typing import Literal

import jax
import jax.numpy as jnp

from rlalign.checks import expect
from rlalign.types import Array

Metrics = dict[str, jax.Array]
MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8: where a ratio is cut so that it stays finite in float32


def wide(x: Array) -> jax.Array:
    """x in float32, or wider if it is."""
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
    x = jnp.where(mask, wide(x), 0)
    count = count_for(aggregate, mask) if denominator is None else jnp.asarray(denominator)
    count = jnp.maximum(count, 1).astype(x.dtype)
    if aggregate == "token":
        return jnp.sum(x) / count
    total = jnp.sum(x, axis=1)
    if aggregate == "constant" and max_length is not None:
        return jnp.sum(total) / (count * max_length)
    return jnp.sum(total / jnp.maximum(jnp.sum(mask, axis=1), 1).astype(x.dtype)) / count


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
