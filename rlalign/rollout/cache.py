"""Key/value caches of the sampler: a group's prompt is stored once and read once for all its samples.

    prefix  [L, B, K, P, D]      written by the prefill, never again
    suffix  [L, B, K, G, R, D]   one column a decoding step

A decoding step reads the prefix once for the G * H / K queries of a key/value head (rlalign_kernels.decode_attention):
a matrix product in place of G matrix-vector products. Of the suffix it reads what is filled.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlalign.models.config import ModelConfig
from rlalign.models.decoder import Attend, AttentionFn

EVERYTHING = 2**30  # a window that hides nothing


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
    one_type = [jnp.asarray(i, jnp.int32) for i in start]  # in float64 mode Python's numbers are int64
    return jax.lax.dynamic_update_slice(cache, value[None].astype(cache.dtype), one_type)


def attend_prefill(attend: Attend) -> Attend:
    """`attend` over the prompts' forest, and a record of its keys and values."""

    def run(layer, q, k, v, cache: Prefix):
        out, _ = attend(layer, q, k, v, None)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return out, Prefix(_write(cache.k, layer, k), _write(cache.v, layer, v))

    return run


def attend_decode(
    attention: AttentionFn, config: ModelConfig, prefix: Prefix, length: jax.Array, step: jax.Array
) -> Attend:
    """Attention of the newest token of every sample, q f[B, G, H, D], over its prompt and its own past.

    Args:
      attention: decode_attention, or a form of it that is local to a device.
      config: whose windows are kept.
      prefix: the prompts' keys and values.
      length: i32[B], tokens of each prompt.
      step: i32[], how many tokens of the suffix are already there; this one becomes column `step`.
    """

    def run(layer, q, k, v, cache: Suffix):
        column = (step, jnp.int32(0))
        k, v = (x.swapaxes(1, 2)[:, :, :, None] for x in (k, v))
        cache = Suffix(_write(cache.k, layer, k, column), _write(cache.v, layer, v, column))
        window = None
        if config.window is not None:
            full = jnp.isin(layer, jnp.array(config.full_layers, jnp.int32))
            window = jnp.where(full, jnp.int32(EVERYTHING), jnp.int32(config.window))
        return attention(q, prefix, cache, layer, length, step, window=window), cache

    return run
