"""Which tiles of the T x T score matrix hold a visible pair: computed once a batch, shared by all layers and backends.

A query tile i and a key tile j hold a visible pair only if some key of j lies at or before the last query of i and
the furthest reach of j's keys passes the first query of i. No pair of the tile is hidden if j lies wholly before i and
the shortest reach passes i's last query:

    live(i, j)  <=>  j * block_k < (i + 1) * block_q   and   max(visible_until of tile j) > i * block_q
    full(i, j)  <=>  (j + 1) * block_k <= i * block_q  and   min(visible_until of tile j) >= (i + 1) * block_q

The live pairs are listed twice: by query tile, for the output and dq, and by key tile, for dk and dv. The lists are
data: their length is the number of pairs that rows of this length can have, so nothing recompiles from batch to batch.

In a ring (ring.py) keys can be an earlier slice of the rows: all of them lie before every query, visible_until counts
in the queries' columns, rows are whole tiles, and the conditions on the left fall away (causal=False).
"""

import bisect
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Pairs(NamedTuple):
    """Live pairs of tiles in the order in which one kernel visits them.

    Attributes:
      query: i32[S], the query tile of each pair; 0 beyond the live ones.
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
    reach = jnp.minimum(visible_until, length)  # or it would reach into the next row
    flat = jnp.where(reach > 0, reach + start, 0).reshape(-1)
    return jnp.pad(flat, (0, padded - flat.size))


def possible_keys(rows: int, length: int, block_q: int, block_k: int, *, causal: bool = True) -> list[tuple[int, int]]:
    """For every query tile, (first, last + 1) of the key tiles that share its row and, if causal, are not behind it."""
    last = lambda start: start + block_q - 1 if causal else (start // length + 1) * length - 1
    padded = -(-rows * length // max(block_q, block_k)) * max(block_q, block_k)
    return [
        (min(start // length, rows - 1) * length // block_k, last(start) // block_k + 1)
        for start in range(0, padded, block_q)
    ]


def _turned(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """For every key tile, (first, last + 1) of the query tiles whose range holds it: both ends of the ranges rise."""
    keys = range(ranges[-1][1])
    begins, ends = [low for low, _ in ranges], [high for _, high in ranges]
    return [(bisect.bisect_right(ends, key), bisect.bisect_right(begins, key)) for key in keys]


def _pairs(ranges: list[tuple[int, int]]) -> tuple[jax.Array, jax.Array]:
    """(tile, other tile) i32[S] of ranges of the other tile."""
    size = [high - low for low, high in ranges]
    low, start = (jnp.array(x, jnp.int32) for x in ([low for low, _ in ranges], [0, *itertools.accumulate(size)][:-1]))
    # A loop, because what jnp.repeat does with constants, XLA spends seconds on folding at compilation.
    tile = jnp.searchsorted(start, jnp.arange(sum(size), dtype=jnp.int32), side="right").astype(jnp.int32) - 1
    return tile, jnp.arange(sum(size), dtype=jnp.int32) - start[tile] + low[tile]


def _kept(query, key, live, full) -> Pairs:
    """The live pairs, their order kept."""
    upto = jnp.cumsum(live, dtype=jnp.int32)
    place = jnp.where(live, upto - 1, live.size)
    keep = lambda x: jnp.zeros(live.shape, jnp.int32).at[place].set(x.astype(jnp.int32), mode="drop")
    return Pairs(keep(query), keep(key), keep(full), upto[-1:])  # a sum of its own takes XLA ten seconds to compile


def _starts(tile, live, tiles: int) -> jax.Array:
    per_tile = jax.ops.segment_sum(live.astype(jnp.int32), tile, num_segments=tiles)
    return jnp.pad(jnp.cumsum(per_tile, dtype=jnp.int32), (1, 0))


def make_plan(visible_until: jax.Array, *, block_q: int, block_k: int, causal: bool = True) -> Plan:
    """Tile lists of visible_until i[B, T]; see the module's formula. One block length divides the other."""
    rows, length = visible_until.shape
    block = max(block_q, block_k)
    flat = flatten_rows(visible_until.astype(jnp.int32), -(-rows * length // block) * block)
    tiles = flat.reshape(-1, block_k)
    furthest, shortest = jnp.max(tiles, axis=1), jnp.min(tiles, axis=1)

    def judged(query, key):
        live = furthest[key] > query * block_q
        full = shortest[key] >= (query + 1) * block_q
        if causal:
            full &= (key + 1) * block_k <= query * block_q
        return live, _kept(query, key, live, full)

    ranges = possible_keys(rows, length, block_q, block_k, causal=causal)
    query, key = _pairs(ranges)
    live, by_query = judged(query, key)
    key, query_of_key = _pairs(_turned(ranges))
    turned, by_key = judged(query_of_key, key)
    first = _starts(query, live, flat.size // block_q)
    return Plan(flat, by_query, by_key, first, _starts(key, turned, flat.size // block_k))
