"""Log-probs of response tokens from hidden states, without ever holding the logits.

    logp(node) = log_softmax(softcap(hidden[parent(node)] @ head) / temperature)[token(node)]

Only the hidden states some response needs reach the head: the slots of node i32[N, R] that are live are moved to the
front and cut into chunks; a loop visits the chunks that hold one. The backward recomputes a chunk's logits, so the
peak is chunk x V. Sums are in float32, in float64 for float64 inputs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlalign.checks import expect
from rlalign.types import Array, TokenForest

CHUNK_LOGITS = 2**22  # elements of one chunk's logits: 16 MiB in float32, fastest of 2**20 to 2**26 on CPUs
MASKED = -1e30


class _Slots(NamedTuple):
    """Where each slot reads and what it scores, live slots first; i32[S] each, S padded to whole chunks."""

    parent: jax.Array
    target: jax.Array
    mask_row: jax.Array | None  # row of the allowed table
    live: jax.Array  # i32[], how many slots are live


class _Options(NamedTuple):
    chunk: int
    temperature: float
    softcap: float | None


def default_chunk(vocab: int) -> int:
    """Tokens a chunk: a power of two from 64 to 4096 such that chunk x V is near CHUNK_LOGITS."""
    return min(4096, max(64, 1 << (max(CHUNK_LOGITS // vocab, 1).bit_length() - 1)))


def _wide(dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _take(x: jax.Array, chunk: int, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk)


def _chunk_logits(options: _Options, hidden, head, table, slots: _Slots, index):
    """Scaled logits f32[chunk, V] of one chunk, the slope of the soft cap, the states and what of them is live."""
    parent = _take(slots.parent, options.chunk, index)
    live = index * options.chunk + jnp.arange(options.chunk) < slots.live
    states = jnp.where(live[:, None], hidden[parent], 0)  # dead slots read some state: NaN there must not spread
    raw = jnp.matmul(states, head, preferred_element_type=_wide(hidden.dtype))
    slope = None
    if options.softcap is not None:
        bent = jnp.tanh(raw / options.softcap)
        raw, slope = options.softcap * bent, 1 - bent * bent
    logits = raw / options.temperature
    if table is not None and slots.mask_row is not None:
        logits = jnp.where(table[_take(slots.mask_row, options.chunk, index)], logits, MASKED)
    return logits, slope, states, live


def _statistics(logits: jax.Array):
    """log-probs and entropy of each row: log_softmax f[chunk, V], its exp, and -sum p log p f[chunk]."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    prob = jnp.exp(logp)
    return logp, prob, -jnp.sum(prob * jnp.maximum(logp, MASKED), axis=-1)


def _one_hot(options: _Options, slots: _Slots, index, vocab: int) -> jax.Array:
    target = _take(slots.target, options.chunk, index)
    return target[:, None] == jnp.arange(vocab, dtype=target.dtype)[None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(options: _Options, hidden, head, table, slots: _Slots) -> tuple[jax.Array, jax.Array]:
    """(logp, entropy) f[S] in slot order; 0 behind the live slots."""
    size = slots.parent.size
    wide = _wide(hidden.dtype)

    def body(index, out):
        logits, _, _, live = _chunk_logits(options, hidden, head, table, slots, index)
        logp, _, entropy = _statistics(logits)
        target = _take(slots.target, options.chunk, index)
        logp = jnp.take_along_axis(logp, target[:, None], axis=1)[:, 0]
        values = (jnp.where(live, logp, 0), jnp.where(live, entropy, 0))
        at = index * options.chunk
        return tuple(jax.lax.dynamic_update_slice_in_dim(o, v, at, 0) for o, v in zip(out, values, strict=True))

    chunks = -(-slots.live // options.chunk)
    return jax.lax.fori_loop(0, chunks, body, (jnp.zeros(size, wide), jnp.zeros(size, wide)))


def _score_fwd(options, hidden, head, table, slots):
    return _score(options, hidden, head, table, slots), (hidden, head, table, slots)


def _score_bwd(options, residuals, grads):
    """d logp / d z = onehot - p;  d H / d z = -p (log p + H);  z = softcap(hidden head) / temperature."""
    hidden, head, table, slots = residuals
    wide = _wide(hidden.dtype)
    grad_logp, grad_entropy = grads

    def body(index, carry):
        dhidden, dhead = carry
        logits, slope, states, live = _chunk_logits(options, hidden, head, table, slots, index)
        logp, prob, entropy = _statistics(logits)
        g_logp = jnp.where(live, _take(grad_logp, options.chunk, index), 0)[:, None]
        g_entropy = jnp.where(live, _take(grad_entropy, options.chunk, index), 0)[:, None]
        hot = _one_hot(options, slots, index, logits.shape[1])
        dlogits = jnp.where(hot, g_logp, 0) - prob * (
            g_logp + g_entropy * (jnp.maximum(logp, MASKED) + entropy[:, None])
        )
        dlogits = dlogits / options.temperature
        if slope is not None:
            dlogits = dlogits * slope
        dlogits = dlogits.astype(hidden.dtype)
        dstates = jnp.matmul(dlogits, head.T, preferred_element_type=wide)
        parent = _take(slots.parent, options.chunk, index)
        dhidden = dhidden.at[parent].add(jnp.where(live[:, None], dstates, 0))
        return dhidden, dhead + jnp.matmul(states.T, dlogits, preferred_element_type=wide)

    start = (jnp.zeros(hidden.shape, wide), jnp.zeros(head.shape, wide))
    dhidden, dhead = jax.lax.fori_loop(0, -(-slots.live // options.chunk), body, start)
    return dhidden.astype(hidden.dtype), dhead.astype(head.dtype), None, None


_score.defvjp(_score_fwd, _score_bwd)


def token_logprobs(
    hidden: Array,
    head: Array,
    forest: TokenForest,
    node: Array,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    allowed: tuple[Array, Array] | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-prob and entropy of each response token, read from its parent's hidden state.

    Args:
      hidden: f[B, T, W].
      head: f[W, V].
      forest: i32[B, T] each.
      node: i32[N, R], `row * T + column`; -1 gives 0, 0 and zero gradient.
      temperature: > 0; logits are divided by it.
      softcap: logits become softcap * tanh(logits / softcap) first.
      allowed: (table b[S, V], index i32[N, R]): renormalise over the tokens that table[index] allows.
      chunk: tokens scored at a time; None picks by V. Chunks without a live node are skipped.

    Returns:
      (logp f[N, R], entropy f[N, R] in nats) in float32, in float64 for float64 hidden states.

    Raises:
      ValueError: temperature not positive.
    """
    sizes = expect(
        hidden=(hidden, "f[B, T, W]"),
        head=(head, "f[W, V]"),
        token=(forest.token, "i[B, T]"),
        parent=(forest.parent, "i[B, T]"),
        node=(node, "i[N, R]"),
    )
    if allowed is not None:
        expect(bind=sizes, **{"allowed[0]": (allowed[0], "b[S, V]"), "allowed[1]": (allowed[1], "i[N, R]")})
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    length, vocab = forest.token.shape[1], head.shape[1]
    count = node.size
    chunk = min(default_chunk(vocab) if chunk is None else chunk, -(-count // 8) * 8)
    flat = node.reshape(-1)
    alive = flat >= 0
    order = jnp.argsort(~alive, stable=True)
    at = jnp.where(alive, flat, 0)[order]
    parent = at // length * length + forest.parent.reshape(-1)[at]

    def whole_chunks(x):
        return jnp.pad(x.astype(jnp.int32), (0, -count % chunk))

    table, mask_row = (None, None) if allowed is None else (allowed[0], whole_chunks(allowed[1].reshape(-1)[order]))
    token = forest.token.reshape(-1)[at]
    slots = _Slots(whole_chunks(jnp.maximum(parent, 0)), whole_chunks(token), mask_row, jnp.sum(alive))
    options = _Options(chunk, float(temperature), softcap)
    scored: Any = _score(options, hidden.reshape(-1, hidden.shape[-1]), head, table, slots)  # custom_vjp hides its type

    def in_place(x: jax.Array) -> jax.Array:
        return jnp.zeros(count, x.dtype).at[order].set(x[:count]).reshape(node.shape)

    return in_place(scored[0]), in_place(scored[1])
