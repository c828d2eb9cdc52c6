"""Forest attention as Pallas kernels for TPU (Mosaic); with interpret=True they run on a CPU, slowly.

One grid step is one live pair of tiles for one key/value head: the grid is [K, live pairs], its second size is data,
and the lists of plan.py, prefetched as scalars, choose the blocks. Nothing is fetched or run for a pair that is not
live; without a window, masks are computed in pairs that are not full only. Output and dq accumulate in VMEM along a
query tile's pairs, dk and dv along a key tile's, where the heads of a group lie in one tile: every sum has one order,
without atomics. Arrays are those of tiled.py. float32 inputs are multiplied in full precision.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rlalign_kernels.attention.plan import Pairs, Plan
from rlalign_kernels.tile import LANES, MASKED, dot, lanes, scores, visible

ROOM = 80_000  # pairs: three lists of int32 in 1 MiB of scalar memory


def _visible(options, i, j, until, at, shape, block_q, *, turned=False):
    """b[rows, block_k]: which keys of tile j the rows of query tile i see; a row is a query of one head.

    until is [1, block_k] and `at` the positions ([rows, 1], [1, block_k]) of a window. Turned, the mask is
    b[block_k, rows], until [block_k, 1] and the positions ([1, rows], [block_k, 1]).
    """
    down, along = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    row, column = (along, down) if turned else (down, along)
    query, key = i * block_q + (row & (block_q - 1)), j * shape[0 if turned else 1] + column
    return visible(options, query, key, until, at or None)


def _walk(tile, full, count, options, accumulate):
    """(is this grid step its tile's first, its last, what it does); `tile` is the list of what the sums belong to."""
    s, end = pl.program_id(1), jnp.maximum(count[0], 1) - 1
    first = (s == 0) | (tile[jnp.maximum(s - 1, 0)] != tile[s])
    last = (s == end) | (tile[jnp.minimum(s + 1, end)] != tile[s])

    def run():
        if options.window is not None:
            accumulate(masked=True)
        else:
            pl.when(full[s] == 1)(functools.partial(accumulate, masked=False))
            pl.when(full[s] == 0)(functools.partial(accumulate, masked=True))

    return first, last, run


def _forward_kernel(query, key, full, count, q, k, v, until, *refs, options, block_q):
    *at, out, lse, top, total, acc = refs
    s = pl.program_id(1)

    def accumulate(*, masked):
        score, _ = scores(options, dot(q[...], k[...], turned=True))
        if masked:
            where = [lanes(at[0][...])[:, :1], at[1][...]] if at else []
            mask = _visible(options, query[s], key[s], until[...], where, score.shape, block_q)
            score = jnp.where(mask, score, MASKED)
        new_top = jnp.maximum(top[:, :1], jnp.max(score, axis=1, keepdims=True))
        weight = jnp.exp(score - new_top)
        if masked:
            weight = jnp.where(mask, weight, 0)  # of a row that has seen nothing yet
        shrink = jnp.exp(top[:, :1] - new_top)
        total[...] = jnp.broadcast_to(total[:, :1] * shrink + jnp.sum(weight, axis=1, keepdims=True), total.shape)
        acc[...] = acc[...] * shrink + dot(weight.astype(v.dtype), v[...])
        top[...] = jnp.broadcast_to(new_top, top.shape)

    first, last, run = _walk(query, full, count, options, accumulate)

    @pl.when(first)
    def _():
        top[...] = jnp.full(top.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    run()

    @pl.when(last)
    def _():
        seen = total[...] > 0  # a row that sees no key (padding) gives 0, with zero gradient
        whole = jnp.where(seen, total[...], 1)
        out[...] = (acc[...] / whole[:, :1]).astype(out.dtype)
        lse[...] = jnp.where(seen, top[...] + jnp.log(whole), 0).T[:1]


def _dq_kernel(query, key, full, count, q, k, v, until, *refs, options, block_q):
    *at, grad, lse, delta, dq, lse_rows, delta_rows, acc = refs
    s = pl.program_id(1)

    def accumulate(*, masked):
        score, slope = scores(options, dot(q[...], k[...], turned=True))
        weight = jnp.exp(score - lse_rows[:, :1])
        if masked:
            where = [lanes(at[0][...])[:, :1], at[1][...]] if at else []
            weight = jnp.where(_visible(options, query[s], key[s], until[...], where, score.shape, block_q), weight, 0)
        dscore = weight * (dot(grad[...], v[...], turned=True) - delta_rows[:, :1])
        dscore = dscore if slope is None else dscore * slope
        acc[...] += dot(dscore.astype(k.dtype), k[...])

    first, last, run = _walk(query, full, count, options, accumulate)

    @pl.when(first)
    def _():
        lse_rows[...], delta_rows[...] = lanes(lse[...]), lanes(delta[...])
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    run()

    @pl.when(last)
    def _():
        dq[...] = (acc[...] * options.scale).astype(dq.dtype)


def _dkv_kernel(query, key, full, count, q, k, v, until, *refs, options, block_q):
    """Scores are turned here, [block_k, rows]: lse and delta are rows, and all products are plain ones."""
    *at, grad, lse, delta, dk, dv, dk_acc, dv_acc = refs
    s = pl.program_id(1)

    def accumulate(*, masked):
        score, slope = scores(options, dot(k[...], q[...], turned=True))
        weight = jnp.exp(score - lse[...])
        if masked:
            where, reach = [at[0][...], lanes(at[1][...])[:, :1]] if at else [], lanes(until[...])[:, :1]
            mask = _visible(options, query[s], key[s], reach, where, score.shape, block_q, turned=True)
            weight = jnp.where(mask, weight, 0)
        dscore = weight * (dot(v[...], grad[...], turned=True) - delta[...])
        dscore = dscore if slope is None else dscore * slope
        dv_acc[...] += dot(weight.astype(grad.dtype), grad[...])
        dk_acc[...] += dot(dscore.astype(q.dtype), q[...])

    first, last, run = _walk(key, full, count, options, accumulate)

    @pl.when(first)
    def _():
        dk_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32)
        dv_acc[...] = jnp.zeros(dv_acc.shape, jnp.float32)

    run()

    @pl.when(last)
    def _():
        dk[...] = (dk_acc[...] * options.scale).astype(dk.dtype)
        dv[...] = dv_acc[...].astype(dv.dtype)


def _block(tile, shape):
    """The block of an array [tiles, K, rows, D] at this pair's query tile (0) or key tile (1) and this head."""
    return pl.BlockSpec((None, None, *shape[2:]), lambda head, s, *lists: (lists[tile][s], head, 0, 0))


def _row(tile, length):
    """The block of an array [tiles, 1, length] at this pair's query tile (0) or key tile (1)."""
    return pl.BlockSpec((None, 1, length), lambda head, s, *lists: (lists[tile][s], 0, 0))


def _call(kernel, options, plan: Plan, pairs: Pairs, q, k, v, position, more, results, scratch, interpret):
    """A kernel over live pairs: `more` are arrays of query tiles, results (shape, dtype, tile), scratch float32."""
    if pairs.query.size > ROOM:
        raise ValueError(
            f"rows of {plan.visible_until.size} tokens in all can have {pairs.query.size} pairs of tiles, more than "
            f"the {ROOM} that a TPU's scalar memory holds: fewer or shorter rows a device, or backend='xla'"
        )
    height, block_q, block_k = q.shape[2], plan.block_q, plan.block_k
    inputs = [(q, _block(0, q.shape)), (k, _block(1, k.shape)), (v, _block(1, v.shape))]
    inputs.append((plan.visible_until.reshape(-1, 1, block_k), _row(1, block_k)))
    if options.window is not None:
        at_query = jnp.tile(position.reshape(-1, 1, block_q), (1, 1, height // block_q))  # of every head's rows
        inputs += [(at_query, _row(0, height)), (position.reshape(-1, 1, block_k), _row(1, block_k))]
    inputs += [(x, _block(0, x.shape)) for x in more]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(pairs),
        grid=(q.shape[1], jnp.maximum(pairs.count[0], 1)),
        in_specs=[spec for _, spec in inputs],
        out_specs=[_block(tile, shape) for shape, _, tile in results],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    )
    return pl.pallas_call(
        functools.partial(kernel, options=options, block_q=block_q),
        grid_spec=grid,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=f"forest_attention{kernel.__name__.removesuffix('_kernel')}",
    )(*pairs, *(x for x, _ in inputs))


def forward(options, q, k, v, plan: Plan, position, *, interpret: bool = False):
    """(out, lse) of tiles; see tiled.py."""
    tiles, kv_heads, height, width = q.shape
    results = [(q.shape, q.dtype, 0), ((tiles, kv_heads, 1, height), jnp.float32, 0)]
    scratch = [(height, LANES), (height, LANES), (height, width)]
    run = functools.partial(_call, _forward_kernel, options, plan, plan.by_query, q, k, v, position)
    out, lse = run([], results, scratch, interpret)
    return out, lse[:, :, 0]


def backward(options, q, k, v, plan: Plan, position, lse, delta, grad, *, interpret: bool = False):
    """(dq, dk, dv) of tiles; see tiled.py."""
    height, width = q.shape[2:]
    more, rows = [grad, lse[:, :, None], delta[:, :, None]], (height, LANES)
    run = functools.partial(_call, options=options, plan=plan, q=q, k=k, v=v, position=position, more=more)
    run = functools.partial(run, interpret=interpret)
    [dq] = run(_dq_kernel, pairs=plan.by_query, results=[(q.shape, q.dtype, 0)], scratch=[rows, rows, (height, width)])
    results = [(k.shape, k.dtype, 1), (v.shape, v.dtype, 1)]
    dk, dv = run(_dkv_kernel, pairs=plan.by_key, results=results, scratch=[k.shape[2:]] * 2)
    return dq, dk, dv
