"""Several sets mixed by weights, and which entries a step visits: a function of the seed and the step alone."""

import bisect
import dataclasses
import functools
import itertools
import math
import operator
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np

from rlalign.io.data import prompts_at_step, raw_bits, visits
from rlalign.types import Rewards

BITS = 32  # of the fractions in which a step is cut: counts are integers, not roundings of floats
T = TypeVar("T", covariant=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture(Sequence[T], Generic[T]):
    """Several sets one after the other, a sequence like a list, and how often training visits each. See `mix`.

    Attributes:
      names: of the sets.
      sets: none empty.
      shares: of a step's entries; they sum to 1.
    """

    names: tuple[str, ...]
    sets: tuple[Sequence[T], ...]
    shares: tuple[float, ...]

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each set begins in the whole, and where the whole ends."""
        return tuple(itertools.accumulate(map(len, self.sets), initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        index = range(len(self))[index]  # a negative one from the end, an IndexError beyond it
        place = bisect.bisect_right(self.starts, index) - 1
        return self.sets[place][index - self.starts[place]]

    def recipe(self) -> list[Any]:
        """[name, size, share] of each set, in order: what a run must keep to be continued."""
        return [list(row) for row in zip(self.names, map(len, self.sets), self.shares, strict=True)]

    def summary(self) -> str:
        """One line for the log: "25.0% sums (98), 75.0% chat (1,000)"."""
        return ", ".join(f"{share:.1%} {name} ({size:,})" for name, size, share in self.recipe())


def mix(sets: Mapping[str, Sequence[T]], *, weights: Mapping[str, float]) -> Mixture[T]:
    """Mixes sets of prompts, or of anything else that training visits, by weights.

    Of every step's entries each set has its share, rounded up or down at random such that the expected share is exactly
    the weight's; over a step no count is off by 1 or more. Each set is visited in an order of its own, every entry once
    an epoch of that set, however the run was interrupted: of two sets of one weight the smaller has more epochs.

    Args:
      sets: name -> entries. The order of the names matters to which steps round up.
      weights: name -> > 0; only their ratios count.
    Returns:
      Mixture, for `fit(prompts=...)` and `at_step`.
    Raises:
      ValueError: no set, an empty one, a name in one of the two alone, a weight that is not finite and positive.
      TypeError: a Mixture inside a Mixture.

    >>> mix({"a": [1, 2], "b": [3, 4, 5]}, weights={"a": 1, "b": 3}).summary()
    '25.0% a (2), 75.0% b (3)'
    """
    if not sets:
        raise ValueError("mix needs at least one set")
    for name in [*sets, *weights]:
        if name not in weights:
            raise ValueError(f"weights has no {name!r} (present: {', '.join(weights) or 'none'}); give each set one")
        if name not in sets:
            raise ValueError(f"weights has {name!r}, which is no set (sets: {', '.join(sets)}); remove it")
        if isinstance(sets[name], Mixture):
            raise TypeError(f"set {name!r} is a Mixture itself; mix the sets that it is made of")
        if not len(sets[name]):
            raise ValueError(f"set {name!r} is empty; leave it out")
        if not (math.isfinite(weights[name]) and weights[name] > 0):
            raise ValueError(f"weights[{name!r}] is {weights[name]}, must be finite and positive; leave the set out")
    largest = max(weights.values())
    total = math.fsum(weights[name] / largest for name in sets)
    shares = tuple(weights[name] / largest / total for name in sets)
    return Mixture(tuple(sets), tuple(sets.values()), shares)


def at_step(items: Sequence[T], per_step: int, *, seed: int, step: int) -> list[T]:
    """The entries of a step: of a plain sequence as prompts_at_step has them, of a Mixture each set's share.

    Args:
      items: a sequence or a Mixture, not empty.
      per_step: > 0.
      seed, step: >= 0.
    Returns:
      per_step entries; those of a set are spread over the list, so that its parts have their shares too.
    Raises:
      ValueError: an argument out of range.
    """
    return [items[i] for i in entries_at_step(items, per_step, seed=seed, step=step)]


def entries_at_step(items: Sequence[Any], per_step: int, *, seed: int, step: int) -> np.ndarray:
    """i64[per_step]: the indices of what at_step gives. A Mixture's take time with the step: 5 ms at 100,000."""
    if not isinstance(items, Mixture):
        return prompts_at_step(len(items), per_step, seed=seed, step=step)
    prompts_at_step(len(items), per_step, seed=seed, step=step)  # checks its arguments
    per_step, seed, step = (operator.index(number) for number in (per_step, seed, step))
    before, now = _counts(items.shares, per_step, seed, step)
    parts = [
        start + visits(len(entries), int(first), int(count), seed=seed, stream=(zlib.crc32(name.encode()),))
        for name, entries, start, first, count in zip(items.names, items.sets, items.starts, before, now, strict=False)
    ]
    place = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in now])
    return np.concatenate(parts)[np.argsort(place, kind="stable")]


def _counts(shares: Sequence[float], per_step: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """i64[sets] entries of each set in all steps before, and in this one, by systematic sampling.

    The sets cut the line from 0 to per_step by their shares. A step draws u in [0, 1) and takes the sets in which the
    points u, u + 1, ..., u + per_step - 1 lie: per_step of them, and of each set its length on the line or one less or
    more, on average exactly its length.
    """
    whole = per_step << BITS
    ends = [min(round(share * whole), whole) for share in itertools.accumulate(shares)]
    ends = np.array([0, *ends[:-1], whole], np.int64)
    u = (raw_bits(step + 1, seed, (0, 0, 0)) >> np.uint64(64 - BITS)).astype(np.int64)
    below = -((u[:, None] - ends[None, :]) >> BITS)  # points of each step below each end: ceil(end - u)
    counts = np.diff(below, axis=1)
    return counts[:-1].sum(axis=0), counts[-1]


def reward_by_set(items: Sequence[Any], entry: np.ndarray, rewards: Rewards) -> dict[str, float]:
    """reward/NAME, the mean of a set's valid rewards, of each set of a Mixture; `entry` i[N] is a sample's prompt."""
    if not isinstance(items, Mixture):
        return {}
    place = np.searchsorted(items.starts, entry, side="right") - 1
    chosen = {name: rewards.valid & (place == number) for number, name in enumerate(items.names)}
    return {f"reward/{name}": float(rewards.reward[mine].mean()) for name, mine in chosen.items() if mine.any()}
