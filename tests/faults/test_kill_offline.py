"""GSIL killed with -9 in generation, in training and between iterations ends in the bits of the uninterrupted run."""

import pytest

from tests.faults.killing import finish, kill, lines, logged, start, wait_until

SCRIPT = "tests/faults/offline.py"  # three iterations of six steps; twelve files an iteration
SAME = ("loss", "grad_norm", "pair_accuracy", "copied_share")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    run = tmp_path_factory.mktemp("whole")
    return finish(start(SCRIPT, {"run": run}, cache)), logged(run, SAME)


def prepared(run, iteration):
    """How many files of an iteration there are."""
    return len(list(run.glob(f"iterations/{iteration}/*.npz")))


def steps(run):
    return lines(run / "metrics.jsonl")


# when to kill, and what must then be true of the folder
MOMENTS = {
    "generation": (lambda run: prepared(run, 1) >= 3, lambda run: 3 <= prepared(run, 1) < 12),
    "training": (lambda run: steps(run) >= 9, lambda run: 9 <= steps(run) < 12),
    "between": (lambda run: (run / "iterations" / "2").exists(), lambda run: prepared(run, 2) < 12 and steps(run) < 13),
}


def test_killed_in_every_phase_it_ends_in_the_same_bits(uninterrupted, tmp_path, cache):
    """One run, killed at each moment in turn."""
    result, rows = uninterrupted
    for moment, (when, true_then) in MOMENTS.items():
        process = start(SCRIPT, {"run": tmp_path}, cache)
        wait_until(lambda when=when: when(tmp_path), process)
        kill(process)
        assert true_then(tmp_path), f"the kill came at another moment than {moment}"
    assert finish(start(SCRIPT, {"run": tmp_path}, cache)) == result
    assert logged(tmp_path, SAME) == rows
    assert [row["step"] for row in rows] == list(range(19))
