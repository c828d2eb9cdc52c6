"""A run killed with -9 in every phase and at random moments ends in the bits of the uninterrupted run.

RLALIGN_KILLS=100 raises the number of random kills in a row (make kills N=100, which adds five runs killed once, and
kills between a save's rename and its sync, in an evaluation, in retention and before the report).
"""

import os
import random
import signal
import time

import pytest

from rlalign.io.checkpoint import Checkpoints
from tests.faults.killing import ends_with, finish, kill_somewhere, logged, start

SCRIPT = "tests/faults/small.py"
KILLS = int(os.environ.get("RLALIGN_KILLS", "2"))
SINGLE = int(os.environ.get("RLALIGN_SINGLE_KILLS", "0"))
SAME = ("loss", "reward", "kl", "entropy", "grad_norm", "tokens", "ratio_error", "eval_accuracy", "eval_reward")
STEPS = 12 + 3 * max(KILLS - 2, 0)  # so that those who are killed often have steps left to be killed in
# A checkpoint every three steps, an evaluation every four: where each process is killed, in this order, in one run.
DEATHS = ("rollout:1", "pack:2", "save:3", "update:4", "metrics:5", "restore:", "reward:7")
if SINGLE:
    DEATHS = (*DEATHS[:5], "commit:6", *DEATHS[5:], "evaluate:8", "retain:9", "report:")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    run = tmp_path_factory.mktemp("whole") / "run"
    return finish(start(SCRIPT, {"run": run, "steps": STEPS}, cache)), logged(run, SAME)


def assert_same(run, end, uninterrupted):
    """Every logged number and the final parameters; a line a step, none twice."""
    result, rows = uninterrupted
    assert end == result
    assert end["updates"] == STEPS
    assert logged(run, SAME) == rows
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert len({row["grad_norm"] for row in rows}) == STEPS + 1  # a comparison of numbers that move


def test_killed_in_every_phase_a_run_ends_in_the_same_bits(uninterrupted, tmp_path, cache):
    run, told = tmp_path / "run", tmp_path / "told"
    for count, death in enumerate(DEATHS, start=1):
        ends_with(start(SCRIPT, {"run": run, "steps": STEPS, "die": death, "told": told}, cache), -signal.SIGKILL)
        assert len(told.read_bytes()) == count, f"the fault at {death} did not fire"
    assert not (run / "report.html").exists()
    assert_same(run, finish(start(SCRIPT, {"run": run, "steps": STEPS}, cache)), uninterrupted)
    assert (run / "report.html").exists()


def test_asked_to_stop_a_run_saves_at_the_next_step_and_leaves(uninterrupted, tmp_path, cache):
    """SIGTERM in the middle of update 7, of which the next checkpoint would be 9."""
    run, told = tmp_path / "run", tmp_path / "told"
    flags = {"run": run, "steps": STEPS, "die": "update:7", "told": told, "signal": int(signal.SIGTERM)}
    process = start(SCRIPT, flags, cache)
    while process.poll() is None and not told.exists():
        time.sleep(0.01)
    asked = time.monotonic()
    ends_with(process, 0)
    assert time.monotonic() - asked < 30
    assert told.read_bytes() == b"."
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.latest() == 8
        assert checkpoints.problem(8) is None
    assert_same(run, finish(start(SCRIPT, {"run": run, "steps": STEPS}, cache)), uninterrupted)


def test_killed_many_times_in_a_row_it_ends_in_the_same_bits(uninterrupted, tmp_path, cache):
    """At random moments: of starting, restoring, a step, or a save."""
    run, draw, killed = tmp_path / "run", random.Random(KILLS), 0
    while killed < KILLS:
        process = start(SCRIPT, {"run": run, "steps": STEPS}, cache)
        killed += kill_somewhere(process, run, draw)
    assert_same(run, finish(start(SCRIPT, {"run": run, "steps": STEPS}, cache)), uninterrupted)


@pytest.mark.parametrize("number", range(SINGLE))
def test_killed_once_it_ends_in_the_same_bits(number, uninterrupted, tmp_path, cache):
    run, draw = tmp_path / "run", random.Random(1000 + number)
    while not kill_somewhere(start(SCRIPT, {"run": run, "steps": STEPS}, cache), run, draw):
        pass
    assert_same(run, finish(start(SCRIPT, {"run": run, "steps": STEPS}, cache)), uninterrupted)
