"""Returns, GiGPO's two levels and its anchors, against loops written from the paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign import advantages
from tests import oracles

SHAPES = ((7, 2), (24, 4))  # rows, group ids
CASES = 100  # of each shape
VARIANTS = {
    "paper": {},
    "no std": {"scale": "none", "gamma": 0.5, "step_weight": 0.5},
    "official": {"episode_stat": "step"},
    "official, no std": {"episode_stat": "step", "scale": "none", "gamma": 1.0},
}
IDS = ("group", "trajectory", "step", "anchor")


@functools.cache
def cases(rows, groups):
    rng = np.random.default_rng(rows)
    return oracles.stack([oracles.random_steps(rng, rows, groups) for _ in range(CASES)])


def every(reward, rest, groups, variants=VARIANTS):
    """Every variant, and the discounted return."""
    out = {}
    ids = {k: rest[k] for k in IDS}
    how = {"num_groups": groups, "valid": rest["valid"]}
    for name, options in variants.items():
        whole, parts = advantages.group_in_group(reward, penalty=rest["penalty"], **ids, **how, **options)
        out |= {name: whole, f"{name}, episode": parts["episode"], f"{name}, step": parts["step"]}
    out["without penalty"] = advantages.group_in_group(reward, **ids, **how)[0]
    back = functools.partial(advantages.discounted_return, reward, rest["trajectory"], rest["step"])
    return out | {"return": back(gamma=0.75, valid=rest["valid"])}


def expected(case, groups):
    ids = {k: case[k] for k in IDS}
    how = {"num_groups": groups, "valid": case["valid"]}
    out = {}
    for name, options in VARIANTS.items():
        whole, parts = oracles.group_in_group(case["reward"], penalty=case["penalty"], **ids, **how, **options)
        out |= {name: whole, f"{name}, episode": parts["episode"], f"{name}, step": parts["step"]}
    out["without penalty"] = oracles.group_in_group(case["reward"], **ids, **how)[0]
    back = functools.partial(oracles.discounted_return, case["reward"], case["trajectory"], case["step"])
    return out | {"return": back(gamma=0.75, valid=case["valid"])}


@functools.cache
def compiled(groups, mapped=True):
    one = functools.partial(every, groups=groups)
    return jax.jit(jax.vmap(one) if mapped else one)


def run(case, groups, dtype=jnp.float32, mapped=True):
    floats = {k: jnp.asarray(case[k], dtype) for k in ("reward", "penalty")}
    rest = {k: jnp.asarray(case[k]) for k in (*IDS, "valid")} | {"penalty": floats["penalty"]}
    return {k: np.asarray(v) for k, v in compiled(groups, mapped)(floats["reward"], rest).items()}


@pytest.mark.parametrize(
    ("rows", "groups", "dtype", "tolerance"),
    [*((*shape, "float64", 1e-12) for shape in SHAPES), (*SHAPES[1], "float32", 1e-5)],
)
def test_values_equal_the_oracle(x64, rows, groups, dtype, tolerance):
    case = cases(rows, groups)
    out = run(case, groups, dtype)
    wanted = [expected({k: v[c] for k, v in case.items() if np.ndim(v)}, groups) for c in range(CASES)]
    for name, got in out.items():
        assert got.dtype == dtype
        # A deviation of nearly equal returns keeps few of float32's digits: their differences are on a coarse grid.
        loose = 20 if dtype == "float32" and "gamma" not in VARIANTS.get(name.split(",")[0], {}) else 1
        want = np.stack([w[name] for w in wanted])
        np.testing.assert_allclose(got, want, loose * tolerance, loose * tolerance, err_msg=name)


def test_gradients_equal_finite_differences(x64):
    """The returns and both parts, where no two scores are equal."""
    rng = np.random.default_rng(5)
    case = oracles.random_steps(rng, 14, 3)
    case["reward"] = rng.normal(size=14)
    slope = np.sin(np.arange(14.0))
    rest = {k: jnp.asarray(case[k]) for k in (*IDS, "valid", "penalty")}
    names = list(expected(case, 3))
    got = jax.jit(jax.jacrev(lambda r: {k: jnp.sum(slope * v) for k, v in every(r, rest, 3).items()}))(case["reward"])
    for name in names:
        truth = lambda x, name=name: float(np.sum(slope * expected(case | {"reward": x}, 3)[name]))
        want = oracles.numerical_gradient(truth, case["reward"])
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-7, err_msg=name)


def test_shuffled_rows_give_shuffled_advantages():
    rows, groups = SHAPES[1]
    case = cases(rows, groups)
    order = np.random.default_rng(0).permutation(rows)
    moved = {k: v[:, order] if np.ndim(v) == 2 else v for k, v in case.items()}
    straight, shuffled = run(case, groups), run(moved, groups)
    for name, out in shuffled.items():
        np.testing.assert_allclose(out, straight[name][:, order], rtol=1e-5, atol=1e-5, err_msg=name)


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


def test_duplicated_padding_changes_nothing_bit_for_bit():
    rows, groups = SHAPES[1]
    case = {k: v[3] if np.ndim(v) else v for k, v in cases(rows, groups).items()}

    def padded(rows, junk):
        more = {k: np.concatenate([v, v[rows]]) if np.ndim(v) else v for k, v in case.items()}
        more["valid"] = np.concatenate([case["valid"], np.zeros(4, bool)])
        for k in ("reward", "penalty"):
            more[k] = np.where(more["valid"], more[k], junk)
        return run(more, groups, mapped=False)

    want = padded([3, 3, 3, 3], 0.0)
    for name, out in run(case, groups, mapped=False).items():
        np.testing.assert_allclose(want[name][:rows], out, rtol=1e-6, atol=1e-7, err_msg=name)
    for junk in (1.0, np.nan, np.inf):
        for name, out in padded([0, 0, 5, 11], junk).items():
            np.testing.assert_array_equal(out, want[name], err_msg=name)
            assert not np.any(out[rows:])


def test_junk_in_invalid_rows_changes_nothing_without_jit():
    rows, groups = SHAPES[0]
    valid = cases(rows, groups)["valid"].sum(axis=1)
    mixed = int(np.flatnonzero((valid > 2) & (valid < rows))[0])
    case = {k: jnp.asarray(v[mixed]) if np.ndim(v) else v for k, v in cases(rows, groups).items()}

    def at(junk):
        hidden = {k: jnp.where(case["valid"], case[k], junk) for k in ("reward", "penalty")}
        return every(hidden["reward"], {**case, **hidden}, groups, {"paper": {}})

    with jax.disable_jit():
        clean, dirty = at(0.0), at(jnp.nan)
    for name, want in clean.items():
        np.testing.assert_array_equal(dirty[name], want, err_msg=name)


def test_nan_in_a_valid_row_is_its_groups_alone():
    rows, groups = SHAPES[1]
    case = {k: v[1] if np.ndim(v) else v for k, v in cases(rows, groups).items()}
    before = run(case, groups, mapped=False)
    assert len(np.unique(case["group"][case["valid"]])) > 1
    for field in ("reward", "penalty"):
        bad = int(np.flatnonzero(case["valid"])[0])
        hit = case["valid"] & (case["group"] == case["group"][bad])
        after = run(case | {field: np.where(np.arange(rows) == bad, np.nan, case[field])}, groups, mapped=False)
        for name, out in after.items():
            if name != "return" and (name, field) != ("without penalty", "penalty"):
                assert np.all(np.isnan(out[hit])), name
            np.testing.assert_array_equal(out[~hit], before[name][~hit], err_msg=name)


def test_one_step_episodes_and_singleton_anchors():
    """Episodes of one step: R is the score, and the step part compares those that began alike."""
    ids = {k: jnp.arange(4) for k in ("trajectory", "step")}
    call = functools.partial(
        advantages.group_in_group, jnp.array([1.0, 0.0, 1.0, 0.0]), **ids, num_groups=1, scale="none"
    )
    alone, parts = call(group=jnp.zeros(4, int), anchor=jnp.arange(4))
    assert alone.tolist() == [0.5, -0.5, 0.5, -0.5]
    assert not np.any(parts["step"])
    together, parts = call(group=jnp.zeros(4, int), anchor=jnp.zeros(4, int))
    assert together.tolist() == [1.0, -1.0, 1.0, -1.0]
    assert parts["step"].tolist() == parts["episode"].tolist()


def test_a_penalty_acts_where_all_scores_are_equal_through_the_step_part_only():
    penalty = jnp.array([0.1, 0.0, 0.0, 0.0])
    ids = {"trajectory": jnp.array([0, 0, 1, 1]), "step": jnp.array([0, 1, 0, 1]), "anchor": jnp.array([0, 1, 0, 1])}
    for stat in ("trajectory", "step"):
        _, parts = advantages.group_in_group(
            jnp.zeros(4), group=jnp.zeros(4, int), **ids, num_groups=1, penalty=penalty, episode_stat=stat
        )
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
    metrics = advantages.step_metrics(parts, **ids, valid=jnp.arange(6) < 5)
    assert float(metrics["anchor_share"]) == pytest.approx(3 / 5)
    assert float(metrics["anchor_size"]) == pytest.approx(5 / 3)
    assert float(metrics["step_to_episode"]) == pytest.approx(2 / 4)
    nothing = advantages.step_metrics({k: v * 0 for k, v in parts.items()}, **ids)
    assert float(nothing["step_to_episode"]) == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_the_figures_of_step_groups_equal_the_oracle(x64, dtype, tolerance):
    rows, groups = SHAPES[1]
    case, rng = cases(rows, groups), np.random.default_rng(0)
    parts = {k: rng.normal(size=(CASES, rows)) * case["valid"] for k in ("episode", "step")}
    call = jax.jit(jax.vmap(lambda p, g, a, v: advantages.step_metrics(p, group=g, anchor=a, valid=v)))
    args = [case[k] for k in ("group", "anchor", "valid")]
    got = call({k: jnp.asarray(v, dtype) for k, v in parts.items()}, *args)
    for c in range(CASES):
        group, anchor, valid = (x[c] for x in args)
        of = {k: v[c] for k, v in parts.items()}
        for name, want in oracles.step_metrics(of, group=group, anchor=anchor, valid=valid).items():
            np.testing.assert_allclose(got[name][c], want, tolerance, tolerance, err_msg=name)


def test_no_rows_are_no_error():
    none, ids = jnp.zeros(0), jnp.zeros(0, int)
    assert advantages.discounted_return(none, ids, ids, gamma=0.5).shape == (0,)
    out, _ = advantages.group_in_group(none, group=ids, trajectory=ids, step=ids, anchor=ids, num_groups=1)
    assert out.shape == (0,)


def test_without_discount_a_later_infinity_stays_where_it_is():
    out = advantages.discounted_return(jnp.array([1.0, jnp.inf]), jnp.zeros(2, int), jnp.arange(2), gamma=0.0)
    assert out.tolist() == [1.0, np.inf]
