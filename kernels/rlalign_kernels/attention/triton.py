"""Forest attention as Pallas kernels for GPUs, by Triton; with interpret=True they run on a CPU, slowly.

One program is one query tile of the heads that its rows hold (output and dq), or one key tile of one key/value head, or
a part of its queries (dk and dv, over the heads of its group). It walks the live pairs of plan.py in their order in a
loop whose bounds are data: every sum has one order, without atomics, and nothing is read for a pair that is not live.
Long tiles start first, or a prompt's would end alone. Arrays are those of tiled.py, whose query tiles hold the heads of
a group one after the other; a head that is no power of two wide is padded to one.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from rlalign_kernels.attention.plan import Plan
from rlalign_kernels.tile import MASKED, dot, scores, visible

LOG2E = math.log2(math.e)  # exponentials are powers of two: what a GPU has an instruction for


def _visible(options, i, j, until, at, rows, *, turned=False):
    """b[rows, block_k], or turned: which keys of tile j the rows of query tile i see; a row is a query of one head."""
    block_q = options.tile.block_q
    query = i * block_q + (jnp.arange(rows, dtype=jnp.int32) & (block_q - 1))
    key = j * until.shape[0] + jnp.arange(until.shape[0], dtype=jnp.int32)
    down = (lambda x: x[None, :]) if turned else (lambda x: x[:, None])  # a query's place
    along = (lambda x: x[:, None]) if turned else (lambda x: x[None, :])  # a key's place
    position = (down(at[0]), along(at[1])) if at else None
    return visible(options, down(query), along(key), along(until), position)


def _scores(options, product):
    """scores() times log2(e), and its slope."""
    softcap = None if options.softcap is None else options.softcap * LOG2E
    return scores(options._replace(scale=options.scale * LOG2E, softcap=softcap), product)


def _hide(options, score, full, *where, turned=False):
    """Scores with hidden ones at MASKED. A full pair hides none, but what a window hides."""
    mask = lambda: jnp.where(_visible(options, *where, turned=turned), score, MASKED)
    return mask() if options.window is not None else jax.lax.cond(full == 1, lambda: score, mask)


def _forward_kernel(pairs, full, first, order, until, *refs, options):
    *at, q, k, v, out, lse = refs
    i, rows = triton.load(order.at[pl.program_id(0)]), q.shape[1]
    query = triton.load(q.at[i])
    where = [triton.load(at[0].at[i])] if at else []

    def step(t, carry):
        acc, top, total = carry
        j = triton.load(pairs.at[t])
        value = triton.load(v.at[j])
        score, _ = _scores(options, dot(query, triton.load(k.at[j]), turned=True))
        here = [*where, triton.load(at[1].at[j])] if at else []
        score = _hide(options, score, triton.load(full.at[t]), i, j, triton.load(until.at[j]), here, rows)
        new_top = jnp.maximum(top, jnp.max(score, axis=1))
        base = jnp.where(new_top == MASKED, 0, new_top)  # of a row that has seen nothing yet
        weight = jnp.exp2(score - base[:, None])
        shrink = jnp.exp2(top - new_top)
        acc = acc * shrink[:, None] + dot(weight.astype(value.dtype), value)
        return acc, new_top, total * shrink + jnp.sum(weight, axis=1)

    start = (
        jnp.zeros(q.shape[1:], jnp.float32),
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    acc, top, total = jax.lax.fori_loop(triton.load(first.at[i]), triton.load(first.at[i + 1]), step, start)
    seen = total > 0  # a row that sees no key (padding) gives 0, with zero gradient
    whole = jnp.where(seen, total, 1)
    out[i] = (acc / whole[:, None]).astype(out.dtype)
    lse[i] = jnp.where(seen, top / LOG2E + jnp.log(whole), 0)


def _dq_kernel(pairs, full, first, order, until, *refs, options):
    *at, q, k, v, grad, lse, delta, dq = refs
    i, rows = triton.load(order.at[pl.program_id(0)]), q.shape[1]
    query, gradient, lse_row, delta_row = (triton.load(x.at[i]) for x in (q, grad, lse, delta))
    lse_row = lse_row * LOG2E
    where = [triton.load(at[0].at[i])] if at else []

    def step(t, acc):
        j = triton.load(pairs.at[t])
        key = triton.load(k.at[j])
        score, slope = _scores(options, dot(query, key, turned=True))
        here = [*where, triton.load(at[1].at[j])] if at else []
        score = _hide(options, score, triton.load(full.at[t]), i, j, triton.load(until.at[j]), here, rows)
        weight = jnp.exp2(score - lse_row[:, None])
        dscore = weight * (dot(gradient, triton.load(v.at[j]), turned=True) - delta_row[:, None])
        dscore = dscore if slope is None else dscore * slope
        return acc + dot(dscore.astype(key.dtype), key)

    start = jnp.zeros(q.shape[1:], jnp.float32)
    acc = jax.lax.fori_loop(triton.load(first.at[i]), triton.load(first.at[i + 1]), step, start)
    dq[i] = (acc * options.scale).astype(dq.dtype)


def _dkv_kernel(pairs, full, first, order, until, *refs, options):
    """Scores are turned here, [block_k, rows]: every product is a plain one."""
    *at, q, k, v, grad, lse, delta, dk, dv = refs
    j, (inner, rows) = triton.load(order.at[pl.program_id(0)]), q.shape[1:3]
    key, value, reach = triton.load(k.at[j]), triton.load(v.at[j]), triton.load(until.at[j])
    where = [triton.load(at[1].at[j])] if at else []

    # A step is one pair and one set of heads; equal parts of the steps, in their order.
    begin, end = triton.load(first.at[j]), triton.load(first.at[j + 1])
    steps = (end - begin) * inner
    part = (steps + dk.shape[0] - 1) // dk.shape[0]

    def step(s, carry):
        dk_acc, dv_acc = carry
        t, h = begin + s // inner, s % inner
        i = triton.load(pairs.at[t])
        query, gradient = triton.load(q.at[i, h]), triton.load(grad.at[i, h])
        score, slope = _scores(options, dot(key, query, turned=True))
        here = [triton.load(at[0].at[i]), *where] if at else []
        score = _hide(options, score, triton.load(full.at[t]), i, j, reach, here, rows, turned=True)
        weight = jnp.exp2(score - triton.load(lse.at[i, h])[None, :] * LOG2E)
        dscore = weight * (dot(value, gradient, turned=True) - triton.load(delta.at[i, h])[None, :])
        dscore = dscore if slope is None else dscore * slope
        return dk_acc + dot(dscore.astype(query.dtype), query), dv_acc + dot(weight.astype(gradient.dtype), gradient)

    start = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    low = pl.program_id(2) * part
    dk_acc, dv_acc = jax.lax.fori_loop(low, jnp.minimum(low + part, steps), step, start)
    dk[pl.program_id(2), j] = (dk_acc * options.scale).astype(dk.dtype)
    dv[pl.program_id(2), j] = dv_acc.astype(dv.dtype)


def _whole(x):
    """The block that is all of an array."""
    return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)


def _of_rows(x):
    """Of [tiles_q, K, inner, rows, ...], all tiles of the heads of a program (tile, head)."""
    inner, rest = x.shape[2], (0,) * (x.ndim - 3)
    split = lambda h: (jax.lax.div(h, jax.lax.full_like(h, inner)), jax.lax.rem(h, jax.lax.full_like(h, inner)))
    return pl.BlockSpec((x.shape[0], None, None, *x.shape[3:]), lambda i, h: (0, *split(h), *rest))


def _of_keys(x, inner):
    """Of [tiles_k, K, block_k, D], all tiles that a program (tile, head) reads."""
    return pl.BlockSpec(
        (x.shape[0], None, *x.shape[2:]), lambda i, h: (0, jax.lax.div(h, jax.lax.full_like(h, inner)), 0, 0)
    )


def _of_head(x, axis):
    """Of an array whose `axis` is that of key/value heads, all that belongs to a program (tile, head, part)."""
    shape = tuple(None if a == axis else size for a, size in enumerate(x.shape))
    return pl.BlockSpec(shape, lambda j, h, part: tuple(h if a == axis else 0 for a in range(x.ndim)))


def _wide(x):
    """The last axis padded to a power of two, which is what Triton takes."""
    width = x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, (1 << (width - 1).bit_length()) - width)])


def _by_rows(x, options):
    """[tiles_q, K, group * block_q, ...] -> [tiles_q, K, inner, rows, ...]."""
    rows = options.tile.heads * options.tile.block_q
    return x.reshape(*x.shape[:2], -1, rows, *x.shape[3:])


def _lists(pairs, others, first, options, plan: Plan, position):
    """What every program reads whole: its pairs, where they begin, tiles by falling work, the mask and positions."""
    order = jnp.argsort(first[:-1] - first[1:], stable=True).astype(jnp.int32)
    lists = [others, pairs.full, first, order, plan.visible_until.reshape(-1, plan.block_k)]
    if position is not None:
        lists.append(jnp.tile(position.reshape(-1, plan.block_q), (1, options.tile.heads)))  # of every head's rows
        lists.append(position.reshape(-1, plan.block_k))
    return [(x, _whole(x)) for x in lists]


def _parts(options, programs, steps):
    """Into how many parts the queries of a key tile are cut: a power of two, so that the device has its programs, but
    no more than a key tile can have steps."""
    missing = -(-options.tile.programs // programs)
    return min(1 << (missing - 1).bit_length(), 1 << (steps.bit_length() - 1))


def _call(kernel, options, grid, inputs, results, interpret):
    """`inputs` are (array, block), `results` (shape and dtype, block)."""
    name = kernel.__name__.strip("_").removesuffix("_kernel")
    which = ("forward", "dq", "dkv").index(name)
    return pl.pallas_call(
        functools.partial(kernel, options=options),
        grid=grid,
        in_specs=[block for _, block in inputs],
        out_specs=[block for _, block in results],
        out_shape=[shape for shape, _ in results],
        compiler_params=triton.CompilerParams(
            num_warps=options.tile.warps[which], num_stages=options.tile.stages[which]
        ),
        interpret=interpret,
        name=f"forest_attention_{name}",
    )(*(x for x, _ in inputs))


def forward(options, q, k, v, plan: Plan, position, *, interpret: bool = False):
    """(out, lse) of tiles; see tiled.py."""
    query, keys, values = _by_rows(_wide(q), options), _wide(k), _wide(v)
    tiles, kv_heads, inner = query.shape[:3]
    inputs = _lists(plan.by_query, plan.by_query.key, plan.first, options, plan, position)
    inputs += [(query, _of_rows(query)), (keys, _of_keys(keys, inner)), (values, _of_keys(values, inner))]
    rows = jax.ShapeDtypeStruct(query.shape[:4], jnp.float32)
    results = [(jax.ShapeDtypeStruct(query.shape, q.dtype), _of_rows(query)), (rows, _of_rows(rows))]
    out, lse = _call(_forward_kernel, options, (tiles, kv_heads * inner), inputs, results, interpret)
    return out[..., : q.shape[3]].reshape(q.shape), lse.reshape(q.shape[:3])


def backward(options, q, k, v, plan: Plan, position, lse, delta, grad, *, interpret: bool = False):
    """(dq, dk, dv) of tiles; see tiled.py."""
    query, gradient, keys, values = _by_rows(_wide(q), options), _by_rows(_wide(grad), options), _wide(k), _wide(v)
    lse, delta = _by_rows(lse, options), _by_rows(delta, options)
    tiles, kv_heads, inner = query.shape[:3]

    inputs = _lists(plan.by_query, plan.by_query.key, plan.first, options, plan, position)
    inputs += [(query, _of_rows(query)), (keys, _of_keys(keys, inner)), (values, _of_keys(values, inner))]
    inputs += [(x, _of_rows(x)) for x in (gradient, lse, delta)]
    results = [(jax.ShapeDtypeStruct(query.shape, q.dtype), _of_rows(query))]
    [dq] = _call(_dq_kernel, options, (tiles, kv_heads * inner), inputs, results, interpret)

    inputs = _lists(plan.by_key, plan.by_key.query, plan.first_key, options, plan, position)
    inputs += [(x, _of_head(x, 1)) for x in (query, keys, values, gradient, lse, delta)]
    parts = _parts(options, keys.shape[0] * kv_heads, tiles * inner)
    part = jax.ShapeDtypeStruct((parts, *keys.shape), k.dtype if parts == 1 else jnp.float32)
    grid = (keys.shape[0], kv_heads, parts)
    dk, dv = _call(_dkv_kernel, options, grid, inputs, [(part, _of_head(part, 2))] * 2, interpret)
    width = q.shape[3]
    dk, dv = (functools.reduce(jnp.add, x).astype(k.dtype)[..., :width] for x in (dk, dv))
    return dq[..., :width].reshape(q.shape), dk, dv
