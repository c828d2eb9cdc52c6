"""Key/value caches of the sampler: a group's prompt is stored once and read once for all its samples.

    prefix  [L, B, K, P, D]      written by the prefill, never again
    suffix  [L, B, K, G, R, D]   one column a decoding step

A decoding step multiplies the prefix once by the G * H / K queries of a key/value head: a matrix product in place of G
matrix-vector products.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlalign.models.config import ModelConfig
from rlalign.models.decoder import Attend

MASKED = -1e30


class Prefix(NamedTuple):
    """Keys and values of the prompts, f[L, B, K, P, D]."""

    k: jax.Array
    v: jax.Array


class Suffix(NamedTuple):
    """Keys and values of what was sampled, f[L, B, K, G, R, D]."""

    k: jax.Array
    v: jax.Array


def empty_prefix(config: ModelConfig, prompts: int, length: int) -> Prefix:
    """Zeros for `prompts` prompts of at most `length` tokens."""
    shape = (config.layers, prompts, config.kv_heads, length, config.head_width)
    return Prefix(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def empty_suffix(config: ModelConfig, prompts: int, samples: int, length: int) -> Suffix:
    """Zeros for `samples` responses a prompt of at most `length` tokens."""
    shape = (config.layers, prompts, config.kv_heads, samples, length, config.head_width)
    return Suffix(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def _write(cache: jax.Array, layer, value: jax.Array, at: tuple = ()) -> jax.Array:
    """Put `value` (without the layer axis) at `layer` and, on the last axes, at `at`; in place where possible."""
    start = (layer, *(0,) * (cache.ndim - 1 - len(at)), *at)
    return jax.lax.dynamic_update_slice(cache, value[None].astype(cache.dtype), start)


def _layer(cache: jax.Array, layer) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(cache, layer, 0, keepdims=False)


def attend_prefill(attend: Attend) -> Attend:
    """`attend` over the prompts' forest, and a record of its keys and values."""

    def run(layer, q, k, v, cache: Prefix):
        out, _ = attend(layer, q, k, v, None)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return out, Prefix(_write(cache.k, layer, k), _write(cache.v, layer, v))

    return run


def attend_decode(prefix: Prefix, length: jax.Array, step: jax.Array) -> Attend:
    """Attention of the newest token of every sample, q f[B, G, H, D], over its prompt and its own past.

    Args:
      prefix: the prompts' keys and values.
      length: i32[B], tokens of each prompt.
      step: i32[], how many tokens of the suffix are already there; this one becomes column `step`.
    """
    in_prefix = jnp.arange(prefix.k.shape[3])[None, :] < length[:, None]

    def run(layer, q, k, v, cache: Suffix):
        batch, samples, heads, width = q.shape
        kv_heads, past = k.shape[2], cache.k.shape[4]
        column = (step, jnp.int32(0))
        k, v = (x.swapaxes(1, 2)[:, :, :, None] for x in (k, v))
        cache = Suffix(_write(cache.k, layer, k, column), _write(cache.v, layer, v, column))
        q = q.reshape(batch, samples, kv_heads, heads // kv_heads, width).swapaxes(1, 2)
        packed = q.reshape(batch, kv_heads, -1, width)
        wide = jnp.promote_types(q.dtype, jnp.float32)

        def dot(spec, x, y):
            return jnp.einsum(spec, x, y, preferred_element_type=wide)

        before = dot("bkxd,bkpd->bkxp", packed, _layer(prefix.k, layer)) * width**-0.5
        before = jnp.where(in_prefix[:, None, None, :], before, MASKED)
        since = dot("bkgrd,bkgtd->bkgrt", q, _layer(cache.k, layer)) * width**-0.5
        since = jnp.where(jnp.arange(past)[None, None, None, None, :] <= step, since, MASKED)
        before = before.reshape(*q.shape[:-1], -1)
        top = jnp.maximum(jnp.max(before, axis=-1), jnp.max(since, axis=-1))[..., None]
        before, since = jnp.exp(before - top), jnp.exp(since - top)
        total = jnp.sum(before, axis=-1) + jnp.sum(since, axis=-1)
        weight = before.reshape(batch, kv_heads, -1, before.shape[-1]).astype(q.dtype)
        out = dot("bkxp,bkpd->bkxd", weight, _layer(prefix.v, layer)).reshape(q.shape)
        out = out + dot("bkgrt,bkgtd->bkgrd", since.astype(q.dtype), _layer(cache.v, layer))
        out = (out / total[..., None]).astype(q.dtype)
        return out.swapaxes(1, 2).reshape(batch, samples, heads, width), cache

    return run
