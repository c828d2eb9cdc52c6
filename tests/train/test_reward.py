"""Reward models: the Bradley-Terry step against rows that share nothing, what a judge gives, and fit with one."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rlalign as ra
from rlalign.compat import CompileCounter
from rlalign.envs import sums
from rlalign.io.checkpoint import ConfigMismatch
from rlalign.io.identity import run_identity
from rlalign.io.metrics import read_metrics
from rlalign.models.reward import add_reward_head
from rlalign.train import make_rewarder
from tests.graders import share_right
from tests.tiny import GEMMA, QWEN2, dense_decoder, ragged_groups, random_params, sums_model, sums_run

MODEL = dataclasses.replace(QWEN2, dtype="float64", reward_head=True)
SAMPLES = ragged_groups(3, [(4, (3, 2)), (5, (1, 4)), (2, (2, 2)), (6, (3, 5))])
PAIRS = np.array([[0, 1], [3, 2], [4, 5], [7, 6]])
BRADLEY_TERRY = ra.ALGORITHMS["bradley_terry"]


@functools.cache
def params(config=MODEL):
    return random_params(config)


def by_hand(weights, config=MODEL):
    """Rewards f[N] of rows that hold one sample each, by attention with its whole mask."""
    rows = SAMPLES.repeated(12)
    hidden = dense_decoder(config).apply(weights, rows)
    last = np.array([len(t) - 1 for t in SAMPLES.tokens])
    return (hidden[np.arange(len(last)), last] @ weights["reward"]["kernel"])[:, 0]


MESHES = ({}, {"data": 2}, {"data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2})


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_is_that_of_rows_that_share_nothing(x64, sizes, microbatches):
    def truth(weights):
        reward = by_hand(weights)
        return jnp.mean(jnp.log1p(jnp.exp(-(reward[PAIRS[:, 0]] - reward[PAIRS[:, 1]]))))

    loss, slope = jax.value_and_grad(truth)(params())
    mesh = ra.make_mesh(**sizes) if sizes else None
    parts = microbatches * sizes.get("data", 1) * sizes.get("fsdp", 1)
    packed = SAMPLES.pack(row_length=24, parts=parts, unit=np.arange(8) // 2)
    decoder, optimizer = ra.Decoder(MODEL), optax.sgd(1.0)
    start = params() if mesh is None else ra.place_params(params(), mesh)
    step = ra.make_train_step(decoder, BRADLEY_TERRY, optimizer, mesh=mesh, microbatches=microbatches)
    state, metrics = step(ra.init_state(decoder, start, optimizer), ra.Batch(packed, pair=PAIRS))
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-10)
    assert 0 <= float(metrics["accuracy"]) <= 1
    for a, b, c in zip(*map(jax.tree.leaves, (params(), state.params, slope)), strict=True):
        np.testing.assert_allclose(np.asarray(a - b), c, atol=1e-10, rtol=0)
    rewards = make_rewarder(decoder, mesh=mesh)(start, SAMPLES.pack(row_length=24, parts=parts))
    np.testing.assert_allclose(rewards, by_hand(params()), rtol=0, atol=1e-10)


def preferences(seed, count):
    """Two answers to a prompt; the better one holds token 3 more often."""
    rng = np.random.default_rng(seed)
    sequences, start = [], []
    for _ in range(count):
        prompt = rng.integers(4, 17, rng.integers(2, 6))
        answers = [rng.integers(4, 17, 6) for _ in range(2)]
        for answer, often in zip(answers, rng.choice(5, 2, replace=False), strict=True):
            answer[rng.choice(6, often, replace=False)] = 3
        answers.sort(key=lambda a: -np.sum(a == 3))
        sequences += [np.concatenate([prompt, a]) for a in answers]
        start += [len(prompt)] * 2
    return sequences, start


def test_it_learns_what_is_preferred():
    base = ra.Decoder(QWEN2)
    decoder, weights = add_reward_head(base, base.init(0))
    optimizer = ra.make_optimizer(ra.OptimizerConfig(learning_rate=3e-3))
    step = ra.make_train_step(decoder, BRADLEY_TERRY, optimizer)
    state = ra.init_state(decoder, weights, optimizer)
    sequences, start = preferences(0, 64)
    packed = ra.pack(sequences, row_length=48, response_start=start, unit=np.arange(128) // 2)
    for _ in range(60):
        state, metrics = step(state, ra.Batch(packed, pair=np.arange(128).reshape(64, 2)))
    assert float(metrics["accuracy"]) > 0.9
    sequences, start = preferences(1, 100)
    packed = ra.pack(sequences, row_length=48, response_start=start)
    rewards = make_rewarder(decoder)(state.params, packed).reshape(100, 2)
    assert np.mean(rewards[:, 0] > rewards[:, 1]) > 0.85


def rollouts(tokens, prompt):
    """Of ragged answers."""
    size = max(map(len, tokens))
    mask = np.arange(size) < np.array([len(t) for t in tokens])[:, None]
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = np.concatenate(tokens)
    zeros = np.zeros(mask.shape, np.float32)
    return ra.Rollouts(ids, mask, zeros, zeros, np.zeros(len(tokens), np.int32), np.array(prompt, np.int32))


def every_sample():
    """SAMPLES as prompts and rollouts."""
    prompts = [ra.Prompt(i, SAMPLES.tokens[2 * i][: SAMPLES.start[2 * i]], "", {}) for i in range(4)]
    answers = [t[s:] for t, s in zip(SAMPLES.tokens, SAMPLES.start, strict=True)]
    return prompts, rollouts(answers, np.arange(8) // 2)


def test_a_judge_reads_the_reward_at_the_last_token(x64):
    prompts, asked = every_sample()
    judge = ra.make_judge(ra.Decoder(MODEL), params(), row_length=24)
    np.testing.assert_allclose(judge(prompts, asked), by_hand(params()), rtol=1e-6)
    mesh = ra.make_mesh(data=2, tensor=2)
    placed = ra.make_judge(ra.Decoder(MODEL), ra.place_params(params(), mesh), row_length=24, mesh=mesh)
    np.testing.assert_allclose(placed(prompts, asked), by_hand(params()), rtol=1e-6)
    backwards = lambda prompt, tokens: np.concatenate([np.asarray(prompt), tokens])[::-1]
    other = ra.make_judge(ra.Decoder(MODEL), params(), row_length=24, encode=backwards)
    assert not np.allclose(other(prompts, asked), by_hand(params()), rtol=1e-3)
    narrow = ra.make_judge(ra.Decoder(MODEL), params(), row_length=8)  # two samples are longer
    long = np.array([len(t) for t in SAMPLES.tokens]) > 8
    assert 0 < long.sum() < 8
    found = narrow(prompts, asked)
    np.testing.assert_array_equal(np.isnan(found), long)
    np.testing.assert_allclose(found[~long], np.asarray(by_hand(params()))[~long], rtol=1e-6)


@functools.cache
def judge_of(seed):
    base = ra.Decoder(sums_model(16))
    return ra.make_judge(*add_reward_head(base, base.init(seed), seed=seed), row_length=16)


def fitted(folder, judge, reward=share_right, **changes):
    decoder = ra.Decoder(sums_model(16))
    return ra.fit(
        sums_run(folder, **({"algorithm": "gprs", "steps": 2, "eval_prompts": 4} | changes)),
        decoder=decoder,
        params=decoder.init(0),
        prompts=sums.problems("train")[:40],
        eval_prompts=sums.problems("held-out"),
        reward=reward,
        decode=sums.decode,
        judge=judge,
    )


def test_fit_trains_on_the_judge_and_counts_by_the_reward(tmp_path):
    """What the judge says is logged as the reward; held-out accuracy is the share of right answers."""
    fitted(tmp_path, judge_of(1))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert all(row["reward"] != round(row["reward"]) for row in rows[:2])
    assert all(row["eval_accuracy"] in (0, 0.25, 0.5, 0.75, 1) for row in rows if "eval_accuracy" in row)
    assert all(row["invalid_rewards"] == 0 for row in rows[:2])
    assert not any("accuracy" in row for row in rows), "a judge's numbers have no threshold"
    assert (tmp_path / "report.html").exists()
    fitted(tmp_path, judge_of(1), steps=3)
    with pytest.raises(ConfigMismatch, match="reward_model_sha256"):
        fitted(tmp_path, judge_of(2), steps=4)


def test_a_judge_in_parts_gives_the_same(x64):
    prompts, asked = every_sample()
    whole = ra.make_judge(ra.Decoder(MODEL), params(), row_length=24)
    parts = ra.make_judge(ra.Decoder(MODEL), params(), row_length=24, at_once=3)
    np.testing.assert_allclose(parts(prompts, asked), whole(prompts, asked), rtol=1e-12)
    with pytest.raises(ValueError, match="at_once must be at least 1 or None, got 0"):
        ra.make_judge(ra.Decoder(MODEL), params(), row_length=24, at_once=0)


def test_a_judge_is_enough(tmp_path):
    """Without a reward function there is no accuracy, and the judge's mean of held-out answers is what is watched."""
    fitted(tmp_path, judge_of(1), reward=None)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval_judge" in row] == [0, 2]
    assert not any("eval_accuracy" in row for row in rows)
    assert "by the judge" in (tmp_path / "report.html").read_text()
    for other in (None, lambda prompts, rollouts: np.zeros(len(rollouts.prompt))):
        with pytest.raises(ValueError, match="nothing says how good a held-out answer is"):
            fitted(tmp_path / "other", other, reward=None)


def test_judges_are_told_apart_whatever_holds_them():
    """By the reward model's numbers, its shape and its rows; in a partial, a tuple, a dataclass or a closure."""

    def ensemble(judges, prompts, asked):
        return sum(judge(prompts, asked) for judge in judges)

    def closed(judge):
        return lambda prompts, asked: judge(prompts, asked)

    def known(judge):
        return json.dumps(run_identity(ra.Decoder(QWEN2), ra.ALGORITHMS["grpo"], {}, [], judge)["judge"])

    one, other = judge_of(1), judge_of(2)
    short = dataclasses.replace(one, row_length=8)
    assert known(one) == known(dataclasses.replace(one)) != known(short)
    for wrap in (lambda j: functools.partial(ensemble, (j, one)), closed, lambda j: [j], lambda j: j):
        assert known(wrap(one)) == known(wrap(one)) != known(wrap(other))


def test_tokens_that_a_reward_model_does_not_know_are_refused():
    asked = rollouts([[4, 5], [4, 200]], [0, 0])
    judge = ra.make_judge(ra.Decoder(MODEL), params(), row_length=24)
    with pytest.raises(ValueError, match=r"sample 1 holds token 200, the reward model's vocabulary has 17: .* encode"):
        judge([ra.Prompt(0, np.array([1, 2]), "", {})], asked)
    with pytest.raises(ValueError, match="row_length=65 is beyond the reward model's max_positions=64"):
        ra.make_judge(ra.Decoder(MODEL), params(), row_length=65)


def test_samples_that_are_too_long_compile_nothing(x64):
    judge = ra.make_judge(ra.Decoder(MODEL), params(), row_length=40)
    prompt, rng = [ra.Prompt(0, np.array([1, 2]), "", {})], np.random.default_rng(0)
    ask = lambda long: judge(prompt, rollouts([rng.integers(4, 17, 39 if n < long else 4) for n in range(6)], [0] * 6))
    ask(0)
    counter = CompileCounter()
    assert [int(np.isnan(ask(long)).sum()) for long in (1, 2, 5)] == [1, 2, 5]
    assert counter.take() == 0
    assert np.isnan(ask(6)).all()


def test_an_adapter_leaves_no_reward_head_frozen(x64):
    base = ra.Decoder(dataclasses.replace(QWEN2, dtype="float64"))
    decoder, weights = ra.add_lora(*add_reward_head(base, random_params(base.config)), ra.LoraConfig(rank=2))
    optimizer = optax.sgd(0.1)
    state = ra.init_state(decoder, weights, optimizer)
    step = ra.make_train_step(decoder, BRADLEY_TERRY, optimizer)
    state, _ = step(state, ra.Batch(SAMPLES.pack(row_length=24), pair=PAIRS))
    assert not np.array_equal(state.params["reward"]["kernel"], weights["reward"]["kernel"])
    assert not np.array_equal(state.params["lora"]["layers"]["mlp"]["up"]["b"], np.zeros(1))
    assert state.params["embedding"] is weights["embedding"]
    merged, whole = ra.merge_lora(decoder, state.params)
    packed = SAMPLES.pack(row_length=24)
    np.testing.assert_allclose(
        make_rewarder(merged)(whole, packed), make_rewarder(decoder)(state.params, packed), rtol=1e-6
    )


def first_is_missing(prompts, asked):
    out = np.arange(len(asked.prompt), dtype=np.float32)
    out[0] = np.nan
    return out


def test_answers_that_a_judge_cannot_judge_are_invalid(tmp_path, caplog):
    fitted(tmp_path, first_is_missing, steps=1)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["invalid_rewards"] == 1
    assert "the judge gave nan" in caplog.text


def test_a_judge_of_another_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the judge gave float64\[4\] for 16 samples: one number each"):
        fitted(tmp_path, lambda prompts, asked: np.zeros(4))


def test_models_and_algorithms_that_do_not_go_together():
    plain, head = ra.Decoder(QWEN2), ra.Decoder(dataclasses.replace(QWEN2, reward_head=True))
    optimizer = optax.sgd(1.0)
    with pytest.raises(ValueError, match=r"algorithm.score='reward', and the model lacks a reward head: bradley_terry"):
        ra.make_train_step(plain, BRADLEY_TERRY, optimizer)
    with pytest.raises(ValueError, match=r"algorithm.score='logratio', and the model has a reward head"):
        ra.make_train_step(head, ra.ALGORITHMS["grpo"], optimizer)
    with pytest.raises(ValueError, match="the model has no reward head: add_reward_head"):
        ra.make_judge(plain, {}, row_length=8)
    with pytest.raises(ValueError, match="the model has a reward head already"):
        add_reward_head(head, {})
    with pytest.raises(ValueError, match="a reward model has no head over the vocabulary, it cannot sample"):
        ra.sample(head, head.init(0), [np.array([1])], seed=0, step=0, config=ra.SampleConfig(1, 2, eos_ids=(0,)))


@pytest.mark.parametrize("model", [QWEN2, GEMMA], ids=["qwen2", "gemma"])
def test_a_reward_head_shares_the_model_and_drops_its_head(model):
    base = ra.Decoder(dataclasses.replace(model, tied_head=False))
    weights = random_params(base.config)
    decoder, changed = add_reward_head(base, weights, seed=5)
    assert set(changed) == {*weights, "reward"} - {"head"}
    assert changed["layers"] is weights["layers"]
    assert jax.tree.structure(changed) == jax.tree.structure(jax.eval_shape(decoder.init, 0))
    wide = dataclasses.replace(base.config, width=4096)
    drawn = add_reward_head(ra.Decoder(wide), {}, seed=5)[1]["reward"]["kernel"]
    assert float(jnp.std(drawn)) == pytest.approx(4097**-0.5, rel=0.05)
