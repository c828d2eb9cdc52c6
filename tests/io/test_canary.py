"""The canary finds each planted bug by its cause, and is silent in a thousand clean steps."""

import dataclasses
import os

import jax
import numpy as np
import pytest

import rlalign as ra
from rlalign.envs import sums
from rlalign.io.canary import CAUSES, WINDOW, Canary
from rlalign.io.updates import Updates, passes
from rlalign.train import init_state, make_batch, make_scorer, make_train_step
from rlalign.types import Rollouts, StopReason
from tests.graders import share_right
from tests.tiny import random_params, sums_model

CONFIG = dataclasses.replace(sums_model(8), max_positions=16)
DECODER = ra.Decoder(CONFIG)
ALGORITHM = dataclasses.replace(ra.ALGORITHMS["grpo"], kl_coef=0.01)
SAMPLING = ra.SampleConfig(4, sums.ANSWER_TOKENS, eos_ids=(sums.EOS,))
PROMPTS = sums.problems("train")[:24]
STEPS = int(os.environ.get("RLALIGN_CLEAN_STEPS", "200"))
OPTIMIZER = ra.make_optimizer(ra.OptimizerConfig(learning_rate=1e-3))


def start():
    """Far from uniform, so that temperatures matter."""
    return random_params(CONFIG, 0, 0.5)


@pytest.fixture(scope="module")
def update():
    """Compiled once for all loops."""
    step = make_train_step(DECODER, ALGORITHM, OPTIMIZER)
    return Updates(step, max_bad_steps=5, learning_rate=1e-3)


@pytest.fixture(scope="module")
def score():
    return make_scorer(DECODER, temperature=ALGORITHM.temperature)


class Loop:
    """The loop of the README with a reward in this process; bugs replace its methods."""

    def __init__(self, update, score):
        self.update, self.score, self.first = update, score, start()

    def sample(self, params, prompts, step):
        return ra.sample(DECODER, params, prompts, seed=0, step=step, config=SAMPLING)

    def reward(self, prompts, rollouts):
        texts = [sums.decode(t[m].tolist()) for t, m in zip(rollouts.tokens, rollouts.mask, strict=True)]
        owners = [prompts[p].example for p in rollouts.prompt]
        return np.array([share_right(text, own) for text, own in zip(texts, owners, strict=True)])

    def reference(self, state):
        return self.first

    def batch(self, batch):
        return batch

    def step_params(self, state):
        return state.params

    def run(self, steps):
        """All alarms, with their steps."""
        canary, state, alarms = Canary(eos_ids=SAMPLING.eos_ids), init_state(DECODER, start(), OPTIMIZER), []
        for step in range(steps):
            chosen = np.arange(4 * step, 4 * step + 4) % len(PROMPTS)
            prompts = [PROMPTS[i] for i in chosen]
            rollouts = self.sample(self.step_params(state), prompts, step)
            reference = lambda packed, s=state: self.score(self.reference(s), packed)
            how = {"row_length": 64, "num_rows": 4, "reference": reference}
            batch = self.batch(make_batch(ALGORITHM, prompts, rollouts, self.reward(prompts, rollouts), **how))
            signal = np.bincount(rollouts.prompt, np.asarray(batch.advantage) != 0, len(prompts)) > 0
            state, metrics = passes(self.update, state, batch, epochs=1, minibatches=1)
            metrics["tokens_learnt"] = metrics["tokens"]
            metrics["groups_without_signal"] = int((~signal).sum())
            seen = {"prompt_ids": chosen, "rollouts": rollouts, "learnt": batch.packed.mask, "metrics": metrics}
            alarms += [(step, alarm) for alarm in canary(step=step, **seen)]
        return alarms


def at_another_temperature(loop):
    """The sampler's log-probs are those of what it draws from, at .6."""
    cool = dataclasses.replace(SAMPLING, temperature=0.6)
    loop.sample = lambda params, prompts, step: ra.sample(DECODER, params, prompts, seed=0, step=step, config=cool)


def trained_at_another_temperature(loop):
    other = dataclasses.replace(ALGORITHM, temperature=1.8)
    loop.update = Updates(make_train_step(DECODER, other, OPTIMIZER), max_bad_steps=5, learning_rate=1e-3)


def without_the_newest_weights(loop):
    loop.step_params = lambda state: loop.first


def of_another_model(loop):
    """Positions that the sampler counts otherwise: its rotary base is another."""
    other = ra.Decoder(dataclasses.replace(CONFIG, rope_theta=2.0))
    loop.sample = lambda params, prompts, step: ra.sample(other, params, prompts, seed=0, step=step, config=SAMPLING)


def without_the_end(loop):
    """The mask cuts the end token off."""
    whole = loop.sample

    def cut(params, prompts, step):
        rollouts = whole(params, prompts, step)
        ends = (rollouts.tokens == sums.EOS) & (rollouts.stop == StopReason.EOS)[:, None]
        return rollouts._replace(mask=rollouts.mask & ~ends)

    loop.sample = cut


def with_padding(loop):
    """The token behind an end is learnt from."""

    def wider(batch):
        mask = np.array(batch.packed.mask)
        short = (mask.sum(axis=1) < mask.shape[1]) & mask.any(axis=1)
        mask[short, mask[short].sum(axis=1)] = True
        return batch._replace(packed=batch.packed._replace(mask=mask, node=np.where(mask, batch.packed.node, -1)))

    loop.batch = wider


def with_one_key_a_group(loop):
    whole = loop.sample

    def copied(params, prompts, step):
        rollouts = whole(params, prompts, step)
        first = np.arange(len(rollouts.prompt)) // SAMPLING.num_samples * SAMPLING.num_samples
        return type(rollouts)(*(x[first] for x in rollouts))

    loop.sample = copied


def with_the_keys_of_step_0(loop):
    whole = loop.sample
    loop.sample = lambda params, prompts, step: whole(params, prompts, 0)


def with_a_constant_reward(loop):
    loop.reward = lambda prompts, rollouts: np.ones(len(rollouts.prompt))


def with_a_reference_that_follows(loop):
    loop.reference = lambda state: state.params


def with_the_reference_of_another_run(loop):
    loop.first = jax.tree.map(lambda x: 0.7 * x, start())


BUGS = {  # what is planted -> the alarm that names it
    at_another_temperature: "temperature",
    trained_at_another_temperature: "temperature",
    without_the_newest_weights: "stale_weights",
    of_another_model: "numerics",
    without_the_end: "eos",
    with_padding: "padding",
    with_one_key_a_group: "keys_in_group",
    with_the_keys_of_step_0: "keys_of_steps",
    with_a_constant_reward: "no_signal",
    with_a_reference_that_follows: "reference_moves",
    with_the_reference_of_another_run: "reference_start",
}


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found_and_its_cause_named(plant, update, score, caplog):
    loop = Loop(update, score)
    plant(loop)
    alarms = loop.run(2 * WINDOW)
    found = {alarm.kind for _, alarm in alarms}
    assert BUGS[plant] in found, found
    assert found <= {BUGS[plant], "no_signal"}, found  # one key a group leaves no signal either
    assert CAUSES[BUGS[plant]] in caplog.text
    assert caplog.text.count(f"probably {CAUSES[BUGS[plant]]}") == 1  # said once


def test_clean_steps_raise_no_alarm(update, score):
    alarms = Loop(update, score).run(STEPS)
    assert not alarms, [str(alarm) for _, alarm in alarms]


def seen(canary, step, **metrics):
    """The kinds of alarm of a step of 64 x 16 tokens, different ones, with these metrics."""
    shape, draw = (64, 16), np.random.default_rng(step)
    logp = np.full(shape, -2.0, np.float32)
    owner, stop = np.repeat(np.arange(16, dtype=np.int32), 4), np.full(64, StopReason.MAX_TOKENS, np.int32)
    rollouts = Rollouts(draw.integers(2, 10**6, shape), np.ones(shape, bool), logp, logp, stop, owner)
    usual = {"groups_without_signal": 0, "skipped": 0, "entropy": 2.0, "first_ratio_error": 0.0}
    found = canary(step=step, prompt_ids=range(16), rollouts=rollouts, learnt=rollouts.mask, metrics=usual | metrics)
    return [alarm.kind for alarm in found]


def test_an_update_that_is_not_finite_does_not_say_that_sampler_and_trainer_agreed():
    """Else another temperature that shows a step later would pass for stale weights."""
    canary = Canary(eos_ids=())
    assert seen(canary, 0, first_approx_kl=np.nan, skipped=1) == []
    assert seen(canary, 1, first_approx_kl=0.3, entropy=3.0) == ["temperature"]
    assert seen(Canary(eos_ids=()), 0, first_approx_kl=np.inf) == ["numerics"]
    canary = Canary(eos_ids=())
    assert seen(canary, 0, first_approx_kl=0.0) == []
    assert seen(canary, 1, first_approx_kl=0.3, entropy=3.0) == ["stale_weights"]


def test_a_policy_that_does_not_move_is_no_reference_that_follows():
    for rate, kinds in ((0.0, []), (1e-3, ["reference_moves"])):
        canary = Canary(eos_ids=())
        told = [seen(canary, step, kl=0.0, learning_rate=rate) for step in range(WINDOW)]
        assert told[-1] == kinds
        assert not any(told[:-1])


def test_every_cause_has_a_bug():
    assert set(BUGS.values()) == set(CAUSES)
