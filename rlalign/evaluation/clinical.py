"""What workups of held-out patients say of an asker: recall, calibration, what was asked, and for whom. NumPy, float64.

    found = findings(workups)                                   # of one asker; None where a number may not be shown
    found.micro[1], found.macro[5], found.calibration.error

Every number is of ten patients or more, and none follows from others that are shown; see rlalign.evaluation.disclosure.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlalign.clinical.workup import Workup, band
from rlalign.evaluation.disclosure import MINIMUM, hidden, joined
from rlalign.evaluation.estimates import Estimate, class_mean, ratio, wilson

PLACES = (1, 5)  # k of recall@k
ORDERS = 5  # first tests that are compared with the orders on record
BINS = 10  # of confidence
COMMON = 10  # tests that are named


class Bin(NamedTuple):
    """Patients of similar confidence: its mean, how often the likeliest diagnosis was right, and how many they are."""

    confidence: float
    accuracy: Estimate
    patients: int


class Calibration(NamedTuple):
    """How far confidence is what it says.

    Attributes:
      bins: ten of equal width over [0, 1], neighbours joined until each has enough patients.
      error: |accuracy - confidence| of each bin, by its share of patients: the expected calibration error.
      brier: the mean of sum_c (p_c - [c is gold])^2; a diagnosis that is not listed counts as of probability 0.
    """

    bins: tuple[Bin, ...]
    error: float
    brier: float


class Row(NamedTuple):
    """Some patients: recall@k by k; None where they are hidden.

    Attributes:
      name: of the class, the sex or the age band; "" for classes put together.
      classes: how many.
      patients: None: hidden.
      recall: k -> Estimate.
      tests: median; None for classes, or where no tests are known.
    """

    name: str
    classes: int
    patients: int | None
    recall: Mapping[int, Estimate]
    tests: float | None = None


class Asking(NamedTuple):
    """What was asked; None where it is not known, or may not be shown.

    Attributes:
      mean: tests a patient, as exact as may be shown.
      quartiles: of the tests a patient.
      counts: (fewest, most, patients), how many patients were asked that many tests.
      common: (test, share of patients who were asked it, as `outside` gives it), the most common first.
      abstained: share of patients without a diagnosis, as `outside` gives it.
      rejects: candidates turned down, a test.
      redundant: share of tests that brought nothing new.
      abnormal: share of results that were low, high or abnormal.
      orders: recall of the orders on record among the first five asked for.
      usual: the same, had everybody been asked what is ordered most for the others.
    """

    mean: float | None
    quartiles: tuple[float, float, float] | None
    counts: tuple[tuple[int, int, int], ...]
    common: tuple[tuple[str, str | float], ...]
    abstained: str | float
    rejects: float | None
    redundant: Estimate | None
    abnormal: Estimate | None
    orders: Estimate | None
    usual: Estimate | None


@dataclasses.dataclass(frozen=True)
class Findings:
    """All about one asker.

    Attributes:
      asker: its name.
      patients, classes: how many.
      micro, macro: k -> recall@k over gold diagnoses, and the mean of that of each class; macro is empty where it would
        give a small class away.
      rare: k -> recall@k over the gold diagnoses of the rarest third of the classes.
      curve: k -> micro recall@k after 0, 1, 2, ... tests; empty where lists are not known.
      calibration: None where no beliefs are known; those of patients without a diagnosis count too.
      asking: see Asking.
      by_class: the rarest third, those that are too small put together in the last row.
      by_sex, by_age: see Row; empty where it is not known.
    """

    asker: str
    patients: int
    classes: int
    micro: dict[int, Estimate]
    macro: dict[int, Estimate]
    rare: dict[int, Estimate]
    curve: dict[int, list[Estimate]]
    calibration: Calibration | None
    asking: Asking
    by_class: tuple[Row, ...]
    by_sex: tuple[Row, ...]
    by_age: tuple[Row, ...]


def by_asker(
    workups: Sequence[Workup], where: Callable[[int], str] = lambda place: f"workups[{place}]"
) -> dict[str, list[Workup]]:
    """The workups of each asker, in the order in which askers first occur.

    Args:
      workups: of any askers.
      where: names a workup by its place, for errors, which hold no value of it.

    Raises:
      ValueError: an asker of fewer than ten patients, one that was given other patients than the first, which would
        tell of the difference, or one that knows a field of some patients alone; overlapping age bands.
    """
    places: dict[str, list[int]] = {}
    for place, one in enumerate(workups):
        places.setdefault(one.asker, []).append(place)
    patients = lambda at: collections.Counter(_patient(workups[i]) for i in at)
    expected = patients(next(iter(places.values()))) if places else None
    for at in places.values():
        first = workups[at[0]]
        if len(at) < MINIMUM:
            raise ValueError(f"{where(at[0])}: its asker has {len(at)} patients; a report takes {MINIMUM} or more")
        for i in at:
            for field in dataclasses.fields(first):
                if (getattr(first, field.name) is None) != (getattr(workups[i], field.name) is None):
                    raise ValueError(
                        f"{where(i)}: {field.name} is not known of all patients of this asker, compare {where(at[0])}; "
                        "give it for all of them or for none"
                    )
        if patients(at) != expected:
            raise ValueError(
                f"{where(at[0])}: its asker was given other patients ({len(at)}) than that of {where(0)} "
                f"({expected.total() if expected else 0}); give each the same, with gold, sex, age and orders"
            )
    _check_bands(workups, where)
    return {asker: [workups[i] for i in at] for asker, at in places.items()}


def _patient(one: Workup) -> tuple:
    """What is the same whoever asks."""
    return tuple(sorted(one.gold)), one.sex, one.age, None if one.orders is None else tuple(sorted(one.orders))


def _check_bands(workups: Sequence[Workup], where: Callable[[int], str]) -> None:
    first = {}
    for i, one in enumerate(workups):
        if (years := band(one.age)) is not None:
            first.setdefault(years, i)
    ordered = sorted(first.items())
    for ((_, last), i), ((begin, _), j) in itertools.pairwise(ordered):
        if begin <= last:
            raise ValueError(f"the age bands of {where(i)} and {where(j)} overlap; give bands that do not")


def findings(workups: Sequence[Workup]) -> Findings:
    """All about one asker, of ten patients or more, as by_asker gives them; see Findings."""
    codes = sorted({code for one in workups for code in one.gold})
    gold = np.array([[code in one.gold for code in codes] for one in workups])
    place = _places([() if one.abstained else one.ranked for one in workups], codes)
    hit = {k: gold & (place < k) for k in PLACES}
    recall = lambda who: {k: ratio(hit[k][who].sum(axis=1), gold[who].sum(axis=1)) for k in PLACES}
    count = gold.sum(axis=0)
    small = hidden(count)
    rare = np.argsort(count, kind="stable")[: max(len(codes) // 3, int(small.sum()))]
    rows = [
        Row(codes[c], 1, int(count[c]), {k: wilson(int(hit[k][:, c].sum()), int(count[c])) for k in PLACES})
        for c in rare
        if not small[c]
    ]
    over = lambda some: {k: ratio(hit[k][:, some].sum(axis=1), gold[:, some].sum(axis=1)) for k in PLACES}
    if small.any():
        patients = int(gold[:, small].any(axis=1).sum())
        enough = patients >= MINIMUM
        rows.append(Row("", int(small.sum()), patients if enough else None, over(small) if enough else {}))
    told = gold[:, rare].any(axis=1).sum() >= MINIMUM and all(row.patients is not None for row in rows)
    # A mean over classes and those shown one by one would give the others away, were they few.
    whole = not small.any() or len(codes) - len(rows) >= MINIMUM
    asked = None if workups[0].tests is None else np.array([len(one.tests or ()) for one in workups])
    return Findings(
        asker=workups[0].asker,
        patients=len(workups),
        classes=len(codes),
        micro=recall(slice(None)),
        macro={k: class_mean(hit[k], gold) for k in PLACES} if whole else {},
        rare=over(rare) if told else {},
        curve=_curve(workups, codes, gold),
        calibration=_calibration(workups),
        asking=_asking(workups, asked),
        by_class=tuple(rows),
        by_sex=_rows([one.sex for one in workups], recall, asked),
        by_age=_rows([one.age for one in workups], recall, asked),
    )


def _places(ranked: Sequence[Sequence[str]], codes: Sequence[str]) -> np.ndarray:
    """i64[N, C]: where each code is in each list; far behind where it is not."""
    out = np.full((len(ranked), len(codes)), 1 << 30)
    column = {code: c for c, code in enumerate(codes)}
    for n, codes_of in enumerate(ranked):
        for place, code in enumerate(codes_of):
            if code in column:
                out[n, column[code]] = place
    return out


def _curve(workups: Sequence[Workup], codes: Sequence[str], gold: np.ndarray) -> dict[int, list[Estimate]]:
    lists = [one.lists for one in workups if one.lists is not None]
    if not lists:
        return {}
    out: dict[int, list[Estimate]] = {k: [] for k in PLACES}
    for t in range(max(map(len, lists))):
        place = _places([one[min(t, len(one) - 1)] for one in lists], codes)
        for k, curve in out.items():
            curve.append(ratio((gold & (place < k)).sum(axis=1), gold.sum(axis=1)))
    return out


def _calibration(workups: Sequence[Workup]) -> Calibration | None:
    if workups[0].belief is None:
        return None
    sure, right, brier = [], [], []
    for one in workups:
        belief = one.belief or ()
        best = max(range(len(belief)), key=lambda i: belief[i], default=None)  # the first of equals
        sure.append(0.0 if best is None else belief[best])
        right.append(best is not None and one.ranked[best] in one.gold)
        told = [code in one.gold for code in one.ranked]
        missed = len(one.gold) - sum(told)
        brier.append(sum((p - g) ** 2 for p, g in zip(belief, told, strict=True)) + missed)
    confidence, hit = np.array(sure), np.array(right)
    into = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    bins = []
    for some in joined(np.bincount(into, minlength=BINS)):
        who = (into >= some.start) & (into < some.stop)
        patients = int(who.sum())
        bins.append(Bin(float(confidence[who].mean()), wilson(int(hit[who].sum()), patients), patients))
    error = sum(abs(one.accuracy.value - one.confidence) * one.patients for one in bins) / len(workups)
    return Calibration(tuple(bins), error, float(np.mean(brier)))


def _rows(group: Sequence[str | None], recall: Callable, asked: np.ndarray | None) -> tuple[Row, ...]:
    """Patients by sex or age band, youngest first; a cell that may not be shown has no numbers."""
    if group[0] is None:
        return ()
    names = sorted(set(map(str, group)), key=lambda name: (band(name) or (200, 0), name))
    of = np.array(group)
    out = []
    for name, hide in zip(names, hidden([int((of == name).sum()) for name in names]), strict=True):
        who = of == name
        median = None if asked is None or hide else float(np.median(asked[who]))
        out.append(Row(name, 0, None if hide else int(who.sum()), {} if hide else recall(who), median))
    return tuple(out)


def _asking(workups: Sequence[Workup], asked: np.ndarray | None) -> Asking:
    total = lambda name: [getattr(one, name) for one in workups]
    known = lambda name: getattr(workups[0], name) is not None
    abstained = outside(sum(total("abstained")), len(workups))
    orders, usual = _orders(workups)
    abnormal = _rate(total("abnormal"), total("results")) if known("results") else None
    if asked is None:
        return Asking(None, None, (), (), abstained, None, None, abnormal, orders, usual)
    counts = []
    for some in joined(number := np.bincount(asked)):
        there = [t for t in range(some.start, some.stop) if number[t]]
        counts.append((there[0], there[-1], int(number[some].sum())))
    seen = collections.Counter(test for one in workups for test in set(one.tests or ()))
    common = sorted(((-many, test) for test, many in seen.items() if many >= MINIMUM))[:COMMON]
    rejects = None if not known("rejects") or asked.sum() < MINIMUM else sum(total("rejects")) / float(asked.sum())
    return Asking(
        mean=_mean(asked, max(last - first for first, last, _ in counts)),
        quartiles=tuple(np.percentile(asked, (25, 50, 75)).tolist()),
        counts=tuple(counts),
        common=tuple((test, outside(-many, len(workups))) for many, test in common),
        abstained=abstained,
        rejects=rejects,
        redundant=_rate(total("redundant"), asked) if known("redundant") else None,
        abnormal=abnormal,
        orders=orders,
        usual=usual,
    )


def outside(few: int, total: int) -> float | str:
    """The share of patients, or the bound "<" or ">" that hides one to nine of them, such as "< 0.5%"."""
    bound = MINIMUM / total
    if 0 < few < MINIMUM:
        return f"< {100 * bound:.1f}%"
    return f"> {100 * (1 - bound):.1f}%" if 0 < total - few < MINIMUM else few / total


def _rate(hits: Sequence[float], of: Sequence[int] | np.ndarray) -> Estimate | None:
    n = np.asarray(of)
    return ratio(hits, n) if n.sum() >= MINIMUM and (n > 0).sum() >= MINIMUM else None


def _mean(asked: np.ndarray, width: int) -> float | None:
    """The mean, rounded so far that it does not tell apart the numbers that were put together: over patients the
    rounding moves the sum by ten times as much as the widest of them is. None where that leaves nothing."""
    mean = float(asked.mean())
    steps = [step for step in (0.1, 0.5, 1.0) if step / 2 * len(asked) >= MINIMUM * width]
    if not width:
        return mean
    return round(mean / steps[0]) * steps[0] if steps else None


def _orders(workups: Sequence[Workup]) -> tuple[Estimate | None, Estimate | None]:
    """(recall of the orders on record among the first five tests, the same of what is ordered most for others)."""
    if workups[0].orders is None:
        return None, None
    names = sorted({name for one in workups for name in one.orders or ()})
    on_record = np.array([[name in (one.orders or ()) for name in names] for one in workups])
    many = on_record.sum(axis=1)
    others = on_record.sum(axis=0) - on_record  # without the patient's own
    first = np.argsort(-others, axis=1, kind="stable")[:, :ORDERS]
    usual = _rate(np.take_along_axis(on_record, first, axis=1).sum(axis=1), many)
    if workups[0].tests is None:
        return None, usual
    # A test inside a panel counts as that panel's order.
    asked = [list(dict.fromkeys(test.split(":")[0] for test in one.tests or ()))[:ORDERS] for one in workups]
    found = [len(set(some) & set(one.orders or ())) for some, one in zip(asked, workups, strict=True)]
    return _rate(found, many), usual
