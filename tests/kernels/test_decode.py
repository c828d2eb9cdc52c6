"""decode_attention: every form against the plain meaning, and the plain meaning against forest attention."""

import functools
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, use_abstract_mesh

from rlalign.models.decoder import Decoder
from rlalign.train.mesh import make_mesh, shard_decoder
from rlalign_kernels import decode_attention
from rlalign_kernels.attention.reference import reference_attention
from rlalign_kernels.decode.reference import reference_decode
from tests.kernels.test_attention import TOLERANCE
from tests.kernels.test_pallas import H100, KERNELS
from tests.tiny import QWEN3

every = pytest.mark.parametrize("backend", ["xla", "interpret", "interpret_triton"])
both = pytest.mark.parametrize("backend", ["interpret", "interpret_triton"])
LAYERS, LAYER = 3, 1


def arrays(batch, samples, heads, kv_heads, width, prompt, response, dtype):
    """q, prefix and suffix."""
    rng = np.random.default_rng(heads + width)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    cache = lambda *shape: (draw(LAYERS, batch, kv_heads, *shape, width), draw(LAYERS, batch, kv_heads, *shape, width))
    return draw(batch, samples, heads, width), cache(prompt), cache(samples, response)


@functools.cache
def compiled(function=decode_attention, **options):
    return jax.jit(functools.partial(function, **options))


def run(inputs, length, step, **options):
    return np.asarray(compiled(**options)(*inputs, LAYER, jnp.asarray(length), step))


def check(inputs, cases, *, backend, **options):
    """`cases` are (length, step); one program runs them all."""
    q = inputs[0]
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), inputs)
    for length, step in cases:
        got = run(inputs, length, step, backend=backend, **options)
        assert got.dtype == q.dtype
        assert got.shape == q.shape
        reference = compiled(reference_decode, **options)
        expected = np.asarray(reference(*wide, LAYER, jnp.asarray(length), step))
        error = np.abs(got.astype(np.float64) - expected).max()
        assert error <= TOLERANCE[q.dtype.name] * np.abs(expected).max(), (length, step)


def test_oracle_is_a_row_of_forest_attention(x64):
    """The newest token of a sample is the last one of the row (prompt, its past)."""
    q, prefix, suffix = arrays(2, 2, 4, 2, 8, 5, 4, "float64")
    length, step = (3, 5), 2
    options = {"scale": 0.7, "softcap": 3.0}
    got = compiled(reference_decode, **options)(q, prefix, suffix, LAYER, jnp.asarray(length), step)
    whole = compiled(reference_attention, **options)
    q, prefix, suffix = jax.tree.map(np.asarray, (q, prefix, suffix))
    for b, n in enumerate(length):
        for g in range(2):
            k, v = (
                np.concatenate([before[LAYER, b, :, :n], since[LAYER, b, :, g, : step + 1]], axis=1).swapaxes(0, 1)
                for before, since in zip(prefix, suffix, strict=True)
            )
            row = np.zeros((1, len(k), 4, 8))
            row[0, -1] = q[b, g]
            expected = whole(row, k[None], v[None], np.full((1, len(k)), len(k)))[0, -1]
            np.testing.assert_allclose(got[b, g], expected, rtol=0, atol=1e-12)


# Three ragged prompts of 37 columns, pasts of 21: neither is whole tiles; step 0, some step, the last one.
RAGGED = [((37, 1, 16), 0), ((5, 33, 17), 15), ((1, 36, 32), 20)]


@every
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype"),
    [(2, 2, "float32"), (8, 2, "float32"), (8, 2, "bfloat16"), (7, 1, "bfloat16"), (8, 1, "float32")],
)
def test_equals_the_plain_meaning(backend, heads, kv_heads, dtype, x64):
    check(arrays(3, 3, heads, kv_heads, 64, 37, 21, dtype), RAGGED, backend=backend)


@both
@pytest.mark.parametrize("width", [96, 128, 256])
def test_other_head_widths_and_options(backend, width, x64):
    check(arrays(1, 2, 2, 1, width, 19, 3, "float32"), [((18,), 1)], backend=backend, scale=-0.3, softcap=1.5)


def test_float64_and_any_width(x64):
    check(arrays(3, 3, 4, 2, 8, 150, 100, "float64"), [((150, 1, 65), 0), ((64, 128, 2), 99)], backend="xla")


def test_options_on_every_platform(x64):
    check(arrays(1, 2, 2, 1, 8, 5, 3, "float64"), [((4,), 1)], backend="xla", scale=-0.3, softcap=1.5)


@every
def test_long_caches(backend, x64):
    """Keys enough for several parts of a GPU's grid, steps of a TPU's, tiles of a bfloat16 loop."""
    check(arrays(1, 1, 2, 2, 64, 530, 5, "bfloat16"), [((529,), 4), ((3,), 0)], backend=backend)


WINDOWS = (1, 2, 7, 16, 17, 40, 2**30)  # within the past, over its edge, prompts out of sight, all of it


@every
@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_leaves_out_what_is_further_back(backend, window, x64):
    check(arrays(3, 3, 8, 2, 64, 37, 21, "float32"), RAGGED, backend=backend, window=window)


def test_a_window_is_that_of_forest_attention(x64):
    """The newest token of a row of 8, whose keys are cut by the rule of the trainer."""
    q, prefix, suffix = arrays(1, 1, 4, 2, 8, 5, 4, "float64")
    got = compiled(window=4)(q, prefix, suffix, LAYER, jnp.array([5]), 2)
    k, v = (
        np.concatenate([a[LAYER, 0], b[LAYER, 0, :, 0, :3]], axis=1).swapaxes(0, 1)
        for a, b in zip(prefix, suffix, strict=True)
    )
    row = jnp.zeros((1, 8, 4, 8)).at[0, -1].set(q[0, 0])
    at = {"window": 4, "position": jnp.arange(8)[None]}
    expected = reference_attention(row, k[None], v[None], jnp.full((1, 8), 8), **at)[0, -1]
    np.testing.assert_allclose(got[0, 0], expected, rtol=0, atol=1e-12)


@every
def test_a_window_reads_no_tile_before_it(backend, x64):
    """NaN in every key that the window hides, whole tiles and parts of one: bit for bit the same."""
    length, step, window = np.array([37, 33, 20]), 20, 24
    q, prefix, suffix = arrays(3, 3, 8, 2, 64, 37, 21, "float32")
    clean = run((q, prefix, suffix), length, step, backend=backend, window=window)
    hidden = np.arange(37)[None] <= (length + step - window)[:, None]
    assert hidden.any(axis=1).all()
    dirty = tuple(jnp.where(hidden[None, :, None, :, None], jnp.nan, x) for x in prefix)
    np.testing.assert_array_equal(clean, run((q, dirty, suffix), length, step, backend=backend, window=window))
    assert np.isfinite(clean).all()


@both
def test_more_queries_than_a_tile_holds(backend, x64):
    check(arrays(1, 33, 8, 1, 64, 19, 2, "float32"), [((18,), 1)], backend=backend)


@every
def test_what_lies_behind_the_limits_changes_nothing(backend, x64):
    """Junk and NaN in every unused column and in the other layers: bit for bit the same, twice."""
    length, step = np.array([37, 1, 16]), 4
    q, prefix, suffix = arrays(3, 3, 8, 2, 64, 37, 21, "float32")
    used = np.zeros((LAYERS, 3, 1, 37, 1), bool)
    used[LAYER] = (np.arange(37)[None] < length[:, None])[:, None, :, None]
    since = np.zeros((LAYERS, 1, 1, 1, 21, 1), bool)
    since[LAYER, ..., : step + 1, :] = True
    clean = run((q, prefix, suffix), length, step, backend=backend)
    for junk in (np.nan, np.inf, -3e38):
        dirty = [tuple(jnp.where(mask, x, junk) for x in c) for mask, c in ((used, prefix), (since, suffix))]
        np.testing.assert_array_equal(clean, run((q, *dirty), length, step, backend=backend))
    assert np.isfinite(clean).all()


@every
def test_no_keys_give_zero(backend, x64):
    """An empty prompt leaves the past; without either there is nothing, and nothing is NaN."""
    inputs = arrays(3, 3, 8, 2, 64, 37, 21, "float32")
    v = inputs[2][1]
    assert not run(inputs, [0, 0, 0], -1, backend=backend).any()
    own = np.repeat(np.asarray(v[LAYER, :, :, :, 0]).swapaxes(1, 2), 4, axis=2)  # step 0: one key, of weight 1
    np.testing.assert_allclose(run(inputs, [0, 0, 0], 0, backend=backend), own, rtol=1e-6)


def test_the_loop_over_keys_has_an_end_that_is_data():
    """One tile needs none; a static number of tiles would be a scan."""
    for response, loops in ((64, 0), (65, 1), (640, 1)):
        inputs = arrays(1, 1, 2, 1, 64, 8, response, "float32")
        program = str(jax.make_jaxpr(decode_attention)(*inputs, LAYER, jnp.array([8]), 3))
        assert program.count("while[") == loops
        assert "scan[" not in program


def test_the_environment_chooses_a_backend(monkeypatch):
    inputs = arrays(1, 2, 2, 1, 64, 19, 3, "float32")
    program = lambda: str(jax.make_jaxpr(lambda *x: decode_attention(*x, LAYER, jnp.array([3]), 1))(*inputs))
    assert "pallas_call" not in program()
    monkeypatch.setenv("RLALIGN_KERNELS", "interpret")
    assert program().count("pallas_call") == 2
    monkeypatch.setenv("RLALIGN_KERNELS", "cudnn")
    with pytest.raises(ValueError, match="unknown kernel backend 'cudnn': choose one of xla, tpu, triton, "):
        program()


@both
def test_caches_stay_on_their_device(backend, monkeypatch):
    """Prompts over data and fsdp, key/value heads over tensor: as the sampler calls it under a mesh."""
    monkeypatch.setenv("RLALIGN_KERNELS", backend)
    decode = shard_decoder(Decoder(QWEN3), make_mesh(data=2, fsdp=2, tensor=2)).decode
    inputs, length = arrays(4, 2, 4, 2, 64, 19, 3, "float32"), jnp.array([18, 1, 19, 7])
    got = jax.jit(decode)(*inputs, jnp.int32(LAYER), length, jnp.int32(1))
    expected = reference_decode(*inputs, LAYER, length, 1)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("width", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers_for_its_device(backend, width, dtype):
    """Prompt and past become kernels; `make aot` and `make aot-cuda` compile them."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    cache = lambda *sizes: (shape(2, 2, 2, *sizes, width),) * 2
    inputs = shape(2, 4, 14, width), cache(1100), cache(4, 300), scalar, jax.ShapeDtypeStruct((2,), jnp.int32), scalar
    platform, call = KERNELS[backend]
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)) if backend == "triton" else nullcontext():
        text = compiled(backend=backend).trace(*inputs).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(call) == 2
    assert "decode_attention" in text


GOOD = {
    "q": ((2, 3, 4, 64), "float32"),
    "k": ((2, 2, 2, 9, 64), "float32"),
    "v": ((2, 2, 2, 9, 64), "float32"),
    "sk": ((2, 2, 2, 3, 5, 64), "float32"),
    "sv": ((2, 2, 2, 3, 5, 64), "float32"),
    "layer": ((), "int32"),
    "length": ((2,), "int32"),
    "step": ((), "int32"),
}
REFUSALS = {
    "rank of q": (
        {"q": ((2, 12, 64), "float32")},
        r"q must be \[B, G, H, D\], k and v of prefix \[L, B, K, P, D\], of",
    ),
    "rank of the suffix": (
        {"sk": ((2, 2, 2, 5, 64), "float32")},
        r"of suffix \[L, B, K, G, R, D\]; got q \(2, 3, 4, 64",
    ),
    "k is not v": (
        {"v": ((2, 2, 2, 8, 64), "float32")},
        r"got q .*, prefix \(2, 2, 2, 9, 64\), \(2, 2, 2, 8, 64\), suf",
    ),
    "another batch": ({"q": ((3, 3, 4, 64), "float32")}, r"q, prefix and suffix must agree in L, B, K, G and D; got q"),
    "another group": ({"q": ((2, 4, 4, 64), "float32")}, "must agree in L, B, K, G and D"),
    "another width": ({"q": ((2, 3, 4, 32), "float32")}, "must agree in L, B, K, G and D"),
    "heads": ({"q": ((2, 3, 5, 64), "float32")}, "2 key/value heads do not divide 5 query heads"),
    "dtypes": ({"k": ((2, 2, 2, 9, 64), "bfloat16")}, "must have one floating dtype; got bfloat16, float32"),
    "integers": (dict.fromkeys(("q",), ((2, 3, 4, 64), "int32")), "one floating dtype; got float32, int32"),
    "layer": ({"layer": ((1,), "int32")}, r"layer must be int\[\]; got int32\[1\]"),
    "length": ({"length": ((3,), "int32")}, r"length must be int\[2\]; got int32\[3\]"),
    "step": ({"step": ((), "float32")}, r"step must be int\[\]; got float32\[\]"),
    "window": ({"window": ((1,), "int32")}, r"window must be int\[\]; got int32\[1\]"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_argument(case):
    change, message = REFUSALS[case]
    change = dict(change)
    window = change.pop("window", ((), "int32"))
    q, k, v, sk, sv, *at, w = (jax.ShapeDtypeStruct(*x) for x in (*(GOOD | change).values(), window))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda q, before, since, *at: decode_attention(q, before, since, *at[:-1], window=at[-1]),
            q,
            (k, v),
            (sk, sv),
            *at,
            w,
        )


def test_a_soft_cap_that_is_none_is_refused():
    q, k, v, sk, sv, *at = (jax.ShapeDtypeStruct(*x) for x in GOOD.values())
    with pytest.raises(ValueError, match=r"softcap must be positive, got -1.0: None is no cap"):
        jax.eval_shape(functools.partial(decode_attention, softcap=-1.0), q, (k, v), (sk, sv), *at)


@pytest.mark.parametrize(("width", "dtype"), [(48, "float32"), (64, "float16")])
@pytest.mark.parametrize("backend", ["tpu", "triton"])
def test_heads_that_no_kernel_takes_are_refused(backend, width, dtype):
    inputs = jax.eval_shape(lambda: arrays(1, 2, 2, 1, width, 5, 3, dtype))
    at = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    message = f"backend '{backend}' take heads of width 64, 96, 128, 256 in bfloat16 or float32; got width {width} in"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(decode_attention, backend=backend), *inputs, *at)
