"""A run killed with -9 at a random moment and started again ends in the bits of the uninterrupted run.

RLALIGN_KILLS=20 raises the number of kills (make kills N=20).
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
KILLS = int(os.environ.get("RLALIGN_KILLS", "1"))
STEPS = 24
SAME = ("loss", "reward", "entropy", "grad_norm", "tokens", "eval_accuracy")


def start(run: pathlib.Path, cache: pathlib.Path) -> subprocess.Popen:
    flags = {"steps": STEPS, "warmup-steps": 8, "prompts-per-step": 8, "learning-rate": 0.003, "save-every": 5}
    command = [sys.executable, str(ROOT / "experiments" / "quickstart.py"), "--run", str(run)]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    # What one process compiled the next one loads: starting is most of the time here.
    cached = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    environment = {**os.environ, **cached, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def logged(run: pathlib.Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: row.get(key) for key in ("step", *SAME)} for row in rows]


def wait_for_step(run: pathlib.Path, step: int, process: subprocess.Popen) -> None:
    path = run / "metrics.jsonl"
    while not (path.exists() and path.read_bytes().count(b"\n") > step):
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.002)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    run = tmp_path_factory.mktemp("whole") / "run"
    return finish(start(run, cache)), logged(run)


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_run_ends_in_the_same_bits(number, uninterrupted, tmp_path, cache):
    result, rows = uninterrupted
    draw = random.Random(number)
    run = tmp_path / "run"
    process = start(run, cache)
    wait_for_step(run, draw.randrange(STEPS - 2), process)
    time.sleep(draw.random() * 0.1)  # somewhere in rollout, reward, pack, update, save or the metrics' write
    process.kill()
    process.communicate()
    assert process.returncode == -9, "the run ended before it was killed"
    again = finish(start(run, cache))
    assert again["params_sha256"] == result["params_sha256"]
    assert logged(run) == rows
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
