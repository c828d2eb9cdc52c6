"""Sampling: the trainer's log-probs, what a sample depends on and what not, where it ends, what it is drawn from."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign.compat import CompileCounter
from rlalign.models.decoder import Decoder
from rlalign.rollout import SampleConfig, sample
from rlalign.rollout.sampler import trace_sample
from rlalign.train import make_mesh, make_scorer, pack_rollouts, place_params
from rlalign.types import Prompt, StopReason, TokenForest
from tests.tiny import GEMMA, GPT_NEOX, QWEN3, dense_decoder, random_params

VOCAB = QWEN3.vocab_size
CONFIG = SampleConfig(num_samples=3, max_new_tokens=8, eos_ids=(0, 5), temperature=0.8)
STEPS = []  # shapes of the tokens that CountingDecoder ran over


class CountingDecoder(Decoder):
    """A decoder that records every forward it really runs."""

    def run(self, params, token, position, attend, cache):
        jax.debug.callback(lambda: STEPS.append(token.shape))
        return super().run(params, token, position, attend, cache)


DECODER = CountingDecoder(QWEN3)


@functools.cache
def params():
    return random_params(QWEN3)


def eos_params(logit):
    """Every token has the same hidden state, of norm 4; both EOS tokens have this logit, the others 0."""
    out = jax.tree.map(jnp.zeros_like, params())
    out["final_norm"]["scale"] += 1
    out["embedding"] += 1
    kernel = np.zeros(out["head"]["kernel"].shape, np.float32)
    kernel[:, list(CONFIG.eos_ids)] = logit / QWEN3.width
    out["head"]["kernel"] += kernel
    return out


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n) for n in lengths]


FOUR = prompts(3, 8, 1, 5)


def draw(of=FOUR, *, config=CONFIG, seed=1, step=2, weights=None, **options):
    return sample(DECODER, weights or params(), of, seed=seed, step=step, config=config, **options)


@functools.cache
def usual():
    """What most tests compare with."""
    return draw()


def of_prompt(rollouts, index):
    """Tokens, mask and log-probs of one prompt's samples."""
    rows = rollouts.prompt == index
    return rollouts.tokens[rows], rollouts.mask[rows], rollouts.logp[rows]


def assert_same_samples(a, b):
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])
    np.testing.assert_allclose(a[2], b[2], rtol=0, atol=1e-5)


@functools.cache
def whole_logits():
    """(prompt + response) -> log-probs f64[length, V] of what follows each token, by dense attention; untempered."""
    decoder = dense_decoder(QWEN3)

    @jax.jit
    def run(token, size):
        column = jnp.arange(token.size, dtype=jnp.int32)[None]
        forest = TokenForest(token[None], column, column - 1, jnp.where(column < size, size, 0))
        return (decoder.apply(params(), forest) @ decoder.head(params()))[0]

    def call(sequence):
        token = np.zeros(24, np.int32)
        token[: len(sequence)] = sequence
        return np.asarray(run(token, len(sequence)), np.float64)[: len(sequence)]

    return call


def log_softmax(x):
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def steps(rollouts, of=FOUR):
    """(row, column, token, logits f64[V] it was drawn from) of every sampled token."""
    for row in range(len(rollouts.tokens)):
        prompt, size = of[rollouts.prompt[row]], rollouts.mask[row].sum()
        logits = whole_logits()(np.concatenate([prompt, rollouts.tokens[row, :size]]))
        for column in range(size):
            yield row, column, rollouts.tokens[row, column], logits[len(prompt) - 1 + column]


@pytest.mark.parametrize("lengths", [(3, 8, 1, 5), (9, 2, 12, 12), (1, 20, 24, 13)], ids=["8", "12", "24"])
def test_the_trainer_agrees_with_the_sampler(lengths):
    """|ratio - 1| on the first step, over groups that share their prompt and prompts of every length."""
    of = prompts(*lengths)
    rollouts = usual() if lengths == tuple(map(len, FOUR)) else draw(of)
    packed = pack_rollouts(of, rollouts, np.ones(12, bool), row_length=64, num_rows=4)
    trained = scorer()(params(), packed)
    assert rollouts.mask.sum() > 24
    assert np.abs(np.exp(trained - rollouts.logp) - 1)[rollouts.mask].max() <= 1e-4


MISTRAL = dataclasses.replace(QWEN3, window=5)  # every layer
OTHERS = {"gemma": GEMMA, "gpt_neox": GPT_NEOX, "every layer a window": MISTRAL}


@pytest.mark.parametrize("model", OTHERS.values(), ids=OTHERS)
def test_the_trainer_agrees_with_the_sampler_in_other_families(model):
    """Soft caps, scales, windows and partial rotation, in prefill, decoding and training alike."""
    decoder, own = Decoder(model), random_params(model)
    rollouts = sample(decoder, own, FOUR, seed=0, step=0, config=CONFIG)
    packed = pack_rollouts(FOUR, rollouts, np.ones(12, bool), row_length=64, num_rows=4)
    trained = make_scorer(decoder, temperature=CONFIG.temperature)(own, packed)
    assert rollouts.mask.sum() > 24
    assert np.abs(np.exp(trained - rollouts.logp) - 1)[rollouts.mask].max() <= 1e-4


@functools.cache
def scorer():
    return make_scorer(Decoder(QWEN3), temperature=CONFIG.temperature)


def test_order_does_not_matter_and_neither_does_the_rest_of_the_batch():
    order = [2, 0, 3, 1]
    shuffled = draw([FOUR[i] for i in order], prompt_ids=order)
    for place, index in enumerate(order):
        assert_same_samples(of_prompt(shuffled, place), of_prompt(usual(), index))
    alone = draw([FOUR[1]], prompt_ids=[1])
    assert_same_samples(of_prompt(alone, 0), of_prompt(usual(), 1))


def test_ids_come_from_prompts_and_from_places():
    objects = [Prompt(id=i, tokens=p) for i, p in zip((7, 1, 2**40 + 3, -5), FOUR, strict=True)]
    with_objects, with_ids = draw(objects), draw(prompt_ids=[7, 1, 2**40 + 3, -5])
    np.testing.assert_array_equal(with_objects.tokens, with_ids.tokens)
    np.testing.assert_array_equal(usual().tokens, draw(prompt_ids=range(4)).tokens)
    assert not np.array_equal(with_objects.tokens, usual().tokens)


def test_a_prompt_that_occurs_again_is_sampled_anew():
    rollouts = draw([Prompt(id=3, tokens=FOUR[1])] * 4)
    assert len({of_prompt(rollouts, i)[0].tobytes() for i in range(4)}) == 4


def test_every_part_of_the_key_matters():
    same = [FOUR[1]] * 4
    base = draw(same, prompt_ids=[0, 1, 2, 3])
    drawn = [base.logp]
    for change in ({"seed": 2}, {"step": 3}, {"prompt_ids": [4, 5, 6, 7]}):
        drawn.append(draw(same, **({"prompt_ids": [0, 1, 2, 3]} | change)).logp)
    long = [row.tobytes() for logp in drawn for row in logp if np.count_nonzero(row) > 3]
    assert len(long) > 20
    assert len(set(long)) == len(long)  # by seed, step, prompt id and sample
    again = draw(same, prompt_ids=[0, 1, 2, 3])
    for a, b in zip(base, again, strict=True):
        np.testing.assert_array_equal(a, b)


MESHES = ({"data": 2}, {"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2})


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_devices_do_not_matter(sizes):
    mesh = make_mesh(**sizes)
    placed = place_params(params(), mesh)
    rollouts = sample(Decoder(QWEN3), placed, FOUR, seed=1, step=2, config=CONFIG, mesh=mesh)
    for index in range(4):
        assert_same_samples(of_prompt(rollouts, index), of_prompt(usual(), index))


def test_devices_do_not_matter_to_a_window():
    mesh, decoder, own = make_mesh(data=2, tensor=2), Decoder(MISTRAL), random_params(MISTRAL)
    alone = sample(decoder, own, FOUR, seed=1, step=2, config=CONFIG)
    rollouts = sample(decoder, place_params(own, mesh), FOUR, seed=1, step=2, config=CONFIG, mesh=mesh)
    np.testing.assert_array_equal(rollouts.tokens, alone.tokens)
    np.testing.assert_allclose(rollouts.logp, alone.logp, atol=1e-5)
    assert not np.array_equal(alone.tokens, usual().tokens)


def test_a_response_ends_with_its_eos():
    """EOS is kept, in tokens and mask; behind it there is nothing; without it the response is as long as it may be."""
    rollouts = usual()
    length = rollouts.mask.sum(axis=1)
    assert 1 <= length.min() < length.max() == CONFIG.max_new_tokens  # both kinds are there
    for row, size in enumerate(length):
        tokens = rollouts.tokens[row]
        ends = np.isin(tokens[:size], CONFIG.eos_ids)
        assert rollouts.mask[row, :size].all()
        assert not ends[:-1].any()
        assert rollouts.stop[row] == (StopReason.EOS if ends[-1] else StopReason.MAX_TOKENS)
        assert ends[-1] or size == CONFIG.max_new_tokens
        for x in (rollouts.mask, rollouts.tokens, rollouts.logp, rollouts.behaviour_logp):
            assert not x[row, size:].any()
    assert set(rollouts.stop) == set(StopReason)
    assert rollouts.prompt.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def counted(**options):
    """Rollouts and how many decoding steps they took."""
    jax.effects_barrier()
    STEPS.clear()
    rollouts = draw(**options)
    jax.effects_barrier()
    return rollouts, len(STEPS) - 1  # one is the prefill


def test_decoding_stops_when_all_have_ended():
    rollouts, taken = counted(weights=eos_params(100.0))
    assert taken == 0
    assert rollouts.mask.sum(axis=1).tolist() == [1] * 12
    assert set(rollouts.stop) == {StopReason.EOS}
    # A logit of 100 has 7.6e-6 between neighbours.
    np.testing.assert_allclose(rollouts.logp[:, 0], np.log(0.5), atol=8e-6)
    lengths = set()
    for seed in range(20):
        rollouts, taken = counted(weights=eos_params(2.0), seed=seed)
        lengths.add(int(rollouts.mask.sum(axis=1).max()))
        assert taken == rollouts.mask.sum(axis=1).max() - 1
    assert len(lengths) > 2


def test_without_eos_all_responses_are_full():
    rollouts, taken = counted(weights=eos_params(-1000.0))
    assert taken == CONFIG.max_new_tokens - 1
    assert rollouts.mask.all()
    assert set(rollouts.stop) == {StopReason.MAX_TOKENS}
    np.testing.assert_allclose(rollouts.logp, -np.log(15), atol=1e-5)


def test_greedy_is_the_argmax_of_the_whole_logits():
    rollouts = draw(config=dataclasses.replace(CONFIG, greedy=True, num_samples=1))
    for row, column, token, logits in steps(rollouts):
        assert token == logits.argmax()
        assert rollouts.logp[row, column] == pytest.approx(log_softmax(logits / 0.8).max(), abs=1e-4)
    assert not rollouts.behaviour_logp.any()  # sampled with probability 1


def truncate(logits, top_k, top_p):
    """The distribution that top-k, then top-p leave of a softmax, as probabilities f64[V]."""
    order = np.argsort(-logits)
    kept = order[:top_k] if top_k else order
    prob = np.exp(log_softmax(logits[kept]))
    if top_p:
        kept = kept[: np.searchsorted(np.cumsum(prob), top_p) + 1]
    out = np.zeros(len(logits))
    out[kept] = np.exp(log_softmax(logits[kept]))
    return out


@pytest.mark.parametrize(("top_k", "top_p"), [(6, 0.7), (1, None)])
def test_truncation_changes_what_is_sampled_from_and_not_logp(top_k, top_p):
    rollouts = draw(config=dataclasses.replace(CONFIG, top_k=top_k, top_p=top_p))
    support = []
    for row, column, token, logits in steps(rollouts):
        behaviour = truncate(logits / 0.8, top_k, top_p)
        support.append(np.count_nonzero(behaviour))
        assert behaviour[token] > 0
        assert rollouts.behaviour_logp[row, column] == pytest.approx(np.log(behaviour[token]), abs=1e-4)
        assert rollouts.logp[row, column] == pytest.approx(log_softmax(logits / 0.8)[token], abs=1e-4)
    assert max(support) <= top_k
    assert top_k == 1 or min(support) < max(support)  # top_p cuts some of them further
    assert top_k > 1 or not rollouts.behaviour_logp.any()


QUANTILE = (0, 10.8, 13.8, 16.3, 18.5, 20.5, 22.5, 24.3, 26.1, 27.9, 29.6, 31.3, 32.9, 34.5, 36.1, 37.7, 39.3)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (6, 0.7)])
def test_frequencies_follow_the_probabilities(top_k, top_p):
    """Chi-square of 3,000 first tokens, over samples, prompt ids and steps; bound: the 99.9 % quantiles."""
    config, prompt = dataclasses.replace(CONFIG, top_k=top_k, top_p=top_p), FOUR[0]
    ids, count = range(4), 3000
    drawn = np.concatenate(
        [draw([prompt] * 4, config=config, step=step, prompt_ids=ids).tokens[:, 0] for step in range(count // 12)]
    )
    probability = truncate(whole_logits()(prompt)[-1] / CONFIG.temperature, top_k, top_p)
    expected, seen = probability * count, np.bincount(drawn, minlength=VOCAB)
    assert not seen[probability == 0].any()
    common = expected > 5
    assert common.sum() > 2
    chi_square = np.sum((seen[common] - expected[common]) ** 2 / expected[common])
    assert chi_square < QUANTILE[common.sum() - 1]
    rare = expected[~common].sum()
    assert abs(seen[~common].sum() - rare) < 4 * np.sqrt(rare) + 1


def test_a_second_call_in_a_bucket_compiles_nothing():
    usual()
    counter = CompileCounter()
    draw(prompts(2, 4, 7, 8, seed=9), seed=77, step=5, prompt_ids=[9, 8, 7, 6])
    assert counter.take() == 0
    jax.jit(lambda x: x + 41)(1)
    assert counter.take() == 1  # it does count


def test_no_step_copies_a_cache():
    """Tokens are written in place and layers are read where they lie: one copy of each cache, its zeros, in all."""
    config = dataclasses.replace(CONFIG, max_new_tokens=130)
    traced = trace_sample(Decoder(QWEN3), params(), prompts=4, longest=8, config=config)
    copies = re.findall(r"= f32\[2,(?:4,2,3|24),130,6\]\S* copy\(", traced.lower().compile().as_text())
    assert len(copies) <= 2, copies


def loops(text):
    """Of a compiled program: the text of every computation that a loop runs."""
    computations = dict(re.findall(r"^%(\S+) [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    found, waiting = {}, re.findall(r"body=%([\w.-]+)", text)
    while waiting:
        name = waiting.pop()
        if name in computations and name not in found:
            found[name] = computations[name]
            waiting += re.findall(r"(?:calls|to_apply|body|condition)=%([\w.-]+)", found[name])
    return "\n".join(found.values())


@pytest.mark.parametrize("gather_weights", [True, False])
def test_weights_are_gathered_before_the_first_token_or_at_each(gather_weights):
    mesh, config = make_mesh(fsdp=4), dataclasses.replace(CONFIG, gather_weights=gather_weights)
    placed = place_params(params(), mesh)
    traced = trace_sample(Decoder(QWEN3), placed, prompts=4, longest=8, config=config, mesh=mesh)
    text = traced.lower().compile().as_text()
    assert "all-gather" in text
    assert ("all-gather" in loops(text)) == (not gather_weights)
    if not gather_weights:  # otherwise every mesh is compared
        rollouts = sample(Decoder(QWEN3), placed, FOUR, seed=1, step=2, config=config, mesh=mesh)
        np.testing.assert_array_equal(rollouts.tokens, usual().tokens)


BAD_PROMPTS = {
    "empty": ([np.array([1]), np.zeros(0, int)], r"prompt 1 must be a non-empty 1-D integer array, got int64\[0\]"),
    "rank": ([np.array([[1]])], r"prompt 0 must be a non-empty 1-D integer array, got int64\[1, 1\]: drop it"),
    "dtype": ([np.array([1.0])], r"prompt 0 must be .* got float64\[1\]"),
    "too large": ([np.array([1]), np.array([2, VOCAB])], "prompt 1 holds token 17, the vocabulary has 17"),
    "negative": ([np.array([1, -1])], "prompt 0 holds token -1, the vocabulary has 17"),
    "none": ([], "sample needs at least one prompt"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_refuses_bad_prompts_by_index(case):
    bad, message = BAD_PROMPTS[case]
    with pytest.raises(ValueError, match=message):
        draw(bad)


def test_refuses_ids_of_another_number():
    with pytest.raises(ValueError, match="prompt_ids has 2 entries for 4 prompts"):
        draw(prompt_ids=[1, 2])


BAD_CONFIGS = {
    "temperature": ({"temperature": 0.0}, "temperature must be > 0, got 0.0: use greedy=True"),
    "samples": ({"num_samples": 0}, "num_samples and max_new_tokens must be at least 1, got 0, 8"),
    "tokens": ({"max_new_tokens": 0}, "num_samples and max_new_tokens must be at least 1, got 3, 0"),
    "top_k": ({"top_k": 0}, "top_k must be at least 1 or None, got 0"),
    "top_p": ({"top_p": 0.0}, r"top_p must be in \(0, 1\] or None, got 0.0"),
    "top_p above 1": ({"top_p": 1.5}, r"top_p must be in \(0, 1\] or None, got 1.5"),
    "greedy group": ({"greedy": True}, "greedy=True with num_samples=3: all samples of a group would be equal; use 1"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_refuses_bad_settings(case):
    change, message = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
