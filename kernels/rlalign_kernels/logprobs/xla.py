"""Logits of one chunk of rows in plain XLA: every platform, float64 too. They are whole in memory, [chunk, V]."""

import jax
import jax.numpy as jnp

from rlalign_kernels.logprobs.statistics import Statistics, of_logits
from rlalign_kernels.tile import MASKED, capped


def _logits(options, states, head, seen, limit):
    """z f[n, V], and the slope d (capped logit) / d (raw logit), None where it is 1."""
    wide = jnp.promote_types(jnp.result_type(states, head), jnp.float32)
    raw, slope = capped(jnp.matmul(states, head, preferred_element_type=wide), options.softcap)
    logits = raw / options.temperature
    if seen is not None:
        logits = jnp.where(seen, logits, MASKED)
    if limit is not None:
        logits = jnp.where(jnp.arange(logits.shape[1])[None] < limit, logits, MASKED)
    return logits, slope


def _hot(target, vocab) -> jax.Array:
    return target[:, None] == jnp.arange(vocab, dtype=target.dtype)[None]


def statistics(options, states, head, target, seen, limit) -> Statistics:
    """Of the logits of states f[n, W]; see api.py."""
    logits, _ = _logits(options, states, head, seen, limit)
    return Statistics(*(x[:, 0] for x in of_logits(logits, _hot(target, head.shape[1]))))


def logit_gradients(options, states, head, target, seen, limit, lse, entropy, grad_logp, grad_entropy) -> jax.Array:
    """d loss / d (raw logit) f[n, V] in the inputs' dtype; see api.py."""
    logits, slope = _logits(options, states, head, seen, limit)
    log_prob = logits - lse[:, None]
    pull = grad_logp[:, None] + grad_entropy[:, None] * (log_prob + entropy[:, None])
    hot = jnp.where(_hot(target, head.shape[1]), grad_logp[:, None], 0)
    gradient = (hot - jnp.exp(log_prob) * pull) / options.temperature
    return (gradient if slope is None else gradient * slope).astype(jnp.result_type(states, head))
