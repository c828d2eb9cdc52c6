"""Losses against loops written from the papers, and what the mask, the cut and the denominator promise."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign import losses
from tests import oracles

SHAPES = ((1, 1), (4, 3), (6, 5), (9, 4))  # samples, response tokens
CASES = 100  # of each shape; each is judged under every combination below
CLIPS, RATIOS = ("ppo", "literal", "cispo", "none"), ("token", "sequence", "product")
AGGREGATES = ("token", "sequence", "constant")
COMBINATIONS = list(itertools.product(CLIPS, RATIOS))
SHAPE_OF = {  # float64, with gradients: every clip and every ratio
    ("ppo", "token"): SHAPES[3],
    ("ppo", "sequence"): SHAPES[2],
    ("ppo", "product"): SHAPES[1],
    ("literal", "token"): SHAPES[0],
    ("cispo", "product"): SHAPES[2],
    ("none", "sequence"): SHAPES[1],
}
FIELDS = ("logp", "old_logp", "advantage", "advantage_token", "weight", "weight_token", "mask")


def variants(clip):
    """Options and which fields stand for advantage and weight; every aggregate, [N] and [N, R] of both fields."""
    yield {"aggregate": "token"}, "advantage", None
    yield {"aggregate": "sequence", "clip_low": 0.1, "clip_high": 0.5}, "advantage_token", "weight"
    yield {"aggregate": "constant", "max_length": 7, "denominator": 5}, "advantage", "weight_token"
    if clip == "ppo":
        yield {"aggregate": "sequence", "denominator": 11, "dual_clip": 1.5}, "advantage", None


@functools.cache
def cases(samples, length):
    rng = np.random.default_rng(10 * samples + length)
    return oracles.stack([oracles.random_tokens(rng, samples, length) for _ in range(CASES)])


def all_variants(clip, ratio, function, case, **extra):
    out = []
    for options, advantage, weight in variants(clip):
        args = case["logp"], case["old_logp"], case[advantage], case["mask"]
        weight = None if weight is None else case[weight]
        out.append(function(*args, weight=weight, clip=clip, ratio=ratio, **options, **extra))
    return out


def mixture(out):
    """One number from all variants, so that one gradient judges them all."""
    return sum(np.cos(k) * loss for k, (loss, _) in enumerate(out))


@functools.cache
def compiled(clip, ratio):
    def both(logp, rest):
        out = all_variants(clip, ratio, losses.policy_gradient, rest | {"logp": logp})
        return mixture(out), out

    return jax.jit(jax.vmap(jax.value_and_grad(both, has_aux=True)))


def run(clip, ratio, case):
    """((mixture, every variant), gradient of the mixture) in float64."""
    case = {k: jnp.asarray(case[k]) for k in FIELDS}
    return compiled(clip, ratio)(case["logp"], case)


def unstacked(case):
    return [{k: v[c] for k, v in case.items()} for c in range(CASES)]


def compare(loss, metrics, wanted, tolerance, label):
    """One variant's values and metrics [CASES] against the oracle's."""
    np.testing.assert_allclose(loss, [w[0] for w in wanted], tolerance, tolerance, err_msg=label)
    assert set(metrics) == set(wanted[0][1])
    for name, value in metrics.items():
        np.testing.assert_allclose(value, [w[1][name] for w in wanted], tolerance, tolerance, err_msg=f"{label} {name}")


@pytest.mark.parametrize(("clip", "ratio"), SHAPE_OF)
def test_values_and_gradients_equal_the_oracle(x64, clip, ratio):
    case = cases(*SHAPE_OF[clip, ratio])
    (_, out), gradient = run(clip, ratio, case)
    assert out[0][0].dtype == np.float64
    wanted = [all_variants(clip, ratio, oracles.policy_gradient, one) for one in unstacked(case)]
    for k, options in enumerate(variants(clip)):
        compare(*out[k], [w[k] for w in wanted], 1e-12, f"{clip} {ratio} {options}")
    near = np.flatnonzero(np.abs(case["logp"] - case["old_logp"]).max(axis=(1, 2)) < 5)  # differences are exact enough
    for c in near[:4]:
        one = unstacked(case)[c]

        def truth(logp, one=one):
            return mixture(all_variants(clip, ratio, oracles.policy_gradient, one | {"logp": logp}, at=one["logp"]))

        np.testing.assert_allclose(gradient[c], oracles.numerical_gradient(truth, one["logp"]), rtol=1e-6, atol=1e-8)
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[~case["mask"]])


def test_float32_equals_the_oracle():
    """Every clip with every ratio, each with another variant of the options, in one program."""
    case = cases(6, 5)

    def call(function, case):
        return [all_variants(clip, ratio, function, case)[k % 3] for k, (clip, ratio) in enumerate(COMBINATIONS)]

    batch = {k: jnp.asarray(case[k], bool if k == "mask" else jnp.float32) for k in FIELDS}
    out = jax.jit(jax.vmap(functools.partial(call, losses.policy_gradient)))(batch)
    wanted = [call(oracles.policy_gradient, one) for one in unstacked(case)]
    for k, (loss, metrics) in enumerate(out):
        assert loss.dtype == np.float32
        compare(loss, metrics, [w[k] for w in wanted], 1e-5, str(COMBINATIONS[k]))


@pytest.mark.parametrize(
    ("clip", "dual_clip", "want"),
    # the ratio is 2 or 1/2, the advantage +1 or -1; clipped to [0.8, 1.2]
    [
        ("ppo", None, [1.2, -2.0, 0.5, -0.8]),
        ("ppo", 1.5, [1.2, -1.5, 0.5, -0.8]),
        ("literal", None, [1.2, -1.2, 0.5, -0.5]),
        ("none", None, [2.0, -2.0, 0.5, -0.5]),
    ],
)
def test_objective_of_four_numbers(clip, dual_clip, want):
    logp = jnp.log(jnp.array([[2.0], [2.0], [0.5], [0.5]]))
    advantage = jnp.array([1.0, -1.0, 1.0, -1.0])

    @jax.jit
    @jax.vmap
    def loss(mask):
        return losses.policy_gradient(logp, logp * 0, advantage, mask, clip=clip, dual_clip=dual_clip)[0]

    masks = np.concatenate([np.eye(4, dtype=bool), np.ones((1, 4), bool)])[:, :, None]
    np.testing.assert_allclose(loss(masks), -np.array([*want, np.mean(want)]), rtol=1e-6)


def test_permuted_rows_give_the_same_loss_and_permuted_gradients(x64):
    case = cases(*SHAPE_OF["none", "sequence"])
    order = np.array([2, 0, 3, 1])
    shuffled = {k: v[:, order] for k, v in case.items()}
    (straight, _), slope = run("none", "sequence", case)
    (moved, _), moved_slope = run("none", "sequence", shuffled)
    np.testing.assert_allclose(moved, straight, rtol=1e-11)
    np.testing.assert_allclose(moved_slope, slope[:, order], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("clip", "ratio"), [("ppo", "token"), ("none", "sequence"), ("cispo", "product")])
def test_junk_under_the_mask_changes_nothing_bit_for_bit(x64, junk, clip, ratio):
    case = cases(*SHAPE_OF[clip, ratio])
    empty = ~case["mask"].any(axis=2)
    assert empty.any()

    def holding(x):
        """x wherever no live token reads: under the mask, and in the [N] fields of empty rows."""
        hidden = {k: (empty if np.ndim(case[k]) == 2 else ~case["mask"]) for k in FIELDS if k != "mask"}
        return case | {k: np.where(h, x, case[k]) for k, h in hidden.items()}

    clean, dirty = (run(clip, ratio, holding(x)) for x in (0.0, junk))
    for want, got in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(got, want)
    assert np.all(np.isfinite(dirty[1]))
    assert not np.any(dirty[1][~case["mask"]])


def test_junk_under_the_mask_and_jit_change_nothing():
    """Without jit: the compiler turns a product with a mask into a selection, which hides 0 * NaN."""
    case = {k: jnp.asarray(v[1], None if k == "mask" else jnp.float32) for k, v in cases(6, 5).items()}
    assert case["mask"].any()
    assert not case["mask"].all()

    def call(junk):
        logp, old, ref, weight = (
            jnp.where(case["mask"], case[k], junk) for k in ("logp", "old_logp", "ref_logp", "weight_token")
        )
        empty = ~case["mask"].any(axis=1)
        advantage = jnp.where(empty, junk, case["advantage"])
        surrogate = losses.policy_gradient(
            logp, old, advantage, case["mask"], weight=weight, ratio="sequence", aggregate="sequence"
        )
        return (
            surrogate,
            losses.kl_estimate(logp, ref, case["mask"]),
            losses.negative_log_likelihood(logp, case["mask"]),
        )

    with jax.disable_jit():
        clean = call(0.0)
        jax.tree.map(np.testing.assert_array_equal, call(jnp.nan), clean)
    assert float(clean[0][0]) != 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), clean, jax.jit(call)(0.0))


@functools.cache
def far():
    """Losses, metrics and slopes of every clip and ratio where one log-ratio is +-1e4."""
    logp = jnp.array([[-1.0, -2.0], [-3.0, -1.0]])
    advantage, mask = jnp.array([1.0, -1.0]), jnp.ones((2, 2), bool)

    def call(value):
        old = logp - jnp.zeros((2, 2)).at[0, 0].set(value)
        return {
            (clip, ratio): jax.value_and_grad(losses.policy_gradient, has_aux=True)(
                logp, old, advantage, mask, clip=clip, ratio=ratio
            )
            for clip, ratio in COMBINATIONS
        }

    return jax.jit(jax.vmap(call))(jnp.array([1e4, -1e4]))


@pytest.mark.parametrize(("clip", "ratio"), COMBINATIONS)
def test_log_ratios_of_ten_thousand_stay_finite(clip, ratio):
    (loss, metrics), slope = far()[clip, ratio]
    assert np.all(np.isfinite(loss))
    assert np.all(np.isfinite(slope))
    assert all(np.all(np.isfinite(m)) for m in metrics.values())
    assert metrics["ratio_cut_share"].tolist() == [0.25 if ratio == "token" else 0.5] * 2
    if clip != "cispo":
        assert not np.any(slope[:, 0, 0])  # beyond the cut, nothing pulls


@functools.cache
def both_losses(aggregate):
    """The surrogate plus the likelihood, and its slope, of a [2, 2] batch."""

    def loss(logp, mask):
        old, advantage = logp - 0.1, jnp.arange(1.0, 1.0 + len(logp))
        options = {"aggregate": aggregate, "max_length": 2}
        surrogate = losses.policy_gradient(logp, old, advantage, mask, **options)[0]
        return surrogate + losses.negative_log_likelihood(logp, mask, **options)[0]

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_row_without_tokens_contributes_nothing(aggregate):
    """The same loss, and no gradient, whether the row is there or not; a batch of such rows is exactly 0."""
    logp, mask = np.float32([[-1, -2], [-3, -4]]), np.array([[True, True], [False, False]])
    (with_row, slope), (without, _) = (both_losses(aggregate)(logp[:n], mask[:n]) for n in (2, 1))
    assert float(with_row) == float(without) != 0
    assert np.all(slope[0])
    assert not np.any(slope[1])
    nothing, slope = both_losses(aggregate)(logp, np.zeros((2, 2), bool))
    assert float(nothing) == 0
    assert not np.any(slope)


def test_bfloat16_inputs_stay_within_two_percent_and_sum_in_float32():
    rng = np.random.default_rng(0)
    logp = -rng.uniform(0.1, 1.5, (16, 40)).astype(np.float32)
    old = logp + rng.normal(size=logp.shape).astype(np.float32) * np.float32(0.1)
    advantage, mask = rng.uniform(0.5, 1.5, 16).astype(np.float32), rng.random((16, 40)) < 0.8

    @jax.jit
    def both(*args):
        return [losses.policy_gradient(*args, mask, ratio=ratio)[0] for ratio in ("token", "sequence")]

    for got, want in zip(
        both(*(jnp.asarray(x, jnp.bfloat16) for x in (logp, old, advantage))), both(logp, old, advantage), strict=True
    ):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=2e-2)
    many = jnp.full((4, 1024), -1.0, jnp.bfloat16)  # a bfloat16 sum stops at 256
    for aggregate in AGGREGATES:
        loss, _ = losses.negative_log_likelihood(many, jnp.ones(many.shape, bool), aggregate=aggregate, max_length=1024)
        assert loss.dtype == np.float32
        assert float(loss) == 1.0


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_parts_with_the_denominator_of_the_whole_sum_to_the_whole(x64, aggregate):
    case = oracles.random_tokens(np.random.default_rng(5), 12, 5)
    assert case["mask"].any(axis=1).sum() > 6
    options = {"aggregate": aggregate, "max_length": 5}

    def both(logp, old_logp, advantage, mask, count):
        surrogate = losses.policy_gradient(logp, old_logp, advantage, mask, **options, denominator=count)[0]
        return surrogate, losses.negative_log_likelihood(logp, mask, **options, denominator=count)[0]

    call = jax.jit(both)
    whole = [case[k] for k in ("logp", "old_logp", "advantage", "mask")]
    count = int(losses.count_for(aggregate, case["mask"]))
    want = np.array(call(*whole, None))
    np.testing.assert_allclose(call(*whole, count), want, rtol=1e-12)
    parts = np.array([call(*(x[a : a + 4] for x in whole), count) for a in (0, 4, 8)])
    np.testing.assert_allclose(parts.sum(axis=0), want, rtol=1e-12)
    alone = np.array(call(*(x[:4] for x in whole), None))
    assert np.all(np.abs(alone - parts[0]) > 1e-3)


KINDS = ("k1", "k2", "k3")


@functools.cache
def estimates():
    def call(logp, ref, mask):
        return [losses.kl_estimate(logp, ref, mask, kind=kind) for kind in KINDS]

    return jax.jit(jax.vmap(call))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_kl_estimates_equal_the_oracle(x64, shape, dtype):
    case = cases(*shape)
    tolerance = {"float64": 1e-12, "float32": 1e-5}[dtype]
    out = estimates()(case["logp"].astype(dtype), case["ref_logp"].astype(dtype), case["mask"])
    for kind, got in zip(KINDS, out, strict=True):
        want = [oracles.kl_estimate(c["logp"], c["ref_logp"], c["mask"], kind=kind) for c in unstacked(case)]
        assert got.dtype == dtype
        np.testing.assert_allclose(got, want, tolerance, tolerance, err_msg=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_kl_gradient_equals_finite_differences_and_the_reference_has_none(x64, kind):
    case = unstacked(cases(6, 5))[1]
    logp, ref, mask = (jnp.asarray(case[k]) for k in ("logp", "ref_logp", "mask"))
    assert mask.any()
    slope = np.cos(np.arange(30.0)).reshape(6, 5)

    def score(x, y):
        return jnp.sum(slope * losses.kl_estimate(x, y, mask, kind=kind))

    def truth(x):
        return float(np.sum(slope * oracles.kl_estimate(x, case["ref_logp"], case["mask"], kind=kind)))

    got, none = jax.jit(jax.grad(score, argnums=(0, 1)))(logp, ref)
    np.testing.assert_allclose(got, oracles.numerical_gradient(truth, case["logp"]), rtol=1e-6, atol=1e-8)
    assert not np.any(none)


@pytest.mark.parametrize("kind", KINDS)
def test_kl_estimates_at_the_edges(kind):
    """-inf and NaN under the mask, |d| of 10,000, and k3's precision where the policies nearly agree."""
    logp = jnp.array([[-jnp.inf, -1.0, -1.0, -1.0, jnp.nan]])
    ref = jnp.array([[-2.0, -1e4, 1e4, -1.001, -jnp.inf]])
    mask = jnp.array([[False, True, True, True, False]])
    total = lambda x: (lambda out: (jnp.sum(out), out))(losses.kl_estimate(x, ref, mask, kind=kind))
    (_, out), slope = jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(total, has_aux=True))(logp))
    assert np.all(np.isfinite(out))
    assert np.all(np.isfinite(slope))
    assert np.asarray(out)[0, [0, 4]].tolist() == [0, 0]
    assert slope[0, [0, 4]].tolist() == [0, 0]
    if kind != "k1":
        assert np.all(np.asarray(out) >= 0)
        # k2 = d^2/2; k3 = d^2/2 + d^3/6: 5e-7, which exp(d) - d - 1 would lose in float32
        assert float(out[0, 3]) == pytest.approx(5e-7, rel=1e-2 if kind == "k3" else 1e-3)


def test_no_gradient_flows_to_what_is_held_fixed():
    case = {k: jnp.asarray(v[2], None if k == "mask" else jnp.float32) for k, v in cases(6, 5).items()}
    assert case["mask"].any()

    def loss(old, advantage, weight):
        return losses.policy_gradient(case["logp"], old, advantage, case["mask"], weight=weight)[0]

    slopes = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(case["old_logp"], case["advantage"], case["weight_token"])
    assert not any(np.any(slope) for slope in slopes)


@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_likelihood_equals_the_oracle(x64, shape):
    case = cases(*shape)

    def call(logp, mask, dtype):
        return [
            losses.negative_log_likelihood(logp.astype(dtype), mask, aggregate=how, max_length=9)[0]
            for how in AGGREGATES
        ]

    for dtype, tolerance in ((jnp.float64, 1e-12), (jnp.float32, 1e-5)):
        out = jax.jit(jax.vmap(functools.partial(call, dtype=dtype)))(case["logp"], case["mask"])
        for how, got in zip(AGGREGATES, out, strict=True):
            want = [
                oracles.negative_log_likelihood(c["logp"], c["mask"], aggregate=how, max_length=9)
                for c in unstacked(case)
            ]
            assert got.dtype == dtype
            np.testing.assert_allclose(got, want, tolerance, tolerance, err_msg=how)


N, R = 3, 4
GOOD = {
    "logp": np.zeros((N, R)),
    "old_logp": np.zeros((N, R)),
    "advantage": np.zeros(N),
    "mask": np.ones((N, R), bool),
}
BAD = [
    ({"mask": np.ones((N, R))}, r"mask is float32\[3, 4\], expected b\[N, R\]$"),
    ({"mask": np.ones(N, bool)}, r"mask is bool\[3\], expected b\[N, R\]$"),
    ({"logp": np.zeros((N, 1))}, r"logp is float32\[3, 1\], expected f\[N, R\] with N=3, R=4$"),
    ({"logp": np.zeros((N, R), int)}, r"logp is int32\[3, 4\], expected f\[N, R\] with N=3, R=4$"),
    ({"old_logp": np.zeros((1, R))}, r"old_logp is float32\[1, 4\], expected f\[N, R\] with N=3, R=4$"),
    ({"old_logp": np.zeros(R)}, r"old_logp is float32\[4\], expected f\[N, R\] with N=3, R=4$"),
    ({"old_logp": np.zeros((N, R)).tolist()}, r"old_logp is a list, expected an array f\[N, R\]$"),
    ({"advantage": np.zeros(R)}, r"advantage is float32\[4\], expected f\[N\]\|f\[N, R\] with N=3, R=4$"),
    ({"advantage": np.zeros((N, 1))}, r"advantage is float32\[3, 1\], expected f\[N\]\|f\[N, R\] with N=3, R=4$"),
    ({"advantage": np.zeros(N, int)}, r"advantage is int32\[3\], expected f\[N\]\|f\[N, R\] with N=3, R=4$"),
    ({"weight": np.ones((1, R))}, r"weight is float32\[1, 4\], expected f\[N\]\|f\[N, R\] with N=3, R=4$"),
    ({"clip": "PPO"}, r"clip must be 'ppo', 'literal', 'cispo' or 'none', got 'PPO'$"),
    ({"ratio": "mean"}, r"ratio must be 'token', 'sequence' or 'product', got 'mean'$"),
    ({"aggregate": "sum"}, r"aggregate must be 'token', 'sequence' or 'constant', got 'sum'$"),
    ({"aggregate": "constant"}, r"divides by max_length, which must be at least 1, got None$"),
    ({"aggregate": "constant", "max_length": 0}, r"divides by max_length, which must be at least 1, got 0$"),
    ({"clip_low": -0.1}, r"need 0 <= clip_low <= 1 and clip_high >= 0, got -0.1 and 0.2$"),
    ({"clip_low": 1.5}, r"need 0 <= clip_low <= 1 and clip_high >= 0, got 1.5 and 0.2$"),
    ({"clip_high": -1.0}, r"need 0 <= clip_low <= 1 and clip_high >= 0, got 0.2 and -1.0$"),
    ({"clip_high": float("nan")}, r"need 0 <= clip_low <= 1 and clip_high >= 0, got 0.2 and nan$"),
    ({"dual_clip": 1.0}, r"dual_clip=1.0 must be above 1 and goes with clip='ppo' only, got clip='ppo'$"),
    ({"dual_clip": 3.0, "clip": "cispo"}, r"dual_clip=3.0 must be above 1 and goes with clip='ppo' only, got clip='ci"),
]


@pytest.mark.parametrize(("change", "text"), BAD)
def test_bad_input_is_refused_by_name(change, text):
    with pytest.raises(ValueError, match=text):
        losses.policy_gradient(**(GOOD | change))


def test_bad_input_of_the_other_losses():
    logp, mask = GOOD["logp"], GOOD["mask"]
    with pytest.raises(ValueError, match=r"ref_logp is float32\[3\], expected f\[N, R\] with N=3, R=4$"):
        losses.kl_estimate(logp, logp[:, 0], mask, kind="k1")
    with pytest.raises(ValueError, match=r"kind must be 'k1', 'k2' or 'k3', got 'k4'$"):
        losses.kl_estimate(logp, logp, mask, kind="k4")
    with pytest.raises(ValueError, match=r"logp is float32\[3\], expected f\[N, R\] with N=3, R=4$"):
        losses.negative_log_likelihood(logp[:, 0], mask)
    with pytest.raises(ValueError, match=r"aggregate must be 'token', 'sequence' or 'constant', got 'mean'$"):
        losses.negative_log_likelihood(logp, mask, aggregate="mean")
    with pytest.raises(ValueError, match=r"logp is float32\[3, 1\], expected f\[N, R\] with N=3, R=4"):
        jax.eval_shape(losses.negative_log_likelihood, logp[:, :1], mask)
