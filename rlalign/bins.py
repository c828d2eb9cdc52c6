"""Which samples share a row, and which rows share a part: the bin packing behind forest.pack.

Samples come sorted, so those that share a prefix are neighbours and a run of them costs the first one's length plus
what each later one adds. Runs are cut only where they must be, at the shallowest seam first: a cut at depth s stores s
tokens again.
"""

import numpy as np


def _cost(length: np.ndarray, shared: np.ndarray, run: np.ndarray) -> int:
    """Tokens that a run (ascending indices into the sorted samples) takes in a row."""
    if len(run) == 1:
        return int(length[run[0]])
    between = np.minimum.reduceat(shared[: run[-1] + 1], run[:-1] + 1)  # tokens a sample shares with the one before
    return int(length[run].sum() - between.sum())


def _work(length: np.ndarray, shared: np.ndarray, run: np.ndarray) -> float:
    """Visible pairs of a run: what attention costs, the measure that parts are balanced by."""
    depth, first = length[run].astype(float), np.concatenate([[0], shared[run[1:]]]).astype(float)
    return float(np.sum(depth * (depth + 1) - first * (first + 1)) / 2)


def _cut(length: np.ndarray, shared: np.ndarray, run: np.ndarray, row_length: int) -> list[np.ndarray]:
    """Runs that each fit a row: what is too large splits where its samples share least."""
    runs, children, common = [run], [], []
    for run in runs:  # grows as it goes, parents before children: prefixes nest deeper than Python may recurse
        first = len(runs)
        seam = shared[run[1:]]
        if _cost(length, shared, run) > row_length:
            runs += np.split(run, np.flatnonzero(seam == seam.min()) + 1)
        children.append(range(first, len(runs)))
        common.append(int(seam.min()) if len(runs) > first else 0)
    pieces = [[run] for run in runs]
    for at in reversed(range(len(runs))):
        if children[at]:
            pieces[at] = [piece for child in children[at] for piece in pieces[child]]
        if common[at]:
            # The children share `common` tokens: gather them again, so that it is stored in few rows.
            extra = [_cost(length, shared, piece) - common[at] for piece in pieces[at]]
            pieces[at] = _gather(pieces[at], extra, row_length - common[at])
    return pieces[0]


def _gather(pieces: list[np.ndarray], size: list[int], capacity: int) -> list[np.ndarray]:
    """Largest first into the fullest bin that takes it: what is left over leaves room in one row only."""
    bins: list[list[np.ndarray]] = []
    used: list[int] = []
    for index in sorted(range(len(pieces)), key=lambda i: -size[i]):
        fits = [i for i, tokens in enumerate(used) if tokens + size[index] <= capacity]
        if not fits:
            bins.append([])
            used.append(0)
        best = max(fits, key=used.__getitem__, default=len(bins) - 1)
        bins[best].append(pieces[index])
        used[best] += size[index]
    return [np.sort(np.concatenate(b)) for b in bins]


def _spread(length, shared, runs: list[np.ndarray], parts: int) -> list[np.ndarray]:
    """Cut the heaviest runs until every part can have one; a cut stores the shared path again."""
    runs = list(runs)
    while len(runs) < parts:
        heavy = max(range(len(runs)), key=lambda i: (len(runs[i]) > 1) * _work(length, shared, runs[i]))
        run = runs[heavy]
        if len(run) == 1:
            break
        seam = shared[run[1:]]
        middle = np.abs(np.arange(len(seam)) - (len(seam) - 1) / 2)
        at = int(np.lexsort((middle, seam))[0]) + 1  # the shallowest seam, near the middle
        runs[heavy : heavy + 1] = [run[:at], run[at:]]
    return runs


def _clusters(runs: list[np.ndarray], unit: np.ndarray) -> list[list[int]]:
    """Indices of runs that must share a part because a unit has samples in each of them."""
    root = list(range(len(runs)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    seen: dict[int, int] = {}
    for index, run in enumerate(runs):
        for u in np.unique(unit[run]).tolist():
            root[find(index)] = find(seen.setdefault(u, index))
    members: dict[int, list[int]] = {}
    for index in range(len(runs)):
        members.setdefault(find(index), []).append(index)
    return list(members.values())


def _fill_rows(length, shared, runs: list[np.ndarray], row_length: int) -> list[np.ndarray]:
    """Best fit, longest first: the rows of one part, each an ascending array of samples."""
    rows: list[list[np.ndarray]] = []
    space: list[int] = []
    sized = [(_cost(length, shared, run), run) for run in runs]
    for cost, run in sorted(sized, key=lambda pair: (-pair[0], int(pair[1][0]))):
        fits = [i for i, left in enumerate(space) if left >= cost]
        if fits:
            best = min(fits, key=space.__getitem__)
            rows[best].append(run)
            space[best] -= cost
        else:
            rows.append([run])
            space.append(row_length - cost)
    return [np.sort(np.concatenate(r)) for r in rows]


def assign_rows(
    length: np.ndarray, shared: np.ndarray, *, row_length: int, unit: np.ndarray, parts: int
) -> list[list[np.ndarray]]:
    """Rows of every part, as ascending indices into the sorted samples.

    Args:
      length: i64[N], tokens of the sorted samples.
      shared: i64[N], tokens each shares with the one before it.
      row_length: T.
      unit: i64[N]; samples of one unit go to one part.
      parts: how many; parts are balanced by attention work, heaviest cluster first.

    Returns:
      list[parts] of lists of rows.
    """
    runs = _cut(length, shared, np.arange(len(length)), row_length)
    if parts == 1:
        return [_fill_rows(length, shared, runs, row_length)]
    runs = _spread(length, shared, runs, parts)
    weight = [_work(length, shared, run) for run in runs]
    load, chosen = [0.0] * parts, [[] for _ in range(parts)]
    for cluster in sorted(_clusters(runs, unit), key=lambda c: -sum(weight[i] for i in c)):
        lightest = min(range(parts), key=load.__getitem__)
        load[lightest] += sum(weight[i] for i in cluster)
        chosen[lightest] += [runs[i] for i in cluster]
    return [_fill_rows(length, shared, part, row_length) if part else [] for part in chosen]
