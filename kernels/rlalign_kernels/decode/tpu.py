"""Decode attention as a Pallas kernel for TPU (Mosaic); with interpret=True it runs on a CPU, slowly.

A grid step is one tile of keys for a few rows of X that share their bounds: decoding is bound by reading caches, and a
step should read enough to be worth its start. The last size of the grid is data, the furthest limit; outside of its
own keys a row names its first or last live tile again, which fetches nothing. The layer is prefetched as a scalar and
chooses the blocks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rlalign_kernels.decode.parts import flat, tiles
from rlalign_kernels.tile import LANES, MASKED, dot, scores

ROWS = 256  # query rows of a grid step at most, and ...
BYTES = 2**19  # ... of its keys: with their values, and while the next ones come, 2 MiB of VMEM


def _last(limit, block):
    """The last tile that holds a key below limit; the first where none does."""
    return jnp.maximum(tiles(limit, block) - 1, 0)


def _kernel(layer, first, limit, q, k, v, out, lse, top, total, acc, *, options, block, steps):
    del layer
    of, s = jax.lax.div(pl.program_id(0), jnp.int32(steps)), pl.program_id(2)
    low, here, start = first[of], limit[of], s * block

    @pl.when(s == 0)
    def _():
        top[...] = jnp.full(top.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    def inside(shape, axis):
        column = start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return (column >= low) & (column < here)

    @pl.when(jnp.maximum(start, low) < jnp.minimum(start + block, here))
    def _():
        for x in range(q.shape[0]):
            score, _ = scores(options, dot(q[x], k[x], turned=True))
            score = jnp.where(inside(score.shape, 1), score, MASKED)
            value = jnp.where(inside(v.shape[1:], 0), v[x], jnp.zeros(v.shape[1:], v.dtype))  # 0 * NaN is NaN
            new_top = jnp.maximum(top[x, :, :1], jnp.max(score, axis=1, keepdims=True))
            weight = jnp.exp(score - new_top)  # the tile has a key that is seen: exp(MASKED - new_top) is 0
            shrink = jnp.exp(top[x, :, :1] - new_top)
            new_total = total[x, :, :1] * shrink + jnp.sum(weight, axis=1, keepdims=True)
            acc[x] = acc[x] * shrink + dot(weight.astype(value.dtype), value)
            top[x], total[x] = (jnp.broadcast_to(y, top.shape[1:]) for y in (new_top, new_total))

    @pl.when(s == _last(here, block))
    def _():
        seen = total[...] > 0
        whole = jnp.where(seen, total[...], 1)
        out[...] = acc[...] / whole[:, :, :1]
        lse[...] = jnp.where(seen, top[...] + jnp.log(whole), MASKED)[:, :, :1]


def _rows_of_a_step(shared: int, height: int, size: int) -> int:
    """How many rows of X one grid step takes: a power of two that divides those that share a limit."""
    return next(n for n in (8, 4, 2, 1) if n == 1 or (shared % n == 0 and n * height <= ROWS and n * size <= BYTES))


def partial(options, q, k, v, layer, first, limit, *, interpret: bool = False):
    """(out, lse) over the keys [first, limit); see parts.py."""
    lead = q.shape[:-1]
    q, k, v = flat(q, k, v)
    rows, queries, width = q.shape
    block, height = min(options.block, k.shape[2]), min(ROWS, queries)
    shared = rows // limit.size
    step = _rows_of_a_step(shared, height, block * width * k.dtype.itemsize)
    steps = shared // step  # grid steps that share a limit

    def of_queries(x, m, s, layer, first, limit):
        del s, layer, first, limit
        return x, m, 0

    def of_keys(x, m, s, layer, first, limit):
        del m
        of = jax.lax.div(x, jnp.int32(steps))
        last = _last(limit[of], block)
        lowest = jnp.minimum(jax.lax.div(first[of], jnp.int32(block)), last)
        return layer[0], x, jnp.clip(s, lowest, last), 0

    query, key = pl.BlockSpec((step, height, width), of_queries), pl.BlockSpec((None, step, block, width), of_keys)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(rows // step, pl.cdiv(queries, height), _last(jnp.max(limit), block) + 1),
        in_specs=[query, key, key],
        out_specs=[query, pl.BlockSpec((step, height, 1), of_queries)],
        scratch_shapes=[pltpu.VMEM((step, height, n), jnp.float32) for n in (LANES, LANES, width)],
    )
    out, lse = pl.pallas_call(
        functools.partial(_kernel, options=options, block=block, steps=steps),
        grid_spec=grid,
        out_shape=[jax.ShapeDtypeStruct((*q.shape[:2], n), jnp.float32) for n in (width, 1)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention",
    )(layer, first, limit, q, k, v)
    return out.reshape(*lead, width), lse.reshape(lead)
