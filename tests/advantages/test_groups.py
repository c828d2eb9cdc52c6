"""Advantages against loops written from the papers, and the promises of rlalign.advantages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign import advantages
from tests import oracles

SHAPES = ((13, 4), (40, 9))  # samples, group ids
CASES = 100  # of each shape

VARIANTS = {
    "grpo": (advantages.group_relative, oracles.group_relative, {}),
    "grpo, ddof 0": (advantages.group_relative, oracles.group_relative, {"ddof": 0, "eps": 1e-4}),
    "dr_grpo": (advantages.group_relative, oracles.group_relative, {"scale": "none"}),
    "rloo": (advantages.leave_one_out, oracles.leave_one_out, {}),
    "gprs": (advantages.group_preference, oracles.group_preference, {}),
}
FUNCTIONS = {name: functools.partial(f, **options) for name, (f, _, options) in VARIANTS.items()}


@functools.cache
def cases(samples, groups):
    rng = np.random.default_rng(samples)
    made = [oracles.random_groups(rng, samples, groups) for _ in range(CASES)]
    for case in made:
        case["weight"] = np.round(rng.uniform(0, 3, samples) * 64) / 64
    return oracles.stack(made)


def every(reward, group, valid, weight, groups):
    """All variants of one batch, and GPRS with weights."""
    out = {name: f(reward, group, num_groups=groups, valid=valid) for name, f in FUNCTIONS.items()}
    return out | {"eq. 10": advantages.group_preference(reward, group, num_groups=groups, valid=valid, weight=weight)}


def slopes(reward, group, valid, weight, groups):
    """Gradients of a fixed combination of every variant's advantages: by the reward, for eq. 10 by the weight."""
    slope, how = jnp.sin(jnp.arange(len(reward))), {"num_groups": groups, "valid": valid}
    out = {name: jax.grad(lambda r, f=f: jnp.sum(slope * f(r, group, **how)))(reward) for name, f in FUNCTIONS.items()}
    weighted = lambda w: jnp.sum(slope * advantages.group_preference(reward, group, weight=w, **how))
    return out | {"eq. 10": jax.grad(weighted)(weight)}


@functools.cache
def compiled(function, groups, mapped):
    """One program for all variants: compiling is what costs."""
    one = functools.partial(function, groups=groups)
    return jax.jit(jax.vmap(one) if mapped else one)


def run(case, groups, function=every, mapped=True):
    """Under x64 in float64: most tests share one program."""
    out = compiled(function, groups, mapped)(*(jnp.asarray(case[k]) for k in ("reward", "group", "valid", "weight")))
    return {name: np.asarray(x) for name, x in out.items()}


def expected(name, case, groups):
    rows = zip(case["reward"], case["group"], case["valid"], case["weight"], strict=True)
    if name == "eq. 10":
        return [oracles.group_preference(r, g, num_groups=groups, valid=v, weight=w) for r, g, v, w in rows]
    _, oracle, options = VARIANTS[name]
    return [oracle(r, g, num_groups=groups, valid=v, **options) for r, g, v, _ in rows]


@pytest.mark.parametrize(("samples", "groups"), SHAPES)
def test_float64_equals_the_oracle(x64, samples, groups):
    case = cases(samples, groups)
    for name, out in run(case, groups).items():
        assert out.dtype == np.float64
        np.testing.assert_allclose(out, expected(name, case, groups), rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(("samples", "groups"), SHAPES)
def test_float32_equals_the_oracle(samples, groups):
    case = cases(samples, groups)
    for name, out in run(case, groups).items():
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, expected(name, case, groups), rtol=1e-5, atol=1e-5, err_msg=name)


def test_vmap_changes_nothing(x64):
    samples, groups = SHAPES[0]
    case = cases(samples, groups)
    alone, mapped = run({k: v[7] for k, v in case.items()}, groups, mapped=False), run(case, groups)
    for name in mapped:
        np.testing.assert_allclose(alone[name], mapped[name][7], rtol=1e-12, atol=1e-12, err_msg=name)


def test_gradients_equal_finite_differences(x64):
    rng = np.random.default_rng(3)
    samples, groups = SHAPES[0]
    group = np.array([0, 2, 0, 2, 2, 0, 3, 3, 0, 2, 0, 2, 2])  # 1 is empty
    case = {"reward": rng.normal(size=samples), "group": group, "valid": np.arange(samples) != 4}
    case["weight"] = rng.uniform(0.5, 2, samples)
    for name, got in run(case, groups, slopes, mapped=False).items():
        moved = "weight" if name == "eq. 10" else "reward"

        def truth(x, name=name, moved=moved):
            batch = {k: v[None] for k, v in (case | {moved: x}).items()}
            return float(np.sum(np.sin(np.arange(samples)) * expected(name, batch, groups)[0]))

        want = oracles.numerical_gradient(truth, case[moved])
        assert name == "gprs" or np.abs(want).max() > 0.05
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("value", [0.1, 1 / 3, -7e8])
def test_groups_without_signal_have_zero_advantage_and_gradient(x64, value):
    """Equal rewards, one valid row, no valid row, an empty id: the root of a zero deviation has no finite slope."""
    case = {
        "reward": np.full(13, value),
        "group": np.array([0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 3, 3, 3]),
        "valid": np.array([True] * 9 + [False] * 4),
        "weight": np.ones(13),
    }
    for function in (every, slopes):
        for name, out in run(case, 4, function, mapped=False).items():
            assert name == "eq. 10" or not np.any(out), name  # the weight's slope is that of equal rewards, not of none


def test_identical_rewards_give_exactly_zero():
    """200 float32 values of all magnitudes: alone, each with a quarter of the sizes from 2 to 64, and in one batch."""
    rng = np.random.default_rng(0)
    value = (rng.normal(size=200) * 10.0 ** rng.integers(-8, 12, 200)).astype(np.float32)
    cycled = np.tile(np.arange(2, 65), 4)[:200]
    size = (2 + (np.arange(200)[:, None] + 4 * np.arange(16)) % 63).reshape(-1)
    alone = {"reward": np.repeat(value, 16)[:, None].repeat(64, axis=1), "group": np.zeros((3200, 64), int)}
    alone["valid"] = np.arange(64) < size[:, None]
    ragged = {"reward": np.repeat(value, cycled), "group": np.repeat(np.arange(200), cycled)}
    ragged["valid"] = np.ones(len(ragged["reward"]), bool)
    for case, groups, mapped in ((alone, 1, True), (ragged, 200, False)):
        out = run(case | {"weight": np.ones_like(case["reward"])}, groups, mapped=mapped)
        for name in VARIANTS:
            assert out[name].shape == case["reward"].shape
            assert not np.any(out[name]), name


@pytest.mark.parametrize(("offset", "step"), [(1e8, 8.0), (-1e3, 1e-3), (1e4, 0.01), (0.0, 1e20), (0.0, 1e-20)])
def test_rewards_of_any_offset_and_size_keep_the_digits_of_their_differences(offset, step):
    """float32 against the oracle of the same float32 rewards."""
    rng = np.random.default_rng(0)
    reward = (offset + step * rng.integers(0, 3, 64)).astype(np.float32)
    case = {"reward": reward, "group": np.arange(64) % 3, "valid": np.arange(64) % 7 > 0, "weight": np.ones(64)}
    out = run(case, 3, mapped=False)
    for name in set(VARIANTS) - {"grpo, ddof 0"}:
        want = expected(name, {k: v[None] for k, v in case.items()}, 3)[0]
        if name == "grpo" and step < 1e-6:
            want = want * 0 + out[name]  # eps decides there
        size = np.abs(want).max()
        assert size > 0
        np.testing.assert_allclose(out[name] / size, want / size, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_junk_in_invalid_rows_changes_nothing_bit_for_bit(x64, junk):
    samples, groups = SHAPES[0]
    case = cases(samples, groups)
    assert not np.all(case["valid"])

    def holding(x):
        return case | {k: np.where(case["valid"], case[k], x) for k in ("reward", "weight")}

    for function in (every, slopes):
        clean, dirty = run(holding(0.0), groups, function), run(holding(junk), groups, function)
        for name in clean:
            np.testing.assert_array_equal(dirty[name], clean[name], err_msg=name)
            assert not np.any(dirty[name][~case["valid"]])


@pytest.mark.parametrize("name", ["grpo", "gprs"])
def test_junk_in_invalid_rows_and_jit_change_nothing(name):
    """Without jit: the compiler turns a product with a mask into a selection, which hides 0 * NaN."""
    samples, groups = SHAPES[0]
    kept = cases(samples, groups)["valid"].sum(axis=1)
    mixed = np.flatnonzero((kept > 0) & (kept < samples))[0]
    case = {k: jnp.asarray(v[mixed]) for k, v in cases(samples, groups).items()}

    def call(junk):
        reward = jnp.where(case["valid"], case["reward"], junk)
        assert np.isnan(junk) == np.isnan(reward).any()
        return FUNCTIONS[name](reward, case["group"], num_groups=groups, valid=case["valid"])

    with jax.disable_jit():
        plain = call(0.0)
        np.testing.assert_array_equal(call(jnp.nan), plain)
    jitted = run(cases(samples, groups), groups)[name][mixed]
    np.testing.assert_allclose(plain, jitted, rtol=1e-6, atol=1e-7)


def test_nan_in_a_valid_row_is_its_groups_alone(x64):
    clean = {
        "reward": np.array([1.0, 0.0, 3.0, 1.0, 0.0, 2.0, 5.0, 5.0, 1.0, 1.0, 2.0, 3.0, 2.0]),
        "group": np.array([0, 1, 0, 1, 0, 1, 2, 2, 1, 1, 0, 0, 1]),
        "valid": np.arange(13) != 7,
        "weight": np.ones(13),
    }
    before = run(clean, 4, mapped=False)
    for bad in range(7):
        hit = clean["valid"] & (clean["group"] == clean["group"][bad])
        after = run(clean | {"reward": np.where(np.arange(13) == bad, np.nan, clean["reward"])}, 4, mapped=False)
        for name, out in after.items():
            assert np.all(np.isnan(out[hit])), name
            np.testing.assert_array_equal(out[~hit], before[name][~hit], err_msg=name)
        weighted = run(clean | {"weight": np.where(np.arange(13) == bad, np.nan, 1.0)}, 4, mapped=False)["eq. 10"]
        np.testing.assert_array_equal(weighted[~hit], before["eq. 10"][~hit])
        assert np.all(np.isnan(weighted[hit]))


def test_permuted_rows_give_permuted_advantages(x64):
    samples, groups = SHAPES[0]
    case = cases(samples, groups)
    order = np.random.default_rng(1).permutation(samples)
    straight, shuffled = run(case, groups), run({k: v[:, order] for k, v in case.items()}, groups)
    for name, out in shuffled.items():
        np.testing.assert_allclose(out, straight[name][:, order], rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(("name", "dtype"), [("grpo", np.uint8), ("gprs", np.int16)])
def test_rewards_from_numpy_and_ids_of_any_integer_dtype(name, dtype):
    """NumPy's float64 rewards and int64 ids are what a script has at hand; they must not even warn."""
    reward, group = np.array([1.0, 0.0, 0.5, 2.0]), np.array([0, 0, 1, 1])
    call = functools.partial(FUNCTIONS[name], num_groups=2)
    want, half = (jax.jit(call)(jnp.asarray(reward, d), jnp.asarray(group)) for d in (jnp.float32, jnp.bfloat16))
    np.testing.assert_allclose(call(reward, group.astype(dtype)), want, rtol=1e-6)
    assert half.dtype == np.float32
    np.testing.assert_array_equal(half, want)


def test_statistics_of_bfloat16_rewards_are_float32():
    reward = jnp.asarray(np.arange(512) % 2, jnp.bfloat16)  # a bfloat16 count stops at 256
    out = jax.jit(lambda r: advantages.group_relative(r, jnp.zeros(512, int), num_groups=1, scale="none"))(reward)
    np.testing.assert_array_equal(out, np.arange(512) % 2 - 0.5)


@jax.jit
def _preference(reward, valid):
    return advantages.group_preference(reward, jnp.zeros(len(reward), int), num_groups=1, valid=valid)


def preference(reward):
    """GPRS of one group, behind padding that keeps the shape."""
    padded = np.pad(np.asarray(reward, np.float32), (0, 64 - len(reward)), constant_values=np.nan)
    return np.asarray(_preference(padded, np.arange(64) < len(reward)))[: len(reward)]


def test_preference_in_the_first_example_of_the_readme():
    share = np.array([0.75, 0.5, 0.5, 1.0])
    np.testing.assert_array_equal(preference([1.0, 0.0, 0.0, 2.0]), share - share.mean())


@pytest.mark.parametrize("size", [1, 2, 3, 8, 33])
def test_preference_of_distinct_rewards_is_the_rank(size):
    reward = np.random.default_rng(size).normal(size=size)
    rank = np.argsort(np.argsort(reward)) + 1
    np.testing.assert_allclose(preference(reward), (rank - (size + 1) / 2) / size, rtol=1e-6, atol=1e-7)


def test_preference_is_unchanged_bit_for_bit_by_increasing_maps():
    reward = np.random.default_rng(2).normal(size=50).round(1)
    want = preference(reward)
    assert len(np.unique(want)) > 20
    for increasing in (lambda r: 3 * r + 5, np.exp, np.arctan, lambda r: r * np.abs(r), lambda r: r * 1e-30):
        np.testing.assert_array_equal(preference(increasing(reward)), want)
    assert np.any(preference(-reward) != want)


@pytest.mark.parametrize("size", [2, 4, 7])
def test_preference_of_binary_rewards(size):
    for right in range(1, size):
        p, out = right / size, preference([1.0] * right + [0.0] * (size - right))
        np.testing.assert_allclose(out[:right], p * (1 - p), rtol=1e-6)
        np.testing.assert_allclose(out[right:], -p * p, rtol=1e-6)


def test_preference_of_one_response_is_zero():
    assert preference([3.0]).tolist() == [0.0]


def test_preference_sums_to_zero_in_every_group():
    samples, groups = SHAPES[1]
    case = cases(samples, groups)
    for out, group in zip(run(case, groups)["gprs"], case["group"], strict=True):
        assert np.abs(np.bincount(group, weights=out)).max() <= 1e-6


GOOD = {"reward": np.zeros(4), "group": np.zeros(4, int), "num_groups": 1}
BAD = [
    ({"reward": np.zeros((4, 1))}, r"reward is float32\[4, 1\], expected f\[N\]$"),
    ({"reward": np.zeros(4, int)}, r"reward is int32\[4\], expected f\[N\]$"),
    ({"reward": np.float32(1.0)}, r"reward is float32\[\], expected f\[N\]$"),
    ({"reward": [0.0] * 4}, r"reward is a list, expected an array f\[N\]$"),
    ({"group": np.zeros(3, int)}, r"group is int32\[3\], expected i\[N\] with N=4$"),
    ({"group": np.zeros(1, int)}, r"group is int32\[1\], expected i\[N\] with N=4$"),
    ({"group": np.zeros(4)}, r"group is float32\[4\], expected i\[N\] with N=4$"),
    ({"valid": np.ones(4)}, r"valid is float32\[4\], expected b\[N\] with N=4$"),
    ({"valid": np.ones((4, 4), bool)}, r"valid is bool\[4, 4\], expected b\[N\] with N=4$"),
    ({"num_groups": 0}, r"num_groups must be at least 1, got 0$"),
]


@pytest.mark.parametrize("name", ["grpo", "rloo", "gprs"])
@pytest.mark.parametrize(("change", "text"), BAD)
def test_bad_input_is_refused_by_name(name, change, text):
    with pytest.raises(ValueError, match=text):
        FUNCTIONS[name](**(GOOD | change))


@pytest.mark.parametrize("name", ["grpo", "rloo", "gprs"])
def test_bad_input_is_refused_at_trace_time(name):
    call = functools.partial(FUNCTIONS[name], num_groups=1)
    with pytest.raises(ValueError, match=r"group is int32\[1\], expected i\[N\] with N=4"):
        jax.eval_shape(call, jnp.zeros(4), jnp.zeros(1, int))


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"scale must be 'std' or 'none', got 'mad'$"):
        advantages.group_relative(**GOOD, scale="mad")
    with pytest.raises(ValueError, match=r"ddof must be 0 or 1, got 2$"):
        advantages.group_relative(**GOOD, ddof=2)
    with pytest.raises(ValueError, match=r"eps must be > 0, got 0: a tiny deviation would make infinite advantages$"):
        advantages.group_relative(**GOOD, eps=0)
    for weight in (np.ones(3), np.ones((4, 1)), np.ones(4, int)):
        with pytest.raises(ValueError, match=r"weight is (float|int)32\[.*\], expected f\[N\] with N=4$"):
            advantages.group_preference(**GOOD, weight=weight)
