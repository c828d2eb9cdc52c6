"""forest_attention: forward and gradients against the dense oracle, and the oracle against a walk up the parents."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign_kernels import attention_plan, forest_attention
from rlalign_kernels.attention.reference import reference_attention
from rlalign_kernels.attention.shapes import GROUPS, HEADS, TREES, Branch, group, masked
from tests.jaxprs import largest_array

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}


def finish(parent, padding=0):
    """visible_until and position i32[T] of one row in depth-first order, from its nodes' parents."""
    until, position = np.arange(1, len(parent) + 1), np.zeros(len(parent), np.int64)
    for i, p in enumerate(parent):
        position[i] = 0 if p < 0 else position[p] + 1
    for i in range(len(parent) - 1, -1, -1):
        if parent[i] >= 0:
            until[parent[i]] = max(until[parent[i]], until[i])
    return tuple(np.pad(x, (0, padding)).astype(np.int32) for x in (until, position))


def group_row(shape):
    """A prompt and `samples` responses, and a padding of 3."""
    first = np.arange(shape.prompt) - 1
    response = [
        np.concatenate([[shape.prompt - 1], shape.prompt + i * shape.response + np.arange(shape.response - 1)])
        for i in range(shape.samples)
    ]
    return finish(np.concatenate([first, *response]), padding=3)


def random_parents(rng, size, branch, root):
    """Any forest in depth-first order: the parent of a node is the node before it, one of its ancestors, or none."""
    parent = [-1]
    for i in range(1, size):
        path, at = [], i - 1
        while at >= 0:
            path.append(at)
            at = parent[at]
        draw = rng.random()
        parent.append(-1 if draw < root else int(rng.choice(path)) if draw < root + branch else i - 1)
    return np.array(parent)


def random_rows(seed, rows, length, *, branch=0.15, root=0.04):
    """Ragged rows; the last is padding through and through where there is more than one."""
    rng = np.random.default_rng(seed)
    out = []
    for row in range(rows):
        size = length if row == 0 else 0 if row == rows - 1 else int(rng.integers(length // 3, length))
        parent = random_parents(rng, size, branch, root) if size else np.zeros(0, int)
        out.append(finish(parent, padding=length - size))
    return tuple(np.stack(x) for x in zip(*out, strict=True))


FORESTS = {name: tuple(x[None] for x in group_row(GROUPS[name])) for name in ("tiny", "short_prompt", "one_token")}
FORESTS |= {
    "odd": tuple(x[None] for x in group_row(GROUPS["odd"])),  # 732 tokens: the tiles of long batches
    **{name: tuple(np.array([x + [0] * 3], np.int32) for x in masked(*trees)) for name, trees in TREES.items()},
    "one_token_row": (np.array([[1]], np.int32), np.array([[0]], np.int32)),
    "small_trees": random_rows(0, 3, 19),
    "trees": random_rows(1, 4, 75),
    "bushy_trees": random_rows(2, 2, 83, branch=0.6, root=0.1),
    "long_trees": random_rows(3, 3, 301, branch=0.03, root=0.01),
}


def arrays(seed, shape, heads, kv_heads, width, dtype):
    """q, k, v and a cotangent of the output."""
    rng = np.random.default_rng(seed)
    sizes = (heads, kv_heads, kv_heads, heads)
    return [jnp.asarray(rng.normal(size=(*shape, h, width)), dtype) for h in sizes]


@functools.cache
def compiled(attention, **options):
    """(q, k, v, cotangent, visible_until, position) -> output and the gradients of q, k and v."""

    def both(q, k, v, cotangent, until, position, **plan):
        out, pull = jax.vjp(lambda *x: attention(*x, until, position=position, **options, **plan), q, k, v)
        return (out, *pull(cotangent.astype(out.dtype)))

    return jax.jit(both)


def run(attention, inputs, until, position=None, **options):
    position = jnp.zeros(until.shape, jnp.int32) if position is None else jnp.asarray(position)
    return compiled(attention, **options)(*inputs, jnp.asarray(until), position)


def assert_near(got, expected, tolerance):
    """Relative to the largest entry."""
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= tolerance * (np.abs(b).max() or 1.0), name


def check(name, heads, kv_heads, dtype, width=8, backend=None, **options):
    until, position = FORESTS[name]
    inputs = arrays(heads + kv_heads, until.shape, heads, kv_heads, width, dtype)
    got = run(forest_attention, inputs, until, position, backend=backend, **options)
    assert got[0].dtype == jnp.dtype(dtype)
    wide = [x.astype(jnp.float64) for x in inputs]
    assert_near(got, run(reference_attention, wide, until, position, **options), TOLERANCE[dtype])
    for x in got:  # padding: queries, and keys and values too, are exactly 0
        assert not np.asarray(x, np.float64)[until == 0].any()


def test_oracle_is_attention_over_ancestors(x64):
    """The mask rule itself: a query sees the nodes on its path to the root."""
    rng = np.random.default_rng(5)
    parent = random_parents(rng, 23, 0.4, 0.1)
    until, position = finish(parent, padding=2)
    q, k, v, _ = arrays(0, (1, 25), 2, 1, 4, "float64")
    got = reference_attention(
        q, k, v, jnp.asarray(until)[None], position=jnp.asarray(position)[None], window=4, scale=0.7, softcap=3.0
    )
    for i in range(25):
        path, at = [], i if i < 23 else -1
        while at >= 0 and len(path) < 4:
            path.append(at)
            at = parent[at]
        for head in range(2):
            expected = np.zeros(4)
            if path:
                score = 3.0 * np.tanh(0.7 * (np.asarray(k)[0, path, 0] @ np.asarray(q)[0, i, head]) / 3.0)
                weight = np.exp(score) / np.exp(score).sum()
                expected = weight @ np.asarray(v)[0, path, 0]
            np.testing.assert_allclose(got[0, i, head], expected, rtol=0, atol=1e-12)


def test_named_shapes_are_the_forests_that_they_name():
    for shape in GROUPS.values():
        until, position = masked(group(shape.prompt, *[shape.response] * shape.samples))
        for got, expected in zip((until, position), group_row(shape), strict=True):
            np.testing.assert_array_equal(got, expected[:-3])
        assert shape.pairs == sum(until) - sum(range(shape.tokens))
        assert shape.repeated_pairs == shape.samples * sum(range(1, shape.prompt + shape.response + 1))
    until, position = masked(Branch(2, (Branch(1, (Branch(2), Branch(1))), Branch(1))), Branch(1))
    assert until == [7, 7, 6, 5, 5, 6, 7, 8]
    assert position == [0, 1, 2, 3, 4, 3, 2, 0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads"), [*HEADS.values(), (4, 2)])
def test_equals_the_dense_mask(heads, kv_heads, dtype, x64):
    check("trees", heads, kv_heads, dtype)


@pytest.mark.parametrize("name", sorted(set(FORESTS) - {"trees"}))
def test_equals_the_dense_mask_on_every_forest(name, x64):
    check(name, 2, 1, "float64", backend="xla")


@pytest.mark.parametrize(
    "options",
    [
        {"scale": -1.5},
        {"softcap": 2.0},
        {"window": 7},
        {"window": 3, "softcap": 1.5, "scale": 0.9},
    ],
    ids=str,
)
def test_options_equal_the_dense_mask(options, x64):
    check("trees", 2, 1, "float64", **options)


def test_options_in_other_precisions(x64):
    check("long_trees", 4, 2, "float32", window=40, softcap=4.0)
    check("small_trees", 4, 2, "bfloat16", window=5, softcap=4.0)


def test_large_scores_neither_overflow_nor_vanish(x64):
    """Scores near 1e4: only a running maximum keeps the exponentials finite."""
    until, _ = FORESTS["trees"]
    inputs = arrays(0, until.shape, 2, 1, 8, "float32")
    wide = [x.astype(jnp.float64) for x in inputs]
    got, expected = (run(f, x, until, scale=1e3) for f, x in ((forest_attention, inputs), (reference_attention, wide)))
    assert np.abs(np.asarray(got[0], np.float64) - np.asarray(expected[0])).max() < 2e-3
    assert all(np.isfinite(x).all() for x in got)


def test_no_visible_key_gives_zero():
    """A batch of padding alone."""
    inputs = arrays(0, (4, 75), 2, 1, 8, "float32")
    for x in run(forest_attention, inputs, np.zeros((4, 75), np.int32)):
        assert not np.asarray(x).any()


def test_what_lies_in_the_padding_changes_nothing():
    """Bit for bit, whatever the padding's numbers are, forward and backward."""
    until, _ = FORESTS["trees"]
    inputs = arrays(0, until.shape, 2, 1, 8, "float32")
    dead = jnp.asarray(until == 0)[:, :, None, None]
    clean = run(forest_attention, inputs, until)
    for value in (1e30, jnp.inf, jnp.nan):
        dirty = run(forest_attention, [jnp.where(dead, value, x) for x in inputs], until)
        for a, b in zip(clean, dirty, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["trees", "odd"])
def test_two_runs_agree_bit_for_bit_and_so_does_a_shared_plan(name):
    until = jnp.asarray(FORESTS[name][0])
    inputs = arrays(0, until.shape, 2, 1, 8, "float32")
    first, again = run(forest_attention, inputs, until), run(forest_attention, inputs, until)
    plan = jax.jit(attention_plan)(until)
    planned = compiled(forest_attention)(*inputs, until, jnp.zeros_like(until), plan=plan)
    for a, b, c in zip(first, again, planned, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


def test_without_jit():
    until, _ = FORESTS["trees"]
    inputs = arrays(0, until.shape, 2, 1, 8, "float32")
    eager = forest_attention(*inputs[:3], jnp.asarray(until))
    np.testing.assert_allclose(eager, run(forest_attention, inputs, until)[0], rtol=0, atol=1e-6)


def test_one_program_serves_every_forest_of_a_shape():
    """The tile lists are data: nothing is compiled again for another tree."""
    traced = []

    @jax.jit
    def attend(q, k, v, until):
        traced.append(1)
        return forest_attention(q, k, v, until)

    inputs = arrays(0, (4, 75), 2, 1, 8, "float32")[:3]
    for seed in (1, 7, 8):
        until = jnp.asarray(random_rows(seed, 4, 75)[0])
        got, expected = attend(*inputs, until), reference_attention(*inputs, until)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    assert len(traced) == 1


def test_memory_grows_with_tokens_not_with_their_square():
    """No T x T array, forward or backward, in what is traced."""
    length, heads, width = 2048, 2, 8
    until = jnp.full((1, length), length, jnp.int32)
    inputs = arrays(0, (1, length), heads, 1, width, "float32")

    def both(q, k, v, cotangent, attention):
        out, pull = jax.vjp(lambda *x: attention(*x, until), q, k, v)
        return out, pull(cotangent)

    def largest(attention):
        return largest_array(jax.make_jaxpr(lambda *x: both(*x, attention))(*inputs))

    assert math.prod(largest(reference_attention)) >= length * length  # the measure sees one where there is one
    assert math.prod(largest(forest_attention)) <= length * length // 8


NO_FORESTS = {
    "a reach beyond its row": ([3, 9, 3], r"visible_until\[1, 1\]=9 is no forest's: it must be at most 3, where the"),
    "a negative reach": ([3, -1, 3], r"visible_until\[1, 1\]=-1 is no forest's"),
    "subtrees that cross": (
        [2, 3, 3],
        r"visible_until\[1, 1\]=3 is no forest's: it must be at most 2, where the subtree",
    ),
}


@pytest.mark.parametrize("name", NO_FORESTS)
def test_what_is_no_forest_is_refused_where_it_is_known(name):
    until, message = NO_FORESTS[name]
    q, k, v, _ = arrays(0, (2, 3), 2, 1, 8, "float32")
    with pytest.raises(ValueError, match=message):
        forest_attention(q, k, v, jnp.array([[3, 2, 0], until]))


def test_a_reach_beyond_its_row_ends_there_inside_jit():
    """Where a forest cannot be checked, one row still does not see another."""
    q, k, v, _ = arrays(0, (2, 20), 2, 1, 8, "float32")
    far, end = (jnp.full((2, 20), n) for n in (23, 20))
    np.testing.assert_array_equal(*(jax.jit(forest_attention)(q, k, v, until) for until in (far, end)))


BAD = {
    "rank": ({"q": (2, 5, 8)}, r"q must be \[B, T, H, D\], k and v \[B, T, K, D\]; got q \(2, 5, 8\)"),
    "k and v": ({"v": (2, 5, 2, 4)}, r"k \(2, 5, 2, 8\), v \(2, 5, 2, 4\)"),
    "length": (
        {"k": (2, 6, 2, 8), "v": (2, 6, 2, 8)},
        r"q \(2, 5, 4, 8\) and k \(2, 6, 2, 8\) must agree in B, T and D",
    ),
    "width": ({"k": (2, 5, 2, 4), "v": (2, 5, 2, 4)}, "must agree in B, T and D"),
    "heads": ({"k": (2, 5, 3, 8), "v": (2, 5, 3, 8)}, "3 key/value heads do not divide 4 query heads"),
    "dtypes": ({"k_dtype": "bfloat16"}, "one floating dtype; got float32, bfloat16, float32"),
    "integers": ({"q_dtype": "int32", "k_dtype": "int32", "v_dtype": "int32"}, "one floating dtype; got int32"),
    "until shape": ({"until": (2, 6)}, r"visible_until must be int\[2, 5\]; got int32\(2, 6\)"),
    "until dtype": ({"until_dtype": "float32"}, r"visible_until must be int\[2, 5\]; got float32"),
    "backend": ({"backend": "cuda"}, "unknown kernel backend 'cuda': choose one of xla, tpu, triton, "),
    "width of a kernel": (
        {"backend": "tpu"},
        "backend 'tpu' take heads of width 64, 96, 128, 256 in .*; got width 8 in",
    ),
    "dtype of a kernel": (
        {"backend": "interpret", **{f"{x}_dtype": "float16" for x in "qkv"}},
        "in bfloat16 or float32; got width 8 in float16",
    ),
    "wide float32 on a GPU": (
        {"backend": "triton", "q": (2, 5, 4, 256), "k": (2, 5, 2, 256), "v": (2, 5, 2, 256)},
        "float32 heads of width 256 do not fit into a GPU's shared memory: use bfloat16, or backend='xla'",
    ),
    "nothing": ({"q": (2, 0, 4, 8), "k": (2, 0, 2, 8), "v": (2, 0, 2, 8)}, r"q \(2, 0, 4, 8\): none may be 0"),
    "no keys": (
        {"k": (2, 5, 0, 8), "v": (2, 5, 0, 8)},
        "0 key/value heads do not divide 4 query heads .*: none may be 0",
    ),
    "soft cap": ({"softcap": 0.0}, "softcap must be positive, got 0.0: None is no cap"),
    "window": ({"window": 0}, "window must be at least 1, got 0"),
    "no position": ({"window": 3}, r"window=3 needs position i\[2, 5\]"),
    "position": ({"window": 3, "position": np.zeros((2, 4), np.int32)}, r"window=3 needs position i\[2, 5\]"),
    "plan": (
        {"plan": (9, 9)},
        r"the plan is for 96 tokens in tiles of 16 x 16, the batch has 10 tokens and backend 'xla' tiles of 16 x 16",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals_name_the_argument(case):
    change, message = BAD[case]
    change = dict(change)
    shapes = {"q": (2, 5, 4, 8), "k": (2, 5, 2, 8), "v": (2, 5, 2, 8), "until": (2, 5)}
    dtypes = dict.fromkeys("qkv", "float32") | {"until": "int32"}
    if "plan" in change:
        change["plan"] = attention_plan(jnp.ones(change["plan"], jnp.int32))
    built = [jnp.ones(change.pop(x, shapes[x]), change.pop(f"{x}_dtype", dtypes[x])) for x in shapes]
    with pytest.raises(ValueError, match=message):
        forest_attention(*built, **change)
