"""Forwards without a gradient: log-probs of a frozen or an old policy, and the numbers of a reward model."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from rlalign.forest import pack, split
from rlalign.hosts import fetch
from rlalign.models.decoder import Decoder
from rlalign.train.mesh import gather_embedding, local_logprobs, local_rewards, row_shards, shard_decoder
from rlalign.train.step import arrange
from rlalign.types import Batch, Packed, Params, Prompt, Rollouts, TokenForest


def make_scorer(
    decoder: Decoder, *, temperature: float = 1.0, mesh: Mesh | None = None
) -> Callable[[Params, Packed], np.ndarray]:
    """score(params, packed) -> logp f[N, R], without gradient: for ref_logp, and for old_logp of an outside sampler.

    Args:
      decoder: the model.
      temperature: of the policy.
      mesh: as in make_train_step; rows must be packed in data * fsdp parts.
    """
    model = shard_decoder(decoder, mesh)

    @jax.jit
    def run(params, batch: Batch):
        forest, hidden, node = _forward(model, params, batch, mesh)
        how = {"mesh": mesh, "temperature": temperature, "softcap": model.config.logit_softcap}
        logp, _ = local_logprobs(hidden, model.head(params), forest, node, **how)
        return logp.reshape(node.shape)

    def score(params: Params, packed: Packed) -> np.ndarray:
        return _in_order(run(params, arrange(Batch(packed), 1, mesh)), packed, mesh, np.shape(packed.mask))

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
        _, hidden, node = _forward(model, params, batch, mesh)
        return local_rewards(hidden, params["reward"]["kernel"], node, mesh=mesh).reshape(node.shape[:2])

    def rewards(params: Params, packed: Packed) -> np.ndarray:
        return _in_order(run(params, arrange(Batch(packed), 1, mesh)), packed, mesh, np.shape(packed.mask)[:1])

    return rewards


def _forward(model: Decoder, params: Params, batch: Batch, mesh: Mesh | None):
    forest = TokenForest(*(x.reshape(-1, x.shape[-1]) for x in batch.packed.forest))
    return forest, model.apply(gather_embedding(params, mesh), forest), batch.packed.node[0]


def _in_order(by_part: jax.Array, packed: Packed, mesh: Mesh | None, shape: tuple[int, ...]) -> np.ndarray:
    """Values [S, M, ...] of the samples of each part as those of the batch; 0 for a sample without a token."""
    _, sample = split(packed, row_shards(mesh))
    values = fetch(by_part)[:, : sample.shape[1]]
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

    def __call__(self, prompts: Sequence[Prompt], rollouts: Rollouts) -> np.ndarray:
        """f[N], NaN for a sample that is too long for a row."""
        answers = [row[mask] for row, mask in zip(rollouts.tokens, rollouts.mask, strict=True)]
        whole = [self.encode(prompts[p], tokens) for p, tokens in zip(rollouts.prompt, answers, strict=True)]
        length = np.array([len(x) for x in whole])
        fits = np.flatnonzero((length <= self.row_length) & (length > 1))
        out = np.full(len(whole), np.nan, np.float32)
        if fits.size:
            last = length[fits] - 1
            chosen = [np.asarray(whole[n]) for n in fits]
            packed = pack(chosen, row_length=self.row_length, response_start=last, parts=self.parts)
            out[fits] = self.rewards(self.params, packed)
        return out


def make_judge(
    decoder: Decoder,
    params: Params,
    *,
    row_length: int,
    mesh: Mesh | None = None,
    encode: Callable[[Prompt, np.ndarray], np.ndarray] | None = None,
) -> Judge:
    """A reward model that judges rollouts on the devices they come from, each prompt once for all its answers.

    Args:
      decoder, params: with a reward head (load_pretrained of a sequence classifier, or trained by bradley_terry).
      row_length: tokens a row of the forest.
      mesh: where the parameters lie.
      encode: (prompt, answer's tokens i[L]) -> the reward model's tokens of both, for a model with another tokenizer
        or chat template; None joins the two. The reward is read at the last one.

    Raises:
      ValueError: a model without a reward head.
    """
    joined = lambda prompt, tokens: np.concatenate([np.asarray(prompt), tokens])
    return Judge(decoder, params, row_length, encode or joined, row_shards(mesh), make_rewarder(decoder, mesh=mesh))
