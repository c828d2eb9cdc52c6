"""Which tiles of the T x T score matrix hold a visible pair: computed once a batch, shared by all layers and backends.

A query tile i and a key tile j hold a visible pair only if some key of j lies at or before the last query of i and
the furthest reach of j's keys passes the first query of i. No pair of the tile is hidden if j lies wholly before i and
the shortest reach passes i's last query:

    live(i, j)  <=>  j * block_k < (i + 1) * block_q   and   max(visible_until of tile j) > i * block_q
    full(i, j)  <=>  (j + 1) * block_k <= i * block_q  and   min(visible_until of tile j) >= (i + 1) * block_q

The live pairs are listed twice: by query tile, for the output and dq, and by key tile, for dk and dv. The lists are
data: their length is the number of pairs that rows of this length can have, so nothing recompiles from batch to batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Pairs(NamedTuple):
    """Live pairs of tiles in the order in which one kernel visits them.

    Attributes:
      query: i32[S], the query tile of each pair; beyond the live ones the last live one again.
      key: i32[S], its key tile.
      full: i32[S], 1 where no pair of tokens in it is hidden.
      count: i32[1], how many are live.
    """

    query: jax.Array
    key: jax.Array
    full: jax.Array
    count: jax.Array


class Plan(NamedTuple):
    """Live pairs of tiles of a batch whose rows lie on one axis.

    Attributes:
      visible_until: i32[n], the mask of all rows on one axis, n a multiple of both block lengths; 0 in the padding.
      by_query: pairs in order of (query tile, key tile).
      by_key: the same pairs in order of (key tile, query tile); those of one key tile are consecutive query tiles.
      first: i32[tiles_q + 1], where each query tile's pairs begin in by_query; its length tells block_q.
      first_key: i32[tiles_k + 1], where each key tile's pairs begin in by_key; its length tells block_k.
    """

    visible_until: jax.Array
    by_query: Pairs
    by_key: Pairs
    first: jax.Array
    first_key: jax.Array

    @property
    def block_q(self) -> int:
        """Queries of a tile."""
        return self.visible_until.size // (self.first.size - 1)

    @property
    def block_k(self) -> int:
        """Keys of a tile."""
        return self.visible_until.size // (self.first_key.size - 1)


def flatten_rows(visible_until: jax.Array, padded: int) -> jax.Array:
    """i32[B, T] -> i32[padded]: all rows on one axis. A row's end is its last reach, so the mask rule is unchanged."""
    rows, length = visible_until.shape
    start = jnp.arange(rows, dtype=jnp.int32)[:, None] * length
    flat = jnp.where(visible_until > 0, visible_until + start, 0).reshape(-1)
    return jnp.pad(flat, (0, padded - flat.size))


def possible_pairs(rows: int, length: int, block_q: int, block_k: int) -> list[tuple[int, int]]:
    """(query tile, key tile) of every pair that touches one row with its key tile not behind its query tile."""
    padded = -(-rows * length // max(block_q, block_k)) * max(block_q, block_k)

    def lowest(start):  # the key tile where the row of the query tile's first token begins
        return min(start // length, rows - 1) * length // block_k

    return [
        (start // block_q, key)
        for start in range(0, padded, block_q)
        for key in range(lowest(start), (start + block_q - 1) // block_k + 1)
    ]


def _listed(query, key, live, full) -> Pairs:
    """The live pairs first, their order kept."""
    count = jnp.sum(live, dtype=jnp.int32)
    order = jnp.argsort(~live, stable=True)[jnp.minimum(jnp.arange(live.size), jnp.maximum(count - 1, 0))]
    return Pairs(query[order], key[order], full[order].astype(jnp.int32), count[None])


def _starts(tile, live, tiles: int) -> jax.Array:
    per_tile = jax.ops.segment_sum(live.astype(jnp.int32), tile, num_segments=tiles)
    return jnp.pad(jnp.cumsum(per_tile, dtype=jnp.int32), (1, 0))


def make_plan(visible_until: jax.Array, *, block_q: int, block_k: int) -> Plan:
    """Tile lists of visible_until i[B, T]; see the module's formula. One block length divides the other."""
    rows, length = visible_until.shape
    block = max(block_q, block_k)
    flat = flatten_rows(visible_until.astype(jnp.int32), -(-rows * length // block) * block)
    tiles = flat.reshape(-1, block_k)
    furthest, shortest = jnp.max(tiles, axis=1), jnp.min(tiles, axis=1)

    def listed(pairs):
        query, key = jnp.array(pairs, jnp.int32).T
        live = furthest[key] > query * block_q
        full = ((key + 1) * block_k <= query * block_q) & (shortest[key] >= (query + 1) * block_q)
        return query, key, live, _listed(query, key, live, full)

    pairs = possible_pairs(rows, length, block_q, block_k)
    query, _, live, by_query = listed(pairs)
    _, key, turned, by_key = listed(sorted(pairs, key=lambda pair: pair[::-1]))
    first = _starts(query, live, flat.size // block_q)
    return Plan(flat, by_query, by_key, first, _starts(key, turned, flat.size // block_k))
