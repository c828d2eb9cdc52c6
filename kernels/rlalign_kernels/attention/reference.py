"""The plain meaning of forest attention, with the whole T x T mask: the oracle of tests, never used by the library."""

import jax
import jax.numpy as jnp


def reference_attention(q, k, v, visible_until, *, scale=None, position=None, window=None, softcap=None):
    """softmax over visible keys of softcap(scale * q k^T), times v; same arguments as forest_attention."""
    _, length, heads, width = q.shape
    group = heads // k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = (x.astype(wide) for x in (q, k, v))
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    score = jnp.einsum("bihd,bjhd->bhij", q, k) * (width**-0.5 if scale is None else scale)
    if softcap is not None:
        score = softcap * jnp.tanh(score / softcap)
    i, j = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    mask = (j <= i)[None] & (i[None] < visible_until[:, None, :])
    if window is not None and position is not None:
        mask &= position[:, :, None] - position[:, None, :] < window
    mask = mask[:, None]
    weight = jax.nn.softmax(jnp.where(mask, score, jnp.finfo(wide).min), axis=-1)
    return jnp.einsum("bhij,bjhd->bihd", jnp.where(mask, weight, 0), v)
