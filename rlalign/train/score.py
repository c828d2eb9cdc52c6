"""Forwards without a gradient: log-probs of a frozen or an old policy, and the numbers of a reward model."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from rlalign.forest import pack, split
from rlalign.hosts import fetch
from rlalign.models.decoder import Decoder
from rlalign.train.mesh import (
    gather_embedding,
    local_likeliest,
    local_logprobs,
    local_rewards,
    row_shards,
    shard_decoder,
)
from rlalign.train.step import arrange
from rlalign.types import Array, Batch, Packed, Params, Prompt, Rollouts, TokenForest


def make_scorer(
    decoder: Decoder, *, temperature: float = 1.0, mesh: Mesh | None = None, microbatches: int = 1
) -> Callable[..., np.ndarray]:
    """score(params, packed, allowed=None) -> logp f[N, R], without gradient: for ref_logp, and for old_logp of an
    outside sampler; `allowed` is Batch.allowed.

    Args:
      decoder: the model.
      temperature: of the policy.
      mesh: as in make_train_step; rows must be packed in microbatches * data * fsdp parts.
      microbatches: parts of the batch that are computed one after the other, each in the memory of the last.
    """
    model = shard_decoder(decoder, mesh)

    @jax.jit
    def run(params, batch: Batch):
        def one(part: Batch) -> jax.Array:
            forest, hidden, node = _forward(model, params, part, mesh)
            how = {"mesh": mesh, "temperature": temperature, "softcap": model.config.logit_softcap}
            logp, _ = local_logprobs(hidden, model.head(params), forest, node, allowed=part.allowed, **how)
            return logp.reshape(node.shape)

        return jax.lax.map(one, batch) if microbatches > 1 else one(_first(batch))[None]

    def score(params: Params, packed: Packed, allowed: tuple[Array, Array] | None = None) -> np.ndarray:
        by_part = run(params, arrange(Batch(packed, allowed=allowed), microbatches, mesh))
        return _in_order(by_part, packed, mesh, np.shape(packed.mask))

    return score


def make_choice_scorer(
    decoder: Decoder, *, mesh: Mesh | None = None
) -> Callable[[Params, Packed], tuple[np.ndarray, np.ndarray]]:
    """score(params, packed) -> (logp f[N, R], likeliest b[N, R]: whether greedy decoding would give the token).

    Args:
      decoder: the model, at temperature 1.
      mesh: as in make_train_step; rows must be packed in data * fsdp parts.
    """
    model = shard_decoder(decoder, mesh)

    @jax.jit
    def run(params, batch: Batch):
        forest, hidden, node = _forward(model, params, _first(batch), mesh)
        head, softcap = model.head(params), model.config.logit_softcap
        logp, _ = local_logprobs(hidden, head, forest, node, mesh=mesh, temperature=1.0, softcap=softcap)
        likeliest = local_likeliest(hidden, head, forest, node, mesh=mesh)
        return logp.reshape(1, *node.shape), likeliest.reshape(1, *node.shape)

    def score(params: Params, packed: Packed) -> tuple[np.ndarray, np.ndarray]:
        logp, likeliest = run(params, arrange(Batch(packed), 1, mesh))
        shape = np.shape(packed.mask)
        return _in_order(logp, packed, mesh, shape), _in_order(likeliest, packed, mesh, shape)

    return score


def make_rewarder(decoder: Decoder, *, mesh: Mesh | None = None) -> Callable[[Params, Packed], np.ndarray]:
    """rewards(params, packed) -> f[N]: what a reward model gives at the last response token of each sample.

    Args:
      decoder: with a reward head.
      mesh: as in make_train_step; rows must be packed in data * fsdp parts.

    Raises:
      ValueError: a model without a reward head.
    """
    if not decoder.config.reward_head:
        raise ValueError("the model has no reward head: add_reward_head, then train it by ALGORITHMS['bradley_terry']")
    model = shard_decoder(decoder, mesh)

    @jax.jit
    def run(params, batch: Batch):
        _, hidden, node = _forward(model, params, _first(batch), mesh)
        return local_rewards(hidden, params["reward"]["kernel"], node, mesh=mesh).reshape(1, *node.shape[:2])

    def rewards(params: Params, packed: Packed) -> np.ndarray:
        return _in_order(run(params, arrange(Batch(packed), 1, mesh)), packed, mesh, np.shape(packed.mask)[:1])

    return rewards


def _first(batch: Batch) -> Batch:
    """The only microbatch, [shards, ...]."""
    return jax.tree.map(lambda x: x[0], batch)


def _forward(model: Decoder, params: Params, part: Batch, mesh: Mesh | None):
    """forest, hidden states and nodes [shards, M, R] of a microbatch."""
    forest = TokenForest(*(x.reshape(-1, x.shape[-1]) for x in part.packed.forest))
    return forest, model.apply(gather_embedding(params, mesh), forest), part.packed.node


def _in_order(by_part: jax.Array, packed: Packed, mesh: Mesh | None, shape: tuple[int, ...]) -> np.ndarray:
    """Values [microbatches, S, M, ...] of the samples of each part in their order; 0 for a sample without a token."""
    values = fetch(by_part)
    values = values.reshape(-1, *values.shape[2:])
    _, sample = split(packed, len(values))
    values = values[:, : sample.shape[1]]
    out = np.zeros(shape, values.dtype)
    out[sample[sample >= 0]] = values[sample >= 0]
    return out


@dataclasses.dataclass(frozen=True)
class Judge:
    """A reward model as the reward of `fit(judge=...)`: judge(prompts, rollouts) -> f[N]. See make_judge."""

    decoder: Decoder
    params: Params
    row_length: int
    encode: Callable[[Prompt, np.ndarray], np.ndarray]
    parts: int
    rewards: Callable[[Params, Packed], np.ndarray]
    at_once: int | None = None

    @property
    def refuses(self) -> str:
        """What gets NaN, for the reason of an invalid reward."""
        return f"it has no reward for under two tokens, or over row_length={self.row_length}"

    def __call__(self, prompts: Sequence[Prompt], rollouts: Rollouts) -> np.ndarray:
        """f[N], NaN for a sample of less than two tokens, or of more than row_length."""
        answers = [row[mask] for row, mask in zip(rollouts.tokens, rollouts.mask, strict=True)]
        whole = [
            np.asarray(self.encode(prompts[p], tokens)) for p, tokens in zip(rollouts.prompt, answers, strict=True)
        ]
        vocab = self.decoder.config.vocab_size
        for number, ids in enumerate(whole):
            if ids.size and not 0 <= ids.min() <= ids.max() < vocab:
                raise ValueError(
                    f"sample {number} holds token {ids.min() if ids.min() < 0 else ids.max()}, the reward model's "
                    f"vocabulary has {vocab}: it has another tokenizer; give make_judge an encode"
                )
        length = np.array([len(ids) for ids in whole])
        fits = (length <= self.row_length) & (length > 1)
        # Others stay, cut and without a last token: so many samples are one shape.
        kept = [ids if ok else np.zeros(1, np.int32) for ids, ok in zip(whole, fits, strict=True)]
        last = np.where(fits, length - 1, 1)
        step = self.at_once or len(kept)
        found = [self._rewards(kept[i : i + step], last[i : i + step]) for i in range(0, len(kept), step)]
        return np.where(fits, np.concatenate(found), np.nan)

    def _rewards(self, whole: list[np.ndarray], last: np.ndarray) -> np.ndarray:
        packed = pack(whole, row_length=self.row_length, response_start=last, parts=self.parts, response_length=1)
        return self.rewards(self.params, packed)


def make_judge(
    decoder: Decoder,
    params: Params,
    *,
    row_length: int,
    mesh: Mesh | None = None,
    encode: Callable[[Prompt, np.ndarray], np.ndarray] | None = None,
    at_once: int | None = None,
) -> Judge:
    """A reward model that judges rollouts on the devices they come from, each prompt once for all its answers.

    Args:
      decoder, params: with a reward head (load_pretrained of a sequence classifier, or trained by bradley_terry).
      row_length: tokens a row of the forest.
      mesh: where the parameters lie.
      encode: (prompt, answer's tokens i[L]) -> the reward model's tokens of both, for a model with another tokenizer
        or chat template; None joins the two. The reward is read at the last one.
      at_once: samples in one forward, a multiple of those a prompt has so that these share it; None takes all, whose
        activations then lie in memory together.

    Raises:
      ValueError: a model without a reward head; rows beyond its max_positions. Called: a token that it does not know.
    """
    if row_length > decoder.config.max_positions:
        raise ValueError(
            f"row_length={row_length} is beyond the reward model's max_positions={decoder.config.max_positions}: "
            "samples of that length would get numbers that mean nothing; lower it"
        )
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once must be at least 1 or None, got {at_once}")
    joined = lambda prompt, tokens: np.concatenate([np.asarray(prompt), tokens])
    return Judge(
        decoder, params, row_length, encode or joined, row_shards(mesh), make_rewarder(decoder, mesh=mesh), at_once
    )
