"""Returns, GiGPO's two levels and its anchors, against loops written from the paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign import advantages
from tests import oracles

ROWS, GROUPS, CASES = 24, 4, 200  # rows and group ids of a case
VARIANTS = {
    "paper": {},
    "without penalty": {"penalty": None},
    "no std": {"scale": "none", "gamma": 0.5, "step_weight": 0.5},
    "official": {"episode_stat": "step"},
}
IDS = ("group", "trajectory", "step", "anchor")
FLOATS = ("reward", "penalty")


@functools.cache
def cases():
    """Of one shape, so that one program a dtype serves most tests: compiling is what costs."""
    rng = np.random.default_rng(24)
    return oracles.stack([oracles.random_steps(rng, ROWS, GROUPS) for _ in range(CASES)])


def one_of(case, c):
    return {k: v[c] for k, v in case.items() if np.ndim(v)}


def every(module, case, variants=VARIANTS):
    """Every variant and the discounted return, of the library or of the oracles."""
    out, how = {}, {"num_groups": GROUPS, "valid": case["valid"]} | {k: case[k] for k in IDS}
    for name, options in variants.items():
        whole, parts = module.group_in_group(case["reward"], **({"penalty": case["penalty"]} | how | options))
        out |= {name: whole, f"{name}, episode": parts["episode"], f"{name}, step": parts["step"]}
    back = module.discounted_return(case["reward"], case["trajectory"], case["step"], gamma=0.75, valid=case["valid"])
    return out | {"return": back}


program = jax.jit(jax.vmap(functools.partial(every, advantages)))


def run(case, dtype=jnp.float64):
    arrays = {k: jnp.asarray(v, dtype if k in FLOATS else None) for k, v in case.items() if np.ndim(v)}
    return {k: np.asarray(v) for k, v in program(arrays).items()}


@functools.cache
def wanted():
    made = [every(oracles, one_of(cases(), c)) for c in range(CASES)]
    return {name: np.stack([m[name] for m in made]) for name in made[0]}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_values_equal_the_oracle(x64, dtype, tolerance):
    for name, got in run(cases(), dtype).items():
        assert got.dtype == dtype
        # A deviation of nearly equal returns keeps few of float32's digits: their differences are on a coarse grid.
        loose = 20 if dtype == "float32" and "gamma" not in VARIANTS.get(name.split(",")[0], {}) else 1
        np.testing.assert_allclose(got, wanted()[name], loose * tolerance, loose * tolerance, err_msg=name)


def test_gradients_equal_finite_differences(x64):
    """Of a random combination of the returns and of all parts, where no two scores are equal."""
    rng = np.random.default_rng(5)
    case = oracles.random_steps(rng, 14, 3)
    case = {k: v for k, v in case.items() if np.ndim(v)} | {"reward": rng.normal(size=14)}
    slope = {name: rng.normal(size=14) for name in every(oracles, case)}

    def total(module, reward):
        return sum((slope[name] * v).sum() for name, v in every(module, case | {"reward": reward}).items())

    want = oracles.numerical_gradient(functools.partial(total, oracles), case["reward"])
    assert np.abs(want).max() > 0.05
    got = jax.jit(jax.grad(functools.partial(total, advantages)))(case["reward"])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_shuffled_rows_give_shuffled_advantages(x64):
    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = run({k: v[:, order] for k, v in cases().items() if np.ndim(v)})
    for name, want in run(cases()).items():
        np.testing.assert_allclose(shuffled[name], want[:, order], rtol=1e-12, atol=1e-12, err_msg=name)


def test_equal_scores_stay_equal_however_rows_are_shuffled():
    """Sums of 0.1, 0.2 and 0.3 depend on their order; a difference of one bit would be blown up by its deviation."""
    rng = np.random.default_rng(0)
    steps, copies = 9, 8
    reward = np.tile(rng.normal(size=steps).astype(np.float32), copies)
    trajectory, step = np.repeat(np.arange(copies), steps), np.tile(np.arange(steps), copies)
    anchor = step.copy()
    call = jax.jit(functools.partial(advantages.group_in_group, num_groups=1))
    for _ in range(20):
        order = rng.permutation(copies * steps)
        ids = {"trajectory": trajectory[order], "step": step[order], "anchor": anchor[order]}
        out, parts = call(reward[order], group=np.zeros(copies * steps, int), **ids)
        assert not np.any(out)
        assert not np.any(parts["episode"])


def test_duplicated_padding_changes_nothing_bit_for_bit(x64):
    """The last four rows of every case are padding: copies of others with any reward, marked invalid."""
    live = np.arange(ROWS) < ROWS - 4

    def padded(rows, junk):
        copies = {k: np.concatenate([v[:, live], v[:, rows]], axis=1) for k, v in cases().items() if np.ndim(v)}
        copies["valid"] &= live
        return run(copies | {k: np.where(copies["valid"], copies[k], junk) for k in FLOATS})

    want = padded([3, 3, 3, 3], 0.0)
    for c in range(20):
        alone = {k: v[live] for k, v in one_of(cases(), c).items()}
        for name, out in every(oracles, alone).items():
            np.testing.assert_allclose(want[name][c, live], out, rtol=1e-12, atol=1e-12, err_msg=name)
    for junk in (1.0, np.nan, np.inf):
        for name, out in padded([0, 0, 5, 11], junk).items():
            np.testing.assert_array_equal(out, want[name], err_msg=name)
            assert not np.any(out[:, ~live])


def test_junk_in_invalid_rows_changes_nothing_without_jit():
    """The compiler turns a product with a mask into a selection, which hides 0 * NaN."""
    count = cases()["valid"].sum(axis=1)
    mixed = one_of(cases(), int(np.flatnonzero((count > 2) & (count < ROWS))[0]))
    case = {k: jnp.asarray(v) for k, v in mixed.items()}

    def at(junk):
        hidden = {k: jnp.where(case["valid"], case[k], junk) for k in FLOATS}
        return every(advantages, case | hidden, {"paper": {}})

    with jax.disable_jit():
        clean, dirty = at(0.0), at(jnp.nan)
    for name, want in clean.items():
        np.testing.assert_array_equal(dirty[name], want, err_msg=name)
        np.testing.assert_allclose(want, every(oracles, mixed, {"paper": {}})[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_nan_in_a_valid_row_is_its_groups_alone(x64):
    case, before = cases(), run(cases())
    first = case["valid"].argmax(axis=1)[:, None]
    bad = case["valid"] & (np.arange(ROWS) == first)
    hit = case["valid"] & (case["group"] == np.take_along_axis(case["group"], first, axis=1))
    assert np.any(case["valid"] & ~hit)
    for field in FLOATS:
        for name, out in run(case | {field: np.where(bad, np.nan, case[field])}).items():
            if name != "return" and not (field == "penalty" and name.startswith("without penalty")):
                assert np.all(np.isnan(out[hit])), name
            np.testing.assert_array_equal(out[~hit], before[name][~hit], err_msg=name)


def test_one_step_episodes_and_singleton_anchors():
    """Episodes of one step: R is the score, and the step part compares those that began alike."""
    ids = {k: jnp.arange(4) for k in ("trajectory", "step")} | {"group": jnp.zeros(4, int)}
    call = jax.jit(functools.partial(advantages.group_in_group, **ids, num_groups=1, scale="none"))
    reward = jnp.array([1.0, 0.0, 1.0, 0.0])
    alone, parts = call(reward, anchor=jnp.arange(4))
    assert alone.tolist() == [0.5, -0.5, 0.5, -0.5]
    assert not np.any(parts["step"])
    together, parts = call(reward, anchor=jnp.zeros(4, int))
    assert together.tolist() == [1.0, -1.0, 1.0, -1.0]
    assert parts["step"].tolist() == parts["episode"].tolist()


def test_a_penalty_acts_where_all_scores_are_equal_through_the_step_part_only():
    penalty = jnp.array([0.1, 0.0, 0.0, 0.0])
    ids = {"trajectory": jnp.array([0, 0, 1, 1]), "step": jnp.array([0, 1, 0, 1]), "anchor": jnp.array([0, 1, 0, 1])}
    for stat in ("trajectory", "step"):
        call = jax.jit(functools.partial(advantages.group_in_group, **ids, num_groups=1, episode_stat=stat))
        _, parts = call(jnp.zeros(4), group=jnp.zeros(4, int), penalty=penalty)
        assert not np.any(parts["episode"])
        assert parts["step"][0] < 0 < parts["step"][2]


def test_anchors_of_text_history_and_inventory():
    said = ["a door", "Nothing happens.", "a door", "Nothing happens.", "a door"]
    group = [0, 0, 0, 0, 1]
    assert advantages.anchor_ids(said, group).tolist() == [0, 1, 0, 1, 2]
    held = ["", "key", "", "lamp", ""]
    assert advantages.anchor_ids(list(zip(said, held, strict=True)), group).tolist() == [0, 1, 0, 2, 3]


def test_anchors_equal_the_oracle():
    rng = np.random.default_rng(0)
    words = ["the red door", "the red doors", "a red door", "a key", "the key", "key"]
    for threshold in (None, 0.3, 0.8, 0.95, 1.0):
        for _ in range(40):
            texts, group = rng.choice(words, 9).tolist(), rng.integers(0, 3, 9)
            got = advantages.anchor_ids(texts, group, similarity=threshold)
            np.testing.assert_array_equal(got, oracles.anchor_ids(texts, group, similarity=threshold))
            assert got.dtype == np.int32
            assert got.max() < 9


Z, ID = np.zeros(4), np.zeros(4, int)
GOOD = {"reward": Z, "group": ID, "trajectory": ID, "step": ID, "anchor": ID, "num_groups": 1}
BAD = [
    ({"reward": Z[:, None]}, r"reward is float32\[4, 1\], expected f\[N\]$"),
    ({"group": ID[:3]}, r"group is int32\[3\], expected i\[N\] with N=4$"),
    ({"trajectory": Z}, r"trajectory is float32\[4\], expected i\[N\] with N=4$"),
    ({"step": ID[:, None]}, r"step is int32\[4, 1\], expected i\[N\] with N=4$"),
    (
        {"anchor": ["a"] * 4},
        r"anchor is a list, expected an array i\[N\] with N=4|anchor is a list, expected an array i",
    ),
    ({"penalty": Z[:1]}, r"penalty is float32\[1\], expected f\[N\] with N=4$"),
    ({"valid": Z}, r"valid is float32\[4\], expected b\[N\] with N=4$"),
    ({"num_groups": 0}, r"num_groups must be at least 1, got 0$"),
    ({"scale": "mad"}, r"scale must be 'std' or 'none', got 'mad'$"),
    ({"episode_stat": "row"}, r"episode_stat must be 'trajectory' or 'step', got 'row'$"),
    ({"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5$"),
]


@pytest.mark.parametrize(("change", "text"), BAD)
def test_bad_input_is_refused_by_name(change, text):
    given = GOOD | change
    with pytest.raises(ValueError, match=text):
        advantages.group_in_group(given.pop("reward"), **given)


def test_bad_input_of_the_helpers():
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], got -0.5$"):
        advantages.discounted_return(Z, ID, ID, gamma=-0.5)
    with pytest.raises(ValueError, match=r"step is float32\[4\], expected i\[N\] with N=4$"):
        advantages.discounted_return(Z, ID, Z, gamma=0.5)
    with pytest.raises(ValueError, match=r"group has shape \(2,\) for 3 anchors: one id each$"):
        advantages.anchor_ids(["a", "b", "c"], [0, 0])
    with pytest.raises(ValueError, match=r"similarity must be in \(0, 1\], got 0$"):
        advantages.anchor_ids(["a"], [0], similarity=0)
    with pytest.raises(ValueError, match=r"anchor 1 is a tuple: similarity compares texts$"):
        advantages.anchor_ids(["a", ("b", "c")], [0, 0], similarity=0.9)


def test_the_figures_of_step_groups():
    """Five valid rows; the anchors 7 of group 0 are three of them, the others stand alone."""
    parts = {"episode": jnp.array([1.0, 1.0, -1.0, 0.0, 1.0, 9.0]), "step": jnp.array([0.5, -0.5, 1.0, 0.0, 0.0, 9.0])}
    ids = {"group": jnp.array([0, 0, 0, 1, 0, 0]), "anchor": jnp.array([7, 7, 7, 7, 3, 7])}
    call = jax.jit(functools.partial(advantages.step_metrics, **ids))
    metrics = call(parts, valid=jnp.arange(6) < 5)
    assert float(metrics["anchor_share"]) == pytest.approx(3 / 5)
    assert float(metrics["anchor_size"]) == pytest.approx(5 / 3)
    assert float(metrics["step_to_episode"]) == pytest.approx(2 / 4)
    nothing = call({k: v * 0 for k, v in parts.items()}, valid=jnp.ones(6, bool))
    assert float(nothing["step_to_episode"]) == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_the_figures_of_step_groups_equal_the_oracle(x64, dtype, tolerance):
    case, rng = cases(), np.random.default_rng(0)
    parts = {k: rng.normal(size=(CASES, ROWS)) * case["valid"] for k in ("episode", "step")}
    call = jax.jit(jax.vmap(lambda p, g, a, v: advantages.step_metrics(p, group=g, anchor=a, valid=v)))
    args = [case[k] for k in ("group", "anchor", "valid")]
    got = jax.tree.map(np.asarray, call({k: jnp.asarray(v, dtype) for k, v in parts.items()}, *args))
    for c in range(CASES):
        group, anchor, valid = (x[c] for x in args)
        of = {k: v[c] for k, v in parts.items()}
        for name, want in oracles.step_metrics(of, group=group, anchor=anchor, valid=valid).items():
            np.testing.assert_allclose(got[name][c], want, tolerance, tolerance, err_msg=name)


def test_no_rows_are_no_error():
    none, ids = jnp.zeros(0), jnp.zeros(0, int)
    call = functools.partial(advantages.group_in_group, num_groups=1)
    out, _ = jax.jit(call)(none, group=ids, trajectory=ids, step=ids, anchor=ids)
    assert out.shape == (0,)


def test_without_discount_a_later_infinity_stays_where_it_is():
    call = jax.jit(functools.partial(advantages.discounted_return, gamma=0.0))
    out = call(jnp.array([1.0, jnp.inf]), jnp.zeros(2, int), jnp.arange(2))
    assert out.tolist() == [1.0, np.inf]
