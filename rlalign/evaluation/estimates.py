"""What a few numbers say of many: unbiased pass@k, and intervals for shares, wins and seeds. NumPy, float64."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlalign.types import Array


class Estimate(NamedTuple):
    """A number and the interval around it.

    Attributes:
      value: the estimate.
      low, high: ends of its interval.
    """

    value: float
    low: float
    high: float


class WinRate(NamedTuple):
    """How often one of two was preferred.

    Attributes:
      rate: Estimate, the mean over prompts, in [0, 1].
      consistency: share of the comparisons whose two positions gave the same outcome; NaN where one was asked.
      prompts: that the rate counts.
      comparisons: that it counts.
      left_out: comparisons without a verdict in each position asked.
    """

    rate: Estimate
    consistency: float
    prompts: int
    comparisons: int
    left_out: int


def pass_at_k(correct: Array, total: Array, k: int) -> np.ndarray:
    """The chance that one of k answers is right, from n >= k of which c are; unbiased.

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1}^{n} max(1 - k / i, 0)

    Chen et al. 2021 (arXiv 2107.03374), eq. 1; no factor leaves [0, 1], whatever n. The mean over problems estimates
    the share that k answers solve.

    Args:
      correct: i[...], c: right answers of each problem.
      total: i[...], n: answers of each problem.
      k: > 0.

    Returns:
      f64[...].

    Raises:
      ValueError: shapes or types that are none of counts, k beyond a problem's n, c outside [0, n]; by its place.

    >>> pass_at_k([0, 1, 4], [4, 4, 4], 2).tolist()
    [0.0, 0.5, 1.0]
    """
    c, n = np.asarray(correct), np.asarray(total)
    if c.shape != n.shape or c.dtype.kind not in "iu" or n.dtype.kind not in "iu":
        raise ValueError(
            f"correct is {c.dtype}{list(c.shape)} and total {n.dtype}{list(n.shape)}: give integers of one shape"
        )
    c, n = c.astype(np.int64), n.astype(np.int64)
    for bad, what in (
        ((n < k) | (k < 1), f"k={k} must be at least 1 and at most total: sample more answers, or ask for a smaller k"),
        ((c < 0) | (c > n), "correct must lie in [0, total]"),
    ):
        if bad.any():
            at = [int(i) for i in np.argwhere(bad)[0]]
            raise ValueError(f"problem {at}: correct={c[tuple(at)]} of total={n[tuple(at)]}; {what}")
    i = np.arange(1, n.max(initial=0) + 1)
    counts = (i > (n - c)[..., None]) & (i <= n[..., None])
    return 1.0 - np.prod(np.where(counts, np.maximum(1.0 - k / i, 0.0), 1.0), axis=-1)


def wilson(successes: int, total: int, level: float = 0.95) -> Estimate:
    """The share of independent successes, and Wilson's score interval, which never leaves [0, 1].

        (p + z^2 / 2n  +-  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),     p = successes / n

    Wilson 1927 (J. Am. Stat. Assoc. 22, 209); z is the normal quantile of (1 + level) / 2.

    Args:
      successes, total: counts, 0 <= successes <= total, total > 0.
      level: in (0, 1).

    Raises:
      ValueError: counts or a level out of range.
    """
    if not 0 <= successes <= total or total < 1:
        raise ValueError(f"successes={successes} of total={total}: need 0 <= successes <= total and total >= 1")
    z, p = _normal(level), successes / total
    middle, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    low, high = ((middle + sign * half) / (1 + z * z / total) for sign in (-1, 1))
    return Estimate(p, 0.0 if successes == 0 else low, 1.0 if successes == total else high)


def share(values: Array, level: float = 0.95) -> Estimate:
    """The mean of independent numbers in [0, 1], one a prompt, with an interval that is never empty.

        v' = v and z^2 / 2 zeros and z^2 / 2 ones,     mean(v') +- z std(v') / sqrt(n + z^2)

    For numbers that are 0 or 1 this is Agresti and Coull's interval (1998, Am. Stat. 52, 119), a little wider than
    Wilson's; for ties and for means over several samples their own, smaller variance counts. Cut at 0 and 1.

    Args:
      values: f[N] in [0, 1].
      level: in (0, 1).

    Raises:
      ValueError: no values, or one outside [0, 1].
    """
    v = _vector(values)
    if not ((v >= 0) & (v <= 1)).all():
        raise ValueError(f"values[{int(np.argmin((v >= 0) & (v <= 1)))}] is outside [0, 1], or not a number")
    z = _normal(level)
    count = len(v) + z * z
    middle = (v.sum() + z * z / 2) / count
    half = z * math.sqrt(max((np.sum(v * v) + z * z / 2) / count - middle * middle, 0.0) / count)
    return Estimate(float(v.mean()), max(float(middle - half), 0.0), min(float(middle + half), 1.0))


def ratio(hits: Array, of: Array, level: float = 0.95) -> Estimate:
    """sum_i h_i / sum_i n_i over independent patients or prompts, each with h_i of n_i; the interval is never empty.

        R' = (sum h_i + z^2 / 2) / (sum n_i + z^2),     half = z sqrt(sum (h_i - R' n_i)^2) / (sum n_i + z^2)

    with z^2 / 2 of 0 of 1 and z^2 / 2 of 1 of 1 added, in the second sum too: `share` where every n_i is 1. Hits of one
    patient may go together. Cut at 0 and 1.

    Args:
      hits: f[N] or i[N], 0 <= h_i <= n_i.
      of: i[N], not all of them 0.
      level: in (0, 1).

    Raises:
      ValueError: other shapes, hits outside [0, n_i], or all n_i 0.
    """
    h, n, z = _vector(hits), _vector(of), _normal(level)
    if h.shape != n.shape or not ((h >= 0) & (h <= n)).all() or n.sum() == 0:
        raise ValueError(f"hits {list(h.shape)} of {list(n.shape)}: need 0 <= hits <= of, and some of them above 0")
    more, total = z * z / 2, float(n.sum()) + z * z
    middle = (float(h.sum()) + more) / total
    spread = float(((h - middle * n) ** 2).sum()) + more * (middle**2 + (1 - middle) ** 2)
    half = z * math.sqrt(spread) / total
    return Estimate(float(h.sum() / n.sum()), max(middle - half, 0.0), min(middle + half, 1.0))


def class_mean(hit: Array, gold: Array, level: float = 0.95) -> Estimate:
    """The mean over classes of h_c / n_c, such as macro recall, with an interval to first order.

        e_i = 1/C sum_c (h_ic - r_c g_ic) / n_c,     half = z sqrt(sum_i e_i^2),     r_c = (h_c + 1) / (n_c + 2)

    Args:
      hit: b[N, C], what was found of `gold`.
      gold: b[N, C], each class at least once.
      level: in (0, 1).

    Raises:
      ValueError: a class that does not occur.
    """
    h, g = np.asarray(hit, np.float64), np.asarray(gold, np.float64)
    found, count = h.sum(axis=0), g.sum(axis=0)
    if h.shape != g.shape or not (count > 0).all() or not count.size:
        raise ValueError(
            f"hit {list(h.shape)} of gold {list(g.shape)}: need [N, C] twice, and each class at least once"
        )
    each = ((h - (found + 1) / (count + 2) * g) / count).mean(axis=1)
    value, half = float((found / count).mean()), _normal(level) * math.sqrt(float((each**2).sum()))
    return Estimate(value, max(value - half, 0.0), min(value + half, 1.0))


def interval(values: Array, level: float = 0.95) -> Estimate:
    """The mean of numbers, such as one a seed, and Student's interval: mean +- t s / sqrt(n), s with n - 1.

    Args:
      values: f[N].
      level: in (0, 1).

    Returns:
      Estimate; its ends are NaN for a single value, which says nothing of the others.

    Raises:
      ValueError: no values, a level out of range.

    >>> [round(x, 3) for x in interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    v, _ = _vector(values), _normal(level)
    mean = float(v.mean())
    if len(v) == 1:
        return Estimate(mean, math.nan, math.nan)
    half = _student(level, len(v) - 1) * float(v.std(ddof=1)) / math.sqrt(len(v))
    return Estimate(mean, mean - half, mean + half)


def win_rate(outcome: Array, *, prompt: Sequence[int] | np.ndarray | None = None, level: float = 0.95) -> WinRate:
    """How often a candidate beats a reference, from single comparisons: 1 won, 0.5 a tie, 0 lost, NaN no verdict.

    Judges favour a position (Zheng et al. 2023, arXiv 2306.05685, section 3.3), so each comparison is asked in both
    and counts by the mean of the two: won in one and lost in the other is a tie. One without a verdict in either is
    left out whole, as the other alone would bring the position back. A prompt counts by the mean of its comparisons;
    the interval is that of `share` over prompts.

    Args:
      outcome: f[N] of one position, or f[N, 2]: the candidate shown first, and shown second. 1 is a win of the
        candidate in either.
      prompt: i[N], which prompt a comparison belongs to; None: each its own.
      level: in (0, 1).

    Raises:
      ValueError: a shape or an outcome out of range, or no comparison with a verdict.
    """
    outcome = np.asarray(outcome, np.float64)
    both = outcome[:, None] if outcome.ndim == 1 else outcome
    if both.ndim != 2 or both.shape[1] not in (1, 2):
        raise ValueError(f"outcome is f{list(outcome.shape)}: give f[N], or f[N, 2] for both positions")
    if not (np.isnan(both) | ((both >= 0) & (both <= 1))).all():
        raise ValueError("outcome holds a number outside [0, 1]: 1 won, 0.5 a tie, 0 lost, NaN no verdict")
    owner = np.arange(len(both)) if prompt is None else np.asarray(prompt)
    if owner.shape != (len(both),):
        raise ValueError(f"prompt has shape {list(owner.shape)} for {len(both)} comparisons")
    known = ~np.isnan(both).any(axis=1)
    if not known.any():
        raise ValueError(f"none of {len(both)} comparisons has a verdict: look at what the judge answers")
    kept, (_, owner) = both[known], np.unique(owner[known], return_inverse=True)
    each = np.bincount(owner, weights=kept.mean(axis=1)) / np.bincount(owner)
    consistency = float(np.mean(kept[:, 0] == kept[:, 1])) if kept.shape[1] == 2 else math.nan
    return WinRate(share(each, level), consistency, len(each), int(known.sum()), int((~known).sum()))


def _vector(values: Array) -> np.ndarray:
    v = np.asarray(values, np.float64)
    if v.ndim != 1 or not v.size:
        raise ValueError(f"values must be f[N] with N >= 1, got {list(v.shape)}")
    return v


def _normal(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie in (0, 1), such as 0.95")
    return statistics.NormalDist().inv_cdf((1 + level) / 2)


def _student(level: float, freedom: int) -> float:
    """t with P(|T| <= t) = level, by bisection of the angle arctan(t / sqrt(freedom))."""
    low, high = 0.0, math.pi / 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, freedom) < level else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _student_within(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan(angle)); Abramowitz and Stegun 26.7.3 and 26.7.4."""
    odd = freedom % 2
    if freedom == 1:
        return 2 * angle / math.pi
    # sin(a) (1 + (1/2) cos^2 a + (1 3)/(2 4) cos^4 a + ...), or for odd freedom cos a (1 + (2/3) cos^2 a + ...).
    at = np.arange(2 + odd, freedom - 1, 2)
    terms = np.cumprod((at - 1) / at * math.cos(angle) ** 2)
    total = math.sin(angle) * math.cos(angle) ** odd * (1.0 + float(terms.sum()))
    return 2 / math.pi * (angle + total) if odd else total
