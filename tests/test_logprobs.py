"""token_logprobs against log_softmax of the whole logits: values, entropy, gradients, and what is never computed."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign.forest import pack
from rlalign.logprobs import token_logprobs
from rlalign.types import TokenForest
from rlalign_kernels.logprobs.tiles import chunk_rows
from tests.jaxprs import equations, largest_array

WIDTH, VOCAB = 6, 13


def packed_samples(seed=0):
    """Nine samples in two rows: groups, a three-level tree, an empty response, and two samples that are equal."""
    rng = np.random.default_rng(seed)
    stem = [rng.integers(0, VOCAB, size) for size in (5, 1, 3)]
    branch = np.concatenate([stem[0], rng.integers(0, VOCAB, 4)])
    starts, sequences = [], []
    for prompt, start, sizes in ((stem[0], 5, (3, 1)), (branch, 5, (2, 2)), (stem[1], 1, (6, 4)), (stem[2], 3, (0, 2))):
        for size in sizes:
            sequences.append(np.concatenate([prompt, rng.integers(0, VOCAB, size)]))
            starts.append(start)
    sequences.append(sequences[0])
    starts.append(starts[0])
    return pack(sequences, row_length=24, response_start=starts, num_rows=3)


PACKED = packed_samples()
FOREST = TokenForest(*(jnp.asarray(x) for x in PACKED.forest))
NODE = jnp.asarray(PACKED.node)


def inputs(dtype="float64", seed=0):
    """hidden, head, and weights of logp and entropy in a random loss."""
    rng = np.random.default_rng(seed)
    shapes = ((*PACKED.forest.token.shape, WIDTH), (WIDTH, VOCAB), NODE.shape, NODE.shape)
    hidden, head, a, b = (jnp.asarray(rng.normal(size=s)) for s in shapes)
    return hidden.astype(dtype), head.astype(dtype), a, b


def allowed_tables():
    """Three sets of allowed tokens, and for each slot a set that holds its token."""
    rng = np.random.default_rng(3)
    table, index = rng.random((3, VOCAB)) < 0.4, rng.integers(0, 3, NODE.shape)
    token = PACKED.forest.token.reshape(-1)[np.maximum(PACKED.node, 0)]
    table[index[PACKED.mask], token[PACKED.mask]] = True
    assert not table.all(axis=1).any()
    return table, index


ALLOWED = allowed_tables()


def whole(hidden, head, node, *, temperature=1.0, softcap=None, restricted=False):
    """The plain meaning, from the logits of every token; `node` is that of PACKED."""
    del node
    logits = jnp.einsum("btw,wv->btv", hidden, head)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    row, column = np.divmod(np.maximum(PACKED.node, 0), PACKED.forest.token.shape[1])
    seen = logits[row, PACKED.forest.parent[row, column]] / temperature
    kept = ALLOWED[0][ALLOWED[1]] if restricted else np.ones(seen.shape, bool)
    logp = jax.nn.log_softmax(jnp.where(kept, seen, -jnp.inf), axis=-1)
    entropy = -jnp.sum(jnp.where(kept, jnp.exp(logp) * jnp.where(kept, logp, 0), 0), axis=-1)
    token = PACKED.forest.token[row, column]
    logp = jnp.take_along_axis(logp, token[..., None], axis=-1)[..., 0]
    return tuple(jnp.where(PACKED.mask, x, 0) for x in (logp, entropy))


def mine(hidden, head, node=NODE, *, restricted=False, **options):
    allowed = tuple(map(jnp.asarray, ALLOWED)) if restricted else None
    return token_logprobs(hidden, head, FOREST, node, allowed=allowed, **options)


@functools.cache
def compiled(score, **options):
    """(logp, entropy), (dhidden, dhead) of a loss that weights every log-prob and every entropy."""

    @jax.jit
    def run(hidden, head, a, b, node):
        def loss(hidden, head):
            logp, entropy = score(hidden, head, node, **options)
            return jnp.sum(a * logp + b * entropy), (logp, entropy)

        (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)
        return out, gradients

    return run


def value_and_gradients(score, hidden, head, a, b, *, node=NODE, **options):
    return compiled(score, **options)(hidden, head, a, b, node)


def assert_near(got, expected, tolerance):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.abs(x - y).max() <= tolerance * (np.abs(y).max() or 1.0)


OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "all": {"temperature": 1.7, "softcap": 2.0, "restricted": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_whole_logits(name, x64):
    expected = value_and_gradients(whole, *inputs(), **OPTIONS[name])
    for chunk in (1, 7, 64) if name == "all" else (7,):
        got = value_and_gradients(mine, *inputs(), chunk=chunk, **OPTIONS[name])
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(got))
        assert_near(got, expected, 1e-12)


def test_other_precisions(x64):
    """float32 and bfloat16 in, float32 out; gradients in the precision of their argument."""
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 2e-2)):
        hidden, head, a, b = inputs(dtype)
        got = value_and_gradients(mine, hidden, head, a, b, temperature=0.6, chunk=7)
        assert [x.dtype for x in jax.tree.leaves(got)] == [jnp.float32] * 2 + [jnp.dtype(dtype)] * 2
        wide = (hidden.astype(jnp.float64), head.astype(jnp.float64), a, b)
        assert_near(got, value_and_gradients(whole, *wide, temperature=0.6), tolerance)


def test_without_jit_and_with_the_default_chunk(x64):
    hidden, head, *_ = inputs()
    assert_near(mine(hidden, head), whole(hidden, head, NODE), 1e-12)


def test_masked_slots_are_zero_with_zero_gradient(x64):
    hidden, head, *_ = inputs()
    dead = ~PACKED.mask
    assert dead.any()
    weights = (jnp.asarray(dead, jnp.float64),) * 2
    scored, gradients = value_and_gradients(mine, hidden, head, *weights, chunk=7)
    assert not any(np.asarray(x)[dead].any() for x in scored)
    assert not any(np.asarray(g).any() for g in gradients)


def test_nothing_live_gives_zero():
    hidden, head, a, b = inputs("float32")
    none = jnp.full_like(NODE, -1)
    got = value_and_gradients(mine, jnp.full_like(hidden, jnp.nan), head, a, b, node=none, chunk=7)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(got))


def test_a_shared_node_adds_its_gradients(x64):
    """The first and the last sample are the same sequence: one node, two slots."""
    assert NODE[0].tolist() == NODE[-1].tolist()
    hidden, head, *_ = inputs()

    def gradient(*samples):
        a = jnp.zeros(NODE.shape).at[jnp.array(samples)].set(1.0)
        return value_and_gradients(mine, hidden, head, a, a, chunk=7)[1]

    assert_near(gradient(0, 8), jax.tree.map(lambda x: 2 * x, gradient(0)), 1e-12)


@pytest.mark.parametrize("chunk", [7, 64])
def test_states_that_no_response_needs_change_nothing(chunk):
    """Bit for bit, NaN included: the first prompt's tokens, a row's padding, an unused row."""
    hidden, head, a, b = inputs("float32")
    row, column = np.divmod(PACKED.node[PACKED.mask], PACKED.forest.token.shape[1])
    needed = np.zeros(PACKED.forest.token.shape, bool)
    needed[row, PACKED.forest.parent[row, column]] = True
    assert not needed[0, 0]  # dead slots of a chunk read some state: it must not matter which
    dirty = jnp.where(needed[:, :, None], hidden, jnp.nan)
    clean_out = value_and_gradients(mine, hidden, head, a, b, chunk=chunk)
    dirty_out = value_and_gradients(mine, dirty, head, a, b, chunk=chunk)
    for x, y in zip(jax.tree.leaves(clean_out), jax.tree.leaves(dirty_out), strict=True):
        np.testing.assert_array_equal(x, y)


def test_logits_are_never_whole():
    """The largest array of the traced gradient is a chunk's logits or an argument, never [N * R, V]."""
    samples, response, vocab, chunk = 32, 16, 256, 64
    forest = TokenForest(*(jnp.tile(x, (11, 1))[:, :20] for x in FOREST))
    node = jnp.full((samples, response), 3, jnp.int32)
    hidden, head = jnp.ones((*forest.token.shape, WIDTH)), jnp.ones((WIDTH, vocab))

    def trace(chunk):
        def loss(hidden, head):
            return sum(x.sum() for x in token_logprobs(hidden, head, forest, node, chunk=chunk))

        return jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, head)

    assert math.prod(largest_array(trace(samples * response))) == samples * response * vocab  # the measure sees it
    assert math.prod(largest_array(trace(chunk))) == chunk * vocab


def test_chunks_without_a_live_slot_are_skipped():
    """The loops' bound is data: the number of live slots decides how many chunks are visited."""
    hidden, head, *_ = inputs("float32")
    jaxpr = jax.make_jaxpr(lambda h, w, n: mine(h, w, n, chunk=7))(hidden, head, NODE)
    assert sum(e.primitive.name == "while" for e in equations(jaxpr)) == 1  # a static bound would be a scan


@pytest.mark.parametrize(("vocab", "chunk"), [(1, 4096), (512, 4096), (4096, 1024), (152_000, 64), (2**20, 64)])
def test_default_chunk(vocab, chunk):
    """Powers of two near 2 ** 22 logits; 152,000 tokens of vocabulary would give 16."""
    assert chunk_rows("xla", vocab) == max(64, chunk)


def bad(**change):
    arguments = {
        "hidden": np.zeros((2, 4, 3)),
        "head": np.zeros((3, 5)),
        "forest": TokenForest(*(np.zeros((2, 4), jnp.int32),) * 4),
        "node": np.zeros((6, 2), jnp.int32),
    }
    return arguments | change


BAD = {
    "rank": (bad(hidden=np.zeros((8, 3))), r"hidden is float32\[8, 3\], expected f\[B, T, W\]"),
    "dtype": (bad(hidden=np.zeros((2, 4, 3), int)), r"hidden is int32\[2, 4, 3\], expected f\[B, T, W\]"),
    "head": (bad(head=np.zeros((5, 3))), r"head is float32\[5, 3\], expected f\[W, V\] with W=3"),
    "forest": (bad(hidden=np.zeros((2, 7, 3))), r"token is int32\[2, 4\], expected i\[B, T\] with B=2, T=7"),
    "node": (bad(node=np.zeros(6, jnp.int32)), r"node is int32\[6\], expected i\[N, R\]"),
    "node dtype": (bad(node=np.zeros((6, 2))), r"node is float32\[6, 2\], expected i\[N, R\]"),
    "table": (
        bad(allowed=(np.ones((3, 4), bool), np.zeros((6, 2), jnp.int32))),
        r"allowed\[0\] is bool\[3, 4\], expected b\[S, V\] with V=5",
    ),
    "index": (
        bad(allowed=(np.ones((3, 5), bool), np.zeros((6, 1), jnp.int32))),
        r"allowed\[1\] is int32\[6, 1\], expected i\[N, R\] with N=6, R=2",
    ),
    "temperature": (bad(temperature=0.0), "temperature must be positive, got 0.0"),
    "negative temperature": (bad(temperature=-1.0), "temperature must be positive, got -1.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals_name_the_argument(case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        token_logprobs(**arguments)


def test_the_first_token_of_the_batch_may_be_a_parent(x64):
    """A prompt of one token in the first row: place 0 is read, not taken for padding."""
    packed = pack([np.array([1, 3, 2])], row_length=4, response_start=[1])
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(1, 4, WIDTH)), rng.normal(size=(WIDTH, VOCAB))
    logp, _ = jax.jit(token_logprobs)(hidden, head, packed.forest, packed.node)
    logits = hidden[0, :2] @ head
    want = logits[[0, 1], [3, 2]] - np.log(np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(logp[0], want, rtol=1e-12)
