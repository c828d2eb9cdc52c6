"""Log-probs as Pallas kernels for GPUs, by Triton; with interpret=True they run on a CPU, slowly.

A program of the forward is one tile of rows and one share of the vocabulary, which it walks tile by tile; four numbers
a row and share leave it and merge outside. A program of the backward makes one tile of logits anew and writes its
gradients. Programs side by side share a tile of the head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from rlalign_kernels.logprobs.statistics import Statistics, joined, merged, of_logits
from rlalign_kernels.logprobs.tiles import TILES
from rlalign_kernels.tile import MASKED, capped, dot

SHARE = 32  # tiles of the vocabulary that a program of the forward walks


def _columns(ref, first, size: int):
    """Columns of all rows; both indices are i32, as the interpreter wants them where int is i64."""
    return ref.at[pl.ds(jnp.int32(0), ref.shape[0]), pl.ds(first, size)]


def _logits(options, tile, limit, states, head, first):
    """(logits, slope of the soft cap, columns i32[1, tile.vocab]) of the columns from `first`."""
    width, vocab = head.shape
    inner = tile.bytes // states.dtype.itemsize
    column = first + jnp.arange(tile.vocab, dtype=jnp.int32)[None]

    def step(w, product):
        at = pl.multiple_of(w * inner, inner)
        deep = at + jnp.arange(inner, dtype=jnp.int32)
        # Whatever reaches over an edge of the head is 0.
        state = triton.load(_columns(states, at, inner), mask=(deep < width)[None], other=0.0)
        inside = (deep < width)[:, None] & (column < vocab)
        weight = triton.load(head.at[pl.ds(at, inner), pl.ds(first, tile.vocab)], mask=inside, other=0.0)
        return product + dot(state, weight)

    product = jax.lax.fori_loop(
        jnp.int32(0), jnp.int32(pl.cdiv(width, inner)), step, jnp.zeros((tile.rows, tile.vocab), jnp.float32)
    )
    raw, slope = capped(product, options.softcap)
    return jnp.where(column < limit, raw / options.temperature, MASKED), slope, column


def _statistics_kernel(limit, states, head, target, *results, options):
    tile = TILES[options.backend]
    most, goal = triton.load(limit)[None], triton.load(target)[:, None]
    begin = pl.program_id(1) * SHARE
    end = jnp.minimum(begin + SHARE, pl.cdiv(head.shape[1], tile.vocab))

    def step(j, kept):
        logits, _, column = _logits(options, tile, most, states, head, j * tile.vocab)
        return joined(kept, of_logits(logits, goal == column))

    start = Statistics(*(jnp.full((tile.rows, 1), x, jnp.float32) for x in (MASKED, 0, 0, 0)))
    for ref, x in zip(results, jax.lax.fori_loop(begin, end, step, start), strict=True):
        triton.store(ref, x[:, 0])


def _gradient_kernel(limit, states, head, target, lse, entropy, grad_logp, grad_entropy, out, *, options):
    tile, first = TILES[options.backend], pl.program_id(1) * TILES[options.backend].vocab
    logits, slope, column = _logits(options, tile, triton.load(limit)[None], states, head, first)
    lse, entropy, by_logp, by_entropy = (triton.load(x)[:, None] for x in (lse, entropy, grad_logp, grad_entropy))
    log_prob = logits - lse
    pull = by_logp + by_entropy * (log_prob + entropy)
    hot = jnp.where(triton.load(target)[:, None] == column, by_logp, 0)
    gradient = (hot - jnp.exp(log_prob) * pull) / options.temperature
    gradient = (gradient if slope is None else gradient * slope).astype(out.dtype)
    inside = jnp.broadcast_to(column < head.shape[1], gradient.shape)
    triton.store(_columns(out, first, tile.vocab), gradient, mask=inside)


def _call(kernel, options, shares, states, head, limit, rows, results, interpret):
    """A kernel over (tile of rows, share of the vocabulary); `rows` are [n], results (shape, dtype, block)."""
    tile = TILES[options.backend]
    limit = jnp.full((1,), head.shape[1], jnp.int32) if limit is None else limit.reshape(1)
    whole = lambda x: pl.BlockSpec(x.shape, lambda i, j: (0,) * x.ndim)
    row = pl.BlockSpec((tile.rows,), lambda i, j: (i,))
    return pl.pallas_call(
        functools.partial(kernel, options=options),
        grid=(states.shape[0] // tile.rows, shares),
        in_specs=[whole(limit), pl.BlockSpec((tile.rows, states.shape[1]), lambda i, j: (i, 0)), whole(head)]
        + [row] * len(rows),
        out_specs=[block for *_, block in results],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in results],
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name=f"logprobs{kernel.__name__.removesuffix('_kernel')}",
    )(limit, states, head, *rows)


def statistics(options, states, head, target, seen, limit, *, interpret: bool = False) -> Statistics:
    """Of the logits of states f[n, W], n whole tiles; see api.py."""
    del seen
    tile = TILES[options.backend]
    shares = pl.cdiv(head.shape[1], SHARE * tile.vocab)
    block = pl.BlockSpec((None, tile.rows), lambda i, j: (j, i))
    results = [((shares, states.shape[0]), jnp.float32, block)] * 4
    found = _call(_statistics_kernel, options, shares, states, head, limit, [target], results, interpret)
    over = functools.partial(functools.partial, axis=0, keepdims=True)
    return Statistics(*(x[0] for x in merged(Statistics(*found), over(jnp.max), over(jnp.sum))))


def logit_gradients(options, states, head, target, seen, limit, *rows, interpret: bool = False) -> jax.Array:
    """d loss / d (raw logit) f[n, V] in the inputs' dtype; see api.py."""
    del seen
    tile, shape = TILES[options.backend], (states.shape[0], head.shape[1])
    results = [(shape, states.dtype, pl.BlockSpec((tile.rows, shape[1]), lambda i, j: (i, 0)))]
    shares = pl.cdiv(shape[1], tile.vocab)
    return _call(_gradient_kernel, options, shares, states, head, limit, [target, *rows], results, interpret)[0]
