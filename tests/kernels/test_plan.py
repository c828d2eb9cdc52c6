"""The tile lists against the whole mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign_kernels.attention.plan import make_plan, possible_pairs
from tests.kernels.test_attention import FORESTS, random_rows

BLOCKS = ((8, 8), (8, 16), (16, 4))


def dense(plan):
    """b[tiles_q, tiles_k, block_q, block_k]: the whole mask, cut into tiles."""
    until = np.asarray(plan.visible_until)
    i, j = np.arange(until.size)[:, None], np.arange(until.size)[None, :]
    mask = (j <= i) & (i < until[None, :])
    return mask.reshape(-1, plan.block_q, until.size // plan.block_k, plan.block_k).swapaxes(1, 2)


def listed(pairs):
    count = int(pairs.count[0])
    return [tuple(int(x) for x in row) for row in zip(*(x[:count] for x in pairs[:3]), strict=True)]


@functools.cache
def planned(name, block_q, block_k):
    until = FORESTS[name][0]
    return jax.jit(functools.partial(make_plan, block_q=block_q, block_k=block_k))(jnp.asarray(until))


@pytest.mark.parametrize(("block_q", "block_k"), BLOCKS)
@pytest.mark.parametrize("name", ["tiny", "trees", "bushy_trees", "long_trees", "odd"])
def test_every_visible_pair_is_listed_and_full_ones_hide_none(name, block_q, block_k):
    plan = planned(name, block_q, block_k)
    assert (plan.block_q, plan.block_k) == (block_q, block_k)
    mask = dense(plan)
    pairs = listed(plan.by_query)
    assert {(int(i), int(j)) for i, j in np.argwhere(mask.any(axis=(2, 3)))} <= {(i, j) for i, j, _ in pairs}
    for i, j, full in pairs:
        assert not full or mask[i, j].all()
    wholly = {(int(i), int(j)) for i, j in np.argwhere(mask.all(axis=(2, 3)))}
    assert {(i, j) for i, j, full in pairs if full} == wholly or block_q != block_k


@pytest.mark.parametrize(("block_q", "block_k"), BLOCKS)
@pytest.mark.parametrize("name", ["tiny", "trees", "long_trees"])
def test_both_orders_hold_the_same_pairs_and_say_where_a_tile_begins(name, block_q, block_k):
    plan = planned(name, block_q, block_k)
    by_query, by_key = listed(plan.by_query), listed(plan.by_key)
    assert by_query == sorted(by_query)
    assert by_key == sorted(by_query, key=lambda pair: (pair[1], pair[0]))
    for pairs, first, axis in ((by_query, plan.first, 0), (by_key, plan.first_key, 1)):
        for tile in range(first.size - 1):
            assert [pair[axis] for pair in pairs].count(tile) == first[tile + 1] - first[tile]
            assert all(pair[axis] == tile for pair in pairs[first[tile] : first[tile + 1]])
    for tile in range(plan.first_key.size - 1):
        queries = [i for i, j, _ in by_key if j == tile]
        assert queries == list(range(queries[0], queries[0] + len(queries))) if queries else True


def test_the_lists_of_a_batch_without_tokens_are_empty():
    plan = make_plan(jnp.zeros((2, 20), jnp.int32), block_q=8, block_k=8)
    assert int(plan.by_query.count[0]) == int(plan.by_key.count[0]) == 0
    assert not np.any(plan.first)


def test_lists_have_room_for_pairs_of_one_row_only():
    """A causal row of n tiles has n (n + 1) / 2; rows that end inside a tile share it."""
    assert len(possible_pairs(1, 64, 8, 8)) == 36
    assert len(possible_pairs(10, 64, 8, 8)) == 360
    assert len(possible_pairs(1, 64, 16, 8)) == 2 + 4 + 6 + 8
    until = jnp.asarray(random_rows(5, 9, 20, branch=0, root=0)[0])
    plan = make_plan(until, block_q=8, block_k=8)
    assert int(plan.by_query.count[0]) <= plan.by_query.query.size
