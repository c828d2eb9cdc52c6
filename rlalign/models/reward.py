"""Reward models: a language model with one number a token in place of logits (InstructGPT, arXiv 2203.02155)."""

import dataclasses

import jax

from rlalign.models.decoder import Decoder
from rlalign.types import Params


def add_reward_head(decoder: Decoder, params: Params, *, seed: int = 0) -> tuple[Decoder, Params]:
    """The same model with a reward head; the head over the vocabulary is left out.

    Args:
      decoder, params: a language model; its arrays are shared, not copied.
      seed: of the head f[W, 1], normal with variance 1 / (W + 1) (arXiv 2009.01325, appendix B): rewards begin near a
        variance of 1, and their differences near 0.

    Raises:
      ValueError: the model has a reward head already.

    >>> reward_model, its_params = add_reward_head(decoder, params)    # doctest: +SKIP
    >>> step = make_train_step(reward_model, ALGORITHMS["bradley_terry"], optimizer)    # doctest: +SKIP
    """
    if decoder.config.reward_head:
        raise ValueError("the model has a reward head already")
    config = dataclasses.replace(decoder.config, reward_head=True)
    draw = jax.random.normal(jax.random.key(seed), (config.width, 1)) / (config.width + 1) ** 0.5
    kept = {name: value for name, value in params.items() if name != "head"}
    return dataclasses.replace(decoder, config=config), {**kept, "reward": {"kernel": draw.astype(config.dtype)}}
