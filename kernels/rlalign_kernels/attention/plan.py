"""Which tiles of the T x T score matrix hold a visible pair: computed once a batch, shared by all layers.

A query tile i and a key tile j hold a visible pair only if some key of j lies at or before the last query of i and
the furthest reach of j's keys passes the first query of i:

    live(i, j)  <=>  j * block_k < (i + 1) * block_q   and   max(visible_until of tile j) > i * block_q

The lists are data: their shapes depend on the number of tiles only, so nothing recompiles from batch to batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Plan(NamedTuple):
    """Live key tiles of every query tile.

    Attributes:
      visible_until: i32[n * block], the mask of all rows on one axis; 0 in the padding.
      key_tile: i32[tiles_q, tiles_k], the live key tiles of each query tile first, ascending.
      count: i32[tiles_q], how many of them are live.
    """

    visible_until: jax.Array
    key_tile: jax.Array
    count: jax.Array


def flatten_rows(visible_until: jax.Array, padded: int) -> jax.Array:
    """i32[B, T] -> i32[padded]: all rows on one axis. A row's end is its last reach, so the mask rule is unchanged."""
    rows, length = visible_until.shape
    start = jnp.arange(rows, dtype=jnp.int32)[:, None] * length
    flat = jnp.where(visible_until > 0, visible_until + start, 0).reshape(-1)
    return jnp.pad(flat, (0, padded - flat.size))


def make_plan(visible_until: jax.Array, *, block_q: int, block_k: int) -> Plan:
    """Tile lists of visible_until i32[B, T]; see the module's formula."""
    block = max(block_q, block_k)
    padded = -(-visible_until.size // block) * block
    flat = flatten_rows(visible_until.astype(jnp.int32), padded)
    reach = jnp.max(flat.reshape(-1, block_k), axis=1)
    query = jnp.arange(padded // block_q, dtype=jnp.int32)[:, None]
    key = jnp.arange(padded // block_k, dtype=jnp.int32)[None, :]
    live = (key * block_k < (query + 1) * block_q) & (reach[None, :] > query * block_q)
    order = jnp.argsort(~live, axis=1, stable=True).astype(jnp.int32)
    return Plan(flat, order, jnp.sum(live, axis=1, dtype=jnp.int32))
