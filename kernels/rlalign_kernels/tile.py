"""On one tile inside a kernel: what the Pallas kernels of all operations share."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # large and finite: -inf minus -inf is NaN
LANES = 128  # of a TPU's registers: one number a row is held in every lane of its row


def dot(x, y, *, turned: bool = False):
    """x y, or x y^T turned, in float32; float32 inputs in full precision."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((1,), (1 if turned else 0,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def lanes(row):
    """[1, n] -> [n, LANES]: its numbers down the rows, in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def capped(x, softcap: float | None):
    """softcap tanh(x / softcap) and its slope; x and None without a soft cap."""
    if softcap is None:
        return x, None
    bent = jnp.tanh(x / softcap)
    return softcap * bent, 1 - bent * bent


def visible(options, query, key, until, position=None):
    """The mask rule, on indices and visible_until[key] of any shapes that broadcast.

    key <= query < visible_until[key], and position[query] - position[key] < window where `position` is that pair.
    """
    mask = (key <= query) & (query < until) if options.causal else query < until
    return mask if position is None else mask & (position[0] - position[1] < options.window)


def scores(options, product):
    """Scores of products, and d score / d (scaled product) where that is not 1."""
    return capped(product * options.scale, options.softcap)
