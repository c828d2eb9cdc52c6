"""REINFORCE++ and DAPO's length penalty, and ReMax, objectives of several terms and DAPO's filter of groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign import advantages
from tests import oracles

SAMPLES, LENGTH, GROUPS, CASES = 12, 5, 4, 200  # samples, response tokens and group ids of a case
FLOATS = ("reward", "token_reward", "baseline", "terms")
WHITENED = {
    "reinforce_pp": {},
    "reinforce_pp, gamma": {"gamma": 0.75, "eps": 1e-4},
    "reinforce_pp, group": {"baseline": "group"},
}


@functools.cache
def cases():
    """Of one shape, so that one program a dtype serves most tests: compiling is what costs."""
    rng, made = np.random.default_rng(12), []
    for _ in range(CASES):
        case = oracles.random_groups(rng, SAMPLES, GROUPS)
        case["mask"] = oracles.random_tokens(rng, SAMPLES, LENGTH)["mask"]
        case["token_reward"] = rng.integers(-4, 5, (SAMPLES, LENGTH)) / 16
        case["baseline"] = rng.integers(-4, 5, GROUPS) / 4
        case["terms"] = rng.integers(-2, 3, (SAMPLES, 3)) / 2
        made.append(case)
    return oracles.stack(made)


def every(module, case, whitened=WHITENED):
    how = {"num_groups": GROUPS, "valid": case["valid"]}
    args = case["reward"], case["group"]
    out = {
        name: module.reinforce_pp(*args, mask=case["mask"], token_reward=reward, **how, **options)
        for name, options in whitened.items()
        for reward in ([None, case["token_reward"]] if options else [None])[-1:]
    }
    return out | {
        "remax": module.remax(*args, baseline=case["baseline"], **how),
        "per_objective": module.per_objective(*args, terms=case["terms"], term_weight=(10.0, 1.0, 0.5), **how),
        "per_objective, none": module.per_objective(
            *args, terms=case["terms"], term_weight=(10.0, 1.0, 0.5), scale="none", **how
        ),
        "term_spread": module.term_spread(case["terms"], case["group"], **how),
        "informative_groups": module.informative_groups(*args, **how),
    }


program = jax.jit(jax.vmap(functools.partial(every, advantages)))


def run(case, dtype=jnp.float64):
    arrays = {k: jnp.asarray(v, dtype if k in FLOATS else None) for k, v in case.items()}
    return {k: np.asarray(v) for k, v in program(arrays).items()}


def one_of(case, c):
    return {k: v[c] for k, v in case.items()}


@functools.cache
def wanted():
    return [every(oracles, one_of(cases(), c)) for c in range(CASES)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_values_equal_the_oracle(x64, dtype, tolerance):
    for name, got in run(cases(), dtype).items():
        want = np.stack([w[name] for w in wanted()])
        assert got.dtype == (bool if name == "informative_groups" else dtype)
        np.testing.assert_allclose(got, want, tolerance, tolerance, err_msg=name)


def test_gradients_equal_finite_differences(x64):
    rng = np.random.default_rng(1)
    case = one_of(cases(), 4) | {"reward": rng.normal(size=SAMPLES)}
    slope = {k: rng.normal(size=v.shape) for k, v in every(oracles, case).items() if v.dtype != bool}

    def total(module, reward):  # a random combination: one gradient judges all
        out = every(module, case | {"reward": reward})
        return sum((slope[name] * out[name]).sum() for name in slope)

    want = oracles.numerical_gradient(functools.partial(total, oracles), case["reward"])
    assert np.abs(want).max() > 0.05
    got = jax.jit(jax.grad(functools.partial(total, advantages)))(case["reward"])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_permuted_rows_give_permuted_results(x64):
    order = np.random.default_rng(0).permutation(SAMPLES)
    moved = run({k: v if k == "baseline" else v[:, order] for k, v in cases().items()})
    for name, want in run(cases()).items():
        back = want if name in ("informative_groups", "term_spread") else want[:, order]
        np.testing.assert_allclose(moved[name], back, rtol=1e-12, atol=1e-12, err_msg=name)


def test_junk_in_invalid_rows_changes_nothing_and_jit_changes_nothing():
    """Without jit: the compiler turns a product with a mask into a selection, which hides 0 * NaN."""
    count = cases()["valid"].sum(axis=1)
    c = int(np.flatnonzero((count > 2) & (count < SAMPLES))[0])
    mixed = one_of(cases(), c)

    def at(junk):
        hidden = {
            "reward": np.where(mixed["valid"], mixed["reward"], junk),
            "terms": np.where(mixed["valid"][:, None], mixed["terms"], junk),
            "token_reward": np.where(mixed["valid"][:, None] & mixed["mask"], mixed["token_reward"], junk),
        }
        return {k: jnp.asarray(v, jnp.float32 if k in FLOATS else None) for k, v in (mixed | hidden).items()}

    one = {"reinforce_pp, group": WHITENED["reinforce_pp, group"]}
    with jax.disable_jit():
        clean, dirty = (every(advantages, at(x), one) for x in (0.0, np.nan))
    for name, got in clean.items():
        np.testing.assert_array_equal(dirty[name], got, err_msg=name)
        np.testing.assert_allclose(got, wanted()[c][name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_nan_in_a_valid_row_is_seen():
    reward = jnp.array([1.0, jnp.nan, 0.0, 1.0])
    group, mask = jnp.array([0, 0, 1, 1]), jnp.ones((4, 2), bool)
    hit = advantages.remax(reward, group, baseline=jnp.zeros(2), num_groups=2)
    assert np.isnan(hit).tolist() == [True, True, False, False]
    assert np.isnan(advantages.remax(jnp.ones(4), group, baseline=jnp.array([jnp.nan, 0.0]), num_groups=2)[:2]).all()
    assert advantages.informative_groups(reward, group, num_groups=2).tolist() == [False, True]
    for baseline in ("none", "group"):
        call = jax.jit(functools.partial(advantages.reinforce_pp, num_groups=2, baseline=baseline))
        assert np.isnan(call(reward, group, mask=mask)).all()
        without = call(reward, group, mask=mask.at[1].set(False))
        assert np.isnan(without).tolist() == [[True] * 2, [False] * 2, [True] * 2, [True] * 2]


@pytest.mark.parametrize("baseline", ["none", "group"])
def test_equal_rewards_whiten_to_exactly_zero(baseline):
    """Of a group each with the group's mean taken off: 0.1 * 3 / 3 is not 0.1."""
    group = jnp.repeat(jnp.arange(7), 3)
    reward = jnp.full(21, 0.1) if baseline == "none" else 0.1 * (1 + group.astype(jnp.float32))
    call = functools.partial(advantages.reinforce_pp, mask=jnp.ones((21, 3), bool), num_groups=7, baseline=baseline)
    slope = np.sin(np.arange(63)).reshape(21, 3)
    total = lambda r: (jnp.sum(slope * call(r, group)), call(r, group))
    (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(reward)
    assert not np.any(out)
    assert not np.any(gradient)


def test_the_length_penalty_at_its_corners():
    length = np.array([0, 50, 51, 75, 99, 100, 101, 1000])
    want = oracles.overlong_penalty(length, max_length=100, cache=50)
    drawn = np.random.default_rng(0).integers(0, 300, 200)
    for limit, cache in ((100, 50), (128, 1), (77, 77)):
        many = oracles.overlong_penalty(drawn, max_length=limit, cache=cache)
        np.testing.assert_allclose(advantages.overlong_penalty(drawn, max_length=limit, cache=cache), many, rtol=1e-6)
    np.testing.assert_allclose(advantages.overlong_penalty(length, max_length=100, cache=50), want, rtol=1e-6)
    assert want[[1, 3, 5, 6]].tolist() == [0.0, -0.5, -1.0, -1.0]


def test_a_term_keeps_its_weight_where_all_answers_are_right():
    """CRPO's trap: the sum's deviation is the small term's, which grows to full size."""
    terms = jnp.array([[1.0, 0.0], [1.0, 0.1], [1.0, 0.0], [1.0, 0.1]])
    group, total = jnp.zeros(4, int), terms @ jnp.array([10.0, 1.0])
    summed = advantages.group_relative(total, group, num_groups=1)
    split = advantages.per_objective(total, group, terms=terms, term_weight=(1.0, 0.1), num_groups=1)
    np.testing.assert_allclose(np.abs(summed), 0.866, rtol=1e-3)
    np.testing.assert_allclose(np.abs(split), 0.0866, rtol=1e-3)


Z, ID, M = np.zeros(4), np.zeros(4, int), np.ones((4, 2), bool)
BAD = [
    ("reinforce_pp", (Z, ID), {"mask": M[:3]}, r"mask is bool\[3, 2\], expected b\[N, R\] with N=4$"),
    ("reinforce_pp", (Z, ID), {"mask": M[:, 0]}, r"mask is bool\[4\], expected b\[N, R\] with N=4$"),
    ("reinforce_pp", (Z, ID), {"mask": M, "token_reward": Z}, r"token_reward is float32\[4\], expected f\[N, R\] with"),
    ("reinforce_pp", (Z, ID), {"mask": M, "baseline": "mean"}, r"baseline must be 'none' or 'group', got 'mean'$"),
    ("reinforce_pp", (Z, ID), {"mask": M, "gamma": 2.0}, r"gamma must be in \[0, 1\], got 2.0$"),
    ("remax", (Z, ID), {"baseline": Z}, r"baseline is float32\[4\], expected f\[E\] with E=1$"),
    ("remax", (Z, Z), {"baseline": Z[:1]}, r"group is float32\[4\], expected i\[N\] with N=4$"),
    (
        "per_objective",
        (Z, ID),
        {"terms": Z, "term_weight": (1.0,)},
        r"terms is float32\[4\], expected f\[N, C\] with N=4$",
    ),
    (
        "per_objective",
        (Z, ID),
        {"terms": M * 1.0, "term_weight": (1.0,)},
        r"term_weight has 1 numbers for 2 terms: one",
    ),
    (
        "per_objective",
        (Z, ID),
        {"terms": M * 1.0, "term_weight": (1.0, 2.0), "scale": "max"},
        r"scale must be 'std' or 'none', got 'max'$",
    ),
    ("term_spread", (Z, ID), {}, r"terms is float32\[4\], expected f\[N, C\]$"),
    ("reinforce_pp", (Z, ID), {"mask": M, "eps": 0.0}, r"eps must be > 0, got 0.0$"),
    ("informative_groups", (Z, ID[:2]), {}, r"group is int32\[2\], expected i\[N\] with N=4$"),
]


@pytest.mark.parametrize(("function", "args", "options", "text"), BAD)
def test_bad_input_is_refused_by_name(function, args, options, text):
    with pytest.raises(ValueError, match=text):
        getattr(advantages, function)(*args, num_groups=1, **options)


@pytest.mark.parametrize("cache", [0, 101])
def test_bad_lengths_are_refused(cache):
    with pytest.raises(ValueError, match=rf"cache must be in \[1, max_length=100\], got {cache}$"):
        advantages.overlong_penalty(ID, max_length=100, cache=cache)
    with pytest.raises(ValueError, match=r"length is float32\[4\], expected i\[N\]$"):
        advantages.overlong_penalty(Z, max_length=100, cache=50)


def test_the_spread_of_a_term_is_its_deviation_within_groups():
    """Group 0 varies in the first term, group 1 in none; group 2 has one valid row and counts in no mean."""
    terms = jnp.array([[1.0, 5.0], [3.0, 5.0], [7.0, 9.0], [7.0, 9.0], [0.0, 0.0], [9.0, np.nan]])
    group, valid = jnp.array([0, 0, 1, 1, 2, 2]), jnp.array([True] * 5 + [False])
    spread = jax.jit(functools.partial(advantages.term_spread, num_groups=4))(terms, group, valid=valid)
    np.testing.assert_allclose(spread, [np.sqrt(2) / 2, 0.0], rtol=1e-6)


whitened = jax.jit(functools.partial(advantages.reinforce_pp, num_groups=5))


@pytest.mark.parametrize(("offset", "step"), [(1e8, 8.0), (-1e3, 1e-3), (-20.0, 0.5)])
def test_returns_of_any_offset_keep_the_digits_of_their_differences(offset, step):
    rng = np.random.default_rng(0)
    reward = (offset + step * rng.integers(0, 3, 64)).astype(np.float32)
    group, mask = np.arange(64) % 5, np.ones((64, 40), bool)
    out = whitened(reward, group, mask=mask)
    want = oracles.reinforce_pp(reward, group, mask=mask, num_groups=5)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
