"""Advantages of answers given to episodes, and HGPO's hierarchy of groups, against loops written from the formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign import advantages
from tests import oracles

ROWS, GROUPS, CASES, LEVELS = 24, 3, 60, 3
FLOATS = ("reward", "penalty")
OF_ANSWERS = {  # ours, the oracle's, whether deviations divide
    "grpo": (advantages.group_relative, oracles.group_relative),
    "rloo": (advantages.leave_one_out, oracles.leave_one_out),
    "gprs": (advantages.group_preference, oracles.group_preference),
}


@functools.cache
def cases():
    rng = np.random.default_rng(7)
    made = [oracles.random_steps(rng, ROWS, GROUPS) for _ in range(CASES)]
    for case in made:  # coarse first, finer with every level, as states with more of their past are
        past = [case["anchor"]]
        for _ in range(LEVELS - 1):
            past.append(past[-1] * 2 + rng.integers(0, 2, ROWS))
        case["past"] = np.stack([np.unique(p, return_inverse=True)[1] for p in past], axis=1)
    return oracles.stack(made)


def every(of, case, answers):
    """Each advantage with and without penalties, of the library or of the oracles."""
    how = {"num_groups": GROUPS} | {k: case[k] for k in ("trajectory", "step", "valid")}
    out = {}
    for name, function in answers.items():
        call = functools.partial(of.per_trajectory, function)
        out[name] = call(case["reward"], case["group"], **how)
        out[f"{name}, penalties"] = call(case["reward"], case["group"], penalty=case["penalty"], **how)
    for name, more in (("hgpo", {"penalty": case["penalty"]}), ("hgpo, level", {"alpha": 0.0, "gamma": 0.5})):
        out[name] = of.hierarchy_of_groups(case["reward"], case["group"], past=case["past"], **how, **more)
    return out


class Ours:
    """The library, with per_trajectory called as the oracle is."""

    hierarchy_of_groups = staticmethod(advantages.hierarchy_of_groups)

    @staticmethod
    def per_trajectory(function, reward, group, **how):
        return advantages.per_trajectory(function)(reward, group, **how)


@functools.cache
def program():
    return jax.jit(jax.vmap(lambda case: every(Ours, case, {k: v[0] for k, v in OF_ANSWERS.items()})))


def run(case, dtype=jnp.float64):
    arrays = {k: jnp.asarray(v, dtype if k in FLOATS else None) for k, v in case.items() if np.ndim(v)}
    return {k: np.asarray(v) for k, v in program()(arrays).items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 2e-4)])
def test_values_equal_the_oracle(x64, dtype, tolerance):
    got, case = run(cases(), dtype), cases()
    for c in range(CASES):
        one = {k: v[c] for k, v in case.items() if np.ndim(v)}
        for name, want in every(oracles, one, {k: v[1] for k, v in OF_ANSWERS.items()}).items():
            assert got[name].dtype == dtype
            np.testing.assert_allclose(got[name][c], want, tolerance, tolerance, err_msg=f"{name}, case {c}")


def test_shuffled_rows_give_shuffled_results_bitwise(x64):
    order = np.random.default_rng(1).permutation(ROWS)
    plain = run(cases())
    shuffled = run({k: v[:, order] if np.ndim(v) else v for k, v in cases().items()})
    for name in ("grpo", "rloo", "gprs"):
        np.testing.assert_allclose(shuffled[name], plain[name][:, order], 1e-12, 1e-12, err_msg=name)
    np.testing.assert_allclose(shuffled["hgpo"], plain["hgpo"][:, order], 1e-9, 1e-9)


def test_grpo_of_episodes_is_the_episode_part_of_gigpo(x64):
    case = {k: v[3] for k, v in cases().items() if np.ndim(v)}
    ids = {k: case[k] for k in ("trajectory", "step", "valid")} | {"num_groups": GROUPS}
    whole = advantages.per_trajectory(advantages.group_relative)(case["reward"], case["group"], **ids)
    _, parts = advantages.group_in_group(case["reward"], group=case["group"], anchor=case["anchor"], **ids)
    assert np.abs(whole).max() > 0
    np.testing.assert_allclose(whole, parts["episode"], 1e-12, 1e-12)


def test_invalid_rows_change_nothing_and_nan_stays_in_its_group(x64):
    case = {k: v[:1].copy() for k, v in cases().items() if np.ndim(v)}
    case["valid"][:] = True
    case["valid"][0, 5] = False
    plain = run(case)
    case["reward"][0, 5] = np.nan
    case["penalty"][0, 5] = np.nan
    for name, value in run(case).items():
        np.testing.assert_array_equal(value, plain[name], err_msg=name)
        assert value[0, 5] == 0
    row = int(np.flatnonzero(case["group"][0] == case["group"][0, 0])[0])
    case["valid"][:] = True
    case["penalty"][0, 5], case["reward"][0, 5] = 0.0, 0.0
    case["reward"][0, row] = np.nan
    for name, value in run(case).items():
        same = case["group"][0] == case["group"][0, row]
        assert np.isnan(value[0][same]).all(), name
        assert np.isfinite(value[0][~same]).all(), name


def test_two_subgroups_by_hand(x64):
    """Four steps from one state, the past splits them 2 and 2: weights 1 and 2 of a level's z-scores."""
    reward = jnp.array([4.0, 0.0, 2.0, 2.0])
    ids = {"trajectory": jnp.arange(4), "step": jnp.zeros(4, int), "num_groups": 1}
    past = jnp.array([[0, 0], [0, 0], [0, 1], [0, 1]])
    out = advantages.hierarchy_of_groups(reward, jnp.zeros(4, int), past=past, **ids)
    coarse = 2 / np.sqrt(2)  # 4 among 4, 0, 2, 2: mean 2, population deviation sqrt 2; the finer level gives 1
    np.testing.assert_allclose(out, [(coarse + 2) / 3, -(coarse + 2) / 3, 0, 0], 1e-5)


def test_pasts_equal_the_oracle():
    rng = np.random.default_rng(0)
    for length in (0, 1, 2, 4):
        for _ in range(20):
            trajectory = rng.integers(0, 4, 12)
            step, anchors = rng.permutation(12), rng.choice(["a", "b", "c"], 12).tolist()
            got = advantages.past_ids(anchors, trajectory, step, length=length)
            np.testing.assert_array_equal(got, oracles.past_ids(anchors, trajectory, step, length=length))
            assert got.dtype == np.int32


Z, ID = np.zeros(4), np.zeros(4, int)
GOOD = {"trajectory": ID, "step": ID, "past": ID[:, None], "num_groups": 1}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"past": ID}, r"past is int32\[4\], expected i\[N, L\]"),
        ({"past": ID[:3, None]}, r"past is int32\[3, 1\], expected i\[N, L\] with N=4"),
        ({"alpha": -1.0}, r"alpha must be >= 0, got -1.0$"),
        ({"gamma": 2.0}, r"gamma must be in \[0, 1\], got 2.0$"),
        ({"step": Z}, r"step is float32\[4\], expected i\[N\] with N=4$"),
    ],
)
def test_bad_input_is_refused_by_name(change, text):
    with pytest.raises(ValueError, match=text):
        advantages.hierarchy_of_groups(Z, ID, **(GOOD | change))


def test_bad_input_of_the_helpers():
    by_token = advantages.per_trajectory(lambda reward, group, **_: jnp.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"the advantage gave \(4, 2\) for \(4,\) scores"):
        by_token(Z, ID, num_groups=1, trajectory=ID, step=ID)
    with pytest.raises(ValueError, match=r"length must be >= 0, got -1$"):
        advantages.past_ids(["a"], [0], [0], length=-1)
