"""Decode attention in plain XLA: every platform, float64 too. A loop over tiles of keys goes from the
lowest first one to the furthest limit."""

import math

import jax
import jax.numpy as jnp

from rlalign_kernels.decode.parts import tiles
from rlalign_kernels.tile import MASKED, scores


def partial(options, q, k, v, layer, first, limit):
    """(out, lse) over the keys [first, limit); see parts.py.

    The caches keep their axes: of one that is reshaped, XLA's CPU compiler copies all after each token that is written.
    """
    rows, keys = q.shape[:-2], k.shape[-2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    block, zero = min(options.block, keys), jnp.int32(0)
    low, here = (jnp.repeat(x, math.prod(rows) // x.size).reshape(*rows, 1) for x in (first, limit))

    def tile(j, carry):
        top, total, acc = carry
        start = jnp.minimum(j * block, keys - block)  # the last tile begins earlier where block does not divide keys
        column = start + jnp.arange(block, dtype=jnp.int32).reshape(*(1 for _ in rows), block)
        seen = (column >= j * block) & (column >= low) & (column < here)
        at, size = (layer[0], *(zero for _ in rows), start, zero), (1, *rows, block, k.shape[-1])
        key, value = (jax.lax.dynamic_slice(x, at, size)[0] for x in (k, v))
        value = jnp.where(seen[..., None], value, 0)  # 0 * NaN is NaN
        score, _ = scores(options, jnp.einsum("...md,...sd->...ms", q, key, preferred_element_type=wide))
        score = jnp.where(seen[..., None, :], score, MASKED)
        new_top = jnp.maximum(top, jnp.max(score, axis=-1))
        weight = jnp.where(seen[..., None, :], jnp.exp(score - new_top[..., None]), 0)
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(weight, axis=-1)
        more = jnp.einsum("...ms,...sd->...md", weight.astype(value.dtype), value, preferred_element_type=wide)
        return new_top, total, acc * shrink[..., None] + more

    carry = jnp.full(q.shape[:-1], MASKED, wide), jnp.zeros(q.shape[:-1], wide), jnp.zeros(q.shape, wide)
    if block == keys:
        top, total, acc = tile(zero, carry)
    else:
        start = jax.lax.div(jnp.min(first), jnp.int32(block))
        top, total, acc = jax.lax.fori_loop(start, tiles(jnp.max(limit), block), tile, carry)
    whole = jnp.where(total > 0, total, 1)
    return acc / whole[..., None], jnp.where(total > 0, top + jnp.log(whole), MASKED)
