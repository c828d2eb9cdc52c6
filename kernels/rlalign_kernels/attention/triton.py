"""Forest attention as Pallas kernels for GPUs, by Triton; with interpret=True they run on a CPU, slowly.

One program is one query tile of one query head (output and dq), or one key tile of one key/value head (dk and dv, over
the heads of its group). It walks the live pairs of plan.py in their order in a loop whose bounds are data: every sum
has one order, without atomics, and nothing is read for a pair that is not live. Arrays are those of tiled.py, whose
query tiles hold the heads of a group one after the other; a head that is no power of two wide is padded to one.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from rlalign_kernels.attention.plan import Plan
from rlalign_kernels.tile import MASKED, dot, scores


def _visible(options, i, j, until, at, block_q, *, turned=False):
    """b[block_q, block_k], or turned: which keys of tile j the queries of tile i see."""
    query = i * block_q + jnp.arange(block_q, dtype=jnp.int32)
    key = j * until.shape[0] + jnp.arange(until.shape[0], dtype=jnp.int32)
    down = (lambda x: x[None, :]) if turned else (lambda x: x[:, None])  # a query's place
    along = (lambda x: x[:, None]) if turned else (lambda x: x[None, :])  # a key's place
    mask = (along(key) <= down(query)) & (down(query) < along(until)) if options.causal else down(query) < along(until)
    if at:
        mask &= down(at[0]) - along(at[1]) < options.window
    return mask


def _forward_kernel(pairs, first, until, *refs, options):
    *at, q, k, v, out, lse = refs
    i, block_q = pl.program_id(0), q.shape[0]
    query = triton.load(q)
    where = [triton.load(at[0].at[i])] if at else []

    def step(t, carry):
        acc, top, total = carry
        j = triton.load(pairs.at[t])
        value = triton.load(v.at[j])
        score, _ = scores(options, dot(query, triton.load(k.at[j]), turned=True))
        here = [*where, triton.load(at[1].at[j])] if at else []
        mask = _visible(options, i, j, triton.load(until.at[j]), here, block_q)
        score = jnp.where(mask, score, MASKED)
        new_top = jnp.maximum(top, jnp.max(score, axis=1))
        weight = jnp.where(mask, jnp.exp(score - new_top[:, None]), 0)
        shrink = jnp.exp(top - new_top)
        acc = acc * shrink[:, None] + dot(weight.astype(value.dtype), value)
        return acc, new_top, total * shrink + jnp.sum(weight, axis=1)

    start = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full((block_q,), MASKED, jnp.float32),
        jnp.zeros((block_q,), jnp.float32),
    )
    acc, top, total = jax.lax.fori_loop(triton.load(first.at[i]), triton.load(first.at[i + 1]), step, start)
    seen = total > 0  # a row that sees no key (padding) gives 0, with zero gradient
    whole = jnp.where(seen, total, 1)
    triton.store(out, (acc / whole[:, None]).astype(out.dtype))
    triton.store(lse, jnp.where(seen, top + jnp.log(whole), 0))


def _dq_kernel(pairs, first, until, *refs, options):
    *at, q, k, v, grad, lse, delta, dq = refs
    i, block_q = pl.program_id(0), q.shape[0]
    query, gradient, lse_row, delta_row = (triton.load(x) for x in (q, grad, lse, delta))
    where = [triton.load(at[0].at[i])] if at else []

    def step(t, acc):
        j = triton.load(pairs.at[t])
        key = triton.load(k.at[j])
        score, slope = scores(options, dot(query, key, turned=True))
        here = [*where, triton.load(at[1].at[j])] if at else []
        mask = _visible(options, i, j, triton.load(until.at[j]), here, block_q)
        weight = jnp.where(mask, jnp.exp(score - lse_row[:, None]), 0)
        dscore = weight * (dot(gradient, triton.load(v.at[j]), turned=True) - delta_row[:, None])
        dscore = dscore if slope is None else dscore * slope
        return acc + dot(dscore.astype(key.dtype), key)

    start = jnp.zeros(q.shape, jnp.float32)
    acc = jax.lax.fori_loop(triton.load(first.at[i]), triton.load(first.at[i + 1]), step, start)
    triton.store(dq, (acc * options.scale).astype(dq.dtype))


def _dkv_kernel(pairs, first, until, *refs, options):
    """Scores are turned here, [block_k, block_q]: every product is a plain one."""
    *at, q, k, v, grad, lse, delta, dk, dv = refs
    j, (group, block_q) = pl.program_id(0), q.shape[1:3]
    key, value, reach = triton.load(k), triton.load(v), triton.load(until.at[j])
    where = [triton.load(at[1].at[j])] if at else []

    def step(t, carry):
        i = triton.load(pairs.at[t])
        here = [triton.load(at[0].at[i]), *where] if at else []
        mask = _visible(options, i, j, reach, here, block_q, turned=True)

        def head(h, carry):
            dk_acc, dv_acc = carry
            query, gradient = triton.load(q.at[i, h]), triton.load(grad.at[i, h])
            score, slope = scores(options, dot(key, query, turned=True))
            weight = jnp.where(mask, jnp.exp(score - triton.load(lse.at[i, h])[None, :]), 0)
            dscore = weight * (dot(value, gradient, turned=True) - triton.load(delta.at[i, h])[None, :])
            dscore = dscore if slope is None else dscore * slope
            return dk_acc + dot(dscore.astype(query.dtype), query), dv_acc + dot(
                weight.astype(gradient.dtype), gradient
            )

        return jax.lax.fori_loop(0, group, head, carry)

    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dk_acc, dv_acc = jax.lax.fori_loop(triton.load(first.at[j]), triton.load(first.at[j + 1]), step, start)
    triton.store(dk, (dk_acc * options.scale).astype(dk.dtype))
    triton.store(dv, dv_acc.astype(dv.dtype))


def _whole(x):
    """The block that is all of an array."""
    return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)


def _of_group(head, group):
    """(key/value head, place in its group) of a query head."""
    size = jax.lax.full_like(head, group)
    return jax.lax.div(head, size), jax.lax.rem(head, size)


def _query(x):
    """Of [tiles_q, K, group, block_q, ...], the tile and head of a program (tile, head)."""
    rest = (0,) * (x.ndim - 3)
    return pl.BlockSpec((None, None, None, *x.shape[3:]), lambda i, h: (i, *_of_group(h, x.shape[2]), *rest))


def _keys(x, group):
    """Of [tiles_k, K, block_k, D], all tiles that a query head reads."""
    return pl.BlockSpec((x.shape[0], None, *x.shape[2:]), lambda i, h: (0, _of_group(h, group)[0], 0, 0))


def _key(x):
    """Of [tiles_k, K, block_k, D], the tile of a program (tile, key/value head)."""
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda j, h: (j, h, 0, 0))


def _queries(x):
    """Of [tiles_q, K, group, block_q, ...], all tiles and heads that read a key/value head."""
    return pl.BlockSpec((x.shape[0], None, *x.shape[2:]), lambda j, h: (0, h, *(0,) * (x.ndim - 2)))


def _wide(x):
    """The last axis padded to a power of two, which is what Triton takes."""
    width = x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, (1 << (width - 1).bit_length()) - width)])


def _by_head(x, plan: Plan):
    """[tiles_q, K, group * block_q, ...] -> [tiles_q, K, group, block_q, ...]."""
    return x.reshape(*x.shape[:2], -1, plan.block_q, *x.shape[3:])


def _lists(pairs, first, plan: Plan, position):
    """What every program reads whole: its pairs, where they begin, visible_until and positions by tile."""
    at = [] if position is None else [position.reshape(-1, plan.block_q), position.reshape(-1, plan.block_k)]
    return [(x, _whole(x)) for x in (pairs, first, plan.visible_until.reshape(-1, plan.block_k), *at)]


def _call(kernel, options, grid, inputs, results, interpret):
    """`inputs` are (array, block), `results` (shape, dtype, block)."""
    shape, dtype, _ = results[0]
    row = shape[-1] * jnp.dtype(dtype).itemsize  # bytes; beyond 256, two stages exceed an H100's shared memory
    return pl.pallas_call(
        functools.partial(kernel, options=options),
        grid=grid,
        in_specs=[block for _, block in inputs],
        out_specs=[block for *_, block in results],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in results],
        compiler_params=triton.CompilerParams(num_warps=8 if shape[-1] >= 128 else 4, num_stages=1 if row > 256 else 2),
        interpret=interpret,
        name=f"forest_attention{kernel.__name__.removesuffix('_kernel')}",
    )(*(x for x, _ in inputs))


def forward(options, q, k, v, plan: Plan, position, *, interpret: bool = False):
    """(out, lse) of tiles; see tiled.py."""
    query, keys, values = _by_head(_wide(q), plan), _wide(k), _wide(v)
    tiles, kv_heads, group = query.shape[:3]
    inputs = _lists(plan.by_query.key, plan.first, plan, position)
    inputs += [(query, _query(query)), (keys, _keys(keys, group)), (values, _keys(values, group))]
    rows = jax.ShapeDtypeStruct(query.shape[:4], jnp.float32)
    results = [(query.shape, q.dtype, _query(query)), (rows.shape, rows.dtype, _query(rows))]
    out, lse = _call(_forward_kernel, options, (tiles, kv_heads * group), inputs, results, interpret)
    return out[..., : q.shape[3]].reshape(q.shape), lse.reshape(q.shape[:3])


def backward(options, q, k, v, plan: Plan, position, lse, delta, grad, *, interpret: bool = False):
    """(dq, dk, dv) of tiles; see tiled.py."""
    query, gradient, keys, values = _by_head(_wide(q), plan), _by_head(_wide(grad), plan), _wide(k), _wide(v)
    lse, delta = _by_head(lse, plan), _by_head(delta, plan)
    tiles, kv_heads, group = query.shape[:3]

    inputs = _lists(plan.by_query.key, plan.first, plan, position)
    inputs += [(query, _query(query)), (keys, _keys(keys, group)), (values, _keys(values, group))]
    inputs += [(x, _query(x)) for x in (gradient, lse, delta)]
    results = [(query.shape, q.dtype, _query(query))]
    [dq] = _call(_dq_kernel, options, (tiles, kv_heads * group), inputs, results, interpret)

    inputs = _lists(plan.by_key.query, plan.first_key, plan, position)
    inputs += [(query, _queries(query)), (keys, _key(keys)), (values, _key(values))]
    inputs += [(x, _queries(x)) for x in (gradient, lse, delta)]
    results = [(x.shape, x.dtype, _key(x)) for x in (keys, values)]
    dk, dv = _call(_dkv_kernel, options, (keys.shape[0], kv_heads), inputs, results, interpret)
    width = q.shape[3]
    return dq[..., :width].reshape(q.shape), dk[..., :width], dv[..., :width]
