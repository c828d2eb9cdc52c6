"""The decoder over a forest against the decoder over the repeated batch: every parameter's gradient."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign.logprobs import token_logprobs
from rlalign.models.decoder import KEPT, Decoder, logits
from rlalign.types import TokenForest
from tests.jaxprs import equations
from tests.tiny import GEMMA, GPT_NEOX, QWEN2, QWEN3, Samples, dense_decoder, ragged_groups, random_params, tree

pytestmark = pytest.mark.usefixtures("x64")  # throughout, so that one compiled function serves several tests

ROWS, LENGTH, SAMPLES, RESPONSE, LONGEST = 4, 40, 8, 12, 24
MODELS = {
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gpt_neox": GPT_NEOX,
    "windows": dataclasses.replace(QWEN2, window=4),
}
FORESTS = {
    "ragged groups": ragged_groups(0, [(9, (1, 6, 3)), (5, (12, 2)), (11, (4, 7, 5))]),
    "prompts of one token": ragged_groups(1, [(1, (5, 1, 12, 3)), (1, (2, 8, 4, 1))]),
    "responses of one token": ragged_groups(2, [(7, (1, 1, 1)), (12, (1, 1, 1, 1)), (3, (1,))]),
    "three levels": tree(3, (4, 3, 3, 3), 2),
    "nothing shared": Samples([np.array([i, 3, 1, 4, 1, i, 9]) for i in range(8)], [4] * 8),
    "an empty response": ragged_groups(5, [(6, (0, 4)), (2, (12, 0)), (10, (3, 3, 2, 1))]),
}


def weights(seed=0):
    """Random weights of every log-prob and every entropy."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(SAMPLES, RESPONSE))) for _ in range(2))


AS_USERS_COMPILE = {"xla_backend_optimization_level": 3}


@functools.cache
def shared_gradient(decoder):
    @jax.jit
    def run(params, packed, a, b):
        def loss(params):
            hidden = decoder.apply(params, packed.forest)
            cap = decoder.config.logit_softcap
            logp, entropy = token_logprobs(hidden, decoder.head(params), packed.forest, packed.node, softcap=cap)
            return jnp.sum(a.astype(logp.dtype) * logp + b.astype(logp.dtype) * entropy), (logp, entropy)

        (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return out, gradient

    return run


@functools.cache
def repeated_gradient(config):
    """The same loss over rows that share nothing, with dense attention and whole logits."""
    decoder = dense_decoder(config)

    @jax.jit
    def run(params, forest, sample, at, token, mask, a, b):
        def loss(params):
            scores = logits(decoder, params, forest)
            scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
            logp = jax.nn.log_softmax(scores, axis=-1)[sample, at - 1]
            entropy = jnp.where(mask, -jnp.sum(jnp.exp(logp) * logp, axis=-1), 0)
            logp = jnp.where(mask, jnp.take_along_axis(logp, token[..., None], axis=-1)[..., 0], 0)
            return jnp.sum(a.astype(logp.dtype) * logp + b.astype(logp.dtype) * entropy), (logp, entropy)

        (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return out, gradient

    def call(params, samples: Samples, a, b):
        at, mask = samples.response(RESPONSE)
        sample = np.arange(len(at))[:, None]
        forest = samples.repeated(LONGEST)
        return run(params, forest, sample, at, forest.token[sample, at], mask, a, b)

    return call


def pack(samples):
    return samples.pack(row_length=LENGTH, num_rows=ROWS, response_length=RESPONSE)


def assert_near(got, expected, tolerance):
    """Each leaf, relative to its largest entry."""
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.abs(y).max() > 0, path
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max(), path


def with_dtype(model, dtype, **options):
    return dataclasses.replace(MODELS[model], dtype=dtype, **options)


def same_params(model, *dtypes):
    """Parameters of each dtype that hold the same numbers: those of the last, which is the narrowest."""
    params = random_params(with_dtype(model, dtypes[-1]))
    return [jax.tree.map(lambda x, d=d: x.astype(d), params) for d in dtypes]


@pytest.mark.parametrize(
    ("model", "name"),
    [(model, name) for model in MODELS for name in FORESTS if model.startswith("qwen") or name != "nothing shared"],
)
def test_gradients_equal_those_of_the_repeated_batch(model, name):
    """Of every parameter, for a loss that weights every log-prob and every entropy."""
    samples = FORESTS[name]
    packed = pack(samples)
    assert packed.mask.shape == (SAMPLES, RESPONSE)
    wide, narrow = same_params(model, "float64", "float32")
    expected = repeated_gradient(with_dtype(model, "float64"))(wide, samples, *weights())
    for params, tolerance in ((wide, 1e-10), (narrow, 1e-5)):
        dtype = params["embedding"].dtype
        run = shared_gradient(Decoder(with_dtype(model, dtype.name)))
        if params is narrow:  # how much float32 loses depends on the code: judge what users run, not conftest.py's
            run = run.lower(params, packed, *weights()).compile(compiler_options=AS_USERS_COMPILE)
        got = run(params, packed, *weights())
        assert all(x.dtype == dtype for x in jax.tree.leaves(got))
        assert_near(got, expected, tolerance)


def test_the_forests_test_what_they_say():
    """Tokens are stored once, in several rows, in several trees a row and at several depths."""
    for name, samples in FORESTS.items():
        forest = pack(samples).forest
        prefixes = {tuple(t[: i + 1].tolist()) for t in samples.tokens for i in range(len(t))}
        stored = int((forest.visible_until > 0).sum())
        assert stored >= len(prefixes)
        if name == "nothing shared":
            assert stored == sum(map(len, samples.tokens))
        else:
            assert stored < sum(map(len, samples.tokens))
    forest = pack(FORESTS["ragged groups"]).forest
    assert (forest.visible_until.any(axis=1)).sum() > 1
    roots = (forest.parent < 0) & (forest.visible_until > 0)
    assert roots.sum(axis=1).max() > 1


WIDE = Decoder(with_dtype("qwen3", "float64"))


@pytest.mark.parametrize("remat", KEPT)
def test_remat_gives_the_same_gradients(remat):
    full = Decoder(with_dtype("qwen3", "float64", remat=remat))
    params, packed = random_params(WIDE.config), pack(FORESTS["three levels"])
    expected = shared_gradient(WIDE)(params, packed, *weights())
    assert_near(shared_gradient(full)(params, packed, *weights()), expected, 1e-12)


def operations(model, remat):
    """How many of each primitive are in the traced gradient."""
    decoder = Decoder(with_dtype(model, "float64", remat=remat))
    packed, params = pack(FORESTS["three levels"]), random_params(decoder.config)
    traced = jax.make_jaxpr(shared_gradient.__wrapped__(decoder))(params, packed, *weights())
    return collections.Counter(e.primitive.name for e in equations(traced))


@pytest.mark.parametrize("model", ["qwen3", "gemma"])
def test_remat_never_runs_attention_again(model, monkeypatch):
    """Attention takes exponentials, forward and backward; layers do nowhere else."""
    once = operations(model, "none")
    products, full = operations(model, "products"), operations(model, "full")
    assert products["exp"] == full["exp"] == once["exp"]
    assert products["dot_general"] == once["dot_general"] < full["dot_general"]
    assert once["rsqrt"] < products["rsqrt"]  # norms are computed again
    monkeypatch.setitem(KEPT, "full", jax.checkpoint_policies.nothing_saveable)
    assert operations(model, "full")["exp"] > once["exp"]  # what it would be


def test_init_depends_on_the_seed_alone():
    init = jax.jit(Decoder(QWEN2).init)
    first, other = init(3), init(4)
    again = jax.jit(dense_decoder(dataclasses.replace(QWEN2, remat="full")).init)(3)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["embedding"], other["embedding"])
    kernel = np.asarray(first["layers"]["mlp"]["gate"]["kernel"])
    assert not np.array_equal(kernel[0], kernel[1])  # layers differ
    assert kernel.std() == pytest.approx(0.02, rel=0.1)


def test_init_by_the_number_of_inputs():
    """1 / sqrt(inputs); what writes to the residual stream sqrt(2 layers) times less; norms and biases as they were."""
    config = dataclasses.replace(QWEN2, width=96, heads=6, head_width=32, mlp_width=160, tied_head=False, layers=3)
    fixed, scaled = (Decoder(config).init(5, deviation=kind) for kind in ("fixed", "fan_in"))
    layer, bare = scaled["layers"], fixed["layers"]
    for owner, expected in {"query": 96**-0.5, "value": 96**-0.5, "output": 192**-0.5 / 6**0.5}.items():
        assert layer["attention"][owner]["kernel"].std() == pytest.approx(expected, rel=0.03)
    for owner, expected in {"gate": 96**-0.5, "up": 96**-0.5, "down": 160**-0.5 / 6**0.5}.items():
        assert layer["mlp"][owner]["kernel"].std() == pytest.approx(expected, rel=0.03)
    for matrix in (scaled["embedding"], scaled["head"]["kernel"]):
        assert matrix.std() == pytest.approx(96**-0.5, rel=0.1)
    np.testing.assert_array_equal(layer["attention_norm"]["scale"], bare["attention_norm"]["scale"])
    np.testing.assert_array_equal(layer["attention"]["query"]["bias"], bare["attention"]["query"]["bias"])
    with pytest.raises(ValueError, match="deviation='xavier' is not known; choose 'fixed' or 'fan_in'"):
        Decoder(config).init(5, deviation="xavier")  # pyright: ignore[reportArgumentType]


def test_tied_and_untied_heads():
    tied, untied = random_params(QWEN2), random_params(QWEN3)
    assert "head" not in tied
    np.testing.assert_array_equal(Decoder(QWEN2).head(tied), tied["embedding"].T)
    np.testing.assert_array_equal(Decoder(QWEN3).head(untied), untied["head"]["kernel"])
    assert untied["head"]["kernel"].shape == (QWEN3.width, QWEN3.vocab_size)


def test_an_untied_embedding_has_no_gradient_through_the_head():
    """Rows of tokens that never occur: with a head of its own, nothing touches them."""
    samples = ragged_groups(0, [(5, (12, 12, 5, 12)), (4, (12, 6, 12, 10))], vocab=9)
    _, gradient = shared_gradient(WIDE)(random_params(WIDE.config), pack(samples), *weights())
    embedding = np.asarray(gradient["embedding"])
    assert embedding[:9].any(axis=1).all()
    assert not embedding[9:].any()
    assert np.asarray(gradient["head"]["kernel"])[:, 9:].any()


def test_logits_are_hidden_states_times_the_head():
    params, samples = random_params(WIDE.config), FORESTS["ragged groups"]
    packed = pack(samples)
    forest = TokenForest(*map(jnp.asarray, packed.forest))
    whole = jax.nn.log_softmax(jax.jit(logits, static_argnums=0)(WIDE, params, forest), axis=-1)
    (expected, _), _ = repeated_gradient(WIDE.config)(params, samples, *weights())
    row, column = np.divmod(packed.node, LENGTH)
    got = whole[row, packed.forest.parent[row, column], packed.forest.token[row, column]]
    np.testing.assert_allclose(np.where(packed.mask, got, 0), expected, rtol=0, atol=1e-12)


def test_bfloat16_is_close_to_float64():
    narrow = Decoder(with_dtype("qwen3", "bfloat16", remat="full"))
    wide, params = same_params("qwen3", "float64", "bfloat16")
    packed = pack(FORESTS["ragged groups"])
    out, gradient = shared_gradient(narrow)(params, packed, *weights())
    expected, wide_gradient = shared_gradient(WIDE)(wide, packed, *weights())
    assert {x.dtype for x in out} == {jnp.dtype("float32")}
    assert_near(out, expected, 5e-2)
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(wide_gradient), strict=True):
        assert x.dtype == jnp.bfloat16
        x, y = np.asarray(x, np.float64).ravel(), np.asarray(y).ravel()
        assert x @ y > 0.98 * np.linalg.norm(x) * np.linalg.norm(y)


def test_refuses_a_forest_of_another_shape():
    forest = TokenForest(*map(jnp.asarray, pack(FORESTS["ragged groups"]).forest))
    with pytest.raises(ValueError, match=r"position is int32\[4, 39\], expected i\[B, T\] with B=4, T=40"):
        WIDE.apply(random_params(WIDE.config), forest._replace(position=forest.position[:, 1:]))
