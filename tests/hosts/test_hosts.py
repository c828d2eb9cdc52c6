"""One run on one device, on several and on two processes: the same numbers, and an end for all when one dies."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import rlalign as ra
from rlalign.hosts import join
from rlalign.io.checkpoint import Checkpoints
from rlalign.io.metrics import read_metrics
from rlalign.train import init_state
from tests.hosts import run as job

ROOT = pathlib.Path(__file__).parents[2]
MESHES = {2: {"data": 2}, 4: {"data": 2, "fsdp": 2}, 8: {"data": 2, "fsdp": 2, "tensor": 2}}
STEPS = 5
LOGGED = ("loss", "kl", "reward", "entropy", "grad_norm", "eval_reward", "invalid_rewards")


def start(folder, *flags, devices=2, processes=2, **environment) -> list[subprocess.Popen]:
    """The processes of one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    kept = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    shared = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "XLA_FLAGS": " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"]),
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what one process compiled for its devices is not another's
        "RLALIGN_COORDINATOR": f"localhost:{port}",
        "RLALIGN_PROCESSES": str(processes),
    }
    command = [sys.executable, str(pathlib.Path(job.__file__)), str(folder), *map(str, flags)]
    logs = [pathlib.Path(f"{folder}.{number}.log") for number in range(processes)]
    out = []
    for number, log in enumerate(logs):
        own = os.environ | shared | environment | {"RLALIGN_PROCESS": str(number)}
        with log.open("w") as file:
            out.append(subprocess.Popen(command, env=own, stdout=file, stderr=subprocess.STDOUT))
        out[-1].log = log
    return out


def finish(processes, *, seconds=240) -> list[int]:
    """Exit codes; whoever is still there after `seconds` is killed."""
    end = time.monotonic() + seconds
    try:
        return [process.wait(max(end - time.monotonic(), 0.1)) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Parameters and metrics of the run on one device."""
    folder = tmp_path_factory.mktemp("one") / "run"
    leaves = job.train(folder, None, steps=STEPS)
    return leaves, read_metrics(folder / "metrics.jsonl")


def assert_same(leaves, folder, one):
    expected, rows = one
    before = ra.Decoder(job.MODEL).init(0)
    moved = [np.abs(a - b).max() for a, b in zip(expected.values(), jax.tree.leaves(before), strict=True)]
    assert min(moved) > 1e-4  # not a comparison of what never changed
    for name, value in expected.items():
        np.testing.assert_allclose(leaves[name], value, rtol=0, atol=1e-6, err_msg=name)
    assert sum(row.get("invalid_rewards", 0) for row in rows) > 0
    for got, want in zip(read_metrics(folder / "metrics.jsonl"), rows, strict=True):
        for name in LOGGED:
            if name in want:
                assert got[name] == pytest.approx(want[name], rel=1e-6, abs=1e-6), (got["step"], name)


def restored(folder, mesh):
    """The newest state of a run, put on this mesh."""
    decoder = ra.Decoder(job.MODEL)
    like = init_state(decoder, ra.place_params(decoder.init(1), mesh), ra.make_optimizer(ra.OptimizerConfig()))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state, meta = checkpoints.restore(None, like)
    assert meta["step"] == STEPS
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {mesh.devices.size}
    return state


@pytest.mark.parametrize("devices", MESHES)
def test_several_devices_train_like_one(devices, one, tmp_path):
    """What they saved, two devices read, bit for bit."""
    leaves = job.train(tmp_path / "run", ra.make_mesh(**MESHES[devices]), steps=STEPS)
    assert_same(leaves, tmp_path / "run", one)
    state = restored(tmp_path / "run", ra.make_mesh(fsdp=2))
    for (path, leaf), value in zip(jax.tree.leaves_with_path(state.params), leaves.values(), strict=True):
        np.testing.assert_array_equal(leaf, value, err_msg=jax.tree_util.keystr(path))


def test_two_processes_train_like_one_device_and_go_on_as_one(one, tmp_path):
    """Process 0 alone writes; what both saved, one process reads on other devices."""
    folder, saved = tmp_path / "run", tmp_path / "leaves.npz"
    exported = tmp_path / "exported"
    flags = ("--steps", STEPS, "--data", 2, "--fsdp", 2, "--save", saved, "--export", exported)
    codes = finish(start(folder, *flags))
    assert codes == [0, 0], pathlib.Path(f"{folder}.1.log").read_text()[-3000:]
    assert_same(np.load(saved), folder, one)
    assert len(read_metrics(folder / "samples.jsonl")) == 2 * 7
    decoder = ra.Decoder(job.MODEL)
    for a, b in zip(*map(jax.tree.leaves, (ra.load_pretrained(exported)[1], decoder.init(3))), strict=True):
        np.testing.assert_array_equal(a, b)
    state = restored(folder, ra.make_mesh(tensor=2))
    assert state.params["embedding"].sharding.spec == jax.sharding.PartitionSpec("tensor")
    for (path, leaf), value in zip(jax.tree.leaves_with_path(state.params), np.load(saved).values(), strict=True):
        np.testing.assert_array_equal(leaf, value, err_msg=jax.tree_util.keystr(path))


def test_when_one_process_is_killed_the_other_ends_and_says_why_and_the_run_goes_on_bitwise(tmp_path):
    processes = start(tmp_path / "run", "--steps", 10_000, "--data", 2, "--patience", 10, devices=1)
    metrics = tmp_path / "run" / "metrics.jsonl"
    waited = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 2):
        assert all(process.poll() is None for process in processes), processes[1].log.read_text()[-3000:]
        assert time.monotonic() < waited
        time.sleep(0.1)
    killed = time.monotonic()
    processes[1].send_signal(signal.SIGKILL)
    codes = finish(processes, seconds=60)
    assert time.monotonic() - killed < 60
    assert codes[0] not in (0, -signal.SIGKILL)
    said = processes[0].log.read_text()
    assert "another process of this run" in said, said[-3000:]

    steps = read_metrics(metrics)[-1]["step"] + 3
    ends = {}
    for name in ("run", "whole"):  # the run that was broken off goes on; one that never was
        folder, saved = tmp_path / name, tmp_path / f"{name}.npz"
        again = start(folder, "--steps", steps, "--data", 2, "--save", saved, devices=1)
        assert finish(again) == [0, 0], again[0].log.read_text()[-3000:]
        rows = [{k: row.get(k) for k in ("step", *LOGGED)} for row in read_metrics(folder / "metrics.jsonl")]
        ends[name] = dict(np.load(saved)), rows
    assert ends["run"][1] == ends["whole"][1]
    for name, leaf in ends["whole"][0].items():
        np.testing.assert_array_equal(ends["run"][0][name], leaf, err_msg=name)


DIFFERENT = {
    "settings": ("seed: 0 there, 1 here", "reward_limit: 20.0 there, 21.0 here"),
    "step": ("step: 0 there, 1 here",),
}


@pytest.mark.parametrize("own", DIFFERENT)
def test_processes_that_were_started_differently_are_refused(own, tmp_path):
    processes = start(tmp_path / "run", "--steps", 2, "--data", 2, "--own", own, devices=1)
    assert all(code not in (0, -9) for code in finish(processes))
    for process in processes:
        said = process.log.read_text()
        assert "process 1 differs from process 0 in" in said
        assert all(text in said for text in DIFFERENT[own]), said[-3000:]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"coordinator": "localhost:1"}, "lacks processes, process: give all three"),
        ({"coordinator": "localhost:1", "processes": 2, "process": 2}, "process=2 of processes=2: .* from 0 to 1"),
    ],
    ids=["incomplete", "outside"],
)
def test_joining_wrongly_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        join(**how)
