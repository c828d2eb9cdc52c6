"""Log-probs of response tokens from hidden states, without ever holding the logits.

    logp(node) = log_softmax(softcap(hidden[parent(node)] @ head) / temperature)[token(node)]

Only the hidden states some response needs reach the head: the slots of node i32[N, R] that are live are moved to the
front, and rlalign_kernels.target_logprobs scores them chunk by chunk.
"""

import jax
import jax.numpy as jnp

from rlalign.checks import expect
from rlalign.types import Array, TokenForest
from rlalign_kernels import target_logprobs


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
    axis_name: str | None = None,
    vocab: int | None = None,
    backend: str | None = None,
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
      axis_name, vocab, backend: a vocabulary that devices share, and the form; see rlalign_kernels.target_logprobs.

    Returns:
      (logp f[N, R], entropy f[N, R] in nats) in float32, in float64 for float64 hidden states.

    Raises:
      ValueError: temperature not positive, options that do not fit, with their values.
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
    length, count = forest.token.shape[1], node.size
    token, before, flat = (jnp.asarray(x).reshape(-1) for x in (forest.token, forest.parent, node))
    alive = flat >= 0
    order = jnp.argsort(~alive, stable=True)
    at = jnp.where(alive, flat, 0)[order]
    parent = at // length * length + before[at]
    scored = target_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        jnp.maximum(parent, 0),
        token[at],
        jnp.sum(alive),
        temperature=temperature,
        softcap=softcap,
        allowed=None if allowed is None else (allowed[0], jnp.asarray(allowed[1]).reshape(-1)[order]),
        chunk=chunk,
        axis_name=axis_name,
        vocab=vocab,
        backend=backend,
    )

    def in_place(x: jax.Array) -> jax.Array:
        return jnp.zeros(count, x.dtype).at[order].set(x).reshape(node.shape)

    return in_place(scored[0]), in_place(scored[1])
