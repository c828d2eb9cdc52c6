"""ring_attention: rows cut along their tokens over simulated devices, against whole rows."""

import functools
import itertools
import math
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from rlalign_kernels import attention_plan, ring_attention, ring_plan
from rlalign_kernels.attention.reference import reference_attention
from tests.jaxprs import equations, largest_array
from tests.kernels.test_attention import TOLERANCE, arrays, assert_near, compiled, random_rows, run
from tests.kernels.test_pallas import H100, KERNELS
from tests.kernels.test_plan import listed

ROW, HEADS = P("data", "sequence"), P("data", "sequence", None, None)
UNTIL = random_rows(1, 4, 148, branch=0.1, root=0.02)[0]  # slices of 148, 74 and 37: no multiples of a tile
UNTIL[1] = 148  # a causal row
OTHER = random_rows(2, 4, 148, branch=0.3, root=0.05)[0]


@pytest.fixture(autouse=True, scope="module")
def compiled_here():
    """A program that XLA has loaded from the cache mixes up its sends between simulated devices: nothing is cached."""
    name = "jax_persistent_cache_min_compile_time_secs"
    seconds = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    yield
    jax.config.update(name, seconds)


@functools.cache
def cut(function, size, *, data=1, in_specs=(HEADS, HEADS, HEADS, ROW), out_specs=HEADS, mesh=None, **options):
    """function(..., axis_name="sequence") over `data` x `size` devices."""
    shape, axes = (data, size), ("data", "sequence")
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 2) if mesh is None else mesh
    function = functools.partial(function, axis_name="sequence", **options)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@functools.cache
def ring(size, **options):
    """ring_attention as the helpers of test_attention call forest_attention."""
    attention = cut(ring_attention, size, **options)
    return lambda *x, position: attention(*x)


def both(attention, *inputs, until):
    """The output and the gradients of q, k and v."""
    out, pull = jax.vjp(lambda *x: attention(*x, until), *inputs[:3])
    return out, *pull(inputs[3].astype(out.dtype))


def check(size, dtype, *, until=UNTIL, width=8, **options):
    inputs = arrays(size, until.shape, 4, 2, width, dtype)
    got = run(ring(size, **options), inputs, until)
    assert got[0].dtype == jnp.dtype(dtype)
    wide = [x.astype(jnp.float64) for x in inputs]
    options.pop("backend", None)
    assert_near(got, run(reference_attention, wide, until, **options), TOLERANCE[dtype])
    for x in got:
        assert not np.asarray(x, np.float64)[until == 0].any()


def test_the_rows_are_worth_a_ring():
    """In a forest some subtree reaches over every border, one ends before the last; and one row is padding."""
    for border in (37, 74, 111):
        assert (UNTIL[0, :border] > border).any()
    assert (UNTIL[0, 37:74] <= 74).any()
    assert not UNTIL[3].any()


@pytest.mark.parametrize(("size", "dtype"), [(1, "float64"), (2, "float64"), *((4, dtype) for dtype in TOLERANCE)])
def test_equals_the_dense_mask(size, dtype, x64):
    check(size, dtype)


def test_options_equal_the_dense_mask(x64):
    check(4, "float64", scale=-1.5, softcap=2.0)


def test_what_is_no_forest_is_finite_too(x64):
    """All queries see the first key, and no other: those that do not see themselves count as padding."""
    until = np.ones_like(UNTIL)
    until[:, 0] = 148
    inputs = arrays(0, UNTIL.shape, 4, 2, 8, "float32")
    out, *gradients = run(ring(4), inputs, until)
    np.testing.assert_allclose(out[:, 0], jnp.repeat(inputs[2][:, 0], 2, axis=1), rtol=1e-6)
    assert not np.any(out[:, 1:])
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("backend", ["interpret", "interpret_triton"])
def test_kernels_equal_the_dense_mask(backend, x64):
    check(4, "float32", until=UNTIL[[0, 3], :100], width=64, backend=backend)


def test_two_runs_agree_bit_for_bit_and_one_program_serves_every_forest(x64):
    attention = ring(4)
    inputs = arrays(0, UNTIL.shape, 4, 2, 8, "float32")
    first = run(attention, inputs, UNTIL)
    programs = compiled(attention)._cache_size()
    other, again = run(attention, inputs, OTHER), run(attention, inputs, UNTIL)
    assert compiled(attention)._cache_size() == programs
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(np.asarray(first[0]) != np.asarray(other[0]))


def test_what_lies_in_the_padding_changes_nothing(x64):
    inputs = arrays(0, UNTIL.shape, 4, 2, 8, "float32")
    dead = jnp.asarray(UNTIL == 0)[:, :, None, None]
    clean, dirty = (run(ring(4), x, UNTIL) for x in (inputs, [jnp.where(dead, jnp.nan, x) for x in inputs]))
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_over_data_tokens_over_a_ring_and_a_shared_plan_change_no_bit(x64):
    """A plan may leave shard_map and come back, as between the layers of a model."""
    inputs, joined = arrays(0, UNTIL.shape, 4, 2, 8, "float32"), P(("data", "sequence"))
    plan = cut(ring_plan, 4, data=2, in_specs=ROW, out_specs=joined)
    planned = cut(with_plan, 4, data=2, in_specs=(HEADS, HEADS, HEADS, ROW, joined))
    shared = jax.jit(lambda until, *x: both(lambda *y: planned(*y, plan(until)), *x, until=until))
    for a, b in zip(shared(jnp.asarray(UNTIL), *inputs), run(ring(4), inputs, UNTIL), strict=True):
        np.testing.assert_array_equal(a, b)


def with_plan(q, k, v, until, plan, **options):
    return ring_attention(q, k, v, until, plan=plan, **options)


def tiles_of(mask, block_q, block_k):
    """b[B, n, n] of a slice's queries and another's keys -> b[tiles_q, tiles_k, block_q, block_k] of all rows."""
    rows, length, _ = mask.shape
    padded = -(-length // max(block_q, block_k)) * max(block_q, block_k)
    whole = np.zeros((rows, padded, rows, padded), bool)
    whole[np.arange(rows), :length, np.arange(rows), :length] = mask
    whole = whole.reshape(rows * padded, rows * padded)
    return whole.reshape(-1, block_q, rows * padded // block_k, block_k).swapaxes(1, 2)


def step_of(plan, size, device, t):
    """Step t of a device, of a plan whose leaves are those of all devices joined."""
    steps, count = (plan.visits, size - 1) if t else (plan.own, 1)
    return jax.tree.map(lambda x: np.asarray(x).reshape(size, count, -1)[device, max(t - 1, 0)], steps)


def test_the_plan_of_every_device_and_step_equals_the_whole_mask():
    """Live pairs are those with a visible pair of tokens (in its own slice a few more), full ones hide none."""
    size, length, (block_q, block_k) = 4, 37, (16, 32)
    room = (4 * 6, 4 * 8)  # pairs of tiles in 4 rows of 64 tokens: of its own slice, of a visitor
    plan = jax.jit(cut(ring_plan, size, in_specs=ROW, out_specs=P("sequence"), backend="interpret"))(jnp.asarray(UNTIL))
    i, j = np.arange(4 * length)[:, None], np.arange(4 * length)[None, :]
    mask = (j <= i)[None] & (i[None] < UNTIL[:, None, :])
    busy = masked = free = 0
    for device, t in itertools.product(range(size), range(size)):
        step, of = step_of(plan, size, device, t), (device - t) % size
        here = mask[:, device * length : (device + 1) * length, of * length : (of + 1) * length]
        tiles = tiles_of(here, block_q, block_k)
        visible, wholly = (set(map(tuple, np.argwhere(x).tolist())) for x in (tiles.any((2, 3)), tiles.all((2, 3))))
        pairs = listed(step.plan.by_query)
        live, full = {pair[:2] for pair in pairs}, {pair[:2] for pair in pairs if pair[2]}
        assert full == wholly
        assert live == visible if t else live >= visible
        assert [pair[:2] for pair in listed(step.plan.by_key)] == sorted(live, key=lambda pair: (pair[1], pair[0]))
        assert step.plan.by_query.key.size == step.plan.by_key.key.size == room[t > 0]
        seen = step.seen.reshape(4, -1)
        np.testing.assert_array_equal(seen[:, :length], here.any(axis=2))
        assert not seen[:, length:].any()
        busy += t > 0 and bool(live)
        masked += t > 0 and bool(live - full)
        free += t > 0 and bool(full)
    assert (busy, masked, free) == (6, 6, 6)  # of 12 visits; in the others a later slice has come around


def test_a_slice_that_no_query_sees_costs_no_tile():
    """Documents that end at the borders: a device computes its own slice only."""
    until = jnp.repeat(jnp.arange(64, 320, 64, dtype=jnp.int32), 64)[None]
    plan = jax.jit(cut(ring_plan, 4, in_specs=ROW, out_specs=P("sequence")))(until)
    assert not np.any(plan.visits.plan.by_query.count)
    assert np.all(plan.own.plan.by_query.count == attention_plan(until[:, :64]).by_query.count)


def sends(jaxpr):
    """Shapes of what is sent to another device, as often as it is."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "ppermute":
            yield from (x.aval.shape for x in equation.invars)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from list(sends(value)) * times


def test_a_device_keeps_its_slice_and_sends_no_more_than_it_must():
    """No array of all keys, let alone T x T; k and v go S - 1 steps, dk and dv S, because they come home."""
    size, length, width = 4, 1024, 8
    until = jax.ShapeDtypeStruct((1, size * length), jnp.int32)
    heads = lambda count: jax.ShapeDtypeStruct((1, size * length, count, width), jnp.float32)
    inputs = heads(2), heads(1), heads(1), heads(2)
    joined = P(("data", "sequence"))
    plan = jax.eval_shape(cut(ring_plan, size, in_specs=ROW, out_specs=joined), until)
    planned = cut(with_plan, size, in_specs=(HEADS, HEADS, HEADS, ROW, joined))
    forward = jax.make_jaxpr(planned)(*inputs[:3], until, plan)
    program = jax.make_jaxpr(lambda plan, until, *x: both(lambda *y: planned(*y, plan), *x, until=until))
    whole = program(plan, until, *inputs)
    assert [math.prod(shape) for shape in sends(forward)] == [length * width] * 2 * (size - 1)
    assert len(list(sends(whole))) == 2 * 2 * (size - 1) + 2 * size
    inside = [x.params["jaxpr"] for x in equations(whole) if x.primitive.name == "shard_map"]
    assert inside
    assert max(math.prod(largest_array(x)) for x in inside) == length * 2 * width  # the queries


@pytest.mark.parametrize("backend", KERNELS)
def test_lowers_for_its_device(backend):
    shape = lambda heads: jax.ShapeDtypeStruct((2, 4 * 1100, heads, 64), "bfloat16")
    ids = jax.ShapeDtypeStruct((2, 4 * 1100), jnp.int32)
    device = {"abstract_device": H100} if backend == "triton" else {}
    mesh = AbstractMesh((1, 4), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2, **device)
    attention = cut(ring_attention, 4, mesh=mesh, backend=backend)
    platform, call = KERNELS[backend]
    with use_abstract_mesh(mesh) if device else nullcontext():
        program = lambda *x: both(attention, *x[:4], until=x[4])
        traced = jax.jit(program).trace(shape(8), shape(2), shape(2), shape(8), ids)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count(call) == 3 * 3  # its own keys, those that are sent on, and the last ones
    assert "collective_permute" in text


BAD = {
    "window": ({"window": 3}, "a ring has no window, got window=3: use forest_attention with whole rows on a device"),
    "heads": ({"heads": 3}, "2 key/value heads do not divide 3 query heads"),
    "width of a kernel": ({"backend": "tpu"}, "backend 'tpu' take heads of width 64, .* got width 8"),
    "backend": ({"backend": "cuda"}, "unknown kernel backend 'cuda'"),
    "plan of another backend": (
        {"plan": lambda u: ring_plan(u, axis_name="sequence", backend="interpret")},
        r"4 steps of 32 tokens in tiles of 16 x 32, the ring 4 of 16 in tiles of 16 x 16: use ring_plan\(",
    ),
    "plan of another ring": (
        {"plan": lambda u: ring_plan(u, axis_name="data")},
        r"the plan has 1 steps of 16 tokens .*, the ring 4 of 16 .* axis_name='sequence', backend='xla', group=2, wid",
    ),
    "length": ({"length": 22}, "divisible"),  # by jax: what a device sees of it are equal slices
}


@pytest.mark.parametrize("case", BAD)
def test_refusals_name_the_argument(case):
    change = dict(BAD[case][0])
    length, heads, plan = change.pop("length", 20), change.pop("heads", 4), change.pop("plan", None)

    def attention(q, k, v, until, **options):
        return ring_attention(q, k, v, until, plan=None if plan is None else plan(until), **options, **change)

    shapes = [jax.ShapeDtypeStruct((1, length, h, 8), jnp.float32) for h in (heads, 2, 2)]
    with pytest.raises(ValueError, match=BAD[case][1]):
        jax.eval_shape(cut(attention, 4), *shapes, jax.ShapeDtypeStruct((1, length), jnp.int32))
