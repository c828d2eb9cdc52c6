"""Log-probs as Pallas kernels for TPU (Mosaic); with interpret=True they run on a CPU, slowly.

A grid step multiplies a tile of states with a tile of the head: the grid is [rows, vocabulary, width]. Products
accumulate in VMEM along the width, which is innermost; what is kept of a row of logits, along the vocabulary. Four
numbers a row leave the forward; the backward makes the logits anew and writes their gradients. One number a row is held
in every lane of its row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rlalign_kernels.logprobs.statistics import Statistics, joined, of_logits
from rlalign_kernels.logprobs.tiles import TILES, width_tile
from rlalign_kernels.tile import LANES, MASKED, capped, dot, lanes

ROWS, VOCAB, WIDTH = range(3)  # of the grid


def _first(axis: int):
    return pl.program_id(axis) == 0


def _last(axis: int):
    return pl.program_id(axis) == pl.num_programs(axis) - 1


def _logits(options, limit, states, head, product, then):
    """Add this step's product; at the width's end then(logits, slope of the soft cap, columns i32[1, tile])."""
    tile = product.shape[1]
    column = pl.program_id(VOCAB) * tile + jax.lax.broadcasted_iota(jnp.int32, (1, tile), 1)

    @pl.when(_first(WIDTH))
    def _():
        product[...] = jnp.zeros(product.shape, jnp.float32)

    product[...] += dot(states[...], head[...])

    @pl.when(_last(WIDTH))
    def _():
        raw, slope = capped(product[...], options.softcap)
        then(jnp.where(column < limit[0], raw / options.temperature, MASKED), slope, column)


def _statistics_kernel(limit, states, head, target, *refs, options):
    results, product, kept = refs[:4], refs[4], refs[5:]

    @pl.when(_first(VOCAB) & _first(WIDTH))
    def _():
        for ref, value in zip(kept, (MASKED, 0, 0, 0), strict=True):
            ref[...] = jnp.full(ref.shape, value, jnp.float32)

    def then(logits, slope, column):
        del slope
        here = of_logits(logits, lanes(target[...])[:, :1] == column)
        for ref, x in zip(kept, joined(Statistics(*(ref[:, :1] for ref in kept)), here), strict=True):
            ref[...] = jnp.broadcast_to(x, ref.shape)

    _logits(options, limit, states, head, product, then)

    @pl.when(_last(VOCAB) & _last(WIDTH))
    def _():
        for out, ref in zip(results, kept, strict=True):
            out[...] = ref[...].T[:1]


def _gradient_kernel(limit, states, head, target, lse, entropy, grad_logp, grad_entropy, out, product, *, options):
    def then(logits, slope, column):
        lse_row, entropy_row, by_logp, by_entropy = (
            lanes(x[...])[:, :1] for x in (lse, entropy, grad_logp, grad_entropy)
        )
        log_prob = logits - lse_row
        pull = by_logp + by_entropy * (log_prob + entropy_row)
        hot = jnp.where(lanes(target[...])[:, :1] == column, by_logp, 0)
        gradient = (hot - jnp.exp(log_prob) * pull) / options.temperature
        out[...] = (gradient if slope is None else gradient * slope).astype(out.dtype)

    _logits(options, limit, states, head, product, then)


def _call(kernel, options, states, head, limit, rows, results, scratch, interpret):
    """A kernel over tiles of f[n, W] and f[W, V]; `rows` are [n], results (shape, dtype), [1, n] or [n, V]."""
    tile = TILES[options.backend]
    (count, width), vocab = states.shape, head.shape[1]
    inner = width_tile(tile, width, states.dtype.itemsize)
    row = pl.BlockSpec((1, tile.rows), lambda i, j, w, limit: (0, i))
    whole = pl.BlockSpec((tile.rows, tile.vocab), lambda i, j, w, limit: (i, j))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(count // tile.rows, pl.cdiv(vocab, tile.vocab), width // inner),
        in_specs=[
            pl.BlockSpec((tile.rows, inner), lambda i, j, w, limit: (i, w)),
            pl.BlockSpec((inner, tile.vocab), lambda i, j, w, limit: (w, j)),
            *[row] * len(rows),
        ],
        out_specs=[row if shape[0] == 1 else whole for shape, _ in results],
        scratch_shapes=[pltpu.VMEM((tile.rows, size), jnp.float32) for size in (tile.vocab, *scratch)],
    )
    limit = jnp.full((1,), vocab, jnp.int32) if limit is None else limit.reshape(1)
    return pl.pallas_call(
        functools.partial(kernel, options=options),
        grid_spec=grid,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
        name=f"logprobs{kernel.__name__.removesuffix('_kernel')}",
    )(limit, states, head, *(x[None] for x in rows))


def statistics(options, states, head, target, seen, limit, *, interpret: bool = False) -> Statistics:
    """Of the logits of states f[n, W], n whole tiles; see api.py."""
    del seen
    results = [((1, states.shape[0]), jnp.float32)] * 4
    found = _call(_statistics_kernel, options, states, head, limit, [target], results, [LANES] * 4, interpret)
    return Statistics(*(x[0] for x in found))


def logit_gradients(options, states, head, target, seen, limit, *rows, interpret: bool = False) -> jax.Array:
    """d loss / d (raw logit) f[n, V] in the inputs' dtype; see api.py."""
    del seen
    results = [((states.shape[0], head.shape[1]), states.dtype)]
    return _call(_gradient_kernel, options, states, head, limit, [target, *rows], results, [], interpret)[0]
