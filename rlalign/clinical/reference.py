"""The clinical test reference (CTR): from a result to normal, abnormal or unknown.

    interpret("718-7", 11.2, "g/dL", sex="female", age=61)      # Result(label='abnormal', direction='low')

DiaLLM (arXiv 2506.20059) has a reference that maps a test's code to a description and a result to normal or abnormal;
the rules below, by which it does so here, are ours. A result of which nothing is known is unknown, never normal.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from rlalign.clinical.events import FLAGS, LOINC, Event
from rlalign.clinical.loinc import NOTICE, PANELS, TESTS, is_loinc
from rlalign.clinical.ranges import RANGES, SOURCES, Range
from rlalign.clinical.units import UNITS, canonical, convert

__all__ = ["NOTICE", "PANELS", "RANGES", "SOURCES", "TESTS", "Range", "Result", "interpret", "interpret_event"]

SEXES = ("female", "male")


class Result(NamedTuple):
    """What a result means.

    Attributes:
      label: "normal", "abnormal" or "unknown".
      direction: "low" or "high" where an abnormal result is known to be so; else None.
    """

    label: Literal["normal", "abnormal", "unknown"]
    direction: Literal["low", "high"] | None = None

    @property
    def word(self) -> str:
        """Both in a word: normal, low, high, abnormal or unknown."""
        return self.direction or self.label


NORMAL, ABNORMAL, UNKNOWN = Result("normal"), Result("abnormal"), Result("unknown")
LOW, HIGH = Result("abnormal", "low"), Result("abnormal", "high")
WORDS = {result.word: result for result in (NORMAL, LOW, HIGH, ABNORMAL, UNKNOWN)}
FLAGGED = dict(zip(FLAGS, (UNKNOWN, NORMAL, LOW, HIGH, ABNORMAL), strict=True))


def interpret(
    loinc: str,
    value: float | None,
    unit: str,
    *,
    sex: str | None = None,
    age: float | None = None,
    low: float | None = None,
    high: float | None = None,
    flag: str = "",
    ranges: Sequence[Range] = RANGES,
) -> Result:
    """The meaning of one result.

    The most specific row of `ranges` decides: of the rows for this test, whose unit the value can be converted to, for
    this sex and this age, the one for one sex before the one for both, then the one with the narrowest age band. Bounds
    are inclusive. Where sex or age is unknown, every sex and age that a row is for is tried: one label of all is the
    label, different ones give unknown. Without such a row the record's own range decides, in its own unit, and then its
    flag.

    Args:
      loinc: of the test.
      value: None where the result is no number; NaN and infinities count as None.
      unit: as the record spells it.
      sex: "female", "male", or None if unknown.
      age: in years; None if unknown.
      low, high: the record's own range; one with low above high counts as none.
      flag: of rlalign.clinical.events.FLAGS.
      ranges: the table.
    Returns:
      Result; of a number within bounds, "normal"; never "normal" where no row, range or flag says so.
    Raises:
      ValueError: a sex, age or flag that is none.
    """
    if sex is not None and sex not in SEXES:
        raise ValueError(f"sex must be one of {', '.join(SEXES)}, or None where it is unknown")
    if age is not None and not 0 <= age < math.inf:
        raise ValueError("age must be a number of years from 0 on, or None where it is unknown")
    if flag not in FLAGGED:
        raise ValueError(f"flag must be one of {', '.join(map(repr, FLAGS))}: translate it with flag_of")
    if value is None or not math.isfinite(value):
        return FLAGGED[flag]
    found = _by_table(loinc, value, unit, sex, age, ranges)
    if found is not None:
        return found
    low, high = (None if bound is None or math.isnan(bound) else bound for bound in (low, high))
    if (low is None and high is None) or (low is not None and high is not None and low > high):
        return FLAGGED[flag]
    return _within(value, low, high)


def interpret_event(event: Event, *, sex: str | None = None, age: float | None = None) -> Result:
    """`interpret` of an event of system "loinc"; of any other system, by its own range and flag alone."""
    loinc = event.code if event.system == LOINC else ""
    bounds = {"low": event.low, "high": event.high, "flag": event.flag}
    return interpret(loinc, event.value, event.unit, sex=sex, age=age, **bounds)


def _by_table(
    loinc: str, value: float, unit: str, sex: str | None, age: float | None, ranges: Sequence[Range]
) -> Result | None:
    """What the table says; None where it says nothing."""
    rows = []
    table = _ROWS if ranges is RANGES else _rows(tuple(ranges))
    for row in table.get(loinc, ()):
        converted = convert(value, unit, row.unit, loinc)
        if converted is not None:
            rows.append((row, _within(converted, row.low, row.high)))
    # Which row is the most specific one changes only where a band begins, or behind its end.
    changes = sorted({year for row, _ in rows for year in (row.age[0], row.age[1] + 1)})
    people = [(who, years) for who in ((sex,) if sex else SEXES) for years in (changes if age is None else (age,))]
    found = {result for who, years in people if (result := _most_specific(rows, who, years)) is not None}
    if not found:
        return None
    if len(found) == 1:
        return found.pop()
    return ABNORMAL if found == {LOW, HIGH} else UNKNOWN


def _most_specific(rows: Iterable[tuple[Range, Result]], sex: str, age: float) -> Result | None:
    """The result of the most specific row for this person."""
    years = math.floor(age)
    fitting = [(row, result) for row, result in rows if row.sex in ("", sex) and row.age[0] <= years <= row.age[1]]
    if not fitting:
        return None
    return min(fitting, key=lambda pair: (pair[0].sex == "", pair[0].age[1] - pair[0].age[0]))[1]


def _within(value: float, low: float | None, high: float | None) -> Result:
    if low is not None and value < low:
        return LOW
    if high is not None and value > high:
        return HIGH
    return NORMAL


@functools.lru_cache(maxsize=8)
def _rows(ranges: tuple[Range, ...]) -> dict[str, tuple[Range, ...]]:
    """The rows of each test, checked.

    Raises:
      ValueError: a row that contradicts itself, or two for the same people.
    """
    found: dict[str, tuple[Range, ...]] = {}
    for row in ranges:
        fault = _fault(row, found.get(row.loinc, ()))
        if fault:
            raise ValueError(f"the range of {row.loinc} in {row.unit} for {row.sex or 'both'}, {row.age}: {fault}")
        found[row.loinc] = (*found.get(row.loinc, ()), row)
    return found


def _fault(row: Range, others: Sequence[Range]) -> str | None:
    if not is_loinc(row.loinc):
        return "its code is no LOINC code: the check digit does not fit"
    if row.unit not in UNITS:
        return f"its unit must be in UNITS; did you mean {canonical(row.unit)!r}?"
    if row.sex not in ("", *SEXES) or row.age[0] > row.age[1]:
        return "its sex must be female, male or '', and its ages (first, last)"
    if (row.low is None and row.high is None) or (row.low is not None and row.high is not None and row.low > row.high):
        return "it needs a low, a high, or both in order"
    same = [o for o in others if o.sex == row.sex and o.age[0] <= row.age[1] and row.age[0] <= o.age[1]]
    if any(o.age[1] - o.age[0] == row.age[1] - row.age[0] for o in same):
        return "another one is as specific and overlaps it"
    return None


_ROWS = _rows(RANGES)
