"""The loss of one batch: forest forward, log-probs, and the algorithm's loss with its KL and entropy terms."""

from typing import Any

import jax
import jax.numpy as jnp

from rlalign.algorithms import Algorithm
from rlalign.losses import aggregate_tokens, count_for, kl_estimate, sequence_logratio, sequence_mean, token_mean
from rlalign.models.decoder import Decoder
from rlalign.train.mesh import gather_embedding, local_logprobs, local_rewards
from rlalign.types import Batch, TokenForest

Metrics = dict[str, jax.Array]


def batch_loss(decoder: Decoder, algorithm: Algorithm, mesh, params, batch: Batch, denominator) -> tuple[Any, Metrics]:
    """Loss of one microbatch, fields [S, ...], as a share of the whole batch's."""
    forest = TokenForest(*(x.reshape(-1, x.shape[-1]) for x in batch.packed.forest))
    params = gather_embedding(params, mesh)
    if algorithm.score == "reward":
        hidden = decoder.apply(params, forest)
        reward = local_rewards(hidden, params["reward"]["kernel"], batch.packed.node, mesh=mesh)
        loss, metrics = _pair_loss(algorithm, reward, batch, denominator)
        return loss, jax.lax.stop_gradient(metrics | {"loss": loss})
    how = {"mesh": mesh, "temperature": algorithm.temperature, "softcap": decoder.config.logit_softcap}
    logp, entropy = local_logprobs(
        decoder.apply(params, forest), decoder.head(params), forest, batch.packed.node, allowed=batch.allowed, **how
    )

    def flat(x: Any) -> Any:
        return None if x is None else x.reshape(-1, *x.shape[2:])

    mask = flat(batch.packed.mask)
    how = {"max_length": algorithm.max_length or mask.shape[1], "denominator": denominator}
    if algorithm.data == "demonstrations":
        loss, metrics = algorithm.loss(logp, mask, aggregate=algorithm.aggregate, **how)
    elif algorithm.data == "rollouts":
        old = jax.lax.stop_gradient(logp) if batch.old_logp is None else flat(batch.old_logp)
        loss, metrics = algorithm.loss(
            logp, old, flat(batch.advantage), mask, weight=flat(batch.weight), aggregate=algorithm.aggregate, **how
        )
    else:
        loss, metrics = _judged_loss(algorithm, logp, mask, batch, denominator)
    metrics = metrics | {"loss": loss, "entropy": token_mean(entropy, mask)}
    if algorithm.kl_coef > 0:
        kl = kl_estimate(logp, flat(batch.ref_logp), mask, kind=algorithm.kl_kind)
        loss = loss + algorithm.kl_coef * aggregate_tokens(kl, mask, algorithm.aggregate, **how)
        metrics["kl"] = token_mean(kl, mask)
    if algorithm.entropy_coef > 0:
        loss = loss - algorithm.entropy_coef * aggregate_tokens(entropy, mask, algorithm.aggregate, **how)
    return loss, jax.lax.stop_gradient(metrics | {"loss": loss})


def _judged_loss(algorithm: Algorithm, logp, mask, batch: Batch, denominator) -> tuple[Any, Metrics]:
    """The loss of pairs or labels from logp f[N, R]; batch fields are [S, ...]."""
    if algorithm.score == "mean_logp":
        score = sequence_mean(logp, mask)
    else:
        score = sequence_logratio(logp, jnp.asarray(batch.ref_logp).reshape(logp.shape), mask)
    if algorithm.data == "pairs":
        return _pair_loss(algorithm, score, batch, denominator)
    # Labels: a pair holds a response and one to another prompt, whose log-ratios estimate the KL.
    apart = {}
    if batch.pair is not None:
        pair, there = _flat_pairs(batch.pair, batch.packed.mask.shape[1])
        apart = {"kl_logratio": score[pair[:, 1]], "kl_valid": there}
    label = jnp.asarray(batch.advantage).reshape(-1)
    valid = jnp.any(mask, axis=1) & (label != 0)
    return algorithm.loss(score, label > 0, valid=valid, denominator=denominator, **apart)


def _pair_loss(algorithm: Algorithm, score: jax.Array, batch: Batch, denominator) -> tuple[Any, Metrics]:
    """The loss of pairs from a number f[N] of each sample."""
    assert batch.pair is not None
    pair, there = _flat_pairs(batch.pair, batch.packed.mask.shape[1])
    return algorithm.loss(score[pair[:, 0]], score[pair[:, 1]], valid=there, denominator=denominator)


def _flat_pairs(pair: jax.Array, samples: int) -> tuple[jax.Array, jax.Array]:
    """Pairs i32[S, M, 2] of shards of so many samples, as pairs of the flattened samples, and which are real."""
    there = pair[..., 0] >= 0
    shifted = pair + samples * jnp.arange(pair.shape[0], dtype=pair.dtype)[:, None, None]
    return jnp.where(there[..., None], shifted, 0).reshape(-1, 2), there.reshape(-1)


def part_share(algorithm: Algorithm, batch: Batch, tokens: jax.Array, count: jax.Array) -> jax.Array:
    """What a part's metrics weigh: its share of the tokens, or of the pairs or labels."""
    if algorithm.data in ("pairs", "labels"):
        parts = jax.tree.map(lambda x: x[None], batch)
        return batch_count(algorithm, parts) / jnp.maximum(count, 1)
    return jnp.sum(batch.packed.mask) / tokens


def batch_count(algorithm: Algorithm, batch: Batch) -> jax.Array:
    """What the loss is a mean over, in the whole batch [microbatches, S, ...]."""
    mask = batch.packed.mask.reshape(-1, batch.packed.mask.shape[-1])
    if algorithm.data == "pairs" and batch.pair is not None:
        return jnp.sum(batch.pair[..., 0] >= 0)
    if algorithm.data == "labels" and batch.advantage is not None:
        return jnp.sum(jnp.any(mask, axis=1) & (batch.advantage.reshape(-1) != 0))
    return count_for(algorithm.aggregate, mask)
