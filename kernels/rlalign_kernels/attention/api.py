"""forest_attention: checks, choice of backend, rows on one axis."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from rlalign_kernels.attention.blocks import tile_of
from rlalign_kernels.attention.plan import Plan, make_plan
from rlalign_kernels.attention.tiled import Options, attention
from rlalign_kernels.backend import check_heads, check_softcap, choose


def attention_plan(
    visible_until: jax.Array, *, backend: str | None = None, group: int = 1, width: int = 128, dtype: Any = "bfloat16"
) -> Plan:
    """Tile lists for forest_attention(..., plan=...): compute them once a batch, use them in every layer.

    Args:
      visible_until: i[B, T].
      backend: that of forest_attention.
      group, width, dtype: H // K, D and the dtype of q. Kernels choose their tiles by them; "xla" does not.
    """
    tile = tile_of(choose(backend), visible_until.shape[1], group=group, width=width, dtype=dtype)
    return make_plan(visible_until, block_q=tile.block_q, block_k=tile.block_k)


def check(q, k, v, visible_until, backend, position, window, softcap) -> None:
    """Refuse arguments of forest_attention that do not fit."""
    if q.ndim != 4 or k.ndim != 4 or v.shape != k.shape:
        raise ValueError(f"q must be [B, T, H, D], k and v [B, T, K, D]; got q {q.shape}, k {k.shape}, v {v.shape}")
    batch, length, heads, width = q.shape
    if k.shape[:2] != (batch, length) or k.shape[3] != width:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in B, T and D")
    if not q.size * k.size or heads % k.shape[2]:
        raise ValueError(
            f"{k.shape[2]} key/value heads do not divide {heads} query heads of q {q.shape}: none may be 0"
        )
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q, k and v must have one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if visible_until.shape != (batch, length) or not jnp.issubdtype(visible_until.dtype, jnp.integer):
        raise ValueError(
            f"visible_until must be int[{batch}, {length}]; got {visible_until.dtype}{visible_until.shape}"
        )
    check_heads(backend, width, q.dtype)
    check_softcap(softcap)
    if backend == "triton" and width > 128 and q.dtype == jnp.float32:
        raise ValueError(
            f"float32 heads of width {width} do not fit into a GPU's shared memory: use bfloat16, or backend='xla'"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if window is not None and (position is None or position.shape != (batch, length)):
        raise ValueError(f"window={window} needs position i[{batch}, {length}]: distance is counted along the path")


def check_forest(visible_until: jax.Array) -> None:
    """Refuse reaches that no forest has, where they are known: inside jit they are not, and `pack` makes forests only.

    Raises:
      ValueError: a reach outside of its row, or one that passes the end of a subtree that it begins in.
    """
    if isinstance(visible_until, Tracer):
        return
    for row, reaches in enumerate(visible_until.tolist()):
        ends = [len(reaches)]
        for column, reach in enumerate(reaches):
            while len(ends) > 1 and ends[-1] <= column:
                ends.pop()
            if not 0 <= reach <= ends[-1]:
                raise ValueError(
                    f"visible_until[{row}, {column}]={reach} is no forest's: it must be at most {ends[-1]}, where the "
                    "subtree around it ends, and 0 for padding; take it from rlalign.pack"
                )
            if reach > column:
                ends.append(reach)


def forest_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible_until: jax.Array,
    *,
    backend: str | None = None,
    scale: float | None = None,
    position: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    plan: Plan | None = None,
) -> jax.Array:
    """Attention over a token forest, with one int per key as the whole mask.

        o_i = sum_j softmax_j(scale * q_i . k_j) v_j   over   j <= i < visible_until[j]

    A causal row, packed documents, a group behind its shared prompt and a tree of any depth are the same rule. The
    gradients are exact: those of the batch in which every prefix is repeated.

    Args:
      q: f[B, T, H, D].
      k, v: f[B, T, K, D]; K divides H, query head h reads key/value head h // (H // K).
      visible_until: i[B, T] of a forest, as `pack` makes it; 0 marks padding.
      backend: "xla" works everywhere; "tpu" and "triton" are Pallas kernels for TPUs and GPUs, "interpret" and
        "interpret_triton" run these on a CPU, slowly. They differ in the last bits. None is the environment's
        RLALIGN_KERNELS, or "xla".
      scale: None is D ** -0.5.
      position: i[B, T], needed with window only.
      window: also require position[i] - position[j] < window (exact in a forest: the difference is path distance).
      softcap: scores become softcap * tanh(score / softcap).
      plan: attention_plan(visible_until, ...) for this backend and these heads, to share it between layers; the mask is
        taken from it.

    Returns:
      f[B, T, H, D] in q's dtype; exactly 0, with zero gradient, for queries that see no key. What padding holds, NaN
      included, changes nothing. Sums are in float32, in float64 for float64 inputs. Deterministic: two runs agree bit
      for bit.

    Raises:
      ValueError: shapes, dtypes or options that do not fit, with their values.
    """
    backend = choose(backend)
    check(q, k, v, visible_until, backend, position, window, softcap)
    check_forest(visible_until)
    batch, length, heads, width = q.shape
    head = {"backend": backend, "group": heads // k.shape[2], "width": width, "dtype": q.dtype.name}
    plan = attention_plan(visible_until, **head) if plan is None else plan
    tile = tile_of(length=length, **head)
    block = max(tile.block_q, tile.block_k)
    tiles, tokens = (tile.block_q, tile.block_k), -(-batch * length // block) * block
    if (plan.block_q, plan.block_k) != tiles or plan.visible_until.size != tokens:
        arguments = ", ".join(f"{name}={value!r}" for name, value in head.items())
        raise ValueError(
            f"the plan is for {plan.visible_until.size} tokens in tiles of {plan.block_q} x {plan.block_k}, the batch "
            f"has {batch * length} tokens and backend {backend!r} tiles of {tile.block_q} x {tile.block_k}: use "
            f"attention_plan(visible_until, {arguments}) of this batch"
        )
    options = Options(backend, width**-0.5 if scale is None else float(scale), window, softcap, tile)

    # A token of a forest sees itself; what does not is padding.
    live = (visible_until > jnp.arange(length, dtype=visible_until.dtype)[None])[:, :, None, None]

    def flat(x):
        return x.reshape(batch * length, *x.shape[2:])

    def clean(x):  # a tile multiplies what it masks by 0, and 0 * NaN is NaN
        return jnp.where(live, x, 0)

    at = None if window is None or position is None else flat(position)
    out = attention(flat(clean(q)), flat(clean(k)), flat(clean(v)), plan, at, options)
    return clean(out.reshape(batch, length, heads, width))
