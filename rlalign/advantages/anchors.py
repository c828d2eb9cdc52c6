"""Which states of an environment are one: ids for advantages that compare steps, on the host."""

import difflib
from collections.abc import Hashable, Sequence

import numpy as np


def anchor_ids(
    anchors: Sequence[Hashable], group: Sequence[int] | np.ndarray, *, similarity: float | None = None
) -> np.ndarray:
    """Ids of environment states for group_in_group, on the host.

    What a state is, is the caller's choice: the observation, the observation with the inventory (equal texts with other
    inventories are other states), or with the last K observations: pass tuples.

    Args:
      anchors: N texts or hashables.
      group: i[N].
      similarity: None: equal anchors of one group share an id. A threshold in (0, 1]: texts are clustered greedily in
        the caller's order; a text joins the first cluster of its group whose first member it resembles, by
        difflib.SequenceMatcher(None, text, first).ratio() >= similarity. Depends on the order of rows.

    Returns:
      i32[N], numbered by first appearance, in [0, N).

    Raises:
      ValueError: lengths that differ, or a similarity of things that are no texts.

    >>> anchor_ids(["a door", "a key", "a door", "a door"], [0, 0, 0, 1]).tolist()
    [0, 1, 0, 2]
    """
    group = np.asarray(group)
    if group.shape != (len(anchors),):
        raise ValueError(f"group has shape {group.shape} for {len(anchors)} anchors: one id each")
    if similarity is None:
        known: dict[Hashable, int] = {}
        return np.array(
            [known.setdefault((g, a), len(known)) for g, a in zip(group.tolist(), anchors, strict=True)], np.int32
        )
    if not 0 < similarity <= 1:
        raise ValueError(f"similarity must be in (0, 1], got {similarity}")
    known: dict[Hashable, int] = {}  # the first cluster that a text fits never changes
    clusters: dict[int, list[tuple[str, int]]] = {}
    ids = np.zeros(len(anchors), np.int32)
    count = 0
    for row, (g, text) in enumerate(zip(group.tolist(), anchors, strict=True)):
        if not isinstance(text, str):
            raise ValueError(f"anchor {row} is a {type(text).__name__}: similarity compares texts")
        if (g, text) in known:
            ids[row] = known[g, text]
            continue
        mine = clusters.setdefault(g, [])
        near = (number for first, number in mine if difflib.SequenceMatcher(None, text, first).ratio() >= similarity)
        ids[row] = next(near, count)
        if ids[row] == count:
            mine.append((text, count))
            count += 1
        known[g, text] = int(ids[row])
    return ids


def past_ids(
    anchors: Sequence[Hashable],
    trajectory: Sequence[int] | np.ndarray,
    step: Sequence[int] | np.ndarray,
    *,
    length: int,
) -> np.ndarray:
    """Ids of environment states with what came before them, for hierarchy_of_groups, on the host.

    Args:
      anchors: N hashables, the states.
      trajectory, step: i[N], whose they are and in which order; only the order counts.
      length: K >= 0.

    Returns:
      i32[N, K + 1] in [0, N): column l is equal for rows whose states and l states before them are equal. Rows with
      fewer than l before them share what they have with those alike.

    >>> past_ids(["a", "b", "c", "b"], [0, 0, 1, 1], [0, 1, 0, 1], length=1).tolist()
    [[0, 0], [1, 1], [2, 2], [1, 3]]
    """
    if length < 0:
        raise ValueError(f"length must be >= 0, got {length}")
    trajectory, one = np.asarray(trajectory), np.zeros(len(anchors), int)
    order = np.lexsort((np.asarray(step), trajectory))
    goes_on = np.append(False, trajectory[order][1:] == trajectory[order][:-1])[: len(order)]
    before = np.empty(len(order), int)
    before[order] = np.where(goes_on, np.roll(order, 1), -1)
    state = anchor_ids(anchors, one)
    levels = [state]
    for _ in range(length):  # a state with l before it is that state, and the one before with l - 1 before it
        earlier = np.where(before < 0, -1, levels[-1][before])
        levels.append(anchor_ids(list(zip(state.tolist(), earlier.tolist(), strict=True)), one))
    return np.stack(levels, axis=1)
