"""Perplexity against whole logits."""

import dataclasses
import math

import jax
import numpy as np
import pytest

import rlalign as ra
from rlalign.evaluation import perplexity
from tests.tiny import QWEN3, Samples, dense_decoder, random_params


def demonstrations(seed=0, sizes=((3, (4, 1)), (5, (2, 0, 6)), (1, (3,)))):
    """Prompts that come again with other responses, one of them empty."""
    rng, out = np.random.default_rng(seed), []
    for number, (length, responses) in enumerate(sizes):
        prompt = ra.Prompt(number, rng.integers(0, QWEN3.vocab_size, length).astype(np.int32))
        out += [ra.Demonstration(prompt, rng.integers(0, QWEN3.vocab_size, size)) for size in responses]
    return out


def by_whole_logits(decoder, params, some):
    """(sum of log-probs, tokens), one response after the other, each in a row of its own."""
    total, count = 0.0, 0
    for prompt, response in some:
        tokens = np.concatenate([prompt.tokens, response])
        row = Samples([tokens], [1]).repeated(16)
        score = np.asarray(ra.logits(decoder, params, row), np.float64)[0]
        logp = score - np.log(np.exp(score).sum(axis=-1, keepdims=True))
        for place in range(len(prompt.tokens), len(tokens)):
            total, count = total + logp[place - 1, tokens[place]], count + 1
    return total, count


@pytest.mark.parametrize("at_once", [2, 64])
def test_perplexity_is_that_of_whole_logits(x64, at_once):
    config = dataclasses.replace(QWEN3, dtype="float64")
    decoder, params, some = dense_decoder(config), random_params(config), demonstrations()
    total, count = by_whole_logits(decoder, params, some)
    got = perplexity(decoder, params, some, row_length=16, at_once=at_once)
    assert got.tokens == count == 16
    np.testing.assert_allclose(got.nats, -total / count, rtol=1e-12)
    np.testing.assert_allclose(got.perplexity, math.exp(-total / count), rtol=1e-12)


def test_of_a_model_that_knows_nothing_it_is_the_vocabulary():
    decoder = dense_decoder(QWEN3)
    zero = jax.tree.map(np.zeros_like, decoder.init(0))
    assert perplexity(decoder, zero, demonstrations(), row_length=16).perplexity == pytest.approx(17, rel=1e-5)


def test_on_a_mesh():
    decoder, params, some = ra.Decoder(QWEN3), random_params(QWEN3), demonstrations()
    mesh = ra.make_mesh(fsdp=2, tensor=2)
    placed = ra.place_params(params, mesh)
    here, there = (
        perplexity(decoder, p, some, row_length=16, at_once=4, mesh=m) for p, m in ((params, None), (placed, mesh))
    )
    np.testing.assert_allclose(there, here, rtol=1e-5)


@pytest.mark.parametrize(
    ("some", "how", "message"),
    [
        (demonstrations(), {"row_length": 10}, "demonstration 4 has 11 tokens; row_length=10 .* max_positions=64"),
        (demonstrations(sizes=((3, (0, 0)),)), {"row_length": 10}, "2 demonstrations hold no response token"),
        (demonstrations(), {"row_length": 16, "at_once": 0}, "at_once must be at least 1, got 0"),
    ],
)
def test_what_is_refused(some, how, message):
    decoder = ra.Decoder(QWEN3)
    with pytest.raises(ValueError, match=message):
        perplexity(decoder, None, some, **how)
