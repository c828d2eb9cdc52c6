"""Losses of pairs and labels against loops written from the papers, and what `valid` promises."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign import losses
from tests import oracles

PAIRS, CASES = 12, 200
SQUARES = ((lambda f: f * f - f), (lambda f: f * f + f))  # a link of one's own
ARGUMENTS = {"pairs": ("real", "generated"), "labels": ("logratio", "desirable")}
FLOATS = ("real", "generated", "logratio", "kl_logratio")
GSIL = {"scale": 0.5, "shift": 0.25}

VARIANTS = {
    **{f"gsil {link}": ("density_ratio", {"link": link, "max_logit": 4.0, **GSIL}) for link in losses.LINKS},
    "gsil at the defaults": ("density_ratio", {}),
    "gsil, own link": ("density_ratio", {"link": SQUARES, "max_logit": 3.5, "denominator": 7}),
    "spin": ("spin", {"scale": 0.3}),
    "dpo": ("dpo", {}),
    "dpo, smoothed": ("dpo", {"beta": 0.7, "label_smoothing": 0.2, "denominator": 9}),
    "simpo": ("simpo", {"beta": 1.5, "gamma": 0.5}),
    "bradley_terry": ("bradley_terry", {}),
    "bradley_terry, margin": ("bradley_terry", {"margin": 0.75}),
    "kto": ("kto", {}),
    "kto, weights": ("kto", {"beta": 0.4, "weight_desirable": 1.5, "weight_undesirable": 0.5, "denominator": 5}),
    "kto, other responses": ("kto", {"kl_logratio": None, "kl_valid": None}),  # filled from the case
}
each = pytest.mark.parametrize("name", VARIANTS)


@functools.cache
def cases():
    rng = np.random.default_rng(0)
    return oracles.stack([oracles.random_pairs(rng, PAIRS) for _ in range(CASES)])


def unstacked(case):
    return [{k: v[c] for k, v in case.items()} for c in range(CASES)]


def call(module, name, case, **extra):
    """One variant of the library or of the oracles."""
    function, options = VARIANTS[name]
    first, second = ARGUMENTS["labels" if function == "kto" else "pairs"]
    options = options | {k: case[k] for k in ("kl_logratio", "kl_valid") if k in options}
    return getattr(module, function)(case[first], case[second], valid=case["valid"], **options, **extra)


@functools.cache
def compiled():
    """All variants in one program: compiling is what costs."""

    def every(floats, rest):
        one = lambda name: jax.value_and_grad(lambda f: call(losses, name, rest | f), has_aux=True)
        return {name: one(name)(floats) for name in VARIANTS}

    return jax.jit(jax.vmap(every))


def run(name, case, dtype):
    floats = {k: jnp.asarray(case[k], dtype) for k in FLOATS}
    return compiled()(floats, {k: jnp.asarray(v) for k, v in case.items() if k not in FLOATS})[name]


@each
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_values_equal_the_oracle(x64, name, dtype, tolerance):
    (loss, metrics), _ = run(name, cases(), dtype)
    wanted = [call(oracles, name, one) for one in unstacked(cases())]
    assert loss.dtype == dtype
    np.testing.assert_allclose(loss, [w[0] for w in wanted], tolerance, tolerance)
    assert set(metrics) == set(wanted[0][1])
    for key, value in metrics.items():
        np.testing.assert_allclose(value, [w[1][key] for w in wanted], tolerance, tolerance, err_msg=key)


@each
def test_gradients_equal_finite_differences(x64, name):
    """Away from the corners of hinge, max_logit and the clip of z."""
    case = {k: v + 0.003 if k in FLOATS else v for k, v in cases().items()}
    _, slope = run(name, case, "float64")
    first, second = ARGUMENTS["labels" if VARIANTS[name][0] == "kto" else "pairs"]
    seen = 0.0
    for c in range(12):
        one = unstacked(case)[c]
        for field in (first, second) if second in FLOATS else (first,):
            at = {"at": one["logratio"]} if VARIANTS[name][0] == "kto" else {}
            truth = lambda x, one=one, field=field, at=at: call(oracles, name, one | {field: x}, **at)[0]
            want = oracles.numerical_gradient(truth, one[field])
            np.testing.assert_allclose(slope[field][c], want, rtol=1e-5, atol=1e-8)
            seen = max(seen, np.abs(want).max())
    assert seen > 1e-3
    assert not np.any(slope["kl_logratio"])
    assert not np.any(slope[first][~case["valid"]])


@each
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_junk_in_invalid_rows_changes_nothing_bit_for_bit(x64, name, junk):
    case = cases()

    def holding(x):
        live = {k: case["kl_valid" if k == "kl_logratio" else "valid"] for k in FLOATS}
        return case | {k: np.where(live[k], case[k], x) for k in FLOATS}

    clean, dirty = (run(name, holding(x), "float64") for x in (0.0, junk))
    for want, got in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(got, want)


@each
def test_junk_in_invalid_rows_and_jit_change_nothing(name):
    """Without jit: the compiler turns a product with a mask into a selection, which hides 0 * NaN."""
    mixed = next(c for c in unstacked(cases()) if 0 < c["valid"].sum() < 12 and 0 < c["kl_valid"].sum() < 14)

    def at(junk):
        hide = {k: np.where(mixed["kl_valid" if k == "kl_logratio" else "valid"], mixed[k], junk) for k in FLOATS}
        one = {k: jnp.asarray(v, jnp.float32 if k in FLOATS else None) for k, v in (mixed | hide).items()}
        return call(losses, name, one)

    with jax.disable_jit():
        clean = at(0.0)
        jax.tree.map(np.testing.assert_array_equal, at(jnp.nan), clean)
    want = call(oracles, name, mixed)
    np.testing.assert_allclose(clean[0], want[0], rtol=1e-5, atol=1e-5)
    for key, value in clean[1].items():
        np.testing.assert_allclose(value, want[1][key], rtol=1e-5, atol=1e-5, err_msg=key)


@each
def test_permuted_pairs_give_the_same_loss(x64, name):
    order = np.random.default_rng(0).permutation(PAIRS)
    moved = {k: v[:, order] if v.shape[1] == PAIRS else v for k, v in cases().items()}
    permuted, straight = (run(name, case, "float64")[0] for case in (moved, cases()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), permuted, straight)


def test_parts_with_the_denominator_of_the_whole_sum_to_the_whole(x64):
    one = next(c for c in unstacked(cases()) if c["valid"].sum() > 6)
    count, fields = int(one["valid"].sum()), ("real", "generated", "valid")
    names = ("gsil kliep", "gsil lsif", "dpo", "simpo", "bradley_terry", "spin")
    every = jax.jit(lambda case: {name: call(losses, name, case, denominator=count)[0] for name in names})
    first, second = (every({k: one[k][part] for k in fields}) for part in (slice(0, 5), slice(5, 12)))
    for name in names:
        want = call(oracles, name, one)[0]
        assert float(first[name] + second[name]) == pytest.approx(want, rel=1e-12), name


@pytest.mark.parametrize("link", losses.LINKS)
def test_log_ratios_of_ten_thousand_stay_finite_with_max_logit_and_are_the_papers_without(link):
    far, near = jnp.array([1e4, -1e4]), jnp.array([0.5, -0.5])
    bounded = functools.partial(losses.density_ratio, link=link, max_logit=20.0)
    both = jax.jit(jax.value_and_grad(bounded, argnums=(0, 1), has_aux=True))
    for real, generated in ((far, near), (near, far)):
        (loss, metrics), slope = both(real, generated)
        assert np.isfinite(loss)
        assert np.all(np.isfinite(slope))
        assert all(np.isfinite(m) for m in metrics.values())
        assert float(metrics["logit_cut_share"]) == 0.5
    unbounded, _ = jax.jit(functools.partial(losses.density_ratio, link=link))(near, far)
    assert np.isfinite(unbounded) == (link in ("bernoulli", "brier", "hinge"))


@pytest.mark.parametrize("name", ["dpo", "simpo", "bradley_terry", "spin", "kto"])
def test_log_ratios_of_ten_thousand_stay_finite(name):
    case = {"real": jnp.array([1e4, -1e4]), "generated": jnp.array([-1e4, 1e4]), "logratio": jnp.array([1e4, -1e4])}
    case |= {"desirable": jnp.array([False, True]), "valid": jnp.ones(2, bool)}
    field = "logratio" if name == "kto" else "real"
    both = jax.value_and_grad(lambda x: call(losses, name, case | {field: x}), has_aux=True)
    (loss, metrics), slope = jax.jit(both)(case[field])
    assert np.isfinite(loss)
    assert np.all(np.isfinite(slope))
    assert all(np.isfinite(m) for m in metrics.values())


@pytest.mark.parametrize("link", ["bernoulli", "brier", "kliep", "lsif"])
def test_generated_responses_pull_e_to_the_shift_times_harder_at_the_start(link):
    shift = 2.0
    slope = jax.grad(lambda a, b: losses.density_ratio(a, b, link=link, shift=shift)[0], argnums=(0, 1))
    real, generated = (float(g[0]) for g in jax.jit(slope)(jnp.zeros(1), jnp.zeros(1)))
    assert -generated / real == pytest.approx(math.exp(shift), rel=1e-5)


@pytest.mark.parametrize("link", ["bernoulli", "brier", "kliep", "lsif"])
def test_the_minimiser_is_the_log_density_ratio(x64, link):
    """Over two responses with known probabilities the minimum of the expected loss is f = log(p_data / p_ref)."""
    data, ref = np.array([0.7, 0.3]), np.array([0.4, 0.6])
    real, generated = losses.LINKS[link]
    slope = jax.jit(jax.grad(lambda f: jnp.sum(data * real(f) + ref * generated(f))))
    np.testing.assert_allclose(slope(jnp.log(data / ref)), 0, atol=1e-12)
    assert np.all(slope(jnp.log(data / ref) + 0.1) > 0)
    assert np.all(slope(jnp.log(data / ref) - 0.1) < 0)


def test_hinge_at_the_scripts_shift_has_no_gradient_on_real_responses_and_says_so():
    call_ = functools.partial(losses.density_ratio, link="hinge", scale=0.01, shift=2.0)
    with pytest.warns(UserWarning, match=r"no gradient on real responses until L < -100; with shift=0 it has"):
        slope = jax.jit(jax.grad(lambda a: call_(a, jnp.zeros(1))[0]))(jnp.zeros(1))
    assert not np.any(slope)


@each
def test_nothing_valid_is_zero_with_zero_gradient(x64, name):
    none = {k: np.zeros_like(cases()[k]) for k in ("valid", "kl_valid")}
    for value in jax.tree.leaves(run(name, cases() | none, "float64")):
        assert not np.any(value)


def test_bfloat16_inputs_are_summed_in_float32():
    rng = np.random.default_rng(0)
    real, generated = (jnp.asarray(rng.normal(size=600), jnp.bfloat16) for _ in range(2))
    chosen = {name: variant for name, variant in VARIANTS.items() if variant[0] != "kto"}
    every = jax.jit(lambda *args: {name: getattr(losses, f)(*args, **how)[0] for name, (f, how) in chosen.items()})
    half, whole = every(real, generated), every(real.astype(jnp.float32), generated.astype(jnp.float32))
    for name, got in half.items():
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, whole[name], rtol=2e-2, err_msg=name)


def test_sequence_sums_and_means_equal_the_oracle(x64):
    rng = np.random.default_rng(0)
    both = jax.jit(
        lambda logp, ref, mask: (losses.sequence_logratio(logp, ref, mask), losses.sequence_mean(logp, mask))
    )
    for _, dtype in itertools.product(range(200), ("float64", "float32")):
        case = oracles.random_tokens(rng, 6, 5)
        junk = np.where(case["mask"], case["logp"], -np.inf)
        sums, means = both(jnp.asarray(junk, dtype), jnp.asarray(case["ref_logp"], dtype), case["mask"])
        assert sums.dtype == means.dtype == dtype
        tolerance = 1e-12 if dtype == "float64" else 1e-5
        want = oracles.sequence_logratio(case["logp"], case["ref_logp"], case["mask"])
        np.testing.assert_allclose(sums, want, tolerance, tolerance)
        np.testing.assert_allclose(means, oracles.sequence_mean(case["logp"], case["mask"]), tolerance, tolerance)
    one = jnp.ones((1, 2))
    live = jnp.ones((1, 2), bool)
    assert not np.any(jax.grad(lambda ref: losses.sequence_logratio(one, ref, live)[0])(one))


Z = np.zeros(3)
BAD = [
    ("density_ratio", (Z, np.zeros(2)), {}, r"logratio_generated is float32\[2\], expected f\[M\] with M=3$"),
    ("density_ratio", (Z, Z), {"valid": Z}, r"valid is float32\[3\], expected b\[M\] with M=3$"),
    (
        "density_ratio",
        (Z, Z),
        {"link": "logit"},
        r"unknown link 'logit': choose one of bernoulli, brier, .*, or a pair",
    ),
    ("density_ratio", (Z, Z), {"scale": 0.0}, r"scale must be > 0, got 0.0: otherwise"),
    ("density_ratio", (Z, Z), {"scale": float("nan")}, r"scale must be > 0, got nan"),
    ("density_ratio", (Z, Z), {"max_logit": 0.0}, r"max_logit must be > 0, got 0.0$"),
    ("spin", (Z, Z[:, None]), {"scale": 1.0}, r"logratio_generated is float32\[3, 1\], expected f\[M\] with M=3$"),
    ("spin", (Z, Z), {"scale": -1.0}, r"scale must be > 0, got -1.0$"),
    ("dpo", (np.zeros(3, int), Z), {}, r"logratio_chosen is int32\[3\], expected f\[M\]$"),
    ("dpo", (Z, Z), {"beta": 0.0}, r"beta must be > 0, got 0.0$"),
    ("dpo", (Z, Z), {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5$"),
    ("dpo", (Z, Z), {"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 0.5\), got -0.1$"),
    ("simpo", (Z, [0.0] * 3), {}, r"logp_rejected is a list, expected an array f\[M\]$"),
    ("simpo", (Z, Z), {"beta": 0.0}, r"beta must be > 0, got 0.0$"),
    ("bradley_terry", (Z, Z[:1]), {}, r"score_rejected is float32\[1\], expected f\[M\] with M=3$"),
    ("kto", (Z, Z), {}, r"desirable is float32\[3\], expected b\[N\] with N=3$"),
    ("kto", (Z, Z > 0), {"kl_logratio": Z, "kl_valid": Z[:2] > 0}, r"kl_valid is bool\[2\], expected b\[K\] with K=3$"),
    ("kto", (Z, Z > 0), {"beta": -1.0}, r"beta must be > 0, got -1.0$"),
    ("sequence_mean", (Z[None], Z > 0), {}, r"mask is bool\[3\], expected b\[N, R\]$"),
    (
        "sequence_logratio",
        (Z[None], Z, Z[None] > 0),
        {},
        r"ref_logp is float32\[3\], expected f\[N, R\] with N=1, R=3$",
    ),
]


@pytest.mark.parametrize(("function", "args", "options", "text"), BAD)
def test_bad_input_is_refused_by_name(function, args, options, text):
    with pytest.raises(ValueError, match=text):
        getattr(losses, function)(*args, **options)
