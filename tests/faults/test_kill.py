"""A run killed with -9 at a random moment and started again ends in the bits of the uninterrupted run.

RLALIGN_KILLS=20 raises the number of kills (make kills N=20).
"""

import os
import random
import time

import pytest

from tests.faults.killing import finish, kill, lines, logged, start, wait_until

KILLS = int(os.environ.get("RLALIGN_KILLS", "1"))
STEPS = 24
SAME = ("loss", "reward", "entropy", "grad_norm", "tokens", "eval_accuracy")
SMALL = {"steps": STEPS, "warmup-steps": 8, "prompts-per-step": 8, "learning-rate": 0.003, "save-every": 5}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    run = tmp_path_factory.mktemp("whole") / "run"
    return finish(start("experiments/quickstart.py", {"run": run, **SMALL}, cache)), logged(run, SAME)


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_run_ends_in_the_same_bits(number, uninterrupted, tmp_path, cache):
    result, rows = uninterrupted
    draw = random.Random(number)
    run = tmp_path / "run"
    process = start("experiments/quickstart.py", {"run": run, **SMALL}, cache)
    step = draw.randrange(STEPS - 2)
    wait_until(lambda: lines(run / "metrics.jsonl") > step, process)
    time.sleep(draw.random() * 0.1)  # somewhere in rollout, reward, pack, update, save or the metrics' write
    kill(process)
    again = finish(start("experiments/quickstart.py", {"run": run, **SMALL}, cache))
    assert again["params_sha256"] == result["params_sha256"]
    assert logged(run, SAME) == rows
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
