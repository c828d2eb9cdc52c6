"""target_logprobs: checks, the loop over chunks of rows, gradients, and the merge of a vocabulary that devices share.

A form is two functions of one chunk of states f[n, W], the head f[W, V], targets i32[n] counted inside the head's
columns (outside of them: another device's), the allowed tokens b[n, V] or None, and how many columns count or None:

    statistics(options, ...)                                                    -> Statistics of n rows
    logit_gradients(options, ..., lse, entropy, grad_logp, grad_entropy)        -> f[n, V] in the inputs' dtype

What the logits' gradients are multiplied with is left to the compiler: it knows matrix products best.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlalign_kernels.backend import DTYPES, check_softcap, choose, load
from rlalign_kernels.logprobs.statistics import Statistics, logp_and_entropy, merged
from rlalign_kernels.logprobs.tiles import TILES, chunk_rows


class Options(NamedTuple):
    """What is static in a call."""

    backend: str
    chunk: int
    temperature: float
    softcap: float | None
    axis_name: str | None
    vocab: int  # tokens of the whole vocabulary


class _Slots(NamedTuple):
    """What each row reads and scores, live rows first; i32[S] each, S whole chunks."""

    parent: jax.Array
    target: jax.Array
    mask_row: jax.Array | None  # row of the allowed table
    live: jax.Array  # i32[], how many rows are live


def _take(x: jax.Array, chunk: int, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk)


def _chunk(options: Options, hidden, table, slots: _Slots, index):
    """A chunk's states and targets and allowed tokens, where its states lie, and which rows are live."""
    parent, target = (_take(x, options.chunk, index) for x in (slots.parent, slots.target))
    seen = None
    if table is not None and slots.mask_row is not None:
        seen = table[_take(slots.mask_row, options.chunk, index)]
    live = index * options.chunk + jnp.arange(options.chunk) < slots.live
    # Dead rows read some state: NaN there must not spread.
    states = jnp.where(live[:, None], hidden[parent], 0)
    return (states, target, seen), parent, live


def _columns(options: Options, head, slots: _Slots):
    """Targets counted inside this device's columns, -1 elsewhere, and how many columns count; None for all."""
    columns, first, limit = head.shape[1], 0, None
    if options.axis_name is not None:
        first = jax.lax.axis_index(options.axis_name) * columns
        if columns * jax.lax.axis_size(options.axis_name) > options.vocab:
            limit = jnp.clip(options.vocab - first, 0, columns)
    target = slots.target - first
    target = jnp.where((target >= 0) & (target < columns), target, -1)  # a tile may reach over the last column
    return slots._replace(target=target), limit


def _chunks(options: Options, slots: _Slots) -> jax.Array:
    return -(-slots.live // options.chunk)


def _forward(options: Options, hidden, head, table, slots: _Slots):
    """(logp, entropy, log of the sum of exp) f[S] in slot order; 0 behind the live slots."""
    form = load("logprobs", options.backend, "statistics")
    here, limit = _columns(options, head, slots)

    def body(index, out):
        (states, target, seen), *_ = _chunk(options, hidden, table, here, index)
        found = form(options, states, head, target, seen, limit)
        at = index * options.chunk
        return jax.tree.map(lambda o, x: jax.lax.dynamic_update_slice_in_dim(o, x, at, 0), out, found)

    wide, size = jnp.promote_types(hidden.dtype, jnp.float32), slots.parent.size
    start = Statistics(jnp.zeros(size, wide), jnp.ones(size, wide), jnp.zeros(size, wide), jnp.zeros(size, wide))
    found = jax.lax.fori_loop(0, _chunks(options, slots), body, start)
    if options.axis_name is not None:
        most, add = (functools.partial(f, axis_name=options.axis_name) for f in (jax.lax.pmax, jax.lax.psum))
        found = merged(found, most, add)
    live, (logp, entropy) = jnp.arange(size) < slots.live, logp_and_entropy(found)
    lse = found.top + jnp.log(found.total)
    return jnp.where(live, logp, 0), jnp.where(live, entropy, 0), jnp.where(live, lse, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(options: Options, hidden, head, table, slots: _Slots) -> tuple[jax.Array, jax.Array]:
    return _forward(options, hidden, head, table, slots)[:2]


def _score_fwd(options, hidden, head, table, slots):
    logp, entropy, lse = _forward(options, hidden, head, table, slots)
    return (logp, entropy), (hidden, head, table, slots, lse, entropy)


def _score_bwd(options, residuals, grads):
    """d logp / d z = onehot - p;  d H / d z = -p (log p + H);  z = softcap(hidden head) / temperature."""
    hidden, head, table, slots, lse, entropy = residuals
    form = load("logprobs", options.backend, "logit_gradients")
    here, limit = _columns(options, head, slots)
    if options.axis_name is not None:  # every device's result is made of all devices' columns
        grads = jax.lax.psum(grads, options.axis_name)
    wide = lse.dtype

    def body(index, carry):
        dhidden, dhead = carry
        (states, target, seen), parent, live = _chunk(options, hidden, table, here, index)
        pulled = [jnp.where(live, _take(g, options.chunk, index), 0) for g in grads]
        rows = [_take(x, options.chunk, index) for x in (lse, entropy)]
        dlogits = form(options, states, head, target, seen, limit, *rows, *pulled)
        dstates = jnp.matmul(dlogits, head.T, preferred_element_type=wide)
        dhidden = dhidden.at[parent].add(jnp.where(live[:, None], dstates, 0))
        return dhidden, dhead + jnp.matmul(states.T, dlogits, preferred_element_type=wide)

    start = (jnp.zeros(hidden.shape, wide), jnp.zeros(head.shape, wide))
    dhidden, dhead = jax.lax.fori_loop(0, _chunks(options, slots), body, start)
    return dhidden.astype(hidden.dtype), dhead.astype(head.dtype), None, None


_score.defvjp(_score_fwd, _score_bwd)


def _check(hidden, head, parent, target, temperature, softcap, allowed, chunk, backend) -> None:
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[0]:
        raise ValueError(f"hidden must be f[n, W] and head f[W, V]; got {hidden.shape}, {head.shape}")
    if parent.ndim != 1 or target.shape != parent.shape:
        raise ValueError(f"parent and target must be i[S] both; got {parent.shape}, {target.shape}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    check_softcap(softcap)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}: None picks by V")
    if backend == "xla":
        return
    if hidden.dtype.name not in DTYPES or head.dtype != hidden.dtype:
        raise ValueError(
            f"the log-prob kernels of backend {backend!r} take hidden and head both in {' or '.join(DTYPES)}; got "
            f"{hidden.dtype}, {head.dtype}: use backend='xla'"
        )
    if allowed is not None:
        raise ValueError(f"backend {backend!r} has no log-prob kernel with `allowed` tokens: use backend='xla'")


def target_logprobs(
    hidden: jax.Array,
    head: jax.Array,
    parent: jax.Array,
    target: jax.Array,
    live: jax.Array,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    allowed: tuple[jax.Array, jax.Array] | None = None,
    chunk: int | None = None,
    axis_name: str | None = None,
    vocab: int | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-prob of a target and entropy for each of S rows, without the [S, V] logits.

        logp_s = log_softmax(softcap(hidden[parent_s] @ head) / temperature)[target_s]

    The peak is chunk x V: logits in the form "xla", in the kernels their gradients in the dtype of `hidden`.

    Args:
      hidden: f[n, W].
      head: f[W, V]; with axis_name this device's columns of it.
      parent: i[S], the row of `hidden` that each row reads.
      target: i[S], counted in the whole vocabulary; one outside of it gives NaN.
      live: i[], rows behind the first `live` ones give 0, 0 and zero gradient; chunks of them are skipped.
      temperature: > 0; logits are divided by it.
      softcap: logits become softcap * tanh(logits / softcap) first.
      allowed: (table b[A, V], row i[S]): renormalise over the tokens that table[row] allows; form "xla" only.
      chunk: rows scored at a time; None picks by V.
      axis_name: inside shard_map(check_vma=False), the axis whose devices hold equal slices of the vocabulary in order;
        only four numbers a row cross it. Take gradients outside of the shard_map, which adds up what devices hold in
        common: inside of it every device's gradient is that of all devices' results.
      vocab: with axis_name, how many columns of all slices together count; None for all. The others are padding.
      backend: "xla" works everywhere; "tpu" and "triton" are Pallas kernels, "interpret" and "interpret_triton" run
        these on a CPU. None is the environment's RLALIGN_KERNELS, or "xla".

    Returns:
      (logp f[S], entropy f[S] in nats) in float32, in float64 for float64 inputs.

    Raises:
      ValueError: shapes, dtypes or options that do not fit, with their values.
    """
    backend = choose(backend)
    _check(hidden, head, parent, target, temperature, softcap, allowed, chunk, backend)
    shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    whole = head.shape[1] * shards if vocab is None else vocab
    if not whole - head.shape[1] * shards <= 0 < whole or (axis_name is None and whole != head.shape[1]):
        raise ValueError(
            f"vocab={vocab}, but there are {shards} slices of {head.shape[1]} columns: it counts the columns of all "
            "slices that are no padding, and goes with axis_name"
        )
    count, tile = max(parent.size, 1), TILES[backend].rows
    chunk = chunk_rows(backend, head.shape[1]) if chunk is None else chunk
    if backend == "xla":
        chunk = min(chunk, -(-count // tile) * tile)
    else:
        chunk = -(-min(chunk, count) // tile) * tile

    def whole_chunks(x):
        return jnp.pad(x.astype(jnp.int32), (0, -(-count // chunk) * chunk - x.size))

    table, mask_row = (None, None) if allowed is None else (jnp.asarray(allowed[0]), whole_chunks(allowed[1]))
    slots = _Slots(whole_chunks(parent), whole_chunks(target), mask_row, jnp.asarray(live, jnp.int32))
    options = Options(backend, chunk, float(temperature), softcap, axis_name, whole)
    scored: Any = _score(options, hidden, head, table, slots)  # custom_vjp hides its type
    known = (target >= 0) & (target < whole) | (jnp.arange(parent.size) >= live)
    return jnp.where(known, scored[0][: parent.size], jnp.nan), scored[1][: parent.size]
