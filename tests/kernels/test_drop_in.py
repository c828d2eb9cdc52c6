"""forest_attention in somebody else's model: what the README shows, and its gradients against the repeated batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlalign.forest import pack
from rlalign_kernels import forest_attention

# --- the example -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer block of one's own. Two lines are about the forest: positions and the attention itself."""

    heads: int = 4

    @nn.compact
    def __call__(self, token, position, visible_until, attend=forest_attention):
        x = nn.Embed(50, 32, name="tokens")(token) + nn.Embed(64, 32, name="places")(position)
        y = nn.LayerNorm()(x)
        q, k, v = (nn.DenseGeneral((self.heads, 8), name=name)(y) for name in ("q", "k", "v"))
        x = x + nn.DenseGeneral(32, axis=(-2, -1), name="out")(attend(q, k, v, visible_until))
        return nn.Dense(50, name="logits")(x + nn.Dense(32)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x)))))


def loss(params, packed):
    """Minus the mean log-prob of the response tokens: each is predicted by its parent, whose prefix is stored once."""
    forest, length = packed.forest, packed.forest.token.shape[1]
    logp = jax.nn.log_softmax(Block().apply(params, forest.token, forest.position, forest.visible_until))
    row, column = packed.node // length, packed.node % length
    chosen = logp[row, forest.parent[row, column], forest.token[row, column]]
    return -jnp.sum(jnp.where(packed.mask, chosen, 0)) / jnp.sum(packed.mask)


def batch():
    """Two prompts with three answers each, as plain token arrays: pack finds what they share."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 50, n) for n in (20, 11)]
    answers = [rng.integers(0, 50, n) for n in (6, 3, 9, 2, 8, 5)]
    sequences = [np.concatenate([prompts[i // 3], answer]) for i, answer in enumerate(answers)]
    return sequences, pack(sequences, row_length=48, response_start=[20, 20, 20, 11, 11, 11])


# --- what it is equal to ---------------------------------------------------------------------------------------------


def causal(q, k, v, visible_until):
    """Ordinary causal attention over rows that each hold one sequence."""
    del visible_until
    score = jnp.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    seen = jnp.tril(jnp.ones(score.shape[-2:], bool))
    return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(jnp.where(seen, score, -jnp.inf)), v)


def repeated_loss(params, token, response):
    """The same loss over one row a sequence, prompts repeated; response b[N, L] marks the tokens that count."""
    position = jnp.broadcast_to(jnp.arange(token.shape[1]), token.shape)
    logp = jax.nn.log_softmax(Block().apply(params, token, position, None, causal))
    chosen = jnp.take_along_axis(logp[:, :-1], token[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(response[:, 1:], chosen, 0)) / jnp.sum(response)


def test_gradients_equal_those_of_the_repeated_batch(x64):
    sequences, packed = batch()
    token = np.stack([np.pad(s, (0, 29 - len(s))) for s in sequences])
    at, length = np.arange(29)[None, :], np.array([len(s) for s in sequences])[:, None]
    response = (at >= np.repeat([20, 11], 3)[:, None]) & (at < length)
    assert response.sum() == packed.mask.sum()
    assert (packed.forest.visible_until > 0).sum() == 20 + 11 + response.sum()  # each prompt once

    start = jax.jit(Block().init)(jax.random.key(0), *(packed.forest[i] for i in (0, 1, 3)))
    params = jax.tree.map(lambda x: x.astype(jnp.float64), start)
    value, gradient = jax.jit(jax.value_and_grad(loss))(params, jax.tree.map(jnp.asarray, packed))
    expected, by_repetition = jax.jit(jax.value_and_grad(repeated_loss))(params, token, response)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for (path, x), y in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(by_repetition), strict=True):
        assert np.abs(x - y).max() <= 1e-12 * max(np.abs(y).max(), 1e-3), path
    assert any(np.asarray(g).any() for g in jax.tree.leaves(gradient))
