"""The tile lists against the whole mask."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign_kernels.attention.plan import make_plan
from tests.kernels.test_attention import FORESTS

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
    visible, wholly = ({(int(i), int(j)) for i, j in np.argwhere(x)} for x in (mask.any((2, 3)), mask.all((2, 3))))
    assert visible <= {(i, j) for i, j, _ in pairs}
    assert {(i, j) for i, j, full in pairs if full} == wholly
    until = np.asarray(plan.visible_until)
    reach = until.reshape(-1, block_k).max(axis=1)
    row = np.arange(until.size) // FORESTS[name][0].shape[1]  # pairs of two rows are not even looked at
    ranges = itertools.product(range(len(mask)), range(len(reach)))
    formula = {(i, j) for i, j in ranges if j * block_k < (i + 1) * block_q and reach[j] > i * block_q}
    assert {(i, j) for i, j, _ in pairs} == formula
    assert all(row[i * block_q] <= row[min((j + 1) * block_k, until.size) - 1] for i, j in formula)


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
    """A causal row of n tiles has n (n + 1) / 2, and all of them are live."""
    for rows, block_q, block_k, room in ((1, 8, 8, 36), (10, 8, 8, 360), (1, 16, 8, 20), (2, 8, 16, 40)):
        until = jnp.full((rows, 64), 64, jnp.int32)
        plan = make_plan(until, block_q=block_q, block_k=block_k)
        assert plan.by_query.query.size == plan.by_key.query.size == room
        assert int(plan.by_query.count[0]) == int(plan.by_key.count[0]) == room
