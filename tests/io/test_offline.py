"""fit_offline: what an iteration prepares, what it learns, what it refuses, and that it ends in the same bits."""

import dataclasses
import json
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import rlalign as ra
from rlalign.envs import sums
from rlalign.io.canary import CAUSES
from rlalign.io.checkpoint import Checkpoints, ConfigMismatch
from rlalign.io.data import prompts_at_step
from rlalign.io.files import fingerprint
from rlalign.io.iteration import _read, _write
from rlalign.io.learner import loss_at_reference
from rlalign.io.metrics import read_metrics
from rlalign.train import make_rewarder
from rlalign.train.offline import LEARNT_FROM, make_offline_batch, pack_examples
from rlalign.types import StopReason
from tests.tiny import random_params, sums_model

DECODER = ra.Decoder(sums_model(8))
GENERATION = ra.SampleConfig(1, sums.ANSWER_TOKENS, eos_ids=(sums.EOS,))
DEMONSTRATIONS = sums.demonstrations("train")[:24]
PAIRS = sums.preferences("train")[:24]


EVALUATE = lambda decoder, weights: {"accuracy": 0.5, "nats": 1.0}
SAME = ("step", "loss", "grad_norm", "eval_accuracy", "copied_share")


def params():
    return DECODER.init(0)


def config(folder, **changes):
    base = ra.OfflineConfig(
        folder=str(folder),
        algorithm="gsil_bernoulli",
        examples_per_step=8,
        optimizer=ra.OptimizerConfig(learning_rate=1e-2),
        row_length=32,
        num_rows=8,
        iterations=2,
        generation=GENERATION,
        prepare_size=16,
        checkpoint_every=2,
        eval_every=2,
    )
    return dataclasses.replace(base, **changes)


def fit(run, examples=DEMONSTRATIONS, decoder=DECODER, start=None, **how):
    return ra.fit_offline(run, decoder=decoder, params=start or params(), examples=examples, **how)


def rows(run):
    return read_metrics(f"{run.folder}/metrics.jsonl")


def mean_logp(decoder, weights, examples):
    """Of response tokens."""
    packed = pack_examples(examples, row_length=32)
    logp = ra.make_scorer(decoder)(weights, packed)
    return float(np.sum(logp) / np.sum(packed.mask))


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Every fit_offline has jitted functions of its own, but most here compile the same programs."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two iterations of three steps, that nothing interrupted."""
    run = config(tmp_path_factory.mktemp("whole"))
    return run, fit(run, evaluate=EVALUATE)


def test_each_iteration_answers_and_scores_once(whole):
    run, _ = whole
    logged = rows(run)
    assert [row["step"] for row in logged] == list(range(7))
    assert [row.get("alarms") for row in logged] == [0] * 6 + [None]
    # 24 demonstrations, 16 at a time: two batches an iteration, and no more in later steps.
    assert [row.get("reference_forwards") for row in logged] == [2, 2, 2, 4, 4, 4, None]
    assert [row["step"] for row in logged if "copied_share" in row] == [0, 3]
    assert [row["step"] for row in logged if "eval_nats" in row] == [0, 2, 3, 4, 6]


def faulty(decoder, weights, prompts, *, step, **how):
    """The random numbers of the first iteration, and end tokens that are cut off."""
    rollouts = ra.sample(decoder, weights, prompts, step=0, **how)
    ends = (rollouts.tokens == sums.EOS) & (rollouts.stop == StopReason.EOS)[:, None]
    return rollouts._replace(mask=rollouts.mask & ~ends)


def test_the_canary_watches_what_is_generated_and_what_is_learnt_from_it(tmp_path, caplog, monkeypatch):
    """A sampler with two bugs, a reference at another temperature, and a batch that lost a token."""

    def shorter(*args, **given):
        batch = make_offline_batch(*args, **given)
        mask = np.array(batch.packed.mask)
        mask[0, mask[0].sum() - 1] = False
        return batch._replace(packed=batch.packed._replace(mask=mask, node=np.where(mask, batch.packed.node, -1)))

    monkeypatch.setattr("rlalign.io.learner.make_offline_batch", shorter)
    hot = lambda decoder, **how: ra.make_scorer(decoder, **(how | {"temperature": 3.0}))
    monkeypatch.setattr("rlalign.io.iteration.make_scorer", hot)
    run = config(tmp_path, iterations=4, optimizer=ra.OptimizerConfig(learning_rate=1e-6))
    fit(run, start=random_params(DECODER.config, 0, 0.5), sampler=faulty)
    told = [record.getMessage() for record in caplog.records if record.name.endswith("canary")]
    for kind in ("eos", "keys_of_steps", "numerics", "reference_start", "padding"):
        assert sum(f"probably {CAUSES[kind]}" in text for text in told) == 1, (kind, told)
    assert len(told) == 5
    assert rows(run)[0]["alarms"] >= 4


@pytest.mark.parametrize("name", [name for name, a in ra.ALGORITHMS.items() if a.data in LEARNT_FROM])
def test_an_algorithm_with_a_reference_has_a_loss_there(name):
    found = loss_at_reference(ra.ALGORITHMS[name])
    assert (found is not None) == ra.ALGORITHMS[name].needs_reference
    assert found is None or np.isfinite(found)


def test_an_iteration_begins_with_its_reference(whole):
    """There L is 0 for both answers, the loss 2 log 2 where the shift is 0, and e^shift where it is not."""
    run, _ = whole
    f = 2.0  # the shift of ALGORITHMS
    expected = np.log1p(np.exp(-f)) + np.log1p(np.exp(f))
    for step in (0, 3):
        assert rows(run)[step]["loss"] == pytest.approx(expected, rel=1e-5)
    assert rows(run)[2]["loss"] < expected


def test_negatives_are_the_answers_of_the_policy_that_the_iteration_began_with(whole, tmp_path):
    run, _ = whole
    with np.load(f"{run.folder}/iterations/0/00000000.npz") as file:
        token, length = file["token"], file["length"]
    rollouts = ra.sample(
        DECODER,
        params(),
        [d.prompt for d in DEMONSTRATIONS[:16]],
        seed=0,
        step=0,
        config=GENERATION,
        prompt_ids=range(16),
    )
    np.testing.assert_array_equal(token, rollouts.tokens)
    np.testing.assert_array_equal(length, rollouts.mask.sum(axis=1))


def test_a_truncated_answer_gets_no_end(whole):
    run, _ = whole
    with np.load(f"{run.folder}/iterations/0/00000000.npz") as file:
        cut = file["stop"] == ra.types.StopReason.MAX_TOKENS
        assert 0 < cut.sum() < len(cut)
        for tokens, length, is_cut in zip(file["token"], file["length"], cut, strict=True):
            assert (sums.EOS in tokens[:length]) == (not is_cut)
    assert 0 < rows(run)[0]["truncated_share"] < 1


def test_the_pairs_of_truncated_answers_can_be_dropped(tmp_path):
    short = dataclasses.replace(GENERATION, max_new_tokens=1)  # all are cut, but for those that end at once
    run = config(tmp_path, generation=short, truncated="drop", iterations=1)
    result = fit(run)
    ended = np.concatenate([np.load(tmp_path / "iterations" / "0" / f"{k:08d}.npz")["stop"] == 0 for k in (0, 16)])
    seen = [prompts_at_step(24, 8, seed=0, step=step) for step in range(3)]
    assert 0 < ended.sum() < 3, "the seed shows nothing"
    assert int(result.state.step) == sum(ended[chosen].any() for chosen in seen)


def stopped(run, evaluations, **how):
    """The run, ended by an error at an evaluation: they are at the steps 0, 2, 3, 4 and 6."""
    left = [None] * evaluations

    def evaluate(decoder, weights):
        left.pop()
        return EVALUATE(decoder, weights)

    with pytest.raises(IndexError):
        fit(run, evaluate=evaluate, **how)


def check_same_end(run, whole):
    complete, result = whole
    resumed = fit(run, evaluate=EVALUATE)
    assert fingerprint(resumed.state.params) == fingerprint(result.state.params)
    assert [[row.get(k) for k in SAME] for row in rows(run)] == [[row.get(k) for k in SAME] for row in rows(complete)]


@pytest.mark.parametrize(("evaluations", "newest"), [(1, 0), (3, 3), (4, 4)], ids=["first", "between", "second"])
def test_a_run_that_was_stopped_ends_in_the_same_bits(whole, tmp_path, evaluations, newest):
    run = dataclasses.replace(whole[0], folder=str(tmp_path))
    stopped(run, evaluations)
    assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()) == newest
    check_same_end(run, whole)


def test_a_run_that_has_ended_goes_on_with_more_iterations(whole, tmp_path):
    run = dataclasses.replace(whole[0], folder=str(tmp_path))
    fit(dataclasses.replace(run, iterations=1), evaluate=EVALUATE)
    check_same_end(run, whole)


@pytest.mark.parametrize("harm", ["lost", "damaged"])
def test_files_of_an_iteration_are_made_anew_from_its_checkpoint(whole, tmp_path, harm):
    run = dataclasses.replace(whole[0], folder=str(tmp_path))
    stopped(run, 4)
    file = tmp_path / "iterations" / "1" / "00000000.npz"
    content = file.read_bytes()
    if harm == "lost":
        file.unlink()
    else:
        file.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    check_same_end(run, whole)
    assert file.read_bytes() == content


def test_a_file_that_was_made_from_something_else_is_not_taken(whole):
    file = Path(whole[0].folder, "iterations", "0", "00000000.npz")
    with np.load(file) as found:
        made_from = str(found["made_from"])
    assert set(_read(file, made_from) or ()) == {"token", "length", "stop", "ref_logp"}
    assert _read(file, made_from[::-1]) is None


ARRAYS = {
    "token": np.arange(64, dtype=np.int32).reshape(8, 8),
    "length": np.full(8, 8),
    "stop": np.zeros(8, np.int32),
    "ref_logp": np.linspace(-3, 0, 128, dtype=np.float32).reshape(8, 2, 8),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("iteration") / "00000000.npz"
    _write(path, "a1b2", ARRAYS)
    return path, path.read_bytes()


def test_a_file_is_read_as_it_was_written(written):
    path, content = written
    found = _read(path, "a1b2")
    assert found is not None
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert (found[name].dtype, found[name].tobytes()) == (array.dtype, array.tobytes())
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
    _write(path, "a1b2", ARRAYS)
    assert path.read_bytes() == content


def test_any_flipped_bit_of_a_file_is_found(written, tmp_path):
    """A zip file's own checksums do not cover names: an array could be renamed away, and the run would do without."""
    content, path = written[1], tmp_path / "flipped.npz"
    places = {*range(0, 8 * len(content), 97)}
    for name in (*ARRAYS, "made_from"):  # every bit of the names, in both places that a zip file has them
        start = 0
        while (start := content.find(name.encode(), start)) >= 0:
            places |= {*range(8 * start, 8 * (start + len(name)))}
            start += 1
    places |= {*range(8 * (len(content) - 30), 8 * len(content))}  # the end of its directory, and the checksum
    assert len(places) > 700
    for place in sorted(places):
        spoilt = bytearray(content)
        spoilt[place // 8] ^= 1 << place % 8
        path.write_bytes(spoilt)
        assert _read(path, "a1b2") is None, place


@pytest.mark.parametrize("how", ["absent", "empty", "half", "a byte short", "a byte more", "zeros", "a folder", "old"])
def test_a_file_that_is_not_what_was_written_is_not_taken(written, tmp_path, how):
    content, path = written[1], tmp_path / "spoilt.npz"
    harm = {"empty": b"", "half": content[: len(content) // 2], "a byte short": content[:-1]}
    harm |= {"a byte more": content + b"0", "zeros": bytes(len(content))}
    if how in harm:
        path.write_bytes(harm[how])
    elif how == "a folder":
        path.mkdir()
    elif how == "old":  # without a checksum
        np.savez(path, made_from=np.array("a1b2"), **ARRAYS)
    assert _read(path, "a1b2") is None


def test_without_that_checkpoint_the_run_says_what_to_do(whole, tmp_path):
    run = dataclasses.replace(whole[0], folder=str(tmp_path))
    stopped(run, 4)
    (tmp_path / "iterations" / "1" / "00000000.npz").unlink()
    (tmp_path / "checkpoints" / "3" / "files.json").unlink()
    with (
        pytest.warns(UserWarning, match="damaged checkpoint"),
        pytest.raises(ValueError, match="remove the checkpoints after step 3"),
    ):
        fit(run, evaluate=EVALUATE)


def test_a_save_that_failed_is_asked_for_at_every_step(tmp_path, monkeypatch):
    boundaries = []

    def failed(self):
        boundaries.append(self)
        if len(boundaries) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "check", failed)
    run = config(tmp_path)
    with pytest.raises(OSError, match="No space left on device"):
        fit(run)
    assert [row["step"] for row in rows(run)] == [0, 1]


def test_other_examples_or_settings_are_refused(whole):
    run, _ = whole
    with pytest.raises(ConfigMismatch, match="examples_sha256"):
        fit(run, examples=[*DEMONSTRATIONS[1:], DEMONSTRATIONS[0]])
    with pytest.raises(ConfigMismatch, match=r"generation\.temperature"):
        fit(dataclasses.replace(run, generation=dataclasses.replace(GENERATION, temperature=0.5)))


def plain(folder, algorithm, **changes):
    return config(folder, algorithm=algorithm, generation=None, iterations=1, epochs=8, **changes)


def test_imitation_raises_the_likelihood_of_the_demonstrations(tmp_path):
    result = fit(plain(tmp_path, "sft"))
    before, after = (mean_logp(DECODER, weights, DEMONSTRATIONS) for weights in (params(), result.state.params))
    assert after > before + 0.3
    assert not (tmp_path / "iterations").exists()


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_preferences_are_learnt(tmp_path, algorithm):
    run = plain(tmp_path, algorithm)
    result = fit(run, examples=PAIRS)
    assert {row["alarms"] for row in rows(run)[:-1]} == {0}
    packed = pack_examples(PAIRS, row_length=32)
    margins = [ra.make_scorer(DECODER)(weights, packed).sum(axis=1) for weights in (params(), result.state.params)]
    gained = np.subtract(*[m.reshape(-1, 2) for m in reversed(margins)])
    assert np.mean(gained[:, 0] - gained[:, 1]) > 0.1


def test_a_reward_model_is_trained(tmp_path):
    decoder, start = ra.add_reward_head(DECODER, params(), seed=0)
    result = fit(plain(tmp_path, "bradley_terry"), examples=PAIRS, decoder=decoder, start=start)
    reward = make_rewarder(decoder)(result.state.params, pack_examples(PAIRS, row_length=32)).reshape(-1, 2)
    assert np.mean(reward[:, 0] > reward[:, 1]) > 0.8


def test_the_optimizer_begins_anew_with_every_iteration(tmp_path):
    """The learning rate decays over an iteration and is back at its peak in the next."""
    schedule = ra.OptimizerConfig(learning_rate=1e-2, schedule="linear", total_steps=3)
    run = config(tmp_path, optimizer=schedule)
    fit(run)
    rates = [row["learning_rate"] for row in rows(run)[:-1]]
    np.testing.assert_allclose(rates, [1e-2 * left / 3 for left in (3, 2, 1, 3, 2, 1)], rtol=1e-6)


def test_the_report_shows_what_was_generated(whole):
    run, _ = whole
    samples = [json.loads(line) for line in Path(run.folder, "samples.jsonl").read_text().splitlines()]
    assert {(row["step"], row["split"]) for row in samples} == {(0, "generated"), (3, "generated")}
    page = Path(run.folder, "report.html").read_text()
    assert "Pairs told apart" in page
    assert "Generated answers to prompts" in page


REFUSED = [
    ({"algorithm": "grpo"}, {}, "learns from rollouts: use fit"),
    ({}, {"examples": []}, "examples is empty"),
    ({}, {"examples": [DEMONSTRATIONS[0], PAIRS[0]]}, "Demonstration, Preference: give one kind"),
    ({"generation": None}, {}, "give generation=SampleConfig"),
    ({"algorithm": "sft", "generation": None}, {"examples": PAIRS}, "leave out the rejected"),
    ({}, {"examples": PAIRS}, "pairs already: leave generation at None"),
    ({"algorithm": "sft"}, {}, "demonstrations alone: leave generation at None"),
    ({"algorithm": "bradley_terry"}, {}, "cannot answer prompts"),
    ({"row_length": 9}, {}, r"examples\[0\] needs 10 tokens"),
    ({"microbatches": 16}, {}, "16 parts"),
    ({"generation": dataclasses.replace(GENERATION, eos_ids=(99,))}, {}, "eos_ids holds 99"),
]


@pytest.mark.parametrize(("changes", "how", "text"), REFUSED, ids=[text for *_, text in REFUSED])
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, changes, how, text):
    with pytest.raises(ValueError, match=text):
        fit(config(tmp_path / "run", **changes), **how)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"epochs": 0}, "epochs must be above 0, got 0"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"truncated": "mask"}, "truncated must be 'keep' or 'drop', got 'mask'"),
        ({"generation": dataclasses.replace(GENERATION, num_samples=2)}, "num_samples=2: one answer"),
        ({"algorithm": "gsil"}, "gsil"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"profile": "4"}, "profile='4'"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path, changes, text):
    with pytest.raises((ValueError, KeyError), match=text):
        config(tmp_path, **changes)


def test_steps_see_each_example_so_many_times(tmp_path):
    assert config(tmp_path, epochs=2).steps_per_iteration(24) == 6
    assert config(tmp_path, epochs=0.5).steps_per_iteration(24) == 2
    assert config(tmp_path, epochs=1).steps_per_iteration(3) == 1


def test_a_fraction_of_an_epoch_answers_only_what_it_sees(tmp_path):
    run = config(tmp_path, epochs=1 / 3, iterations=1, prepare_size=24)
    fit(run)
    with np.load(next((tmp_path / "iterations" / "0").iterdir())) as file:
        assert len(file["stop"]) == 8


def test_an_adapter_learns_and_is_its_own_reference(tmp_path):
    """The second iteration's reference is the adapter as it was then: its log-ratios begin at 0."""
    decoder, start = ra.add_lora(DECODER, params(), ra.LoraConfig(rank=2))
    run = config(tmp_path)
    stopped(run, 4, decoder=decoder, start=start)
    result = fit(run, decoder=decoder, start=start, evaluate=EVALUATE)
    assert rows(run)[3]["loss"] == pytest.approx(np.log1p(np.exp(-2.0)) + np.log1p(np.exp(2.0)), rel=1e-5)
    base = ra.without_lora(result.state.params)
    assert fingerprint(base) == fingerprint(params())
    assert int(result.state.step) == 6


def test_a_mesh_gives_the_same(tmp_path, whole):
    mesh = ra.make_mesh(fsdp=2, tensor=2)
    run = dataclasses.replace(whole[0], folder=str(tmp_path), iterations=1)
    result = fit(run, start=ra.place_params(params(), mesh), mesh=mesh)
    alone = [row["loss"] for row in rows(whole[0])[:3]]
    np.testing.assert_allclose([row["loss"] for row in rows(run)[:3]], alone, atol=1e-6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.state.params))
