"""From products of queries and keys to scores: what the Pallas kernels share."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # large and finite: -inf minus -inf is NaN


def dot(x, y, *, turned: bool = False):
    """x y, or x y^T turned, in float32; float32 inputs in full precision."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((1,), (1 if turned else 0,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def scores(options, product):
    """Scores of products, and d score / d (scaled product) where that is not 1."""
    scaled = product * options.scale
    if options.softcap is None:
        return scaled, None
    bent = jnp.tanh(scaled / options.softcap)
    return options.softcap * bent, 1 - bent * bent
