"""The optimizer's settings: schedules at several steps, the clip, the decay, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlalign.train import OptimizerConfig, make_optimizer, make_schedule
from rlalign.train.optimizer import with_master_weights

SCHEDULES = {
    "constant": ({"warmup_steps": 4}, lambda t: 1.0),
    "no warm-up": ({}, lambda t: 1.0),
    "linear": ({"warmup_steps": 4, "schedule": "linear", "total_steps": 14}, lambda t: max(0.0, 1 - (t - 4) / 10)),
    "cosine": (
        {"warmup_steps": 4, "schedule": "cosine", "total_steps": 14},
        lambda t: 0.5 * (1 + np.cos(np.pi * min(1.0, (t - 4) / 10))),
    ),
    "linear at once": ({"schedule": "linear", "total_steps": 10}, lambda t: max(0.0, 1 - t / 10)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    settings, after = SCHEDULES[name]
    schedule = make_schedule(OptimizerConfig(learning_rate=3e-4, **settings))
    warmup = settings.get("warmup_steps", 0)
    for t in (0, 1, 3, 4, 5, 9, 13, 14, 15, 100):
        expected = 3e-4 * (t / warmup if t < warmup else after(t))
        assert float(schedule(t)) == pytest.approx(expected, rel=1e-5, abs=1e-11), t


def update(config, gradients, params):
    """The updates of several gradients in a row."""
    optimizer = make_optimizer(config)
    state, out = optimizer.init(params), []
    for gradient in gradients:
        change, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, change)
        out.append({k: np.asarray(x) for k, x in change.items()})
    return out


GRADIENT = {"a": jnp.array([3.0, 0.0, 4.0]), "b": jnp.array([[12.0]])}  # of norm 13
PARAMS = {"a": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array([[2.0]])}


def test_gradients_are_clipped_to_their_global_norm():
    """eps = 1 shows the clipped gradient: the first update is -lr g / (|g| + 1)."""
    for limit, scale in ((1.3, 0.1), (20.0, 1.0), (None, 1.0)):
        (change,) = update(OptimizerConfig(learning_rate=0.1, max_grad_norm=limit, eps=1.0), [GRADIENT], PARAMS)
        for name, g in GRADIENT.items():
            g = scale * np.asarray(g)
            np.testing.assert_allclose(change[name], -0.1 * g / (np.abs(g) + 1), rtol=1e-5)


def test_two_steps_of_adamw():
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=2, max_grad_norm=None, weight_decay=0.3, b1=0.8, b2=0.6, eps=1e-3
    )
    second = {"a": jnp.array([-1.0, 2.0, 0.0]), "b": jnp.array([[5.0]])}
    first_change, change = update(config, [GRADIENT, second], PARAMS)
    for name in PARAMS:
        assert not first_change[name].any()  # the warm-up begins at 0
        g, h, x = (np.asarray(t[name], np.float64) for t in (GRADIENT, second, PARAMS))
        m, v = 0.8 * 0.2 * g + 0.2 * h, 0.6 * 0.4 * g**2 + 0.4 * h**2
        m, v = m / (1 - 0.8**2), v / (1 - 0.6**2)
        np.testing.assert_allclose(change[name], -0.05 * (m / (np.sqrt(v) + 1e-3) + 0.3 * x), rtol=1e-5)


def test_the_first_moment_may_be_narrow():
    """Half its bytes, and updates that differ by bfloat16's rounding alone; the second moment stays wide."""
    config = OptimizerConfig(learning_rate=0.1, max_grad_norm=None, mu_dtype="bfloat16")
    state = make_optimizer(config).init(PARAMS)
    assert {x.dtype.name for x in jax.tree.leaves(optax.tree_utils.tree_get(state, "mu"))} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(optax.tree_utils.tree_get(state, "nu"))} == {"float32"}
    gradients = [GRADIENT, jax.tree.map(lambda x: 0.3 * x, GRADIENT)]
    changes = [update(dataclasses.replace(config, mu_dtype=d), gradients, PARAMS)[1] for d in ("bfloat16", None)]
    for name in PARAMS:
        np.testing.assert_allclose(changes[0][name], changes[1][name], rtol=2**-7)
        assert not np.array_equal(changes[0][name], changes[1][name])


BAD = {
    "moment": ({"mu_dtype": "float16"}, "mu_dtype must be None, 'float32' or 'bfloat16', got 'float16'"),
    "rate": ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0.0"),
    "nan rate": ({"learning_rate": float("nan")}, "learning_rate must be > 0, got nan"),
    "warm-up": ({"warmup_steps": -1}, "need warmup_steps, weight_decay >= 0, got -1, 0.0"),
    "decay": ({"weight_decay": -0.1}, "need warmup_steps, weight_decay >= 0, got 0, -0.1"),
    "schedule": ({"schedule": "step"}, "schedule must be 'constant', 'linear' or 'cosine', got 'step'"),
    "no end": (
        {"schedule": "linear"},
        "schedule='linear' ends at total_steps=None, which must be above warmup_steps=0",
    ),
    "end": (
        {"schedule": "cosine", "warmup_steps": 5, "total_steps": 5},
        "schedule='cosine' ends at total_steps=5, which must be above warmup_steps=5",
    ),
    "norm": ({"max_grad_norm": 0.0}, "max_grad_norm must be > 0 or None, got 0.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_bad_settings(case):
    settings, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)


def test_steps_far_below_the_resolution_of_bfloat16_are_not_lost():
    """Against the same optimizer on float32 weights; bfloat16 alone would change nothing."""
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.normal(0, 0.02, (64, 8)), jnp.bfloat16)
    inner = make_optimizer(OptimizerConfig(learning_rate=1e-6, max_grad_norm=None))
    optimizer = with_master_weights(inner)
    narrow, wide = {"w": start}, {"w": start.astype(jnp.float32)}
    state, state_wide = optimizer.init(narrow), inner.init(wide)
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype(jnp.float32)}
    for _ in range(200):
        gradient = {"w": jnp.asarray(np.sign(rng.normal(0.5, 1, (64, 8))), jnp.float32)}
        updates, state = optimizer.update(gradient, state, narrow)
        narrow = optax.apply_updates(narrow, updates)
        updates, state_wide = inner.update(gradient, state_wide, wide)
        wide = optax.apply_updates(wide, updates)
    np.testing.assert_array_equal(np.asarray(state.master["w"]), np.asarray(wide["w"]))
    np.testing.assert_array_equal(narrow["w"], wide["w"].astype(jnp.bfloat16))
    assert narrow["w"].dtype == jnp.bfloat16
    assert np.mean(np.asarray(narrow["w"] != start)) > 0.3


def test_wide_parameters_get_no_copy():
    inner = make_optimizer(OptimizerConfig(learning_rate=1e-3))
    params = {"w": jnp.zeros(3)}
    assert jax.tree.structure(with_master_weights(inner).init(params)) == jax.tree.structure(inner.init(params))
