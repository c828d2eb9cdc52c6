"""A policy that is already right must stay right: groups without a signal and a large learning rate."""

import jax
import numpy as np

import rlalign as ra
from rlalign.envs import sums
from tests.tiny import sums_model

DECODER = ra.Decoder(sums_model(32))
PROBLEMS = [p for p in sums.problems("train") if p.text.endswith("+00=")]  # "57+00=": the answer repeats digits


def imitate(steps: int):
    """Parameters after supervised training on right answers only."""
    rng = np.random.default_rng(0)
    optimizer = ra.make_optimizer(ra.OptimizerConfig(learning_rate=1e-2, schedule="cosine", total_steps=steps + 1))
    train = ra.make_train_step(DECODER, ra.ALGORITHMS["sft"], optimizer)
    state = ra.init_state(DECODER, DECODER.init(0), optimizer)
    for _ in range(steps):
        texts = [sums.demonstration(p, rng, wrong=0.0) for p in PROBLEMS]
        packed = ra.pack(
            texts, row_length=120, num_rows=10, response_start=[sums.PROMPT_TOKENS] * len(PROBLEMS), response_length=4
        )
        state, _ = train(state, ra.Batch(packed))
    return state.params


def rewards_of(prompts, rollouts):
    texts = [sums.decode(t[m].tolist()) for t, m in zip(rollouts.tokens, rollouts.mask, strict=True)]
    return np.array([sums.exact(t, prompts[g].example) for t, g in zip(texts, rollouts.prompt, strict=True)])


def test_a_near_perfect_policy_does_not_fall_at_a_large_learning_rate():
    sampling = ra.SampleConfig(8, sums.ANSWER_TOKENS, eos_ids=(sums.EOS,))
    algorithm, optimizer = ra.ALGORITHMS["grpo"], ra.make_optimizer(ra.OptimizerConfig(learning_rate=1e-3))
    train = ra.make_train_step(DECODER, algorithm, optimizer)
    state = ra.init_state(DECODER, imitate(150), optimizer)
    rng, accuracy, skipped = np.random.default_rng(1), [], 0
    for step in range(80):
        prompts = [PROBLEMS[i] for i in rng.choice(len(PROBLEMS), 16, replace=False)]
        rollouts = ra.sample(DECODER, state.params, prompts, seed=0, step=step, config=sampling)
        rewards = rewards_of(prompts, rollouts)
        batch = ra.make_batch(algorithm, prompts, rollouts, rewards, row_length=128, num_rows=6)
        state, metrics = train(state, batch)
        accuracy.append(rewards.mean())
        skipped += int(jax.device_get(metrics["skipped"]))
    assert skipped >= 15, "the case this test is about: steps in which every group lacks a signal"
    assert np.mean(accuracy[:10]) >= 0.98
    assert np.mean(accuracy[-30:]) >= 0.97
