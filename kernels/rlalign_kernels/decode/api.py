"""decode_attention: checks, choice of backend, the two sets of keys of a sample."""

import jax
import jax.numpy as jnp

from rlalign_kernels.backend import check_heads, check_softcap, choose, load
from rlalign_kernels.decode.parts import Options, join, keys_of_a_tile

Cache = tuple[jax.Array, jax.Array]


def _check(q, prefix, suffix, layer, length, step, window, softcap, backend) -> None:
    shapes = (
        f"got q {q.shape}, prefix {prefix[0].shape}, {prefix[1].shape}, suffix {suffix[0].shape}, {suffix[1].shape}"
    )
    ranks = q.ndim, prefix[0].ndim, suffix[0].ndim
    if ranks != (4, 5, 6) or prefix[1].shape != prefix[0].shape or suffix[1].shape != suffix[0].shape:
        raise ValueError(
            f"q must be [B, G, H, D], k and v of prefix [L, B, K, P, D], of suffix [L, B, K, G, R, D]; {shapes}"
        )
    batch, samples, heads, width = q.shape
    layers, _, kv_heads, columns, _ = prefix[0].shape
    past = suffix[0].shape[4]
    if (prefix[0].shape, suffix[0].shape) != (
        (layers, batch, kv_heads, columns, width),
        (layers, batch, kv_heads, samples, past, width),
    ):
        raise ValueError(f"q, prefix and suffix must agree in L, B, K, G and D; {shapes}")
    if heads % kv_heads:
        raise ValueError(f"{kv_heads} key/value heads do not divide {heads} query heads")
    types = {x.dtype for x in (q, *prefix, *suffix)}
    if len(types) > 1 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q and both caches must have one floating dtype; got {', '.join(sorted(map(str, types)))}")
    named = (("layer", layer, ()), ("length", length, (batch,)), ("step", step, ()), ("window", window, ()))
    for name, x, shape in named:
        if x is not None and (x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer)):
            raise ValueError(f"{name} must be int{list(shape)}; got {x.dtype}{list(x.shape)}")
    check_heads(backend, width, q.dtype)
    check_softcap(softcap)


def decode_attention(
    q: jax.Array,
    prefix: Cache,
    suffix: Cache,
    layer: jax.Array,
    length: jax.Array,
    step: jax.Array,
    *,
    window: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Attention of the newest token of G samples a prompt over the prompt, stored once, and over their own past.

        o = sum_j softmax_j(scale * q . k_j) v_j   over   prefix columns j < length[b]  and  suffix columns j <= step

    With a window only those among the last `window` tokens of the sample, the newest one counted.

    The keys of a prompt are read once for all its samples: G * H / K queries beside each other. Prompt and past are two
    calls of one function, joined by their log-sum-exp (parts.py).

    Args:
      q: f[B, G, H, D].
      prefix: keys and values of the prompts, f[L, B, K, P, D] each; K divides H, query head h reads h // (H // K).
      suffix: keys and values of what was sampled, f[L, B, K, G, R, D] each, the newest token's too.
      layer: i[], which of the L layers; it is data, so that a kernel reads its layer where it lies.
      length: i[B], tokens of each prompt; at most P.
      step: i[], the newest column of the suffix.
      window: i[], data like the layer, because layers differ in it; None is all.
      scale: None is D ** -0.5.
      softcap: scores become softcap * tanh(score / softcap).
      backend: as in forest_attention.

    Returns:
      f[B, G, H, D] in q's dtype. What lies behind the limits, NaN included, changes nothing. Sums are in float32, in
      float64 for float64 inputs. Deterministic: two runs agree bit for bit. There are no gradients.

    Raises:
      ValueError: shapes or dtypes that do not fit, with their values.

    Source: flash decoding (Dao et al. 2023), with the prompt's part packed for a group.
    """
    backend = choose(backend)
    layer, length, step = (jnp.asarray(x) for x in (layer, length, step))
    window = None if window is None else jnp.asarray(window)
    _check(q, prefix, suffix, layer, length, step, window, softcap, backend)
    batch, samples, heads, width = q.shape
    options = Options(width**-0.5 if scale is None else float(scale), softcap, keys_of_a_tile(backend, q.dtype))
    partial = load("decode", backend, "partial")
    packed = q.reshape(batch, samples, prefix[0].shape[2], -1, width).swapaxes(1, 2)  # [B, K, G, H / K, D]
    at = layer.astype(jnp.int32)[None]

    def part(cache, limit, newest):
        """Over the columns below `limit`; the newest token would be column `newest`."""
        k, v = cache
        limit = jnp.clip(limit.astype(jnp.int32), 0, k.shape[-2])
        first = jnp.zeros_like(limit) if window is None else jnp.clip(newest.astype(jnp.int32) + 1 - window, 0, limit)
        first = first.astype(jnp.int32)
        out, lse = partial(options, packed.reshape(*k.shape[1:-2], -1, width), k, v, at, first, limit)
        return out.reshape(packed.shape), lse.reshape(packed.shape[:-1])

    out, lse = zip(part(prefix, length, length + step), part(suffix, step[None] + 1, step[None]), strict=True)
    joined, _ = join(jnp.stack(out), jnp.stack(lse))
    return joined.astype(q.dtype).swapaxes(1, 2).reshape(batch, samples, heads, width)
