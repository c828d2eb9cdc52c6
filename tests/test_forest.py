"""pack and split against brute force: every promise of the token forest, read off the arrays."""

import collections
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.forest import bucket, pack, split
from rlalign.types import Packed

often = settings(derandomize=True, deadline=None, max_examples=150)
sometimes = settings(derandomize=True, deadline=None, max_examples=80)


def walk(packed, place):
    """Tokens from the root down to the node at row * T + column, and its columns."""
    row, column = divmod(int(place), packed.forest.token.shape[1])
    path = []
    while column >= 0:
        path.append(column)
        column = int(packed.forest.parent[row, column])
    columns = path[::-1]
    return packed.forest.token[row, columns].tolist(), columns


def check_forest(forest):
    """Positions, parents, subtrees and padding of every row, by brute force."""
    for token, position, parent, until in zip(*(np.asarray(x) for x in forest), strict=True):
        live = until > 0
        size = int(live.sum())
        assert live.tolist() == [True] * size + [False] * (len(live) - size)  # padding is behind
        assert token[~live].tolist() == position[~live].tolist() == [0] * (len(live) - size)
        assert parent[~live].tolist() == [-1] * (len(live) - size)
        descendants = {i: {i} for i in range(size)}
        for i in range(size):
            assert -1 <= parent[i] < i
            assert position[i] == (0 if parent[i] < 0 else position[parent[i]] + 1)
            ancestor = int(parent[i])
            while ancestor >= 0:
                descendants[ancestor].add(i)
                ancestor = int(parent[ancestor])
        for i in range(size):
            assert sorted(descendants[i]) == list(range(i, until[i]))  # depth first, and what attention may see


def check_packed(packed, sequences, start, loss_mask=None):
    """Every response token of every sample lies where walking to the root gives back its prefix."""
    check_forest(packed.forest)
    assert len(packed.node) == len(packed.mask) == len(sequences)
    for x in (*packed.forest, packed.node):
        assert x.dtype == np.int32
    assert packed.mask.dtype == np.bool_
    for n, sequence in enumerate(sequences):
        for t in range(packed.mask.shape[1]):
            at = start[n] + t
            counts = at < len(sequence) and (loss_mask is None or bool(loss_mask[n][at]))
            assert packed.mask[n, t] == counts
            assert (packed.node[n, t] >= 0) == counts
            if counts:
                tokens, _ = walk(packed, packed.node[n, t])
                assert tokens == sequence[: at + 1].tolist()
        rows = {int(x) // packed.forest.token.shape[1] for x in packed.node[n][packed.mask[n]]}
        assert len(rows) <= 1


def row_of(packed):
    """Row of each sample with a token; the others are absent."""
    length = packed.forest.token.shape[1]
    return {n: int(packed.node[n][packed.mask[n]][0]) // length for n in np.flatnonzero(packed.mask.any(axis=1))}


def prefixes(sequences):
    return {tuple(s[: i + 1]) for s in (s.tolist() for s in sequences) for i in range(len(s))}


def stored(packed):
    return int((np.asarray(packed.forest.visible_until) > 0).sum())


def copies(packed):
    """How often each path from a root is stored in a row."""
    found = collections.Counter()
    length = packed.forest.token.shape[1]
    for row, column in np.argwhere(np.asarray(packed.forest.visible_until) > 0):
        found[int(row), tuple(walk(packed, row * length + column)[0])] += 1
    return found


def batches(tokens=3, samples=9, length=9):
    """Sequences over few tokens, so that they share prefixes, contain each other and repeat; starts and masks."""
    sequence = st.lists(st.integers(0, tokens - 1), min_size=1, max_size=length)

    @st.composite
    def batch(draw):
        sequences = [np.array(s) for s in draw(st.lists(sequence, min_size=1, max_size=samples))]
        start = [draw(st.integers(1, len(s))) for s in sequences]
        return sequences, start

    return batch()


@often
@given(batches(), st.integers(9, 40))
def test_pack_any_batch(batch, row_length):
    sequences, start = batch
    packed = pack(sequences, row_length=row_length, response_start=start)
    check_packed(packed, sequences, start)
    assert packed.forest.token.shape == (bucket(len(packed.forest.token)), row_length)
    # No row holds one prefix twice, and nothing is stored that is not a prefix.
    assert set(copies(packed).values()) <= {1}
    assert {path for _, path in copies(packed)} == prefixes(sequences)


@often
@given(batches(samples=14))
def test_a_prefix_is_stored_once_where_one_row_holds_all(batch):
    sequences, start = batch
    distinct = len(prefixes(sequences))
    packed = pack(sequences, row_length=max(distinct, 9), response_start=start)
    assert packed.forest.token.shape[0] == 1
    assert stored(packed) == distinct
    check_packed(packed, sequences, start)


@sometimes
@given(batches(tokens=2, samples=12), st.integers(1, 4), st.data())
def test_parts_units_and_masks(batch, parts, data):
    sequences, start = batch
    unit = [data.draw(st.integers(0, 4)) for _ in sequences]
    loss_mask = [np.array(data.draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s)))) for s in sequences]
    packed = pack(sequences, row_length=11, response_start=start, loss_mask=loss_mask, unit=unit, parts=parts)
    check_packed(packed, sequences, start, loss_mask)
    assert set(copies(packed).values()) <= {1}
    rows = len(packed.forest.token)
    assert rows % parts == 0
    part = {n: row // (rows // parts) for n, row in row_of(packed).items()}
    for u in set(unit):
        assert len({part[n] for n in part if unit[n] == u}) <= 1
    check_split(packed, parts)


def check_split(packed, parts):
    """Every sample with a token is in one part, once, and its local nodes are the same tokens."""
    local, sample = split(packed, parts)
    rows, length = packed.forest.token.shape
    assert local.forest.token.shape == (parts, rows // parts, length)
    for whole, cut in zip(packed.forest, local.forest, strict=True):
        np.testing.assert_array_equal(cut.reshape(rows, length), whole)
    assert local.node.shape == local.mask.shape == (*sample.shape, packed.node.shape[1])
    assert not local.mask[sample < 0].any()
    assert sorted(sample[sample >= 0].tolist()) == np.flatnonzero(packed.mask.any(axis=1)).tolist()
    for p in range(parts):
        mine = sample[p][sample[p] >= 0]
        assert mine.tolist() == sorted(mine.tolist())
        part = Packed(type(packed.forest)(*(x[p] for x in local.forest)), local.node[p], local.mask[p])
        for slot, n in enumerate(sample[p]):
            if n < 0:
                assert (local.node[p, slot] == -1).all()
                continue
            np.testing.assert_array_equal(local.mask[p, slot], packed.mask[n])
            for t in range(packed.node.shape[1]):
                if packed.mask[n, t]:
                    assert 0 <= local.node[p, slot, t] < rows // parts * length
                    assert walk(part, local.node[p, slot, t]) == walk(packed, packed.node[n, t])
                else:
                    assert local.node[p, slot, t] == -1


@sometimes
@given(batches(samples=8), st.randoms(use_true_random=False))
def test_the_order_of_the_samples_is_kept_and_does_not_matter(batch, random):
    sequences, start = batch
    order = list(range(len(sequences)))
    random.shuffle(order)
    packed = pack(sequences, row_length=80, response_start=start)
    shuffled = pack([sequences[i] for i in order], row_length=80, response_start=[start[i] for i in order])
    for straight, moved in zip(packed.forest, shuffled.forest, strict=True):
        np.testing.assert_array_equal(moved, straight)
    np.testing.assert_array_equal(shuffled.node, packed.node[order])


def test_a_tree_by_hand():
    #   7 - 1 - 2        two answers to one prompt, one of them with two endings
    #     \ 3 - 4
    #         \ 5
    packed = pack([np.array(s) for s in ([7, 3, 5], [7, 1, 2], [7, 3, 4])], row_length=8, response_start=[1, 1, 2])
    assert packed.forest.token.tolist() == [[7, 1, 2, 3, 4, 5, 0, 0]]
    assert packed.forest.position.tolist() == [[0, 1, 2, 1, 2, 2, 0, 0]]
    assert packed.forest.parent.tolist() == [[-1, 0, 1, 0, 3, 3, -1, -1]]
    assert packed.forest.visible_until.tolist() == [[6, 3, 3, 6, 5, 6, 0, 0]]
    assert packed.node.tolist() == [[3, 5], [1, 2], [4, -1]]
    assert packed.mask.tolist() == [[True, True], [True, True], [True, False]]


def test_a_masked_response_token_keeps_its_slot():
    packed = pack([np.arange(6)], row_length=6, response_start=[2], loss_mask=[np.array([0, 0, 1, 0, 1, 1], bool)])
    assert packed.mask.tolist() == [[True, False, True, True]]
    assert packed.node.tolist() == [[2, -1, 4, 5]]


def test_an_empty_response_and_the_default_start():
    packed = pack([np.arange(4), np.arange(3)], row_length=4, response_start=[4, 3])
    assert packed.mask.tolist() == [[False], [False]]
    assert packed.node.tolist() == [[-1], [-1]]
    default = pack([np.arange(4)], row_length=4)
    assert default.node.tolist() == [[1, 2, 3]]
    alone = pack([np.array([5])], row_length=1)
    assert alone.mask.tolist() == [[False]]
    local, sample = split(packed, 1)
    assert sample.tolist() == [[-1, -1]]
    assert not local.mask.any()


def test_tokens_of_every_size_sort_by_value():
    """Ids beyond one byte, and of every integer dtype; neighbours in the row are neighbours by value."""
    values = [0, 1, 255, 256, 257, 65535, 65536, 2**31 - 1]
    sequences = [np.array([9, v], dtype) for v, dtype in zip(values, [np.int64, np.uint32] * 4, strict=True)][::-1]
    packed = pack(sequences, row_length=9)
    assert packed.forest.token.tolist() == [[9, *values]]
    check_packed(packed, sequences, [1] * 8)


def test_response_length_and_num_rows_fix_the_shape():
    packed = pack([np.arange(4), np.arange(2)], row_length=8, response_start=[2, 1], response_length=7, num_rows=5)
    assert packed.node.shape == packed.mask.shape == (2, 7)
    assert packed.forest.token.shape == (5, 8)
    check_packed(packed, [np.arange(4), np.arange(2)], [2, 1])


def test_a_tree_larger_than_a_row_is_cut_between_samples():
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 50, 20)
    sequences = [np.concatenate([prompt, rng.integers(0, 50, 15)]) for _ in range(9)]
    packed = pack(sequences, row_length=60, response_start=[20] * 9)
    check_packed(packed, sequences, [20] * 9)
    rows = collections.Counter(row_of(packed).values())
    assert sorted(rows.values()) == [1, 2, 2, 2, 2]  # 20 + 2 * 15 tokens a row, and no more copies of the prompt
    assert stored(packed) == 5 * 20 + 9 * 15


def test_trees_that_were_cut_leave_few_rows_half_full():
    """32 questions, 8 answers of random digits each: the questions share digits, so no row boundary is natural."""
    rng = np.random.default_rng(0)
    questions = [rng.integers(2, 12, 6) for _ in range(32)]
    sequences = [np.concatenate([q, rng.integers(2, 12, 3), [1]]) for q in questions for _ in range(8)]
    packed = pack(sequences, row_length=120, response_start=[6] * 256, num_rows=12)
    check_packed(packed, sequences, [6] * 256)
    assert stored(packed) <= 11 * 120


def test_prefixes_nest_deeper_than_python_recurses():
    history, ends = np.arange(500), range(1, 500)
    sequences = [np.append(history[:n], 5000 + n) for n in ends]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(400)
    try:
        packed = pack(sequences, row_length=600, response_start=list(ends))
    finally:
        sys.setrecursionlimit(limit)
    check_packed(packed, sequences, list(ends))


def agent_turns(rng, trajectories, turns):
    """Growing prefixes of trajectories that share a task: what an agent's batch looks like."""
    task, out = rng.integers(0, 99, 12), []
    for _ in range(trajectories):
        history = task
        for _ in range(turns):
            history = np.concatenate([history, rng.integers(0, 99, rng.integers(2, 7))])
            out.append(history)
    return out


def test_the_turns_of_agents_are_stored_once():
    sequences = agent_turns(np.random.default_rng(0), trajectories=6, turns=20)
    distinct = len(prefixes(sequences))
    assert distinct * 5 < sum(map(len, sequences))
    assert stored(pack(sequences, row_length=1024)) == distinct
    cut = pack(sequences, row_length=160)
    check_packed(cut, sequences, [1] * len(sequences))
    assert stored(cut) < 1.25 * distinct


def grpo_batch(rng, prompts=32, samples=8):
    sequences, start = [], []
    for _ in range(prompts):
        prompt = rng.integers(0, 30000, rng.integers(50, 400))
        for _ in range(samples):
            sequences.append(np.concatenate([prompt, rng.integers(0, 30000, int(rng.lognormal(5.3, 0.7)) % 1000 + 8)]))
            start.append(len(prompt))
    return sequences, start


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_of_a_grpo_batch_do_equal_work_and_copy_little(parts):
    sequences, start = grpo_batch(np.random.default_rng(1))
    packed = pack(sequences, row_length=4096, response_start=start, parts=parts)
    local, _ = split(packed, parts)
    live = local.forest.visible_until > 0
    work = np.where(live, local.forest.position + 1, 0).sum(axis=(1, 2))  # visible pairs: what attention costs
    assert work.max() < 1.25 * work.min()
    distinct = sum(len(s) - b for s, b in zip(sequences, start, strict=True)) + sum(start[::8])
    assert stored(packed) <= 1.02 * distinct
    assert packed.forest.token.size <= 2 * distinct  # rows are full enough, though their number is a bucket's


def test_pairs_stay_together_and_a_single_tree_reaches_every_part():
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 99, 30) for _ in range(16)]
    sequences = [np.concatenate([p, rng.integers(0, 99, 20)]) for p in prompts for _ in range(2)]
    packed = pack(sequences, row_length=128, response_start=[30] * 32, unit=np.repeat(np.arange(16), 2), parts=8)
    per_part = len(packed.forest.token) // 8
    part = np.array([row_of(packed)[n] // per_part for n in range(32)])
    assert (part[::2] == part[1::2]).all()
    assert np.bincount(part).tolist() == [4] * 8
    one_tree = pack([np.append(prompts[0], [i]) for i in range(8)], row_length=128, parts=4)
    assert set(row_of(one_tree).values()) == {0, 1, 2, 3}


def test_shapes_of_similar_batches_are_few():
    """A run compiles a handful of shapes, whatever it samples."""
    shapes = collections.Counter()
    for seed in range(12):
        sequences, start = grpo_batch(np.random.default_rng(seed), prompts=16, samples=4)
        packed = pack(sequences, row_length=2048, response_start=start, parts=4, response_length=1008)
        local, _ = split(packed, 4)
        shapes[local.forest.token.shape, local.node.shape] += 1
    assert len(shapes) <= 3


def test_bucket():
    assert [bucket(n) for n in range(14)] == [1, 1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert [bucket(n) for n in (17, 24, 25, 33, 48, 49, 1025)] == [24, 24, 32, 48, 48, 64, 1536]
    assert all(n <= bucket(n) <= 1.5 * n for n in range(1, 3000))


ONE = [np.array([1, 2, 3])]
TWO = [np.array([1, 2, 3]), np.array([4, 5])]
BAD = [
    ([], {}, r"^pack needs at least one sequence$"),
    (TWO, {"row_length": 2}, r"^sequence 0 has 3 tokens and row_length is 2: raise row_length to at least 3, or drop"),
    (TWO[::-1], {"row_length": 2}, r"^sequence 1 has 3 tokens"),
    (TWO, {"row_length": 0}, r"^row_length must be at least 1, got 0$"),
    (TWO, {"parts": 0}, r"^parts must be at least 1, got 0$"),
    (TWO, {"num_rows": 3, "parts": 2}, r"^num_rows=3 must be a positive multiple of parts=2$"),
    (TWO, {"num_rows": 0}, r"^num_rows=0 must be a positive multiple of parts=1$"),
    (TWO, {"row_length": 3, "num_rows": 1}, r"^the sequences need 2 rows of 3 tokens .* raise num_rows to at least 2"),
    (TWO, {"response_start": [0, 1]}, r"^response_start\[0\] is 0 in a sequence of 3 tokens: .* prepend a BOS token$"),
    (TWO, {"response_start": [1, 3]}, r"^response_start\[1\] is 3 in a sequence of 2 tokens: it is past the end$"),
    (TWO, {"response_start": [1]}, r"^response_start has 1 entries for 2 sequences$"),
    (TWO, {"unit": [0, 1, 2]}, r"^unit has 3 entries for 2 sequences$"),
    (TWO, {"loss_mask": [np.ones(3, bool)]}, r"^loss_mask has 1 entries for 2 sequences$"),
    (TWO, {"loss_mask": [np.ones(3, bool)] * 2}, r"^loss_mask\[1\] has shape \(3,\), its sequence \(2,\)$"),
    (TWO, {"response_length": 1}, r"^sequence 0 has 2 response tokens, response_length is 1$"),
    ([np.array([1, -100])], {}, r"^sequence 0 holds the negative token -100: strip the padding first$"),
    ([*ONE, np.zeros(0, int)], {}, r"^sequence 1 must be a non-empty 1-D integer array, got int64\[0\]$"),
    ([*ONE, np.zeros((1, 2), int)], {}, r"^sequence 1 must be a non-empty 1-D integer array, got int64\[1, 2\]$"),
    ([*ONE, np.zeros(2)], {}, r"^sequence 1 must be a non-empty 1-D integer array, got float64\[2\]$"),
    ([*ONE, np.ones(2, bool)], {}, r"^sequence 1 must be a non-empty 1-D integer array, got bool\[2\]$"),
]


@pytest.mark.parametrize(("sequences", "options", "text"), BAD)
def test_what_does_not_fit_is_refused_by_name(sequences, options, text):
    with pytest.raises(ValueError, match=text):
        pack(sequences, **({"row_length": 8} | options))


def test_rows_that_do_not_divide_are_refused():
    packed = pack(ONE, row_length=4, num_rows=3)
    for parts in (2, 0):
        with pytest.raises(ValueError, match=rf"^3 rows do not split into {parts} equal parts: call pack\("):
            split(packed, parts)
