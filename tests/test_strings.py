"""Responses that are one of their prompt's strings: what is drawn, and with which log-probs."""

import collections
import dataclasses
import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlalign.algorithms import ALGORITHMS
from rlalign.logprobs import token_logprobs
from rlalign.models.decoder import Decoder
from rlalign.rollout import SampleConfig, sample
from rlalign.strings import allowed_strings, longest_string, states
from rlalign.train import (
    init_state,
    make_batch,
    make_mesh,
    make_scorer,
    make_train_step,
    pack_rollouts,
    place_params,
)
from rlalign.types import Rollouts
from tests.tiny import QWEN3, random_params

VOCAB, EOS = QWEN3.vocab_size, 5
DECODER, PARAMS = Decoder(QWEN3), random_params(QWEN3)
CONFIG = SampleConfig(num_samples=6, max_new_tokens=6, eos_ids=(EOS,), temperature=0.8)
STRINGS = [[[7], [7, 8], [7, 8, 9, 3], [2, 2]], [[3]], [[11, 8, 9, 3], [2, 2], [2, 4]]]
PROMPTS = [np.array([1, 2, 3]), np.array([9]), np.array([4, 4, 6, 1])]

texts = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=6)


def said(rollouts):
    return [tuple(row[mask].tolist()) for row, mask in zip(rollouts.tokens, rollouts.mask, strict=True)]


def draw(seed=0, config=CONFIG, **options):
    allowed = allowed_strings(STRINGS, vocab_size=VOCAB, eos=EOS)
    return allowed, sample(DECODER, PARAMS, PROMPTS, seed=seed, step=0, config=config, allowed=allowed, **options)


@given(st.lists(texts, min_size=1, max_size=4))
def test_an_automaton_accepts_its_strings_and_no_others(strings):
    allowed = allowed_strings(strings, vocab_size=6, eos=5)
    longest = max(len(text) for own in strings for text in own)
    assert longest_string(allowed) == longest + 1
    for prompt, own in enumerate(strings):
        accepted = set()
        for length in range(1, min(longest, 3) + 1):
            for text in itertools.product(range(5), repeat=length):
                token = np.array([[*text, 5]], np.int32)
                rows = Rollouts(token, token >= 0, token, token, np.zeros(1), np.array([prompt]))
                try:
                    states(allowed, rows)
                except ValueError:
                    continue
                accepted.add(text)
        assert accepted == {tuple(text) for text in own if len(text) <= 3}


def test_equal_ends_are_one_state():
    strings = [[[one, *[4] * 9] for one in range(4)], [[4] * 9]]
    allowed = allowed_strings(strings, vocab_size=6, eos=5)
    assert len({*allowed.start}) == 2
    assert (np.asarray(allowed.table)[1:].any(axis=1)).sum() == 11  # nine places, the end, and a start


def test_a_string_may_be_long():
    long = [n % 5 for n in range(3000)]
    allowed = allowed_strings([[long, long[:1000]], [long[7:]]], vocab_size=6, eos=5)
    assert longest_string(allowed) == 3001
    assert (np.asarray(allowed.table)[1:].any(axis=1)).sum() == 3001 + 994  # the second may not end at 1000
    for prompt, text in ((0, long), (0, long[:1000]), (1, long[7:])):
        token = np.array([[*text, 5]], np.int32)
        assert (states(allowed, Rollouts(token, token >= 0, token, token, np.zeros(1), np.array([prompt]))) > 0).all()
    token = np.array([[*long[:1001], 5]], np.int32)
    with pytest.raises(ValueError, match=r"^response 0 says token 5 at place 1001"):
        states(allowed, Rollouts(token, token >= 0, token, token, np.zeros(1), np.array([0])))


@pytest.mark.parametrize("greedy", [False, True])
def test_every_response_is_one_of_its_prompts_strings(greedy):
    _, rollouts = draw(config=SampleConfig(1 if greedy else 6, 6, eos_ids=(EOS,), greedy=greedy))
    for row, text in zip(rollouts.prompt, said(rollouts), strict=True):
        assert text in {(*string, EOS) for string in STRINGS[row]}


def test_log_probs_are_those_that_a_trainer_finds():
    allowed, rollouts = draw()
    packed = pack_rollouts(PROMPTS, rollouts, np.ones(18, bool), row_length=64)
    hidden, head = jax.jit(DECODER.apply)(PARAMS, packed.forest), DECODER.head(PARAMS)
    how = {"temperature": CONFIG.temperature, "softcap": QWEN3.logit_softcap}
    index = states(allowed, rollouts)
    logp, _ = token_logprobs(hidden, head, packed.forest, packed.node, allowed=(allowed.table, index), **how)
    np.testing.assert_allclose(logp, np.where(rollouts.mask, rollouts.logp, 0), atol=2e-5)
    np.testing.assert_array_equal(rollouts.logp, rollouts.behaviour_logp)
    free, _ = token_logprobs(hidden, head, packed.forest, packed.node, **how)
    assert np.abs(np.asarray(free - logp)[rollouts.mask]).max() > 1


def test_strings_are_drawn_as_their_log_probs_say():
    counts, logps = collections.Counter(), {}
    config = SampleConfig(400, 6, eos_ids=(EOS,), temperature=2.0)
    _, rollouts = draw(config=config)
    for row, text, logp in zip(rollouts.prompt, said(rollouts), rollouts.logp.sum(axis=1), strict=True):
        counts[row, text] += 1
        logps[row, text] = float(logp)
    for prompt, own in enumerate(STRINGS):
        assert sum(math.exp(logps[prompt, (*text, EOS)]) for text in own) == pytest.approx(1, abs=1e-4)
        for text in own:
            p = math.exp(logps[prompt, (*text, EOS)])
            assert abs(counts[prompt, (*text, EOS)] / 400 - p) < 4 * math.sqrt(p * (1 - p) / 400) + 1e-9


def test_a_mesh_draws_the_same():
    mesh = make_mesh(data=2, fsdp=2)
    _, one = draw()
    allowed = allowed_strings(STRINGS, vocab_size=VOCAB, eos=EOS)
    params = place_params(PARAMS, mesh)
    cut = sample(DECODER, params, PROMPTS, seed=0, step=0, config=CONFIG, allowed=allowed, mesh=mesh)
    np.testing.assert_array_equal(one.tokens, cut.tokens)


def test_gradients_of_what_is_not_allowed_are_zero():
    allowed, rollouts = draw()
    packed = pack_rollouts(PROMPTS, rollouts, np.ones(18, bool), row_length=64)
    hidden, index = jax.jit(DECODER.apply)(PARAMS, packed.forest), states(allowed, rollouts)
    total = lambda head: jnp.sum(
        token_logprobs(hidden, head, packed.forest, packed.node, allowed=(allowed.table, index))[0]
    )
    slope = np.asarray(jax.grad(total)(DECODER.head(PARAMS)))
    used = {token for own in STRINGS for text in own for token in (*text, EOS)}
    assert not slope[:, [token for token in range(VOCAB) if token not in used]].any()
    assert slope[:, sorted(used)].any()


def test_a_step_is_the_same_in_parts_and_on_a_mesh():
    allowed, rollouts = draw()
    reward = np.random.default_rng(0).normal(size=18)
    algorithm, optimizer = dataclasses.replace(ALGORITHMS["grpo"], temperature=0.8, kl_coef=0.1), optax.sgd(1.0)
    mesh, found = make_mesh(data=2, fsdp=2), []
    for on, micro in ((None, 1), (None, 2), (mesh, 1)):
        params = PARAMS if on is None else place_params(PARAMS, on)
        score = functools.partial(make_scorer(DECODER, temperature=0.8, mesh=on, microbatches=micro), params)
        parts = micro * (1 if on is None else 4)
        how = {"row_length": 64, "parts": parts, "reference": score, "old_policy": score, "allowed": allowed}
        batch = make_batch(algorithm, PROMPTS, rollouts, reward, **how)
        np.testing.assert_allclose(batch.old_logp, np.where(rollouts.mask, rollouts.logp, 0), atol=2e-5)
        step = make_train_step(DECODER, algorithm, optimizer, mesh=on, microbatches=micro)
        state, metrics = step(init_state(DECODER, params, optimizer), batch)
        found.append(jax.tree.map(np.asarray, state.params))
        assert metrics["ratio_error"] < 1e-4
        assert metrics["kl"] < 1e-6
    for other in found[1:]:
        chex.assert_trees_all_close(found[0], other, atol=1e-6)
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (found[0], PARAMS)), strict=True)) > 1e-3
    cut = make_mesh(data=2, fsdp=2, tensor=2)
    state = init_state(DECODER, place_params(PARAMS, cut), optimizer)
    with pytest.raises(ValueError, match=r"^allowed strings and tensor=2: a table of tokens is not cut"):
        make_train_step(DECODER, algorithm, optimizer, mesh=cut)(state, batch)


def test_what_is_refused():
    def refused(strings, message, **options):
        with pytest.raises(ValueError, match=message):
            allowed_strings(strings, **{"vocab_size": 6, "eos": 5} | options)

    refused([[[1]], []], r"^strings\[1\] is empty: nothing could be said$")
    refused([[[1], []]], r"^strings\[0\] holds an empty string")
    refused([[[1, 6]]], r"^strings\[0\] holds token 6: not eos \(5\), which is added, and below vocab_size=6$")
    refused([[[1, 5]]], r"^strings\[0\] holds token 5")
    allowed = allowed_strings(STRINGS, vocab_size=VOCAB, eos=EOS)

    def not_sampled(message, of=PROMPTS, allowed=allowed, config=CONFIG):
        with pytest.raises(ValueError, match=message):
            sample(DECODER, PARAMS, of, seed=0, step=0, config=config, allowed=allowed)

    not_sampled(r"^allowed is of 3 prompts, and there are 2: one start a prompt$", of=PROMPTS[:2])
    not_sampled(r"^max_new_tokens is 4, and an allowed string has 5 tokens with", config=SampleConfig(1, 4, (EOS,)))
    not_sampled(r"^allowed strings end with \[5\], and sampling with eos_ids=\(3,\)$", config=SampleConfig(1, 6, (3,)))
    small = allowed_strings([[[1]]] * 3, vocab_size=6, eos=5)
    not_sampled(rf"^allowed is of 6 tokens, the vocabulary has {VOCAB}$", allowed=small)
    rows = Rollouts(np.array([[3, 2]]), np.ones((1, 2), bool), None, None, None, np.array([1]))
    with pytest.raises(ValueError, match=r"^response 0 says token 2 at place 1, which is not allowed$"):
        states(allowed, rows)
