"""Counts that may be shown: small cells of a table are hidden, and what would give them away by subtraction.

Two ways, both for the cells of one partition, whose total is known: `hidden` leaves cells out, and as many more as it
takes; `joined` puts neighbours together, where the cells have an order.
"""

import itertools
from collections.abc import Sequence

import numpy as np

MINIMUM = 10  # patients behind a number that is shown


def hidden(counts: Sequence[int] | np.ndarray, minimum: int = MINIMUM) -> np.ndarray:
    """Which cells of a partition are not shown.

    Hidden are the cells below the minimum and then the next smallest, until

        R >= minimum,   R > h,   s > the largest one hidden,   R - (h - 1)(s - 1) < minimum - 1

    of h cells hidden, R patients in them, and s in the smallest cell shown. So h is at least 2, and the total less the
    cells shown is no single cell and no small one. And who knows this rule, by which a hidden cell has at most s - 1
    patients and the smallest fewer than the minimum, still cannot tell how many any of them has. If need be, all cells
    are hidden.

    Args:
      counts: i[K] >= 0, patients of each cell.
      minimum: > 0.

    Returns:
      b[K].

    >>> hidden([40, 3, 25, 60]).tolist()
    [False, True, True, False]
    """
    count = np.asarray(counts)
    order = np.argsort(count, kind="stable")
    small = int((count < minimum).sum())
    many = small
    while small and many < len(count):
        rest, largest, shown = count[order[:many]].sum(), count[order[many - 1]], count[order[many]]
        brim = rest - (many - 1) * (shown - 1)  # the least that the smallest cell can be
        if rest >= max(minimum, many + 1) and shown > largest and brim < minimum - 1:
            break
        many += 1
    out = np.zeros(len(count), bool)
    out[order[:many]] = True
    return out


def joined(counts: Sequence[int] | np.ndarray, minimum: int = MINIMUM) -> list[slice]:
    """Cells in their order, neighbours put together until each has the minimum; the last ones go with those before.

    Args:
      counts: i[K] >= 0.
      minimum: > 0.

    Returns:
      Slices that cover all K cells.

    Raises:
      ValueError: fewer than the minimum in all.

    >>> joined([2, 1, 30, 0, 12, 4])
    [slice(0, 3, None), slice(3, 6, None)]
    """
    edges, held = [0], 0
    for place, count in enumerate(counts, start=1):
        held += int(count)
        if held >= minimum:
            edges.append(place)
            held = 0
    if len(edges) == 1:
        raise ValueError(f"{sum(map(int, counts))} in all: fewer than {minimum}, so that nothing may be shown")
    edges[-1] = len(counts)
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
