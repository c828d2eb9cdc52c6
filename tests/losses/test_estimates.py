"""Importance weights between sampler and trainer; kl_estimate is judged beside the surrogate in test_policy.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign import losses
from tests import oracles

VARIANTS = {
    "token, truncate": {},
    "token, mask": {"beyond": "mask", "cap": 1.5, "floor": 0.5},
    "sequence, truncate": {"level": "sequence", "cap": 3.0},
    "sequence, mask": {"level": "sequence", "beyond": "mask", "cap": 3.0},
}
each = pytest.mark.parametrize("name", VARIANTS)


@functools.cache
def cases():
    rng = np.random.default_rng(0)
    return oracles.stack([oracles.random_tokens(rng, 6, 5) for _ in range(200)])


def run(name, case, dtype):
    call = jax.vmap(functools.partial(losses.importance_weight, **VARIANTS[name]))
    out = jax.jit(call)(*(jnp.asarray(case[k], dtype) for k in ("logp", "old_logp")), jnp.asarray(case["mask"]))
    return jax.tree.map(np.asarray, out)


@each
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_weights_equal_the_oracle(x64, name, dtype, tolerance):
    case = cases()
    weight, metrics = run(name, case, dtype)
    assert weight.dtype == dtype
    beyond = 0.0
    for c in range(200):
        args = (case[k][c] for k in ("logp", "old_logp", "mask"))
        want, wanted = oracles.importance_weight(*args, **VARIANTS[name])
        np.testing.assert_allclose(weight[c], want, tolerance, tolerance)
        assert set(metrics) == set(wanted)
        for key, value in metrics.items():
            np.testing.assert_allclose(value[c], wanted[key], tolerance, tolerance, err_msg=key)
        beyond += wanted["weight_beyond_share"]
    assert 1 < beyond < 199


@each
def test_junk_under_the_mask_changes_nothing(name):
    one = {k: cases()[k][1] for k in ("logp", "old_logp", "mask")}
    assert 0 < one["mask"].sum() < one["mask"].size

    def at(junk):
        hidden = {k: jnp.where(one["mask"], one[k], junk) for k in ("logp", "old_logp")}
        return losses.importance_weight(hidden["logp"], hidden["old_logp"], jnp.asarray(one["mask"]), **VARIANTS[name])

    with jax.disable_jit():
        for junk in (np.nan, -np.inf):
            for got, want in zip(jax.tree.leaves(at(junk)), jax.tree.leaves(at(0.0)), strict=True):
                np.testing.assert_array_equal(got, want)


def test_weights_of_equal_distributions_are_one_and_have_no_gradient():
    logp, mask = jnp.array([[-1.0, -2.0]]), jnp.array([[True, True]])
    for options in VARIANTS.values():
        call = lambda x, o=options: losses.importance_weight(x, logp, mask, **o)[0]
        weight, slope = jax.jit(lambda x, call=call: (call(x), jax.grad(lambda y: call(y).sum())(x)))(logp)
        assert weight.tolist() == [[1.0, 1.0]]
        assert not np.any(slope)


BAD = [
    ({"level": "row"}, r"level must be 'token' or 'sequence', got 'row'$"),
    ({"beyond": "clip"}, r"beyond must be 'truncate' or 'mask', got 'clip'$"),
    ({"cap": 0.5}, r"cap must be at least 1, got 0.5: "),
    ({"cap": float("nan")}, r"cap must be at least 1, got nan"),
    ({"floor": 0.5}, r"floor must be in \[0, 1\] and goes with beyond='mask', got 0.5 with 'truncate'$"),
    ({"floor": 1.5, "beyond": "mask"}, r"floor must be in \[0, 1\] and goes with beyond='mask', got 1.5 with 'mask'$"),
    ({"mask": np.ones(2, bool)}, r"mask is bool\[2\], expected b\[N, R\]$"),
    ({"behaviour_logp": np.zeros((2, 1))}, r"behaviour_logp is float32\[2, 1\], expected f\[N, R\] with N=1, R=2$"),
]


@pytest.mark.parametrize(("change", "text"), BAD)
def test_bad_input_is_refused_by_name(change, text):
    good = {"logp": np.zeros((1, 2)), "behaviour_logp": np.zeros((1, 2)), "mask": np.ones((1, 2), bool)}
    with pytest.raises(ValueError, match=text):
        losses.importance_weight(**(good | change))
