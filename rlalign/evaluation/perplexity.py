"""How well a model foretells demonstrations that it was not trained on."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from rlalign.forest import pack
from rlalign.models.decoder import Decoder
from rlalign.train.mesh import row_shards
from rlalign.train.score import make_scorer
from rlalign.types import Demonstration, Params


class Perplexity(NamedTuple):
    """Of a set of demonstrations.

    Attributes:
      perplexity: exp(nats).
      nats: minus the mean log-prob of a response token.
      tokens: response tokens.
    """

    perplexity: float
    nats: float
    tokens: int


def perplexity(
    decoder: Decoder,
    params: Params,
    demonstrations: Sequence[Demonstration],
    *,
    row_length: int,
    at_once: int = 64,
    mesh: Mesh | None = None,
) -> Perplexity:
    """Perplexity of the responses, given their prompts.

        exp(-sum_i log pi(token_i | all before it) / tokens)

    over the response tokens of all demonstrations, the end token included, each token alike; prompts are not counted.
    A prompt that follows itself is computed once.

    Args:
      decoder, params: the model.
      demonstrations: held out.
      row_length: tokens a row of the forest.
      at_once: demonstrations in one forward; their shapes are bucketed, so that a handful are compiled.
      mesh: where the parameters lie.

    Raises:
      ValueError: no response token at all, a demonstration longer than a row or the model's max_positions, at_once < 1.
    """
    if at_once < 1:
        raise ValueError(f"at_once must be at least 1, got {at_once}")
    limit = min(row_length, decoder.config.max_positions)
    start = np.array([len(np.asarray(demonstration.prompt)) for demonstration in demonstrations], np.int64)
    size = np.array([len(demonstration.response) for demonstration in demonstrations], np.int64)
    if not size.sum():
        raise ValueError(f"{len(demonstrations)} demonstrations hold no response token: nothing to foretell")
    longest = int(np.argmax(start + size))
    if start[longest] + size[longest] > limit:
        raise ValueError(
            f"demonstration {longest} has {start[longest] + size[longest]} tokens; row_length={row_length} and the "
            f"model's max_positions={decoder.config.max_positions}: raise row_length, or drop it"
        )
    score = make_scorer(decoder, mesh=mesh)
    total = 0.0
    for begin in range(0, len(demonstrations), at_once):
        some = slice(begin, begin + at_once)
        packed = pack(
            [np.concatenate([np.asarray(prompt), response]) for prompt, response in demonstrations[some]],
            row_length=row_length,
            response_start=start[some],
            response_length=int(size.max()),
            parts=row_shards(mesh),
        )
        total += float(np.sum(score(params, packed), dtype=np.float64))  # 0 where there is no token
    nats = -total / int(size.sum())
    return Perplexity(math.exp(nats) if nats < 700 else math.inf, nats, int(size.sum()))
