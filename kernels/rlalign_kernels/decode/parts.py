"""What the forms of decode attention share: the meaning of a part, tile lengths, and how parts are joined.

A form is one function of queries that share their keys, and of keys that stay where they are, stacked over layers:

    partial(options, q f[X, M, D], k, v f[L, X, S, D], layer i32[1], first i32[n], limit i32[n])
        -> out f32[X, M, D], lse f32[X, M]

X stands for one axis or several. It is attention over the keys [first, limit) of [layer, x], with the bounds of
x // (X // n), and the log of the sum of its exponentials. Without keys (first = limit) out is 0 and lse is
MASKED, which gives the part no weight. What is outside changes nothing, whole tiles there are not read. The layer is
data: slicing a layer out for a kernel would copy it, every step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Keys of a tile, of bfloat16 and of float32 (or float64), by backend. Each row says where it comes from.
BLOCKS = {
    # Not measured on an accelerator yet: there a step of a loop costs more than a few columns that nobody reads.
    "xla": (512, 512),
    # Two AMD EPYC cores, jax 0.10.2. bfloat16: as fast as all columns at once, 64 and 256 are slower. float32: the
    # fastest of 16 to 512, 1.1 to 4 times as fast as all at once.
    "cpu": (512, 64),
    # Not measured on hardware yet: enough bytes to hide a grid step, little enough that a half-filled tile is cheap.
    "tpu": (512, 512),
    # Not measured on hardware yet: what spills no registers of an H100 (make aot-cuda, ptxas -v).
    "triton": (64, 32),
    "interpret": (16, 16),  # small, so that a test has many tiles
    "interpret_triton": (16, 16),
}


def keys_of_a_tile(backend: str, dtype) -> int:
    """How many keys a form reads at once; a power of two."""
    row = "cpu" if backend == "xla" and jax.default_backend() == "cpu" else backend
    return BLOCKS[row][dtype.itemsize >= 4]


def tiles(limit: jax.Array, block: int) -> jax.Array:
    """i32, how many tiles hold a key below limit."""
    return jax.lax.div(limit + jnp.int32(block - 1), jnp.int32(block))


def flat(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arguments of a form with X on one axis."""
    k, v = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (k, v))
    return q.reshape(-1, *q.shape[-2:]), k, v


class Options(NamedTuple):
    """What is static in a call."""

    scale: float
    softcap: float | None
    block: int


def join(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention over all keys, and its lse, from attention over parts of them.

        o = sum_p exp(lse_p - lse) o_p   with   lse = log sum_p exp(lse_p)

    Args:
      out: f[parts, ..., D], each part's result.
      lse: f[parts, ...], each part's log-sum-exp.

    Returns:
      (f[..., D], f[...]).
    """
    top = jnp.max(lse, axis=0)
    weight = jnp.exp(lse - top[None])
    total = jnp.sum(weight, axis=0)
    return jnp.sum(weight[..., None] * out, axis=0) / total[..., None], top + jnp.log(total)
