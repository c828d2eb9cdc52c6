"""What is hidden cannot be found: not by subtraction, and not by who knows the rule."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlalign.evaluation.disclosure import hidden, joined


@pytest.mark.parametrize(
    ("counts", "out"),
    [
        ([10, 11, 500], []),
        ([9, 200, 300], [0, 1]),  # alone it would be the total less the others
        ([3, 4, 50, 90], [0, 1, 2]),  # together seven patients
        ([3, 9, 50, 90], [0, 1]),
        ([40, 3, 25, 60], [1, 2]),
        ([9, 10, 10, 400], [0, 1, 2]),  # of two equal cells neither is chosen
        ([5, 400], [0, 1]),
        ([9, 10, 11], [0, 1, 2]),  # 19 in the first two, at most 10 in either: 9 and 10
        ([0, 30, 60], [0, 1]),
        ([], []),
    ],
)
def test_small_cells_and_their_complements_are_hidden(counts, out):
    assert np.flatnonzero(hidden(counts)).tolist() == out


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_the_total_less_what_is_shown_is_no_small_cell(counts):
    hide, count = hidden(counts), np.array(counts)
    assert (count[~hide] >= 10).all()
    if hide.any() and not hide.all():
        assert hide.sum() >= 2
        assert count.sum() - count[~hide].sum() >= 10
        assert count[hide].max() < count[~hide].min()


@pytest.mark.parametrize("minimum", [4, 5])
@pytest.mark.parametrize("cells", [2, 3, 4])
def test_who_knows_the_rule_cannot_tell_a_hidden_cell(minimum, cells):
    """Of all tables, those that look the same: no hidden cell has one value in all of them."""
    look = collections.defaultdict(list)
    for counts in itertools.product(range(1, 2 * minimum + 3), repeat=cells):
        if sum(counts) > minimum:
            shown = tuple(None if hide else n for n, hide in zip(counts, hidden(counts, minimum), strict=True))
            look[sum(counts), shown].append(counts)
    found = 0
    for (_, shown), same in look.items():
        for place in [place for place, cell in enumerate(shown) if cell is None]:
            assert len({counts[place] for counts in same}) > 1, (shown, same)
            found += 1
    assert found > 10


@given(st.lists(st.integers(0, 25), min_size=1, max_size=30).filter(lambda counts: sum(counts) >= 10))
def test_neighbours_are_joined_until_each_has_enough(counts):
    parts = joined(counts)
    assert [place for part in parts for place in range(part.start, part.stop)] == list(range(len(counts)))
    assert all(sum(counts[part]) >= 10 for part in parts)
    for part in parts[:-1]:
        assert sum(counts[part.start : part.stop - 1]) < 10  # no more than it takes


def test_too_few_for_anything_is_an_error():
    with pytest.raises(ValueError, match="9 in all: fewer than 10"):
        joined([4, 5])
