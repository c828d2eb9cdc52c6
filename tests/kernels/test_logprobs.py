"""target_logprobs: the Pallas kernels and a vocabulary that devices share, against the whole logits."""

import functools
import math
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from rlalign_kernels import target_logprobs
from rlalign_kernels.logprobs.statistics import Statistics, joined, logp_and_entropy, merged, of_logits
from rlalign_kernels.logprobs.tiles import TILES, Tile, chunk_rows, width_tile
from tests.jaxprs import largest_array
from tests.kernels.test_pallas import H100, KERNELS

both = pytest.mark.parametrize("backend", ["interpret", "interpret_triton"])
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}
STATES, WIDTH, VOCAB, ROWS, LIVE = 20, 192, 300, 37, 29  # nothing a whole number of tiles, parents that occur twice


class Case:
    """Inputs, and the weights of log-probs and entropies in a random loss."""

    def __init__(self, dtype, seed=0):
        rng = np.random.default_rng(seed)
        self.hidden = jnp.asarray(rng.normal(size=(STATES, WIDTH)) / 4, dtype)
        self.head = jnp.asarray(rng.normal(size=(WIDTH, VOCAB)) / 4, dtype)
        self.parent, self.target = (jnp.asarray(rng.integers(0, n, ROWS), jnp.int32) for n in (STATES, VOCAB))
        self.by_logp, self.by_entropy = (jnp.asarray(rng.normal(size=ROWS), jnp.float32) for _ in range(2))


def whole(case, *, temperature=1.0, softcap=None):
    """The plain meaning in float64: logp, entropy, and the gradients of the random loss."""

    def loss(hidden, head):
        logits = hidden[case.parent] @ head
        logits = (logits if softcap is None else softcap * jnp.tanh(logits / softcap)) / temperature
        logp = jax.nn.log_softmax(logits, axis=1)
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=1)
        live = jnp.arange(ROWS) < LIVE
        scored = tuple(jnp.where(live, x, 0) for x in (logp[jnp.arange(ROWS), case.target], entropy))
        return jnp.sum(case.by_logp * scored[0] + case.by_entropy * scored[1]), scored

    wide = (case.hidden.astype(jnp.float64), case.head.astype(jnp.float64))
    (_, scored), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(*wide)
    return *scored, *gradients


@functools.cache
def compiled(score):
    @jax.jit
    def run(hidden, head, parent, target, live, by_logp, by_entropy):
        def loss(hidden, head):
            scored = score(hidden, head, parent, target, live)
            return jnp.sum(by_logp * scored[0] + by_entropy * scored[1]), scored

        (_, scored), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)
        return *scored, *gradients

    return run


def run(score, case, live=LIVE):
    """logp, entropy, dhidden, dhead."""
    arguments = case.parent, case.target, jnp.int32(live), case.by_logp, case.by_entropy
    return compiled(score)(case.hidden, case.head, *arguments)


@functools.cache
def form(backend, **options):
    return functools.partial(target_logprobs, backend=backend, **options)


def check(score, case, *, tolerance, **options):
    for got, want in zip(run(score, case), whole(case, **options), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want)
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("backend", ["xla", "interpret", "interpret_triton"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 2.0}], ids=["plain", "capped"])
def test_equals_the_whole_logits(backend, dtype, options, x64):
    check(form(backend, **options), Case(dtype), tolerance=TOLERANCE[dtype], **options)


@both
def test_chunks_of_any_length(backend, x64):
    """8 or 16 rows at a time, where 37 are asked for: whole tiles, the last chunk without a live row."""
    check(form(backend, chunk=1), Case("float32"), tolerance=1e-5)


@both
def test_two_runs_agree_bit_for_bit(backend):
    case = Case("float32")
    for a, b in zip(*(run(form(backend), case) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(a, b)


@both
def test_dead_rows_and_states_change_nothing(backend):
    """Rows behind the live ones, and states that none of these reads."""
    case, dirty = Case("float32"), Case("float32")
    dead = np.setdiff1d(np.arange(STATES), case.parent[:LIVE])
    assert set(np.asarray(case.parent[LIVE:])) & set(dead)
    dirty.hidden = case.hidden.at[dead].set(jnp.nan)
    dirty.by_logp, dirty.by_entropy = (x.at[LIVE:].set(jnp.nan) for x in (case.by_logp, case.by_entropy))
    clean, other = run(form(backend), case), run(form(backend), dirty)
    assert not np.any([x[LIVE:] for x in clean[:2]])
    for a, b in zip(clean, other, strict=True):
        np.testing.assert_array_equal(a, b)
    for x in run(form(backend), case, live=0):
        assert not np.any(x)


@pytest.mark.parametrize("backend", ["xla", "interpret", "interpret_triton"])
def test_targets_outside_of_the_vocabulary_are_loud(backend):
    """300 and 310 lie in the padding of the last tile; what is not live may hold anything."""
    case = Case("float32")
    target = case.target.at[:4].set(jnp.array([VOCAB, VOCAB + 10, -1, 10**6])).at[LIVE].set(-1)
    logp, _ = form(backend)(case.hidden, case.head, case.parent, target, jnp.int32(LIVE))
    np.testing.assert_array_equal(jnp.isnan(logp), jnp.arange(ROWS) < 4)


@pytest.mark.parametrize("backend", ["xla", "interpret", "interpret_triton"])
def test_no_rows_at_all(backend):
    case, none = Case("float32"), jnp.zeros((0,), jnp.int32)
    for x in form(backend)(case.hidden, case.head, none, none, jnp.int32(0)):
        assert x.shape == (0,)


@pytest.mark.parametrize("backend", ["xla", "interpret", "interpret_triton"])
@pytest.mark.parametrize("shards", [2, 8])
def test_a_vocabulary_that_devices_share(backend, shards, x64):
    """Equal slices in order; 300 tokens over 8 devices leave four columns of padding, which may hold anything."""
    mesh = jax.make_mesh((8 // shards, shards), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def score(hidden, head, parent, target, live):
        local = functools.partial(target_logprobs, backend=backend, axis_name="tensor", vocab=VOCAB)
        local = jax.shard_map(
            local, mesh=mesh, in_specs=(P(), P(None, "tensor"), P(), P(), P()), out_specs=P(), check_vma=False
        )
        head = jnp.pad(head, ((0, 0), (0, -VOCAB % shards)), constant_values=7.0)
        return local(hidden, head, parent, target, live)

    dtype = "float64" if backend == "xla" else "float32"
    check(score, Case(dtype), tolerance=TOLERANCE[dtype])


def test_the_environment_chooses_the_form(monkeypatch):
    case = Case("float32")
    arguments = case.hidden, case.head, case.parent, case.target, jnp.int32(LIVE)
    program = lambda: str(jax.make_jaxpr(lambda *x: target_logprobs(*x))(*arguments))
    assert "pallas_call" not in program()
    monkeypatch.setenv("RLALIGN_KERNELS", "interpret")
    assert "name=logprobs_statistics" in program()


@both
def test_no_logits_leave_the_kernels(backend):
    """The forward makes no array larger than the states; the backward one chunk's gradients, in the inputs' dtype."""
    rows, vocab = 256, 4096
    shapes = [(jnp.bfloat16, (rows, 128)), (jnp.bfloat16, (128, vocab)), *[(jnp.int32, (rows,))] * 2, (jnp.int32, ())]
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for dtype, shape in shapes]
    score = lambda *x: sum(x.sum() for x in target_logprobs(*x, backend=backend, chunk=rows))
    assert math.prod(largest_array(jax.make_jaxpr(score)(*shapes))) == rows * 128
    backward = jax.make_jaxpr(jax.grad(score, (0, 1)))(*shapes)
    assert math.prod(largest_array(backward)) == rows * vocab
    assert f"f32[{rows},{vocab}]" not in str(backward)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [576, 896, 5120])
def test_lowers_for_its_device(backend, dtype, width):
    """Widths of SmolLM2 135M, Qwen2.5 0.5B and 14B; `make aot` and `make aot-cuda` compile them."""
    rows, vocab = 700, 49_157
    shapes = [(dtype, (rows, width)), (dtype, (width, vocab)), *[(jnp.int32, (rows,))] * 2, (jnp.int32, ())]
    program = lambda *x: sum(x.sum() for x in target_logprobs(*x, backend=backend, softcap=30.0))
    platform, call = KERNELS[backend]
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)) if backend == "triton" else nullcontext():
        traced = jax.jit(jax.grad(program, (0, 1))).trace(*(jax.ShapeDtypeStruct(s, d) for d, s in shapes))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count(call) == 2
    for name in ("statistics", "gradient"):
        assert f"logprobs_{name}" in text


def test_statistics_join_and_merge_to_those_of_the_whole(x64):
    """Slices of a row with logits of all sizes, and one whose logits are all masked."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(5, 64)) * np.array([1e-6, 1, 30, 1e3, 1e5])[:, None])
    logits = logits.at[:, 16:32].set(-1e30)
    hot = np.arange(64) == np.array([3, 40, 63, 0, 50])[:, None]
    parts = [of_logits(logits[:, i : i + 16], hot[:, i : i + 16]) for i in range(0, 64, 16)]
    stacked = Statistics(*(jnp.stack(x) for x in zip(*parts, strict=True)))
    over = functools.partial(functools.partial, axis=0, keepdims=True)
    shared = Statistics(*(x[0] for x in merged(stacked, over(jnp.max), over(jnp.sum))))
    logp = jax.nn.log_softmax(logits, axis=1)
    want = logp[hot], -jnp.sum(jnp.exp(logp) * logp, axis=1)
    for kept in (functools.reduce(joined, parts), shared):
        got = logp_and_entropy(Statistics(*(x[:, 0] for x in kept)))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_the_entropy_of_a_sure_policy_is_exact_in_float32():
    """log total - spread / total, not lse - mean: 1e-6 beside logits of 100 would be lost."""
    gap = 18.0
    logits = jnp.array([[100.0, 100.0 - gap]], jnp.float32)
    _, entropy = logp_and_entropy(Statistics(*(x[:, 0] for x in of_logits(logits, jnp.array([[True, False]])))))
    p = 1 / (1 + math.exp(gap))
    np.testing.assert_allclose(entropy, -(p * math.log(p) + (1 - p) * math.log1p(-p)), rtol=0.1)


@pytest.mark.parametrize(
    ("width", "itemsize", "want"),
    [(576, 2, 576), (896, 2, 896), (3584, 2, 896), (4096, 2, 1024), (5120, 2, 1024), (4096, 4, 512), (2000, 2, 2000)],
)
def test_shares_of_the_width(width, itemsize, want):
    """All of it, or the largest number of whole lanes that divides it and fits."""
    assert width_tile(Tile(512, 512, 2048), width, itemsize) == want


@pytest.mark.parametrize("backend", TILES)
@pytest.mark.parametrize("vocab", [1, 512, 152_000, 2**22])
def test_chunks_are_whole_tiles(backend, vocab):
    assert chunk_rows(backend, vocab) % TILES[backend].rows == 0


def bad(**change):
    case = Case("float32")
    arguments = {"hidden": case.hidden, "head": case.head, "parent": case.parent, "target": case.target, "live": LIVE}
    return arguments | change


BAD = {
    "rank": (bad(hidden=np.zeros((2, 3, 4))), r"hidden must be f\[n, W\] and head f\[W, V\]; got \(2, 3, 4\)"),
    "width": (bad(head=np.zeros((5, 7))), r"got \(20, 192\), \(5, 7\)"),
    "target": (bad(target=np.zeros(3, int)), r"parent and target must be i\[S\] both; got \(37,\), \(3,\)"),
    "soft cap": (bad(softcap=0.0), "softcap must be positive, got 0.0: None is no cap"),
    "chunk": (bad(chunk=0), "chunk must be at least 1, got 0: None picks by V"),
    "vocab alone": (bad(vocab=VOCAB - 1), r"vocab=299, but there are 1 slices of 300 columns: .* goes with axis_name"),
    "temperature": (bad(temperature=-1.0), "temperature must be positive, got -1.0"),
    "backend": (bad(backend="cuda"), "unknown kernel backend 'cuda': choose one of xla, tpu, triton, "),
    "dtype": (
        bad(head=np.zeros((WIDTH, 5), np.float16), backend="tpu"),
        "backend 'tpu' take hidden and head both in bfloat16 or float32; got float32, float16: use backend='xla'",
    ),
    "allowed": (
        bad(allowed=(np.ones((1, VOCAB), bool), np.zeros(ROWS, int)), backend="triton"),
        "backend 'triton' has no log-prob kernel with `allowed` tokens: use backend='xla'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_name_the_argument(name):
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        target_logprobs(**arguments)
