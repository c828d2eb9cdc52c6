"""What is kept of a row of logits z, and how slices of the vocabulary merge.

    top = max z      total = sum exp(z - top)      spread = sum exp(z - top) (z - top)      hit = z of the target
    log p(target) = hit - top - log total          entropy = log total - spread / total

All are sums or maxima over the vocabulary, so tiles, chunks and devices may hold a slice each.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Statistics(NamedTuple):
    """Of rows of logits, or of a slice of their vocabulary; f[...] each."""

    top: jax.Array
    total: jax.Array
    spread: jax.Array
    hit: jax.Array  # 0 where the target lies in another slice


def of_logits(logits: jax.Array, hot: jax.Array) -> Statistics:
    """f[n, 1] of logits f[n, V], whose targets are where hot b[n, V] is True (nowhere: they lie in another slice)."""
    top = jnp.max(logits, axis=1, keepdims=True)
    below = logits - top
    weight = jnp.exp(below)
    add = lambda x: jnp.sum(x, axis=1, keepdims=True)
    return Statistics(top, add(weight), add(weight * below), add(jnp.where(hot, logits, 0)))


def _from(part: Statistics, top: jax.Array) -> Statistics:
    """The same slice, measured from another top that is not below its own."""
    gap = part.top - top
    shrink = jnp.exp(gap)
    return Statistics(top, part.total * shrink, shrink * (part.spread + part.total * gap), part.hit)


def joined(a: Statistics, b: Statistics) -> Statistics:
    """Of two slices together."""
    top = jnp.maximum(a.top, b.top)
    a, b = _from(a, top), _from(b, top)
    return Statistics(top, a.total + b.total, a.spread + b.spread, a.hit + b.hit)


def merged(parts: Statistics, most: Callable, add: Callable) -> Statistics:
    """Of all slices together; `most` and `add` are the maximum and the sum over them."""
    top = most(parts.top)
    return Statistics(top, *(add(x) for x in _from(parts, top)[1:]))


def logp_and_entropy(whole: Statistics) -> tuple[jax.Array, jax.Array]:
    """(log p(target), entropy in nats); see the module's formula."""
    spread = jnp.log(whole.total)
    return whole.hit - whole.top - spread, spread - whole.spread / whole.total
