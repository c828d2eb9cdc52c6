"""Forest attention on tiles: what all backends share. Tiles in and out, residuals and their names, one custom_vjp.

Rows lie on one axis of n tokens, cut into query tiles and key tiles. The query heads of one key/value head are packed
beside each other, so that a tile of scores is [group * block_q, block_k] for each of K heads:

    q [tiles_q, K, group * block_q, D]      k, v [tiles_k, K, block_k, D]      lse [tiles_q, K, group * block_q]

A backend is two functions of such arrays and a plan:

    forward(options, q, k, v, plan, position)                        -> out, lse
    backward(options, q, k, v, plan, position, lse, delta, grad)     -> dq, dk, dv       delta = sum(grad * out)

A query tile that no live pair reaches may be left unwritten: nothing reads it here, and api.py hides it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rlalign_kernels.attention.blocks import Tile
from rlalign_kernels.attention.plan import Plan
from rlalign_kernels.backend import load


class Options(NamedTuple):
    """What is static in a call."""

    backend: str
    scale: float
    window: int | None
    softcap: float | None
    tile: Tile
    causal: bool = True  # False: all keys of a row lie before its queries, as in an earlier slice of a ring


# A function of its own, because jax 0.10 keeps a kernel whose results nobody reads: a rematerialised layer's.
@functools.partial(jax.jit, static_argnums=0)
def _forward(options: Options, q, k, v, plan: Plan, position):
    return load("attention", options.backend, "forward")(options, q, k, v, plan, position)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: Options, q, k, v, plan: Plan, position):
    return _forward(options, q, k, v, plan, position)[0]


def _attention_fwd(options, q, k, v, plan, position):
    out, lse = _forward(options, q, k, v, plan, position)
    # Named, so that a remat policy can keep them and never run the attention again.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, plan, position, out, lse)


def _attention_bwd(options, residuals, grad):
    q, k, v, plan, position, out, lse = residuals
    wide = lse.dtype
    delta = jnp.sum(grad.astype(wide) * out.astype(wide), axis=-1)
    return (
        *load("attention", options.backend, "backward")(options, q, k, v, plan, position, lse, delta, grad),
        None,
        None,
    )


_attention.defvjp(_attention_fwd, _attention_bwd)


def attention(q, k, v, plan: Plan, position, options: Options, *, on_tiles: Callable = _attention) -> jax.Array:
    """forest_attention on one flat axis of n tokens; see api.forest_attention.

    Args:
      q: f[n, H, D].  k, v: f[n, K, D].  position: i32[n] or None.
      plan: tile lists for n padded to whole tiles.
      options: the backend, its tile and the static parts of the score.
      on_tiles: the attention of such tiles; that of a ring asks other devices too.

    Returns:
      f[n, H, D].
    """
    tokens, heads, width = q.shape
    kv_heads, padded = k.shape[1], plan.visible_until.size
    group, block_q, block_k = heads // kv_heads, plan.block_q, plan.block_k

    def tiles(x, block):  # [n, h, D] -> [tiles, block, h, D]
        return jnp.pad(x, ((0, padded - tokens), (0, 0), (0, 0))).reshape(-1, block, *x.shape[1:])

    q_tiles = tiles(q, block_q).reshape(-1, block_q, kv_heads, group, width)
    q_tiles = q_tiles.transpose(0, 2, 3, 1, 4).reshape(-1, kv_heads, group * block_q, width)
    k_tiles, v_tiles = (tiles(x, block_k).transpose(0, 2, 1, 3) for x in (k, v))
    position = None if position is None else jnp.pad(position, (0, padded - tokens))
    out: Any = on_tiles(options, q_tiles, k_tiles, v_tiles, plan, position)
    out = out.reshape(-1, kv_heads, group, block_q, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(padded, heads, width)[:tokens]
