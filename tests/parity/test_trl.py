"""The losses of the installed TRL and ours, on the same random batches: equal within 1e-5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign.advantages import group_relative
from tests.conftest import enable_x64
from tests.parity import table, trl_side
from tests.parity.cases import CASES, ROWS, base, by_token, rollouts

TOLERANCE = 1e-5


@pytest.mark.parametrize("name", CASES)
def test_advantage_loss_and_gradient_are_equal(name):
    found = table.measure(name)
    assert max(found.values()) <= TOLERANCE, found


def test_the_committed_table_is_of_these_versions_and_cases(request):
    if request.config.getoption("--write"):
        table.write()
    assert table.settled(table.committed()) == table.settled(table.section(measured=False)), "make parity ARGS=--write"


def ours(algorithm, batch, rows=slice(None)):
    """(loss, gradient) of the rows that a step sees; a row that it does not see has an empty mask."""
    seen = np.zeros(ROWS, bool)
    seen[rows] = True
    slope = jax.jit(jax.value_and_grad(functools.partial(table.objective, table.Case({}, algorithm)), has_aux=True))
    with enable_x64():
        arrays = {k: jnp.asarray(v) for k, v in (batch | {"mask": batch["mask"] & seen[:, None]}).items()}
        (loss, _), gradient = slope(arrays.pop("logp"), arrays)
    return float(loss), np.asarray(gradient)


def batch_at(distance):
    return rollouts(np.random.default_rng(0), distance)


def test_equal_rewards_leave_rounding_errors_in_trl_and_exactly_nothing_here():
    batch = batch_at(0.1) | {"reward": np.full((ROWS, 1), 0.7), "group": np.zeros(ROWS, int)}
    with trl_side.quiet():
        found = trl_side.after_generation(trl_side.grpo_trainer({}, batch), batch)["advantages"].numpy()
    assert found.dtype == np.float32
    assert 1e-5 < np.abs(found).max() < 1e-2
    assert not np.any(group_relative(jnp.asarray(batch["reward"][:, 0]), jnp.asarray(batch["group"]), num_groups=1))


def test_bnpo_is_a_mean_of_micro_batches_in_trl_and_of_the_whole_batch_here():
    batch = batch_at(0.1)
    _, loss, gradient = trl_side.grpo({"loss_type": "bnpo", "gradient_accumulation_steps": 3}, batch)
    parts = [ours(by_token, batch, rows) for rows in np.split(np.arange(ROWS), 3)]
    assert table.apart(sum(part[0] for part in parts) / 3, loss) < 1e-12
    assert table.apart(sum(part[1] for part in parts) / 3, gradient) < 1e-12
    assert table.apart(ours(by_token, batch)[1], gradient) > 1e-2


def test_cispo_without_epsilon_high_caps_the_ratio_at_a_fifth_in_trl():
    """Its `epsilon` of 0.2 is then the cap of the ratio itself, so every weight is 0.2."""
    batch = batch_at(1e-9)
    _, _, gradient = trl_side.grpo({"loss_type": "cispo"}, batch)
    assert table.apart(0.2 * ours(CASES["cispo"].ours, batch)[1], gradient) < 1e-6


def test_the_kl_of_trl_is_not_limited_and_ours_is():
    batch = batch_at(1e-9)
    batch["ref_logp"][0, 0] = batch["logp"][0, 0] + 25.0
    batch["mask"][0, 0] = batch["own"][0, 0] = True
    settings = {"loss_type": "grpo", "beta": 1.0, "use_bias_correction_kl": False}
    _, loss, _ = trl_side.grpo(settings, batch)
    limited, gradient = ours(CASES["grpo, KL"].ours, batch)
    assert loss > np.exp(25) / 7 / ROWS
    assert limited < 0.04 * np.exp(20)
    assert gradient[0, 0] == ours(base, batch)[1][0, 0]  # and past the limit it does not pull
