"""GSIL killed with -9 in generation, in training and between iterations ends in the bits of the uninterrupted run."""

import pytest

from tests.faults.killing import finish, kill, lines, logged, start, wait_until

SAME = ("loss", "grad_norm", "pair_accuracy", "copied_share", "eval_accuracy")
SMALL = {
    "demonstrations": 128,
    "sft-steps": 4,
    "examples-per-step": 16,
    "epochs": 1,  # 8 steps an iteration
    "iterations": 3,
    "prepare-size": 8,  # 16 files an iteration
    "save-every": 3,
    "learning-rate": 0.003,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("whole")
    result = finish(start("gsil_self_imitation", {"folder": folder, **SMALL}, cache))
    return result, logged(folder / "seed0" / "gsil_bernoulli", SAME)


def prepared(run, iteration):
    """How many files of an iteration there are."""
    return len(list(run.glob(f"iterations/{iteration}/*.npz")))


# when to kill, and what must then be true of the folder
MOMENTS = {
    "generation": (lambda run: prepared(run, 1) >= 3, lambda run: 3 <= prepared(run, 1) < 16),
    "training": (lambda run: lines(run / "metrics.jsonl") >= 12, lambda run: 8 < lines(run / "metrics.jsonl") < 16),
    "between": (lambda run: (run / "checkpoints" / "16").exists(), lambda run: prepared(run, 2) < 16),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_ends_in_the_same_bits(moment, uninterrupted, tmp_path, cache):
    result, rows = uninterrupted
    when, true_then = MOMENTS[moment]
    run = tmp_path / "seed0" / "gsil_bernoulli"
    process = start("gsil_self_imitation", {"folder": tmp_path, **SMALL}, cache)
    wait_until(lambda: when(run), process)
    kill(process)
    assert true_then(run), "the kill came at another moment"
    again = finish(start("gsil_self_imitation", {"folder": tmp_path, **SMALL}, cache))
    assert again["params_sha256"] == result["params_sha256"]
    assert logged(run, SAME) == rows
    assert [row["step"] for row in rows] == list(range(25))
