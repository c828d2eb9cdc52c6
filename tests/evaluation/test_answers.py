"""Accuracy and pass@k of answers that are known, and of a policy's own."""

import itertools
import math

import numpy as np
import pytest

import rlalign as ra
from rlalign.envs import sums
from rlalign.evaluation import evaluate_answers, share
from tests.evaluation.graders import number_only
from tests.tiny import sums_model

DECODER = ra.Decoder(sums_model(16))
PROMPTS = sums.problems("held-out")[:3]
FOUR = ra.SampleConfig(4, sums.ANSWER_TOKENS, eos_ids=(sums.EOS,))
RIGHT = ((1, 1, 0, 0), (0, 0, 0, 0), (1, 1, 1, 1))


def known(right, *, cut=()):
    """A sampler whose answers are right or wrong as said; those of the places in `cut` have no end."""

    def sampler(decoder, params, prompts, *, seed, step, config, prompt_ids, mesh):
        tokens, stop = np.zeros((len(prompts), config.num_samples, config.max_new_tokens), np.int32), []
        for n, prompt in enumerate(prompts):
            place = [p.id for p in PROMPTS].index(prompt.id)
            for g, ok in enumerate(right[place]):
                tokens[n, g] = [*sums.encode(prompt.example["answer"] if ok else "+++"), sums.EOS]
                stop.append(int((place, g) in cut))
        rows = tokens.reshape(-1, config.max_new_tokens)
        zero = np.zeros(rows.shape, np.float32)
        owner = np.repeat(np.arange(len(prompts)), config.num_samples)
        return ra.Rollouts(rows, np.ones(rows.shape, bool), zero, zero, np.array(stop), owner)

    return sampler


def evaluate(reward=sums.exact, **how):
    usual = {"config": FOUR, "decode": sums.decode, "workers": 1, "sampler": known(RIGHT)}
    return evaluate_answers(DECODER, None, PROMPTS, reward, **(usual | how))


@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_answers_are_counted_by_prompt(at_once):
    got = evaluate(ks=(1, 2, 3, 4), at_once=at_once, sampler=known(RIGHT, cut={(0, 1), (2, 3), (2, 0)}))
    assert got.correct.tolist() == [2, 0, 4]
    assert got.total.tolist() == [4, 4, 4]
    assert got.accuracy == got.pass_at[1] == share([0.5, 0.0, 1.0])
    for k, found in got.pass_at.items():
        solved = [np.mean([any(some) for some in itertools.combinations(answers, k)]) for answers in RIGHT]
        np.testing.assert_allclose(found, share(solved), rtol=1e-12)
    assert got.truncated == 3 / 12
    assert (got.reward, got.invalid, got.reasons) == (0.5, 0, ())


def test_a_lower_bar():
    assert evaluate(success=0.0).accuracy.value == 1.0
    assert evaluate(success=1.5).accuracy.value == 0.0


def test_answers_without_a_reward_are_wrong():
    """int("+++") raises."""
    with ra.RewardGuard(number_only, workers=1, decode=sums.decode) as guard:
        got = evaluate(guard, decode=None)
    assert got.correct.tolist() == [2, 0, 4]
    assert got.invalid == 6
    assert len(got.reasons) == 1
    assert "ValueError" in got.reasons[0]
    assert got.reward == 1.0
    with ra.RewardGuard(number_only, workers=1) as guard:
        none = evaluate(guard, sampler=known(((0,) * 4,) * 3))
    assert (none.accuracy.value, none.invalid) == (0.0, 12)
    assert math.isnan(none.reward)


def test_a_policys_answers_do_not_depend_on_the_batch():
    params = DECODER.init(0)
    prompts = [*PROMPTS, PROMPTS[0]]  # twice the same problem: other answers

    def run(at_once, seed=1):
        drawn = []

        def sampler(*args, **how):
            drawn.append(ra.sample(*args, **how))
            return drawn[-1]

        how = {"config": FOUR, "decode": sums.decode, "workers": 1, "at_once": at_once, "seed": seed}
        found = evaluate_answers(DECODER, params, prompts, sums.exact, sampler=sampler, **how)
        return np.concatenate([x.tokens for x in drawn]).reshape(4, 4, -1), found

    tokens, found = run(4)
    again, same = run(2)
    np.testing.assert_array_equal(tokens, again)
    assert found.pass_at == same.pass_at
    assert not np.array_equal(tokens[0], tokens[3])
    assert not np.array_equal(tokens, run(4, seed=2)[0])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"ks": (1, 5)}, r"ks=\(1, 5\) of num_samples=4"),
        ({"ks": (0,)}, "every k in"),
        ({"at_once": 0}, "at_once=0"),
    ],
)
def test_what_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        evaluate(**how)
    with pytest.raises(ValueError, match="0 prompts"):
        evaluate_answers(DECODER, None, [], sums.exact, config=FOUR)
