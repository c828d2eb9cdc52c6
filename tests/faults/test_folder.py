"""What lies in a run's folder, or does not: checkpoints gone, another run there, and a stop while the last is saved."""

import json
import os
import shutil
import signal
import time

import pytest

import rlalign as ra
from rlalign import hosts
from rlalign.envs import sums
from rlalign.io.checkpoint import Checkpoints
from rlalign.io.files import fingerprint
from rlalign.io.metrics import read_metrics
from rlalign.io.session import alone_in
from rlalign.io.updates import RunAborted
from tests.faults.injection import fail_at, refuse
from tests.faults.small import train
from tests.faults.test_runs import DECODER, poisoned, saved_state

HOW = {"eval_every": 2, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of four steps, and where they end."""
    folder = tmp_path_factory.mktemp("done") / "run"
    return folder, fingerprint(train(str(folder), steps=4, **HOW).state)


@pytest.fixture
def run(done, tmp_path):
    return shutil.copytree(done[0], tmp_path / "run")


def steps(run):
    return [row["step"] for row in read_metrics(run / "metrics.jsonl")]


# What is gone


@pytest.mark.parametrize("left", ["nothing", "steps of another name"])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(left, run):
    if left == "nothing":
        shutil.rmtree(run / "checkpoints")
    else:
        for step in (0, 2, 4):
            (run / "checkpoints" / str(step)).rename(run / "checkpoints" / f"{step}.bak")
    files = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")}
    with pytest.raises(ValueError, match=r"metrics up to step 4 and no checkpoint.*: put checkpoints/ back, use"):
        train(str(run), steps=6, **HOW)
    assert files == {name: (run / name).read_bytes() for name in files}


def test_a_run_that_was_killed_before_its_first_checkpoint_was_written_begins_anew(done, run, caplog):
    """A save goes on behind the steps, so a few lines may be there before it is."""
    shutil.rmtree(run / "checkpoints")
    first = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:2]
    (run / "metrics.jsonl").write_bytes(b"".join(first))
    assert fingerprint(train(str(run), steps=4, **HOW).state) == done[1]
    assert "killed before its first checkpoint was written, the run begins anew" in caplog.text
    assert steps(run) == [0, 1, 2, 3, 4]


def test_a_run_of_fewer_steps_than_were_done_is_refused(run):
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="has done 4 steps, this one asks for 3: ask for as many"):
        train(str(run), steps=3, **HOW)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_goes_on_where_lines_samples_and_the_best_steps_mark_are_damaged(run, caplog):
    """Metrics are its record, and what they lack is told; samples are for show; the mark follows from the metrics."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([lines[0], *lines[2:3]]))
    shown = (run / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (run / "samples.jsonl").write_bytes(b"".join([shown[0], b"\xff\x00{\n", b'{"step": null}\n', *shown[1:]]))
    (run / "checkpoints" / "best.json").unlink()
    train(str(run), steps=5, **HOW)
    rows = read_metrics(run / "metrics.jsonl")
    curve = {row["step"]: row["eval_accuracy"] for row in rows if "eval_accuracy" in row}
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.best() == max(curve, key=lambda step: (curve[step], -step))
    assert "lacks 2 of 4 steps, the first is 1" in caplog.text
    assert steps(run) == [0, 2, 4, 5]
    assert all("step" in json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines())


# Who else is there


def test_two_runs_in_one_folder_are_refused(run):
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    with alone_in(run), pytest.raises(ValueError, match=f"another run is in .*: wait for process {os.getpid()} of "):
        train(str(run), steps=6, **HOW)
    del before[run / ".running"]
    assert all(path.read_bytes() == content for path, content in before.items())
    with alone_in(run):  # it is free again
        pass


# When it is asked to stop


@pytest.fixture
def asked_from_outside():
    """The signals that the run did not take."""
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, before)


def ask(_):
    """Asks this process to stop, and gives its main thread time to hear it."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)


def test_asked_to_stop_while_the_last_step_is_saved_a_run_saves_it_and_leaves(done, tmp_path, asked_from_outside):
    with fail_at("save", 4, ask) as fault, pytest.raises(SystemExit) as stopped:
        train(str(tmp_path / "run"), steps=4, **HOW)
    assert (fault.fired, asked_from_outside, stopped.value.code) == (1, [], 0)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.problem(4) is None
        assert fingerprint(saved_state(tmp_path / "run", 4)) == done[1]


def test_asked_to_stop_a_run_whose_save_fails_does_not_leave_as_if_all_were_well(tmp_path, asked_from_outside):
    with (
        fail_at("update", 2, ask) as stop,
        fail_at("save", 3, refuse) as fault,
        pytest.raises(OSError, match="Read-only file system"),
    ):
        train(str(tmp_path / "run"), steps=6, **HOW)
    assert (stop.fired, fault.fired, asked_from_outside) == (1, 1, [])


def offline(folder):
    """GSIL from twelve demonstrations: an iteration of three steps."""
    settings = ra.OfflineConfig(
        folder=str(folder),
        algorithm="gsil_bernoulli",
        examples_per_step=4,
        row_length=32,
        num_rows=4,
        generation=ra.SampleConfig(1, sums.ANSWER_TOKENS, eos_ids=(sums.EOS,)),
        optimizer=ra.OptimizerConfig(learning_rate=1e-2),
        checkpoint_every=3,
    )
    examples = sums.demonstrations("train")[:12]
    return ra.fit_offline(settings, decoder=DECODER, params=DECODER.init(0), examples=examples)


def test_a_run_of_iterations_is_asked_to_stop_and_goes_on_bitwise(tmp_path, asked_from_outside, monkeypatch):
    """It saves at the next step. Its processes compare settings and step: that they differ is shown in tests/hosts."""
    compared = {}
    monkeypatch.setattr(hosts, "check_same_everywhere", compared.update)
    whole = offline(tmp_path / "whole")
    assert {"seed", "step", "algorithm", "examples_sha256", "decoder", "mesh"} <= set(compared)
    with fail_at("update", None, ask) as fault, pytest.raises(SystemExit) as stopped:
        offline(tmp_path / "run")
    assert (fault.fired, asked_from_outside, stopped.value.code) == (1, [], 0)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.latest() == 1
        assert checkpoints.problem(1) is None
    assert fingerprint(offline(tmp_path / "run").state) == fingerprint(whole.state)


# What it takes along


def test_bad_gradients_in_a_row_are_counted_on_over_a_restart(run):
    """Four before, and one more."""
    state = saved_state(run, 4)
    with Checkpoints(run / "checkpoints") as checkpoints:
        meta = checkpoints.meta(4)
        assert meta["bad_steps"] == 0
        shutil.rmtree(run / "checkpoints" / "4")
        checkpoints.save(4, state, meta | {"bad_steps": 4})
    with fail_at("batch", 4, poisoned) as fault, pytest.raises(RunAborted, match="3"):
        train(str(run), steps=6, **HOW)
    assert fault.fired == 1
