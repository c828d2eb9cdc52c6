"""Blockwise forest attention in plain XLA: every platform, float64 too, deterministic, no T x T array.

Online softmax over the live key tiles of each query tile (FlashAttention-2, arXiv 2307.08691, with the tile lists of
plan.py), on the arrays of tiled.py. The backward walks the same lists once: a query tile's dq stays local, dk and dv
are added to in list order, so two runs agree bit for bit.
"""

import jax
import jax.numpy as jnp

from rlalign_kernels.attention.plan import Plan
from rlalign_kernels.tile import MASKED, capped, visible


def _accumulator(dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=_accumulator(x.dtype))


def _mask(options, plan: Plan, position: jax.Array | None, i: jax.Array, j: jax.Array) -> jax.Array:
    """b[block_q, block_k]: which keys of tile j the queries of tile i see."""
    block_q, block_k = plan.block_q, plan.block_k
    query = i * block_q + jnp.arange(block_q, dtype=jnp.int32)[:, None]
    key = j * block_k + jnp.arange(block_k, dtype=jnp.int32)[None, :]
    until = jax.lax.dynamic_slice_in_dim(plan.visible_until, j * block_k, block_k)[None, :]
    at = None
    if options.window is not None and position is not None:
        at_query = jax.lax.dynamic_slice_in_dim(position, i * block_q, block_q)[:, None]
        at = at_query, jax.lax.dynamic_slice_in_dim(position, j * block_k, block_k)[None, :]
    return visible(options, query, key, until, at)


def _scores(options, q_tile: jax.Array, k_tile: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scores [K, group * block_q, block_k] of scaled queries, and d score / d (scaled dot) where that is not 1."""
    return capped(_dot("kqd,ksd->kqs", q_tile, k_tile), options.softcap)


def _tile(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def forward(options, q, k, v, plan: Plan, position):
    """(out, lse) of tiles; see tiled.py."""
    wide = _accumulator(q.dtype)
    group = q.shape[2] // plan.block_q

    def query_tile(i):
        q_tile = _tile(q, i) * jnp.asarray(options.scale, q.dtype)

        def key_tile(t, carry):
            top, total, out = carry
            j = plan.by_query.key[t]
            score, _ = _scores(options, q_tile, _tile(k, j))
            mask = jnp.tile(_mask(options, plan, position, i, j), (group, 1))[None]
            score = jnp.where(mask, score, MASKED)
            new_top = jnp.maximum(top, jnp.max(score, axis=-1))
            weight = jnp.where(mask, jnp.exp(score - new_top[..., None]), 0)
            shrink = jnp.exp(top - new_top)
            total = total * shrink + jnp.sum(weight, axis=-1)
            out = out * shrink[..., None] + _dot("kqs,ksd->kqd", weight.astype(v.dtype), _tile(v, j))
            return new_top, total, out

        shape = q_tile.shape[:2]
        start = (jnp.full(shape, MASKED, wide), jnp.zeros(shape, wide), jnp.zeros(q_tile.shape, wide))
        top, total, out = jax.lax.fori_loop(plan.first[i], plan.first[i + 1], key_tile, start)
        seen = total > 0  # a row that sees no key (padding) gives 0, with zero gradient
        total = jnp.where(seen, total, 1)
        return (out / total[..., None]).astype(q.dtype), jnp.where(seen, top + jnp.log(total), 0)

    return jax.lax.map(query_tile, jnp.arange(q.shape[0], dtype=jnp.int32))


def backward(options, q, k, v, plan: Plan, position, lse, delta, grad):
    """(dq, dk, dv) of tiles; the same lists, in the same order."""
    wide = _accumulator(q.dtype)
    group = q.shape[2] // plan.block_q

    def query_tile(carry, i):
        q_tile, grad_tile = _tile(q, i) * jnp.asarray(options.scale, q.dtype), _tile(grad, i)
        lse_tile, delta_tile = _tile(lse, i)[..., None], _tile(delta, i)[..., None]

        def key_tile(t, carry):
            dq, dk, dv = carry
            j = plan.by_query.key[t]
            k_tile, v_tile = _tile(k, j), _tile(v, j)
            score, slope = _scores(options, q_tile, k_tile)
            mask = jnp.tile(_mask(options, plan, position, i, j), (group, 1))[None]
            weight = jnp.where(mask, jnp.exp(score - lse_tile), 0)
            dscore = weight * (_dot("kqd,ksd->kqs", grad_tile, v_tile) - delta_tile)
            if slope is not None:
                dscore = dscore * slope
            weight, dscore = weight.astype(q.dtype), dscore.astype(q.dtype)
            dv = dv.at[j].add(_dot("kqs,kqd->ksd", weight, grad_tile))
            dk = dk.at[j].add(_dot("kqs,kqd->ksd", dscore, q_tile))
            return dq + _dot("kqs,ksd->kqd", dscore, k_tile), dk, dv

        start = (jnp.zeros(q_tile.shape, wide), *carry)
        dq, dk, dv = jax.lax.fori_loop(plan.first[i], plan.first[i + 1], key_tile, start)
        return (dk, dv), (dq * options.scale).astype(q.dtype)

    start = (jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide))
    (dk, dv), dq = jax.lax.scan(query_tile, start, jnp.arange(q.shape[0], dtype=jnp.int32))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)
