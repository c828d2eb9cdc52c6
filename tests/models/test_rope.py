"""Rotary embeddings: the tables against transformers' own, the rotation against a loop, and what makes it relative."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlalign.models.families import from_hugging_face
from rlalign.models.rope import inverse_frequencies, rotate
from tests.models.folders import FIXTURES

TABLES = json.loads((FIXTURES / "frequencies.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", TABLES)
def test_frequencies_equal_those_of_transformers(name):
    table = TABLES[name]
    frequencies, scale = inverse_frequencies(from_hugging_face(table["config"]))
    assert frequencies.dtype == np.float64
    np.testing.assert_allclose(frequencies, table["frequencies"], rtol=1e-6, atol=0)  # theirs are float32
    assert scale == pytest.approx(table["scale"], rel=1e-12)


def test_tables_differ_from_one_another():
    """Each recorded table tests something that the others do not."""
    seen = {(*table["frequencies"], table["scale"]) for table in TABLES.values()}
    assert len(seen) == len(TABLES) - 1  # leaving the factor to the lengths gives the plain yarn table


def loop(x, position, frequencies, scale):
    """The rotation of each pair as a product of complex numbers."""
    out, half = np.empty(x.shape), x.shape[-1] // 2
    for index in np.ndindex(x.shape[:-1]):
        for i in range(half):
            turned = complex(x[index][i], x[index][i + half]) * np.exp(1j * position[index[:-1]] * frequencies[i])
            out[index][i], out[index][i + half] = scale * turned.real, scale * turned.imag
    return out


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("lead", [(), (5,), (2, 5), (3, 2, 5)])
def test_rotation_equals_the_loop(lead, jit):
    rng = np.random.default_rng(0)
    x, position = rng.normal(size=(*lead, 3, 8)).astype(np.float32), rng.integers(0, 50, lead).astype(np.int32)
    frequencies = 10.0 ** -np.arange(4)
    run = jax.jit(rotate) if jit else rotate
    got = run(jnp.asarray(x), jnp.asarray(position), frequencies, 1.25)
    np.testing.assert_allclose(got, loop(x, position, frequencies, 1.25), atol=2e-5)


def test_precision_follows_the_argument():
    rng = np.random.default_rng(1)
    x, position, frequencies = (
        rng.normal(size=(4, 2, 8)),
        np.array([0, 7, 4001, 99999]),
        10000.0 ** -np.arange(0, 1, 0.25),
    )
    expected = loop(x, position, frequencies, 1.0)
    with jax.enable_x64(True):
        got = rotate(jnp.asarray(x), jnp.asarray(position), frequencies)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, expected, atol=1e-10)
    got = rotate(jnp.asarray(x, jnp.bfloat16), jnp.asarray(position, jnp.int32), frequencies)
    assert got.dtype == jnp.bfloat16
    # One rounding of x and one of the result; positions must not be rounded: bfloat16 has no 4001.
    np.testing.assert_allclose(got.astype(np.float32), expected, atol=0.03)


def test_scores_depend_on_the_distance_only():
    rng = np.random.default_rng(2)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 8)), jnp.float32) for _ in range(2))
    frequencies = 100.0 ** -np.arange(0, 1, 0.25)

    def score(i, j):
        return float(jnp.sum(rotate(q, jnp.array([i]), frequencies) * rotate(k, jnp.array([j]), frequencies)))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(4, 9), abs=1e-2)
    assert score(3, 3) == pytest.approx(float(jnp.sum(q * k)), abs=1e-5)


def test_gradient():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(3, 2, 4)), jnp.float32)
    check_grads(lambda x: rotate(x, jnp.arange(3), np.array([1.0, 0.1]), 0.5), (x,), order=1, modes=["rev"], eps=1e-2)


BAD = {
    "position": (((2, 3, 2, 4), jnp.zeros((2, 3)), np.ones(2)), r"position is float32\[2, 3\], expected i\[B, T\]"),
    "x": (
        ((3, 2, 4), jnp.zeros((2, 3), int), np.ones(2)),
        r"x is float32\[3, 2, 4\], expected f\[B, T, H, D\] with B=2, T=3",
    ),
    "frequencies": (
        ((2, 3, 2, 4), jnp.zeros((2, 3), int), np.ones(4)),
        r"frequencies is float\d\d\[4\], expected f\[D/2\] with D/2=2",
    ),
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_arguments(argument):
    (shape, position, frequencies), message = BAD[argument]
    with pytest.raises(ValueError, match=message):
        rotate(jnp.zeros(shape), position, frequencies)


def test_llama3_ends_are_kept_and_divided():
    """Short waves stay, long ones are divided by the factor, exactly; between them the ramp falls."""
    config = from_hugging_face(TABLES["llama3"]["config"])
    plain, _ = inverse_frequencies(from_hugging_face(TABLES["plain"]["config"]))
    kept = inverse_frequencies(config)[0] / plain
    turns = 8192 * plain / (2 * math.pi)
    np.testing.assert_array_equal(kept[turns > 4], 1.0)
    np.testing.assert_array_equal(kept[turns < 1], 0.25)
    assert np.all(np.diff(kept) <= 0)
    assert np.any((turns > 1) & (turns < 4))
