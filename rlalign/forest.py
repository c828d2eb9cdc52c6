"""Pack token sequences into a forest in which every shared prefix is stored once; host side, NumPy.

    sequences --sort--> shared prefixes of neighbours --bins--> rows --lay out--> TokenForest, node

Sorted sequences, each emitting only what it does not share with the one before it, are the depth-first order of their
tree. So everything follows from `shared[i]`, the length of the prefix that sequence i shares with its predecessor in
the row: a node at depth d belongs to the last sequence with shared <= d, and its subtree ends where the next such
sequence begins.
"""

from collections.abc import Sequence

import numpy as np

from rlalign.bins import assign_rows
from rlalign.types import Packed, TokenForest


def bucket(count: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is >= count: a run compiles a handful of shapes."""
    if count <= 2:
        return max(count, 1)
    power = 1 << (count - 1).bit_length()
    return 3 * power // 4 if count <= 3 * power // 4 else power


class NotEnoughRows(ValueError):
    """`num_rows` rows do not hold the sequences."""


def pack(
    sequences: Sequence[np.ndarray],
    *,
    row_length: int,
    response_start: Sequence[int] | np.ndarray | None = None,
    loss_mask: Sequence[np.ndarray] | None = None,
    unit: Sequence[int] | np.ndarray | None = None,
    parts: int = 1,
    num_rows: int | None = None,
    response_length: int | None = None,
) -> Packed:
    """Rows of a token forest from any list of token sequences; shared prefixes are found here.

    Args:
      sequences: N 1-D integer arrays, prompt and response joined.
      row_length: T. All nodes of one sample lie in one row; a tree larger than a row is cut between samples and its
        shared path stored again.
      response_start: i[N], index of the first response token. None is 1 for each. Equal to the length: no response.
      loss_mask: N arrays b[len]; a response token that is False there keeps its slot with mask False.
      unit: i[N]; samples of one unit (a DPO or GSIL pair) lie in one part.
      parts: rows come in this many equal blocks, balanced by attention work.
      num_rows: B, a multiple of `parts`; None takes the bucket (1, 2, 3, 4, 6, 8, 12, ...) that fits, times `parts`.
      response_length: R; None takes the longest response.

    Returns:
      Packed: N and its order are those of `sequences`.

    Raises:
      ValueError: what does not fit or makes no sense, naming the sequence and the remedy.

    >>> packed = pack([np.array([1, 2, 3]), np.array([1, 2, 4])], row_length=4, response_start=[2, 2])
    >>> packed.forest.token.tolist(), packed.forest.visible_until.tolist(), packed.node.tolist()
    ([[1, 2, 3, 4]], [[4, 4, 3, 4]], [[2], [3]])
    """
    length, start = _check(sequences, row_length, response_start, loss_mask, unit, parts, num_rows)
    order = np.array(sorted(range(len(length)), key=lambda i: np.asarray(sequences[i]).astype(">u4").tobytes()))
    token = _rectangle([np.asarray(sequences[i]) for i in order], length[order], -1)
    shared = _shared_prefix(token, length[order])
    group = np.arange(len(length)) if unit is None else np.asarray(unit)
    rows = assign_rows(length[order], shared, row_length=row_length, unit=group[order], parts=parts)
    per_part = _rows_per_part(rows, parts, num_rows, row_length)
    members = np.concatenate([part[r] for part in rows for r in range(len(part))])  # indices into the sorted order
    row = np.concatenate(
        [np.full(len(part[r]), p * per_part + r) for p, part in enumerate(rows) for r in range(len(part))]
    )
    shared = _shared_in_rows(token[members], length[order][members], row, shared, members)
    forest, column = _lay_out(token[members], length[order][members], shared, row, parts * per_part, row_length)
    place = np.empty(len(length), np.int64)
    place[order[members]] = np.arange(len(length))
    node = row[place][:, None] * row_length + column[place]
    return _gather_responses(forest, node, length, start, loss_mask, response_length)


def _check(sequences, row_length, response_start, loss_mask, unit, parts, num_rows):
    if not len(sequences):
        raise ValueError("pack needs at least one sequence")
    for name, value in (("row_length", row_length), ("parts", parts)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if num_rows is not None and (num_rows < parts or num_rows % parts):
        raise ValueError(f"num_rows={num_rows} must be a positive multiple of parts={parts}")
    count = len(sequences)
    for name, value in (("response_start", response_start), ("loss_mask", loss_mask), ("unit", unit)):
        if value is not None and len(value) != count:
            raise ValueError(f"{name} has {len(value)} entries for {count} sequences")
    for i, sequence in enumerate(sequences):
        shape, dtype = np.shape(sequence), np.asarray(sequence).dtype
        if len(shape) != 1 or shape[0] == 0 or dtype.kind not in "iu":
            raise ValueError(f"sequence {i} must be a non-empty 1-D integer array, got {dtype}{list(shape)}")
        if loss_mask is not None and np.shape(loss_mask[i]) != shape:
            raise ValueError(f"loss_mask[{i}] has shape {np.shape(loss_mask[i])}, its sequence {shape}")
    length = np.array([len(s) for s in sequences])
    long = int(length.argmax())
    if length[long] > row_length:
        raise ValueError(
            f"sequence {long} has {length[long]} tokens and row_length is {row_length}: raise row_length to at least "
            f"{length[long]}, or drop or shorten the sequence"
        )
    lowest = np.array([np.min(s) for s in sequences])
    bad = int(lowest.argmin())
    if lowest[bad] < 0:
        raise ValueError(f"sequence {bad} holds the negative token {lowest[bad]}: strip the padding first")
    start = np.ones(count, np.int64) if response_start is None else np.asarray(response_start).astype(np.int64)
    for i in np.flatnonzero((start < 1) | (start > length)):
        what = "a root has no parent that predicts it: prepend a BOS token" if start[i] < 1 else "it is past the end"
        raise ValueError(f"response_start[{i}] is {start[i]} in a sequence of {length[i]} tokens: {what}")
    return length, start


def _rectangle(ragged: list[np.ndarray], length: np.ndarray, fill) -> np.ndarray:
    """i64[N, L], the ragged rows with `fill` behind them."""
    out = np.full((len(ragged), int(length.max())), fill, np.int64)
    out[np.arange(out.shape[1]) < length[:, None]] = np.concatenate(ragged)
    return out


def _shared_prefix(token: np.ndarray, length: np.ndarray) -> np.ndarray:
    """i64[N]: tokens that each sorted sequence shares with the one before it; 0 for the first."""
    differ = np.ones((len(token), token.shape[1] + 1), bool)
    differ[1:, :-1] = token[1:] != token[:-1]
    return np.minimum(differ.argmax(axis=1), length)


def _shared_in_rows(token, length, row, shared, members) -> np.ndarray:
    """Shared prefixes once the sequences are in row order: 0 at a row's start, recomputed where neighbours changed."""
    shared = shared[members]
    moved = np.flatnonzero(np.diff(members, prepend=members[0] - 1) != 1)
    for i in moved:  # one per seam between bins, not per sample
        pair = slice(max(i - 1, 0), i + 1)
        shared[i] = _shared_prefix(token[pair], length[pair])[-1]
    shared[np.flatnonzero(np.diff(row, prepend=-1))] = 0
    return shared


def _rows_per_part(rows, parts, num_rows, row_length) -> int:
    needed = max(len(part) for part in rows)
    if num_rows is None:
        return bucket(needed)
    if needed * parts > num_rows:
        raise NotEnoughRows(
            f"the sequences need {needed} rows of {row_length} tokens in each of {parts} parts, num_rows={num_rows} "
            f"gives {num_rows // parts}: raise num_rows to at least {needed * parts}, or row_length"
        )
    return num_rows // parts


def _lay_out(token, length, shared, row, num_rows, row_length) -> tuple[TokenForest, np.ndarray]:
    """The forest of sequences in row order, and column i64[N, L] of every token of every sequence."""
    count, width = token.shape
    index, depth = np.arange(count)[:, None], np.arange(width)[None, :]
    begins = shared[:, None] <= depth  # this sequence starts a new branch at or above this depth
    new_row = np.diff(row, prepend=-1) != 0
    fresh = length - shared
    end = np.cumsum(fresh)
    row_start = np.maximum.accumulate(np.where(new_row, end - fresh, 0))
    start = end - fresh - row_start
    owner = np.maximum.accumulate(np.where(begins, index, -1), axis=0)
    column = start[owner] + depth - shared[owner]
    own = begins & (depth < length[:, None])
    # The subtree of a node ends where the next branch at or above its depth begins, or with its row.
    stop = np.where(new_row, np.append((end - row_start)[:-1], 0)[np.arange(count) - 1], start)
    following = np.where(begins, index, count)[1:][::-1]
    following = np.minimum.accumulate(following, axis=0)[::-1] if count > 1 else following
    following = np.concatenate([following, np.full((1, width), count)])
    until = np.append(stop, end[-1] - row_start[-1])[following]
    before = np.concatenate([np.full((count, 1), -1), column[:, :-1]], axis=1)

    at = (np.broadcast_to(row[:, None], own.shape)[own], column[own])
    filled = {
        "token": token[own],
        "position": np.broadcast_to(depth, own.shape)[own],
        "parent": before[own],
        "visible_until": until[own],
    }
    arrays = {name: np.full((num_rows, row_length), -1 if name == "parent" else 0, np.int32) for name in filled}
    for name, values in filled.items():
        arrays[name][at] = values
    return TokenForest(**arrays), column


def _gather_responses(forest, node, length, start, loss_mask, response_length) -> Packed:
    response = length - start
    longest = int(response.max())
    if response_length is not None and longest > response_length:
        bad = int(response.argmax())
        raise ValueError(f"sequence {bad} has {longest} response tokens, response_length is {response_length}")
    size = max(longest, 1) if response_length is None else response_length
    at = start[:, None] + np.arange(size)[None, :]
    mask = at < length[:, None]
    at = np.where(mask, at, 0)
    if loss_mask is not None:
        counts = _rectangle([np.asarray(m, bool) for m in loss_mask], length, 0).astype(bool)
        mask &= np.take_along_axis(counts, at, axis=1)
    node = np.where(mask, np.take_along_axis(node, at, axis=1), -1)
    return Packed(forest, node.astype(np.int32), mask)


def split(packed: Packed, parts: int) -> tuple[Packed, np.ndarray]:
    """Cut the rows into equal blocks: the one mechanism for shards, pmap, minibatches and microbatches.

    Args:
      packed: B rows, a multiple of `parts`; every sample's nodes lie in one row, so in one part.
      parts: how many.

    Returns:
      Packed with a leading [parts] axis, nodes counted inside the part, and sample i32[parts, M]: which sample each
      slot holds, -1 where it is padding (mask False). Samples without a counted token are in no part. M is a bucket.

    Raises:
      ValueError: B is not a multiple of `parts`.
    """
    rows, length = packed.forest.token.shape
    if parts < 1 or rows % parts:
        raise ValueError(f"{rows} rows do not split into {parts} equal parts: call pack(..., parts={parts})")
    per_part = rows // parts * length
    node, mask = np.asarray(packed.node), np.asarray(packed.mask)
    first = np.take_along_axis(node, mask.argmax(axis=1)[:, None], axis=1)[:, 0]
    part = np.where(mask.any(axis=1), first // per_part, parts)
    order = np.argsort(part, kind="stable")
    counts = np.bincount(part, minlength=parts + 1)[:parts]
    # Room for uneven parts, so that the shape does not change from batch to batch.
    size = len(node) if parts == 1 else max(bucket(int(counts.max())), bucket(-(-5 * len(node) // (4 * parts))))
    slot = np.arange(size)[None, :] < counts[:, None]
    sample = np.full((parts, size), -1, np.int32)
    sample[slot] = order[: counts.sum()]
    mask = mask[sample] & slot[:, :, None]
    local = np.where(mask, node[sample] - np.arange(parts)[:, None, None] * per_part, -1)
    forest = TokenForest(*(np.asarray(x).reshape(parts, rows // parts, length) for x in packed.forest))
    return Packed(forest, local.astype(np.int32), mask), sample
