"""Faults inside a run of fit: failing saves, gradients that are not finite, prompts too long, other devices."""

import json
import shutil

import jax
import numpy as np
import pytest

import rlalign as ra
from rlalign.envs import sums
from rlalign.io.checkpoint import Checkpoints
from rlalign.io.data import read_prompts
from rlalign.io.files import fingerprint
from rlalign.io.metrics import read_metrics
from rlalign.io.runner import rollout_metrics
from rlalign.io.updates import RunAborted
from rlalign.train import init_state, make_batch
from rlalign.types import Rewards, Rollouts
from tests.faults.injection import fail_at, refuse
from tests.faults.small import train
from tests.graders import share_right
from tests.tiny import sums_model, sums_run

DECODER = ra.Decoder(sums_model(8))


def fit(settings, *, params=None, prompts=None, **more):
    """fit of the small run, with settings of the caller's."""
    usual = {"eval_prompts": sums.problems("held-out"), "reward": share_right, "decode": sums.decode}
    params = DECODER.init(0) if params is None else params
    prompts = sums.problems("train")[:40] if prompts is None else prompts
    return ra.fit(settings, decoder=DECODER, params=params, prompts=prompts, **(usual | more))


def saved_state(folder, step):
    """The checkpoint of a step, on one device."""
    like = init_state(DECODER, DECODER.init(1), ra.make_optimizer(ra.OptimizerConfig()))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.problem(step) is None
        return checkpoints.restore(step, like)[0]


def test_a_failed_save_ends_the_run_and_is_not_listed_and_the_run_goes_on_bitwise(tmp_path, monkeypatch):
    """It fails behind step 2, whose update waits for that: the error comes at 3, not at 4, where the next save is."""
    whole = train(str(tmp_path / "whole"), steps=4, checkpoint_every=2)
    run, saves, save = tmp_path / "run", [], Checkpoints.save

    def remembered(self, *args, **given):
        save(self, *args, **given)
        saves.append(self._pending[1])

    def wait(_):
        assert saves[-1].exception(60) is not None

    monkeypatch.setattr(Checkpoints, "save", remembered)
    with (
        fail_at("save", 2, refuse) as fault,
        fail_at("update", 2, wait) as waited,
        pytest.raises(OSError, match="Read-only file system") as error,
    ):
        train(str(run), steps=4, checkpoint_every=2)
    monkeypatch.undo()
    assert (fault.fired, waited.fired) == (1, 1)
    assert "while step 2 was being saved" in error.value.__notes__[0]
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [0]
        assert checkpoints.problem(0) is None
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [0, 1, 2]
    again = train(str(run), steps=4, checkpoint_every=2)
    assert fingerprint(again.state) == fingerprint(whole.state)
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def poisoned(arguments):
    """One NaN among the old log-probs of a batch, which makes its gradient NaN."""
    batch = arguments["batch"]
    where = tuple(np.argwhere(np.asarray(batch.packed.mask))[0])
    old = np.array(batch.old_logp)
    old[where] = np.nan
    return {"batch": batch._replace(old_logp=old)}


def test_five_bad_gradients_in_a_row_end_a_run_with_code_3_and_none_is_applied(tmp_path, capsys):
    with fail_at("batch", 2, poisoned, times=5) as fault, pytest.raises(RunAborted) as stopped:
        train(str(tmp_path), steps=12, eval_every=12, checkpoint_every=1, keep=9)
    assert (fault.fired, stopped.value.code) == (5, 3)
    said = capsys.readouterr().err
    assert "5 gradients in a row were not finite: lower the learning rate (0.01)" in said
    before, after = (saved_state(tmp_path, step) for step in (2, 6))
    assert fingerprint((before.params, before.opt_state)) == fingerprint((after.params, after.opt_state))
    assert (int(before.skipped), int(after.skipped), int(after.step)) == (0, 4, 2)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1]


def test_four_bad_gradients_cost_four_updates(tmp_path):
    with fail_at("batch", 2, poisoned, times=4) as fault:
        result = train(str(tmp_path), steps=8, eval_every=12, checkpoint_every=12)
    assert fault.fired == 4
    assert (int(result.state.step), int(result.state.skipped)) == (4, 4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.state.params))


def test_the_reference_is_bitwise_the_same_before_and_after(tmp_path):
    """The reference of GPRS' KL is the caller's arrays: updates neither change nor use them up."""
    params = DECODER.init(0)
    before = fingerprint(params)
    result = fit(sums_run(tmp_path, algorithm="gprs", steps=3), params=params)
    assert fingerprint(params) == before == json.loads((tmp_path / "config.json").read_text())["reference_sha256"]
    assert fingerprint(result.state.params) != before
    assert read_metrics(tmp_path / "metrics.jsonl")[2]["kl"] > 0


def test_prompts_that_are_too_long_leave_full_batches_and_one_program(tmp_path):
    """Half of a file is too long: it is left out with its reason, and no step is smaller or compiles anew."""
    file = tmp_path / "prompts.jsonl"
    problems = sums.problems("train")[:8]
    records = [{"prompt": text} | p.example for p in problems for text in (p.text, p.text * 3)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    prompts = read_prompts(file, lambda text: sums.encode(text).tolist(), max_tokens=sums.PROMPT_TOKENS)
    assert len(prompts) == 8
    assert prompts.summary() == "8 prompts; left out: 8 too long (first at line 2)"
    assert prompts.dropped[0].reason == "18 tokens, more than max_tokens=6"
    fit(sums_run(tmp_path / "run", steps=5, eval_every=5), prompts=prompts)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")[:-1]
    assert all(row["tokens_repeated"] >= 4 * 4 * (sums.PROMPT_TOKENS + 1) for row in rows)  # 4 prompts, 4 samples each
    assert rows[0]["compiles"] > 0
    assert all(row["compiles"] == 0 for row in rows[1:])


def test_groups_without_signal_are_counted():
    """One valid row; equal rewards; no valid row; and one that has a signal."""
    reward = np.array([1.0, 0.0, 2.0, 2.0, 1.0, 1.0, 0.0, 1.0])
    valid = np.array([True, False, True, True, False, False, True, True])
    token = np.arange(16, dtype=np.int32).reshape(8, 2) % 5 + 2
    mask, owner = np.ones((8, 2), bool), np.repeat(np.arange(4, dtype=np.int32), 2)
    logp = np.full((8, 2), -1.0, np.float32)
    rollouts = Rollouts(token, mask, logp, logp, np.zeros(8, np.int32), owner)
    prompts = [np.array([2, 3 + k], np.int32) for k in range(4)]
    rewards = Rewards(np.where(valid, reward, np.nan), valid, tuple("" if ok else "raised" for ok in valid))
    batch = make_batch(ra.ALGORITHMS["grpo"], prompts, rollouts, rewards, row_length=16)
    assert not batch.advantage[:6].any()
    assert batch.advantage[6] < 0 < batch.advantage[7]
    metrics = rollout_metrics(sums_run("unused"), prompts, rollouts, rewards, batch)
    assert (metrics["groups_without_signal"], metrics["invalid_rewards"]) == (3, 3)


def test_a_path_as_a_prompts_id_is_a_number_and_names_no_file(tmp_path):
    file = tmp_path / "in" / "prompts.jsonl"
    file.parent.mkdir()
    path = "../../outside"
    records = [{"prompt": p.text, "id": f"{path}-{k}"} | p.example for k, p in enumerate(sums.problems("train")[:4])]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    prompts = read_prompts(file, sums.encode, max_tokens=8, id_field="id")
    assert all(isinstance(prompt.id, int) for prompt in prompts)
    fit(sums_run(tmp_path / "a" / "b" / "run", steps=1), prompts=prompts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "in"]
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["run"]
    assert not [p for p in (tmp_path / "a").rglob("*") if "outside" in p.name]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of two steps on one device, and where four steps there end."""
    folder = tmp_path_factory.mktemp("begun")
    how = {"eval_every": 4, "checkpoint_every": 2, "prompts_per_step": 8, "row_length": 24, "num_rows": 8}
    how |= {"optimizer": ra.OptimizerConfig(learning_rate=1e-3)}
    fit(sums_run(folder / "run", steps=2, **how))
    end = fit(sums_run(folder / "whole", steps=4, **how)).state.params
    return folder / "run", how, end


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_a_run_goes_on_with_any_number_of_devices(begun, devices, tmp_path):
    run, how, end = begun
    mesh = ra.make_mesh(data=min(devices, 4), fsdp=max(devices // 4, 1), devices=jax.devices()[:devices])
    where = shutil.copytree(run, tmp_path / "run")
    params = ra.place_params(DECODER.init(0), mesh)
    result = fit(sums_run(where, steps=4, **how), params=params, mesh=mesh)
    assert [row["compiles"] > 0 for row in read_metrics(where / "metrics.jsonl")][2:4] == [
        True,
        False,
    ]  # it went on at 2
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(result.state.params)} == {devices}
    for a, b in zip(*map(jax.tree.leaves, (result.state.params, end)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
