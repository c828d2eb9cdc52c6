"""The plain meaning of decode attention, every sample with keys of its own: the oracle of tests, never used by the
library."""

import jax
import jax.numpy as jnp


def reference_decode(q, prefix, suffix, layer, length, step, *, window=None, scale=None, softcap=None):
    """softmax over prompt and past of softcap(scale * q k^T), times v; same arguments as decode_attention."""
    batch, samples, heads, width = q.shape
    kv_heads, wide = prefix[0].shape[2], jnp.promote_types(q.dtype, jnp.float32)
    columns = prefix[0].shape[3], suffix[0].shape[4]

    def keys(before, since):  # [B, K, P, D] and [B, K, G, R, D] -> [B, G, H, P + R, D]
        before = jnp.broadcast_to(before[layer][:, :, None], (batch, kv_heads, samples, columns[0], width))
        both = jnp.concatenate([before, since[layer]], axis=3).astype(wide)
        return jnp.repeat(both.swapaxes(1, 2), heads // kv_heads, axis=2)

    k, v = keys(prefix[0], suffix[0]), keys(prefix[1], suffix[1])
    score = jnp.einsum("bghd,bghjd->bghj", q.astype(wide), k) * (width**-0.5 if scale is None else scale)
    if softcap is not None:
        score = softcap * jnp.tanh(score / softcap)
    before = jnp.arange(columns[0])[None, :] < length[:, None]
    since = jnp.broadcast_to((jnp.arange(columns[1]) <= step)[None, :], (batch, columns[1]))
    if window is not None:  # the newest token is at position length + step
        before &= (length + step)[:, None] - jnp.arange(columns[0])[None, :] < window
        since &= (step - jnp.arange(columns[1]) < window)[None, :]
    seen = jnp.concatenate([before, since], axis=1)[:, None, None, :]
    weight = jax.nn.softmax(jnp.where(seen, score, jnp.finfo(wide).min), axis=-1)
    weight, v = jnp.where(seen, weight, 0), jnp.where(seen[..., None], v, 0)
    return jnp.einsum("bghj,bghjd->bghd", weight, v)
