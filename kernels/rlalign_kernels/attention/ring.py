"""Forest attention over rows that are cut along their tokens: one slice a device, keys and values travel in a ring.

With S devices, device d holds columns [d n, (d + 1) n) of every row, n = T / S, and in step t the keys of slice d - t:

    t = 0       its own keys: the ordinary rule, visible_until counted from column d n
    t <= d      an earlier slice, all of it before every query: j visible to i  <=>  i < visible_until[j] - d n
    t > d       a later slice, come around: nothing is live, no tile is computed

A step is the attention of tiled.py on one slice of keys. Parts are merged by their log-sum-exp as they come, in one
order; in the backward dk and dv travel with their keys, and one step more brings them home (Ring Attention,
arXiv 2310.01889).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rlalign_kernels.attention.api import check
from rlalign_kernels.attention.blocks import tile_of
from rlalign_kernels.attention.plan import Plan, make_plan
from rlalign_kernels.attention.tiled import Options, attention
from rlalign_kernels.backend import choose, load
from rlalign_kernels.tile import MASKED


class Step(NamedTuple):
    """One step of the ring.

    Attributes:
      plan: live pairs of this device's queries with the slice of keys that is here in this step.
      seen: b[n], the queries on the plan's axis that see a key of the slice.
    """

    plan: Plan
    seen: jax.Array


class RingPlan(NamedTuple):
    """All steps of a device.

    Attributes:
      own: the step of its own keys.
      visits: the steps of the slices that visit it, each leaf with a leading axis of S - 1.
    """

    own: Step
    visits: Step


def _onward(axis_name: str, x):
    """Every array of x, sent to the next device."""
    size = jax.lax.axis_size(axis_name)
    return jax.lax.ppermute(x, axis_name, [(i, (i + 1) % size) for i in range(size)])


def _whole_tiles(x: jax.Array, block: int) -> jax.Array:
    """[B, n, ...] padded along n, so that no tile holds two rows."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))


def ring_plan(
    visible_until: jax.Array,
    *,
    axis_name: str,
    backend: str | None = None,
    group: int = 1,
    width: int = 128,
    dtype: Any = "bfloat16",
) -> RingPlan:
    """Tile lists for ring_attention(..., plan=...): compute them once a batch, use them in every layer.

    To be called inside shard_map, like ring_attention. out_specs can join the devices' lists along the first axis of
    every leaf.

    Args:
      visible_until: i[B, T / S], this device's slice.
      axis_name: the mesh axis of S devices over which the rows are cut.
      backend: that of ring_attention.
      group, width, dtype: as in attention_plan.
    """
    length, here = visible_until.shape[1], jax.lax.axis_index(axis_name)
    tile = tile_of(choose(backend), length, group=group, width=width, dtype=dtype)
    block = max(tile.block_q, tile.block_k)
    column = jnp.arange(length + -length % block, dtype=jnp.int32)[None]

    def step(until, *, causal):
        reach = jax.lax.cummax(until, axis=1) if causal else jnp.max(until, axis=1, keepdims=True)
        plan = make_plan(until, block_q=tile.block_q, block_k=tile.block_k, causal=causal)
        return Step(plan, (column < reach).reshape(-1))

    def visit(until, t):
        until = _onward(axis_name, until)
        return until, step(jnp.where(here >= t, until_here(until), 0), causal=False)

    def until_here(until):  # in this device's columns
        return _whole_tiles(jnp.clip(until - here * length, 0, length), block)

    until = visible_until.astype(jnp.int32)
    own = step(until_here(until), causal=True)
    _, visits = jax.lax.scan(visit, until, jnp.arange(1, jax.lax.axis_size(axis_name), dtype=jnp.int32))
    return RingPlan(own, visits)


def _travel(axis_name: str, visit, carry, keys, visits: Step):
    """visit(carry, keys, step) -> carry, with the keys of one device after the other.

    A slice sets out while the one before it is in use: two of them are here at a time.
    """
    count = visits.seen.shape[0]
    if count == 0:
        return carry

    def step(state, step):
        keys, carry = state
        return (_onward(axis_name, keys), visit(carry, keys, step)), None

    earlier, last = (jax.tree.map(lambda x, at=at: x[at], visits) for at in (slice(count - 1), count - 1))
    (keys, carry), _ = jax.lax.scan(step, (_onward(axis_name, keys), carry), earlier)
    return visit(carry, keys, last)  # which nobody after it needs


def _part(options: Options, q, k, v, step: Step):
    """(out, lse) of one slice of keys; 0 and -1e30 for queries that see none of them."""
    out, lse = load("attention", options.backend, "forward")(options, q, k, v, step.plan, None)
    seen = step.seen.reshape(-1, 1, step.plan.block_q)
    seen = jnp.tile(seen, (1, 1, q.shape[2] // step.plan.block_q))  # of every head's rows
    return jnp.where(seen[..., None], out, 0).astype(lse.dtype), jnp.where(seen, lse, MASKED)


def _merged(one, other):
    """(out, lse) of the keys of both."""
    (out, lse), (more, more_lse) = one, other
    top = jnp.maximum(lse, more_lse)
    old, new = jnp.exp(lse - top), jnp.exp(more_lse - top)
    out = (old[..., None] * out + new[..., None] * more) / (old + new)[..., None]
    return out, top + jnp.log(old + new)


def _forward(options: Options, axis_name: str, q, k, v, plan: RingPlan):
    def visit(so_far, keys, step):
        k, v = keys
        return _merged(so_far, _part(options._replace(causal=False), q, k, v, step))

    out, lse = _travel(axis_name, visit, _part(options, q, k, v, plan.own), (k, v), plan.visits)
    return out.astype(q.dtype), jnp.where(lse > MASKED / 2, lse, 0)  # as a form says of a row that sees no key


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(options: Options, axis_name: str, q, k, v, plan):
    return _forward(options, axis_name, q, k, v, plan)[0]


def _ring_fwd(options, axis_name, q, k, v, plan):
    out, lse = _forward(options, axis_name, q, k, v, plan)
    # The names of tiled.py, for the same remat policies.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, plan, out, lse)


def _ring_bwd(options, axis_name, residuals, grad):
    q, k, v, plan, out, lse = residuals
    wide = lse.dtype
    delta = jnp.sum(grad.astype(wide) * out.astype(wide), axis=-1)

    def part(options, keys, plan):
        def written(x, first):  # tiles without a live pair may not be
            return jnp.where((first[1:] > first[:-1])[:, None, None, None], x, 0).astype(wide)

        backward = load("attention", options.backend, "backward")
        dq, dk, dv = backward(options, q, *keys, plan, None, lse, delta, grad)
        return written(dq, plan.first), (written(dk, plan.first_key), written(dv, plan.first_key))

    def visit(sums, keys, step):
        dq, dkeys = sums
        sums = dq, _onward(axis_name, dkeys)  # with the keys they belong to
        return jax.tree.map(jnp.add, sums, part(options._replace(causal=False), keys, step.plan))

    start = part(options, (k, v), plan.own.plan)
    dq, dkeys = _travel(axis_name, visit, start, (k, v), plan.visits)
    dk, dv = _onward(axis_name, dkeys)  # home
    return *(x.astype(q.dtype) for x in (dq, dk, dv)), None


_ring.defvjp(_ring_fwd, _ring_bwd)


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible_until: jax.Array,
    *,
    axis_name: str,
    backend: str | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    plan: RingPlan | None = None,
) -> jax.Array:
    """forest_attention of rows too long for a device, cut along their tokens over a mesh axis.

        o_i = sum_j softmax_j(scale * q_i . k_j) v_j   over   j <= i < visible_until[j],   i of this slice, j of all

    To be called inside shard_map with check_vma=False, in_specs that cut T over `axis_name`, and T a multiple of its
    size S (pad rows with visible_until 0). A device keeps T / S tokens and two visiting slices of keys and values at a
    time; each step but the last sends a slice on. A slice that no query here sees costs no tile.

    Later slices have more keys before them, and other devices wait for theirs: of a causal row all are busy
    S / (2 S - 1) of the time. benchmarks/ring.py counts tiles of other forests.

    Args:
      q: f[B, T / S, H, D], this device's slice.
      k, v: f[B, T / S, K, D], this device's slice.
      visible_until: i[B, T / S] of a forest, this device's slice of what `pack` makes: in columns of the whole row.
      axis_name: the mesh axis of S devices over which the rows are cut.
      backend, scale, softcap: those of forest_attention.
      window: refused.
      plan: ring_plan(visible_until, ...) for this backend and these heads, to share it between layers; the mask is
        taken from it.

    Returns:
      f[B, T / S, H, D] in q's dtype, what forest_attention returns for the whole row but for rounding: slices are
      merged in float32, in float64 for float64 inputs, from parts in q's dtype. Deterministic: two runs agree bit for
      bit. Gradients are exact, and dk and dv of all devices are summed on the way in float32.

    Raises:
      ValueError: shapes, dtypes or options that do not fit, with their values.
    """
    backend = choose(backend)
    if window is not None:
        raise ValueError(f"a ring has no window, got window={window}: use forest_attention with whole rows on a device")
    check(q, k, v, visible_until, backend, None, None, softcap)
    batch, length, heads, width = q.shape
    head = {"backend": backend, "group": heads // k.shape[2], "width": width, "dtype": q.dtype.name}
    size, tile = jax.lax.axis_size(axis_name), tile_of(length=length, **head)
    block = max(tile.block_q, tile.block_k)
    plan = ring_plan(visible_until, axis_name=axis_name, **head) if plan is None else plan
    own, steps = plan.own.plan, 1 + plan.visits.seen.shape[0]
    tokens = batch * (length + -length % block)
    if steps != size or (own.block_q, own.block_k, own.visible_until.size) != (tile.block_q, tile.block_k, tokens):
        arguments = ", ".join(f"{name}={value!r}" for name, value in {"axis_name": axis_name, **head}.items())
        raise ValueError(
            f"the plan has {steps} steps of {own.visible_until.size} tokens in tiles of {own.block_q} x "
            f"{own.block_k}, the ring {size} of {tokens} in tiles of {tile.block_q} x {tile.block_k}: use "
            f"ring_plan(visible_until, {arguments}) of this batch"
        )
    column = jax.lax.axis_index(axis_name) * length + jnp.arange(length, dtype=jnp.int32)
    live = (visible_until > column[None])[:, :, None, None]  # a token of a forest sees itself

    def flat(x):  # clean, as in forest_attention
        x = _whole_tiles(jnp.where(live, x, 0), block)
        return x.reshape(-1, *x.shape[2:])

    def on_tiles(options, q, k, v, own, position):
        del own, position
        return _ring(options, axis_name, q, k, v, plan)

    options = Options(backend, width**-0.5 if scale is None else float(scale), None, softcap, tile)
    out = attention(flat(q), flat(k), flat(v), own, None, options, on_tiles=on_tiles)
    return jnp.where(live, out.reshape(batch, -1, heads, width)[:, :length], 0)
