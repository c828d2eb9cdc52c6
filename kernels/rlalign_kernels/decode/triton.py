"""Decode attention as a Pallas kernel for GPUs, by Triton; with interpret=True it runs on a CPU, slowly.

One program is one tile of query rows of one row of X, over one of several equal parts of the live tiles of keys: few
prompts still fill a GPU. The parts are joined outside. A program's bounds are data: nothing is read behind a limit.
Query rows are padded to what a product of tiles takes, widths to powers of two; keys and values lie as they are.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from rlalign_kernels.decode.parts import flat, join, tiles
from rlalign_kernels.tile import MASKED, dot, scores

ROWS = 16  # of a tile of queries: what a product of tiles takes at least
MOST = {2: 64, 4: 32}  # and at most, by bytes of a number: with warps and stages below, what spills no registers
PROGRAMS = 264  # two for each of an H100's processors
KEYS = 256  # of a part at least, when all columns are filled


def _kernel(layer, first, limit, q, k, v, out, lse, *, options, block, parts):
    (height, padded), width = q.shape, k.shape[2]
    low, here, at = triton.load(first), triton.load(limit), triton.load(layer)
    begin = jax.lax.div(low, jnp.int32(block))
    end = jnp.where(low < here, tiles(here, block), begin)
    share = tiles(end - begin, parts)  # tiles of a part, rounded up
    own = begin + pl.program_id(2) * share
    query, column = triton.load(q), jnp.arange(padded, dtype=jnp.int32)

    def tile(t, carry):
        acc, top, total = carry
        start = t * block
        key_at = start + jnp.arange(block, dtype=jnp.int32)
        inside = (key_at >= low) & (key_at < here)
        mask = inside[:, None] & (column < width)[None, :]
        # A start that is no int lets the slice reach over the width: the mask hides what is not there.
        where = at, pl.ds(start, block), pl.ds(jnp.int32(0), padded)
        key, value = (triton.load(y.at[where], mask=mask, other=0) for y in (k, v))
        score, _ = scores(options, dot(query, key, turned=True))
        score = jnp.where(inside[None, :], score, MASKED)
        new_top = jnp.maximum(top, jnp.max(score, axis=1))
        weight = jnp.exp(score - new_top[:, None])  # every tile has a key: exp(MASKED - top) is 0
        shrink = jnp.exp(top - new_top)
        acc = acc * shrink[:, None] + dot(weight.astype(value.dtype), value)
        return acc, new_top, total * shrink + jnp.sum(weight, axis=1)

    start = (
        jnp.zeros((height, padded), jnp.float32),
        jnp.full((height,), MASKED, jnp.float32),
        jnp.zeros((height,), jnp.float32),
    )
    acc, top, total = jax.lax.fori_loop(own, jnp.minimum(own + share, end), tile, start)
    seen = total > 0  # a part without keys has no weight
    whole = jnp.where(seen, total, 1)
    triton.store(out, acc / whole[:, None])
    triton.store(lse, jnp.where(seen, top + jnp.log(whole), MASKED))


def _power(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()


def partial(options, q, k, v, layer, first, limit, *, interpret: bool = False):
    """(out, lse) over the keys [first, limit); see parts.py."""
    lead = q.shape[:-1]
    q, k, v = flat(q, k, v)
    rows, queries, width = q.shape
    size = q.dtype.itemsize
    height = min(max(_power(queries), ROWS), MOST[size])
    blocks, padded = pl.cdiv(queries, height), _power(width)
    parts = max(1, min(pl.cdiv(PROGRAMS, rows * blocks), k.shape[2] // KEYS))
    q = jnp.pad(q, ((0, 0), (0, blocks * height - queries), (0, padded - width)))
    shared = rows // limit.size
    bound = pl.BlockSpec((None,), lambda x, m, p: (jax.lax.div(x, jnp.int32(shared)),))
    cache = pl.BlockSpec((k.shape[0], None, *k.shape[2:]), lambda x, m, p: (0, x, 0, 0))
    out, lse = pl.pallas_call(
        functools.partial(_kernel, options=options, block=options.block, parts=parts),
        grid=(rows, blocks, parts),
        in_specs=[
            pl.BlockSpec((None,), lambda x, m, p: (0,)),
            bound,
            bound,
            pl.BlockSpec((None, height, padded), lambda x, m, p: (x, m, 0)),
            cache,
            cache,
        ],
        out_specs=[
            pl.BlockSpec((None, None, height, padded), lambda x, m, p: (p, x, m, 0)),
            pl.BlockSpec((None, None, height), lambda x, m, p: (p, x, m)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((parts, *q.shape), jnp.float32),
            jax.ShapeDtypeStruct((parts, *q.shape[:2]), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(
            num_warps=8 if padded * size > 256 else 4, num_stages=2 if size == 2 else 1
        ),
        interpret=interpret,
        name="decode_attention",
    )(layer, first, limit, q, k, v)
    out, lse = out[:, :, :queries, :width], lse[:, :, :queries]
    out, lse = (out[0], lse[0]) if parts == 1 else join(out, lse)
    return out.reshape(*lead, width), lse.reshape(lead)
