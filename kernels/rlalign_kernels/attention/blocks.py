"""Tiles of the kernels, by backend, device and kind of head. Each row says where its numbers come from.

`benchmarks/autotune.py` rewrites a row on the device at hand, `benchmarks/aot.py` shows what compilers make of it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Tile(NamedTuple):
    """What one step of a kernel works on, and how a GPU runs it.

    Attributes:
      block_q, block_k: queries and keys: powers of two, one divides the other.
      heads: query heads of one key/value head that a Triton program packs into its rows; the other forms take all.
      warps: of a Triton program: forward, dq, dk/dv.
      stages: of its pipeline of loads, likewise.
      programs: of dk/dv, at least: where there are fewer key tiles, the queries of each are cut into parts.
    """

    block_q: int
    block_k: int
    heads: int = 1
    warps: tuple[int, int, int] = (4, 4, 4)
    stages: tuple[int, int, int] = (2, 2, 2)
    programs: int = 1


class Row(NamedTuple):
    """For which heads a tile is.

    Attributes:
      backend: of forest_attention.
      device: a part of the device's kind; "" is any.
      width: of the widest head.
      bytes: of the widest number.
      length: of the shortest row of tokens.
      tile: block_q is for one head: where heads are packed, each brings its share of these rows.
    """

    backend: str
    device: str
    width: int
    bytes: int
    length: int
    tile: Tile


ANY = 1 << 30
MOST_ROWS = 1024  # of a TPU's tile: float32 ones of 8 heads x 128 queries take 10 of 16 MiB (make aot)

# The first row that fits is taken.
ROWS = (
    # Two AMD EPYC cores, jax 0.10.2: a tile of scores stays in a core's cache, and short rows hold short trees, of
    # which a smaller tile computes less that nobody sees.
    Row("xla", "", ANY, ANY, 256, Tile(64, 64)),
    Row("xla", "", ANY, ANY, 33, Tile(32, 32)),
    Row("xla", "", ANY, ANY, 0, Tile(16, 16)),
    # Not measured on hardware yet: 128 is the least that fills a register's lanes, and tiles of a forest that are
    # twice as long compute more that nobody sees; 256 keys halve the steps of a long prefix.
    Row("tpu", "", ANY, ANY, 1024, Tile(128, 256)),
    Row("tpu", "", ANY, ANY, 0, Tile(128, 128)),
    # Not measured on hardware yet. For Hopper, by what its compiler makes of them (make aot-cuda): wide products
    # (wgmma), pipelined loads and next to no spills; 128 keys, because with fewer the two halves of a program share the
    # turned products of dk/dv badly. 1024 programs are eight a multiprocessor.
    Row("triton", "", 64, 2, 0, Tile(128, 128, 4, (8, 8, 8), (3, 3, 2), programs=1024)),
    Row("triton", "", 128, 2, 0, Tile(128, 128, 4, (8, 8, 8), (2, 2, 2), programs=1024)),
    Row("triton", "", 256, 2, 0, Tile(64, 64, 4, (8, 8, 8), (2, 2, 1), programs=1024)),
    # float32 is multiplied without tensor cores, out of registers: what spills least.
    Row("triton", "", 256, 4, 0, Tile(32, 32, 1, (8, 8, 8), (1, 1, 1), programs=1024)),
    # Small, so that a test has many tiles.
    Row("interpret", "", ANY, ANY, 256, Tile(32, 64)),
    Row("interpret", "", ANY, ANY, 0, Tile(16, 32)),
    Row("interpret_triton", "", ANY, ANY, 256, Tile(64, 32, 2, programs=16)),
    Row("interpret_triton", "", ANY, ANY, 0, Tile(32, 16, 2, programs=16)),
)


def device_kind() -> str:
    """The kind of device that a program is traced for: that of a described one, or of the first at hand."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if described is None else described.device_kind


def row_of(backend: str, length: int, *, width: int, dtype: Any) -> Row:
    """The first row for rows of `length` tokens and heads of `width` numbers, on the device at hand."""
    kind, size = device_kind(), jnp.dtype(dtype).itemsize
    return next(
        row
        for row in ROWS
        if row.backend == backend
        and row.device in kind
        and row.width >= width
        and row.bytes >= size
        and row.length <= length
    )


def packed(tile: Tile, group: int) -> Tile:
    """The tile for `group` query heads a key/value head: the packed ones, a power of two of them, share its rows."""
    heads = min(tile.heads, group & -group)
    return tile._replace(block_q=tile.block_q // heads, heads=heads)


def bounded(tile: Tile, group: int) -> Tile:
    """The tile of a form that packs the whole group: no more than MOST_ROWS rows, and 16 queries at least."""
    block_q = tile.block_q
    while group * block_q > MOST_ROWS and block_q > 16:
        block_q //= 2
    return tile._replace(block_q=block_q)


FITTED = {"xla": lambda tile, group: tile, "triton": packed, "interpret_triton": packed}
FITTED |= {"tpu": bounded, "interpret": bounded}


def tile_of(backend: str, length: int, *, group: int, width: int, dtype: Any) -> Tile:
    """The tile for rows of `length` tokens and key/value heads with `group` query heads of `width` numbers."""
    return FITTED[backend](row_of(backend, length, width=width, dtype=dtype).tile, group)
