"""Rotary position embeddings: frequencies on the host, once; the rotation on the device."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from rlalign.checks import expect
from rlalign.models.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig, *, local: bool = False) -> tuple[np.ndarray, float]:
    """The angle that each pair of a head turns by from one position to the next, and the scale of cosine and sine.

    Plain, for i in [0, D / 2):

        f_i = theta ** (-2 i / D)

    linear (position interpolation): f_i / factor.

    llama3, with r_i = original_max_positions * f_i / (2 pi), the turns within the original context:

        s_i = clip((r_i - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
        f_i (s_i + (1 - s_i) / factor)

    yarn, with d(r) = D log(original_max_positions / (2 pi r)) / (2 log theta), the index at which a pair turns r times:

        s_i = 1 - clip((i - low) / (high - low), 0, 1),  low = floor(d(beta_fast)), high = ceil(d(beta_slow))
        f_i (s_i + (1 - s_i) / factor),  scale = 0.1 log(factor) + 1 unless attention_factor says otherwise

    Args:
      config: rotary_width or else head_width (D), rope_theta and rope_scaling are read.
      local: those of layers with a window, where local_rope_theta says other ones.

    Returns:
      f64[D / 2] in radians a position, and the scale (1.0 except for yarn). NumPy, computed in float64.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2; Chen et al. 2023, arXiv:2306.15595 (linear); Peng et al.
      2023, arXiv:2309.00071 (yarn); the functions of transformers 5.23's modeling_rope_utils.py, which these equal.

    >>> from rlalign.models.config import ModelConfig
    >>> config = ModelConfig(vocab_size=8, width=8, layers=1, heads=2, kv_heads=1, head_width=4, mlp_width=8,
    ...                      max_positions=8, tied_head=True, rope_theta=100.0)
    >>> frequencies, scale = inverse_frequencies(config)
    >>> frequencies.round(6).tolist(), scale
    ([1.0, 0.1], 1.0)
    """
    width, theta, scaling = _width(config), config.rope_theta, config.rope_scaling
    if local and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    plain = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if scaling is None:
        return plain, 1.0
    kept = {"linear": _kept_linear, "llama3": _kept_llama3, "yarn": _kept_yarn}[scaling.kind](plain, config, scaling)
    return plain * (kept + (1 - kept) / scaling.factor), _attention_scale(scaling)


def _width(config: ModelConfig) -> int:
    return config.head_width if config.rotary_width is None else config.rotary_width


# Each returns f64[D / 2] in [0, 1]: 1 keeps a frequency as it is, 0 divides it by the factor.


def _kept_linear(plain: np.ndarray, config: ModelConfig, scaling: RopeScaling) -> np.ndarray:
    return np.zeros_like(plain)


def _kept_llama3(plain: np.ndarray, config: ModelConfig, scaling: RopeScaling) -> np.ndarray:
    assert scaling.original_max_positions is not None  # RopeScaling checks it
    turns = scaling.original_max_positions * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return np.clip((turns - low) / (high - low), 0.0, 1.0)


def _kept_yarn(plain: np.ndarray, config: ModelConfig, scaling: RopeScaling) -> np.ndarray:
    assert scaling.original_max_positions is not None  # RopeScaling checks it
    width, log_theta = _width(config), math.log(config.rope_theta)
    low, high = (
        width * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * log_theta)
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    # transformers bounds the ramp by D - 1, though there are only D / 2 pairs, and widens an empty one by 0.001.
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if high == low else high
    return 1.0 - np.clip((np.arange(width // 2) - low) / (high - low), 0.0, 1.0)


def _attention_scale(scaling: RopeScaling) -> float:
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)


def rotate(x: jax.Array, position: jax.Array, frequencies: np.ndarray | jax.Array, scale: float = 1.0) -> jax.Array:
    """Turn each pair (x_i, x_{i + D/2}) of every head by position * frequencies_i, and scale it.

        y_i         = scale (x_i cos a_i - x_{i + D/2} sin a_i)
        y_{i + D/2} = scale (x_{i + D/2} cos a_i + x_i sin a_i),     a_i = position * frequencies_i

    The pairs are the two halves of a head (Hugging Face's `rotate_half`), not neighbours as in the paper; weights in
    Hugging Face folders are stored for this order.

    Args:
      x: f[..., T, H, D], queries or keys; up to two axes before T.
      position: i[..., T], distance from the root.
      frequencies: f[D / 2], from `inverse_frequencies`.
      scale: from `inverse_frequencies`.

    Returns:
      f[..., T, H, D] in x's dtype. Angles and products are computed in float32, in float64 where x is float64. With
      scale 1 the dot product of two rotated vectors depends on the difference of their positions only.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.4.2; transformers 5.23, apply_rotary_pos_emb.
    """
    tokens = ", ".join("ABT"[3 - position.ndim :])
    size = expect(position=(position, f"i[{tokens}]"), x=(x, f"f[{tokens}, H, D]"))
    expect(bind={"D/2": size["D"] // 2}, frequencies=(frequencies, "f[D/2]"))
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    turn = jnp.asarray(frequencies, dtype).reshape((1,) * position.ndim + (-1,))
    angle = jnp.asarray(position, dtype)[..., None] * turn
    cos, sin = (scale * f(angle)[..., None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
