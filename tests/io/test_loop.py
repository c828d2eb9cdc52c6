"""fit: what it logs, what it refuses, how it ends, and that it continues where it was."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
import tokenizers as tokenizers_
import transformers

import rlalign as ra
from rlalign.envs import sums
from rlalign.io.canary import CAUSES
from rlalign.io.checkpoint import Checkpoints, ConfigMismatch, DamagedCheckpoint
from rlalign.io.files import fingerprint
from rlalign.io.metrics import read_metrics
from rlalign.io.rollouts import check_rewards
from rlalign.io.session import best_before
from rlalign.io.updates import RunAborted
from rlalign.models.tokenizer import Tokenizer
from rlalign.plan import read_job
from rlalign.types import Rewards
from tests.graders import share_right
from tests.tiny import random_params, sums_model
from tests.tiny import sums_run as config

_spec = importlib.util.spec_from_file_location("loop_graders", pathlib.Path(__file__).with_name("graders.py"))
graders = importlib.util.module_from_spec(_spec)
sys.modules["loop_graders"] = graders
_spec.loader.exec_module(graders)
DECODER = ra.Decoder(sums_model(16))


def run(settings, reward=graders.even, **more):
    usual = {"decoder": DECODER, "prompts": sums.problems("train")[:40], "eval_prompts": sums.problems("held-out")}
    usual |= {"decode": sums.decode, "params": DECODER.init(0)}
    return ra.fit(settings, reward=reward, **(usual | more))


def test_a_run_logs_evaluates_and_reports(tmp_path):
    result = run(config(tmp_path))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert sorted(result.accuracy) == [0, 2, 4]
    assert all(row["compiles"] == 0 for row in rows[2:]), "one bucket: nothing compiles after step 1"
    assert all(row["ratio_error"] <= 1e-4 for row in rows[:-1])
    assert [row.get("alarms") for row in rows] == [0, 0, 0, 0, None]
    for name in ("loss", "grad_norm", "tokens_per_second", "seconds_rollout", "seconds_update", "learning_rate"):
        assert np.isfinite(rows[1][name])
    assert (tmp_path / "report.html").exists()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["sampling"]["num_samples"] == 4
    job = read_job(tmp_path / "config.json", prompt_length=6)  # what `rlalign plan` reads
    assert (job.run, job.model) == (config(tmp_path), DECODER.config)
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert best["step"] == result.best_step


def test_terms_by_name_are_logged_and_normalised_by_themselves(tmp_path):
    advantage = functools.partial(ra.ALGORITHMS["crpo_per_objective"].advantage, term_weight=(1.0, 1.0))
    algorithm = dataclasses.replace(ra.ALGORITHMS["crpo_per_objective"], advantage=advantage)
    settings = config(tmp_path / "terms", algorithm="crpo_per_objective", success=10.0)
    result = run(settings, graders.by_terms, algorithm=algorithm)
    rows = read_metrics(tmp_path / "terms" / "metrics.jsonl")
    for row in rows[:-1]:
        assert row["reward"] == pytest.approx(10 * row["term_even"] + row["term_first"])
        assert row["accuracy"] == row["term_even"]
        assert 0 < row["term_even_spread"] < 0.6
    assert result.accuracy == {row["step"]: row["eval_term_even"] for row in rows if "eval_term_even" in row}
    with pytest.raises(ValueError, match=r"needs the terms of rewards by themselves: let the reward function return"):
        run(config(tmp_path / "plain", algorithm="crpo_per_objective"), algorithm=algorithm)


def by_tokens(distort):
    """A judge that tells all answers apart, distorted."""
    weights = np.arange(1.0, 1.0 + sums.ANSWER_TOKENS)
    return lambda prompts, rollouts: distort((rollouts.tokens * rollouts.mask) @ weights / 16 - 2)


def test_increasing_distortions_of_rewards_change_no_bit_of_gprs(tmp_path):
    """Eq. 7 compares: rewards times 64, or cubed, end in the same parameters. GRPO, for one, notices."""
    ends = {}
    for name, distort in {"plain": lambda r: r, "scaled": lambda r: 64 * r, "heavy": lambda r: r**3}.items():
        how = {"steps": 2, "eval_every": 2, "algorithm": "gprs"}
        ends[name] = fingerprint(run(config(tmp_path / name, **how), judge=by_tokens(distort)).state.params)
    assert ends["plain"] == ends["scaled"] == ends["heavy"]
    seen = [
        run(config(tmp_path / name, steps=1, eval_every=1), judge=by_tokens(distort)).state.params
        for name, distort in {"grpo": lambda r: r, "grpo-heavy": lambda r: r**3}.items()
    ]
    assert fingerprint(seen[0]) != fingerprint(seen[1])


def test_more_than_a_fifth_of_invalid_rewards_is_too_many():
    """By default, exactly: 4 of 20 go on."""
    share = config("unused").max_invalid_share
    for bad in (0, 4, 5):
        valid = np.arange(20) >= bad
        rewards = Rewards(np.where(valid, 1.0, np.nan), valid, tuple("" if ok else "raised" for ok in valid))
        if bad <= 4:
            check_rewards(rewards, share)
        else:
            with pytest.raises(RunAborted, match="3") as stopped:
                check_rewards(rewards, share)
            assert stopped.value.reason == (
                "5 of 20 rewards of a step are invalid, more than max_invalid_share=0.2; the first: raised"
            )


def hotter(decoder, params, prompts, *, config, **how):
    """Samples at another temperature than it is asked for."""
    return ra.sample(decoder, params, prompts, config=dataclasses.replace(config, temperature=2.0), **how)


def test_the_canary_watches_the_steps(tmp_path, caplog):
    how = {
        "steps": 6,
        "eval_every": 6,
        "prompts_per_step": 16,
        "row_length": 24,
        "num_rows": 16,
        "recompute_logp": True,
    }
    params = random_params(DECODER.config, 0, 0.5)  # far from uniform, so that temperatures matter
    run(config(tmp_path, **how), params=params, sampler=hotter)
    told = [record.getMessage() for record in caplog.records if record.name.endswith("canary")]
    assert [f"probably {CAUSES['temperature']}" in text for text in told] == [True]
    assert sum(row.get("alarms", 0) for row in read_metrics(tmp_path / "metrics.jsonl")) > 0


def test_the_callers_parameters_are_left_alone(tmp_path):
    params = DECODER.init(0)
    before = fingerprint(params)
    run(config(tmp_path, steps=1))
    assert fingerprint(params) == before
    assert fingerprint(DECODER.init(0)) == before


def test_a_killed_run_continues_in_the_same_bits(tmp_path):
    whole = run(config(tmp_path / "whole", eval_every=1))
    part = tmp_path / "part"
    run(config(part, eval_every=1))
    (part / "checkpoints" / "4").rename(part / "gone")  # what a kill after the save of step 3 leaves
    again = run(config(part, eval_every=1))
    assert fingerprint(again.state.params) == fingerprint(whole.state.params)
    same = ("step", "loss", "reward", "eval_accuracy")
    logged = [
        [{k: row.get(k) for k in same} for row in read_metrics(f / "metrics.jsonl")] for f in (part, tmp_path / "whole")
    ]
    assert logged[0] == logged[1]


def test_another_configuration_is_refused_on_resume(tmp_path):
    run(config(tmp_path, steps=1))
    with pytest.raises(ConfigMismatch, match=r"seed"):
        run(config(tmp_path, steps=1, seed=5))


def test_a_longer_run_continues_and_a_named_change_is_accepted(tmp_path):
    run(config(tmp_path, steps=1))
    result = run(config(tmp_path, steps=2, seed=5), allow_change=["seed"])
    assert int(result.state.step + result.state.skipped) == 2


def test_another_model_algorithm_or_prompts_are_refused_on_resume(tmp_path):
    run(config(tmp_path, steps=1))
    other = ra.Decoder(dataclasses.replace(DECODER.config, rope_theta=5e5))
    with pytest.raises(ConfigMismatch, match=r"decoder\.rope_theta: saved 10000\.0, now 500000\.0"):
        run(config(tmp_path, steps=2), decoder=other)
    with pytest.raises(ConfigMismatch, match=r"algorithm_settings\.entropy_coef: saved 0\.0, now 0\.1"):
        run(config(tmp_path, steps=2), algorithm=dataclasses.replace(ra.ALGORITHMS["grpo"], entropy_coef=0.1))
    with pytest.raises(ConfigMismatch, match="prompts_sha256"):
        run(config(tmp_path, steps=2), prompts=sums.problems("train")[:39])
    with pytest.raises(ConfigMismatch, match=r'reward: saved "[\w.]+\.\w+", now "tests\.graders\.share_right"'):
        run(config(tmp_path, steps=2), reward=share_right)


def test_another_tokenizer_is_refused_on_resume(tmp_path):
    """The same prompts' tokens, and other words for what is sampled."""
    tokenizers = {}
    for name, letters in (("mine", "0123456789+="), ("other", "9876543210+=")):
        words = {word: i for i, word in enumerate(["<pad>", "</s>", *letters])}
        inner = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers_.Tokenizer(tokenizers_.models.WordLevel(words, unk_token="<pad>")),
            eos_token="</s>",
        )
        tokenizers[name] = Tokenizer(inner, (sums.EOS,))
    assert tokenizers["mine"].sha256() != tokenizers["other"].sha256()
    run(config(tmp_path, steps=1), decode=tokenizers["mine"].decode)
    with pytest.raises(
        ConfigMismatch, match=r"decode\.of\.tokenizer_sha256: saved \"[0-9a-f]{64}\", now \"[0-9a-f]{64}\""
    ):
        run(config(tmp_path, steps=2), decode=tokenizers["other"].decode)
    run(config(tmp_path, steps=2), decode=tokenizers["other"].decode, allow_change=["decode"])


class Scaled:
    """An advantage that is an object, with an array: it has no name of its own and JSON does not know it."""

    def __call__(self, reward, group, factor, *, num_groups, valid, shape):
        return jax.numpy.where(valid, shape(reward - 0.5) * factor[0], 0.0)


def test_a_run_is_known_by_what_its_functions_were_given(tmp_path):
    def mine(factor):
        advantage = functools.partial(Scaled(), factor=np.array([factor]), shape=jax.numpy.tanh)
        return dataclasses.replace(ra.ALGORITHMS["grpo"], advantage=advantage)

    run(config(tmp_path, steps=1), algorithm=mine(1.0))
    run(config(tmp_path, steps=2), algorithm=mine(1.0))
    with pytest.raises(ConfigMismatch, match=r"advantage\.factor: saved \[1\.0\], now \[2\.0\]"):
        run(config(tmp_path, steps=3), algorithm=mine(2.0))


def test_the_best_accuracy_is_not_that_of_steps_that_come_again(tmp_path):
    """Else a step whose save was lost in a kill would come again, be no better than itself, and never be saved."""
    rows = [{"step": 0, "eval_accuracy": 0.1}, {"step": 4, "eval_accuracy": 0.5}, {"step": 8, "eval_accuracy": 0.2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [best_before(tmp_path, step) for step in (0, 4, 5, 9)] == [(-1, -1.0), (0, 0.1), (4, 0.5), (4, 0.5)]


def test_a_damaged_last_checkpoint_is_written_anew(tmp_path):
    run(config(tmp_path, steps=2))
    (tmp_path / "checkpoints" / "2" / "files.json").unlink()
    with pytest.warns(DamagedCheckpoint):
        run(config(tmp_path, steps=2))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.problem(2) is None


def test_a_batch_that_needs_more_rows_goes_to_the_next_bucket(tmp_path, caplog):
    result = run(config(tmp_path, steps=1, row_length=16, num_rows=2))
    assert int(result.state.step + result.state.skipped) == 1
    assert "a batch of another shape, which compiles once: the sequences need" in caplog.text


def test_epochs_and_minibatches_leave_the_old_policy(tmp_path):
    result = run(config(tmp_path, steps=2, epochs=2, minibatches=2))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert int(result.state.step) + int(result.state.skipped) == 2 * 2 * 2
    assert rows[0]["ratio_error"] > 1e-3, "the second pass is off-policy: old_logp stays fixed"


def test_the_reference_of_a_kl_is_the_first_policy(tmp_path):
    run(config(tmp_path, algorithm="gprs", steps=3))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[2]["kl"] > 1e-6


def test_a_narrow_reference_differs_by_its_rounding(tmp_path):
    run(config(tmp_path, algorithm="gprs", steps=1, reference_dtype="bfloat16"))
    assert 1e-9 < read_metrics(tmp_path / "metrics.jsonl")[0]["kl"] < 1e-4


@pytest.mark.parametrize("name", ["dr_grpo", "reinforce_pp", "remax", "gprs_weight"])
def test_what_an_algorithm_needs_is_found(tmp_path, name):
    """A length to divide by, an advantage by token, the greedy answers' rewards, the reference's weights."""
    result = run(config(tmp_path, algorithm=name, steps=1))
    assert int(result.state.step) == 1


def test_one_sample_a_prompt_is_enough_without_groups(tmp_path):
    sampling = ra.SampleConfig(1, sums.ANSWER_TOKENS, eos_ids=(sums.EOS,))
    result = run(config(tmp_path, algorithm="reinforce_pp", steps=1, sampling=sampling, recompute_logp=True))
    assert int(result.state.step) == 1


def test_what_one_reward_an_answer_does_not_give_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"'gigpo' needs trajectory i\[N\], the trajectory of each step, which one reward"
    ):
        run(config(tmp_path, algorithm="gigpo"))
    assert not (tmp_path / "config.json").exists()


def test_an_algorithm_of_ones_own(tmp_path):
    def mine(reward, group, *, num_groups, valid):
        return jax.numpy.where(valid, reward - 0.5, 0.0)

    result = run(config(tmp_path, steps=1), algorithm=dataclasses.replace(ra.ALGORITHMS["grpo"], advantage=mine))
    assert int(result.state.step) == 1


def test_bad_rewards_are_counted_and_nothing_is_lost(tmp_path, caplog):
    run(config(tmp_path, steps=2, reward_limit=1.0, max_invalid_share=1.0), reward=graders.sometimes)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert sum(row.get("invalid_rewards", 0) for row in rows) > 0
    assert "rewards are invalid" in caplog.text
    assert [row["step"] for row in rows] == [0, 1, 2]


def test_a_reward_that_always_raises_ends_the_run_with_code_3(tmp_path, capsys):
    with pytest.raises(RunAborted) as stopped:
        run(config(tmp_path), reward=graders.raises)
    assert stopped.value.code == 3
    assert "no grader today" in capsys.readouterr().err


def test_a_profile_is_written(tmp_path):
    run(config(tmp_path, steps=3, profile="1:9"))  # written at the end of the run at the latest
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"algorithm": "grop"}, "unknown algorithm 'grop': choose one of grpo"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        (
            {"epochs": 2, "optimizer": ra.OptimizerConfig(1e-3, schedule="linear", total_steps=5)},
            "total_steps=5 ends the learning rate before the run's 8 updates",
        ),
        ({"profile": "5:3"}, "FIRST:END"),
        ({"max_invalid_share": 1.5}, r"max_invalid_share must lie in \[0, 1\]"),
    ],
)
def test_bad_settings_are_refused_when_built(tmp_path, changes, text):
    with pytest.raises(ValueError, match=text):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"algorithm": "sft"}, "algorithm 'sft' learns from demonstrations, not from rewards"),
        ({"sampling": ra.SampleConfig(1, 4, eos_ids=(1,))}, "a group of one has no baseline"),
        ({"sampling": ra.SampleConfig(2, 4, eos_ids=(1,), temperature=0.5)}, "both sides of the importance ratio"),
        ({"row_length": 8}, r"prompts\[0\] has 6 tokens, with max_new_tokens=4 that is 10, and row_length is 8: raise"),
        ({"sampling": ra.SampleConfig(2, 12, eos_ids=(1,))}, "max_positions is 16: raise"),
        ({"sampling": ra.SampleConfig(2, 4, eos_ids=(99,))}, "eos_ids holds 99, the vocabulary has 14"),
        ({"num_rows": 3, "minibatches": 2}, "num_rows=3 does not divide into 2 parts"),
    ],
)
def test_settings_at_odds_with_the_algorithm_or_the_data(tmp_path, changes, text):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=text):
        run(config(folder, **changes))
    assert not folder.exists(), "refused before anything is written"


def test_no_prompts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="eval_prompts is empty: give at least one"):
        run(config(tmp_path), eval_prompts=[])


def test_a_prompt_that_comes_twice_in_a_step_is_sampled_anew(tmp_path):
    prompt = sums.problems("train")[0]
    settings = ra.SampleConfig(2, sums.ANSWER_TOKENS, eos_ids=(sums.EOS,))
    rollouts = ra.sample(DECODER, DECODER.init(0), [prompt, prompt], seed=0, step=0, config=settings)
    assert (rollouts.tokens[:2] != rollouts.tokens[2:]).any()
