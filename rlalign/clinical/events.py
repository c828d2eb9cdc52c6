"""One table for the health records of all formats: an event a row, 48 bytes each, in an order that its content decides.

    table = table_of(events)                       # any iterable of Event: what loaders and generators yield
    for event in table.of("subject 7"): ...
    train, held_out = split_by_subject(table, (0.8, 0.2), seed=0)

What a person is lies in the same table: system "person", code "birth" (its time), and "sex/female" or "sex/male". A
visit has a row at its start and one at its end, system "visit". Diagnoses are "icd10", "icd9" or "snomed", tests
"loinc"; other systems keep the name that their source gives them. ICD codes have no dot.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

PERSON, VISIT, LOINC = "person", "visit", "loinc"
BIRTH, FEMALE, MALE = "birth", "sex/female", "sex/male"
START, END = "start", "end"
DIAGNOSES = ("icd10", "icd9", "snomed")  # systems whose events without a time are dated by their visit
FLAGS = ("", "N", "L", "H", "A")  # not flagged, normal, low, high, abnormal
UNKNOWN_TIME = -(2**63)  # NumPy's NaT as a number: before everything else
CHUNK = 1 << 16

NUMBERS = ("value", "low", "high")
NAMES = {"subject": "i4", "visit": "i4", "code": "i4", "unit": "u2", "system": "u1", "flag": "u1"}
ROW = np.dtype([("time", "i8"), *((name, "f8") for name in NUMBERS), *NAMES.items()])
ORDER = ("subject", "time", "visit", "system", "code", "value", "unit", "low", "high", "flag")


class Event(NamedTuple):
    """One row of a table.

    Attributes:
      subject: whose; an identifier of the source.
      time: seconds since 1970-01-01; None where the source has none.
      visit: the encounter or admission; "" for none.
      system, code: what happened; see the module.
      value: of a measurement; None for none, and for results that are words.
      unit: in UCUM where the source has it.
      low, high: the record's own reference range; None where it has none.
      flag: of FLAGS.
    """

    subject: str
    time: int | None = None
    visit: str = ""
    system: str = ""
    code: str = ""
    value: float | None = None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    flag: str = ""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EventTable:
    """Events of many subjects, sorted by ORDER; a sequence of Event.

    Attributes:
      rows: ROW[N], read-only. `time` is UNKNOWN_TIME and numbers are NaN where there is none; the other columns are
        indices into `names`.
      names: column -> its texts in alphabetical order, each used at least once.
    """

    rows: np.ndarray
    names: dict[str, tuple[str, ...]]

    @property
    def subjects(self) -> tuple[str, ...]:
        """Whose events these are, in the table's order."""
        return self.names["subject"]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"EventTable({len(self.subjects)} subjects, {len(self)} events)"  # no row: a log may hold this

    def __getitem__(self, index: int) -> Event:
        return next(self._events(self.rows[index : index + 1] if index >= 0 else self.rows[index:][:1]))

    def __iter__(self) -> Iterator[Event]:
        for start in range(0, len(self), CHUNK):
            yield from self._events(self.rows[start : start + CHUNK])

    def of(self, subject: str) -> list[Event]:
        """A subject's events.

        Raises:
          KeyError: no such subject; the message does not name it.
        """
        try:
            index = self.subjects.index(subject)
        except ValueError:
            raise KeyError("no event of this subject is in the table") from None
        start, stop = np.searchsorted(self.rows["subject"], (index, index + 1))
        return list(self._events(self.rows[start:stop]))

    def by_subject(self) -> Iterator[list[Event]]:
        """The events of each subject."""
        bounds = np.searchsorted(self.rows["subject"], np.arange(len(self.subjects) + 1))
        for start, stop in itertools.pairwise(bounds):
            yield list(self._events(self.rows[start:stop]))

    def where(self, keep: np.ndarray) -> "EventTable":
        """The rows for which b[N] `keep` is True, with the texts that they use."""
        table = _compact(self.rows[np.flatnonzero(keep)], self.names)
        table.rows.flags.writeable = False
        return table

    def _events(self, rows: np.ndarray) -> Iterator[Event]:
        if not len(rows):
            raise IndexError("there is no such event")
        columns = []
        for name in Event._fields:
            values = rows[name].tolist()
            if name == "time":
                values = [None if x == UNKNOWN_TIME else x for x in values]
            elif name in NUMBERS:
                values = [None if math.isnan(x) else x for x in values]
            else:
                texts = self.names[name]
                values = [texts[x] for x in values]
            columns.append(values)
        return map(Event._make, zip(*columns, strict=True))


def table_of(events: Iterable[Event]) -> EventTable:
    """A table of events in any order: the same events give the same table.

    A diagnosis without a time takes that of its visit's end: it is coded at discharge, and an earlier time would let
    a model see it before it was made. Without such a visit its time stays unknown, which sorts first.

    Args:
      events: consumed once; held as 48 bytes each and every different text once.
    Returns:
      EventTable; equal events are kept once, so that a resource in two files counts as one.
    Raises:
      ValueError: a flag that is none of FLAGS, or more different texts in a column than it can hold.
    """
    index: dict[str, dict[str, int]] = {name: {} for name in NAMES}
    subjects, visits, codes, units, systems, flags = index.values()
    parts, waiting = [], iter(events)
    while chunk := [
        (
            UNKNOWN_TIME if event.time is None else event.time,
            math.nan if event.value is None else event.value + 0.0,  # no -0.0, which equals 0.0 in other bits
            math.nan if event.low is None else event.low + 0.0,
            math.nan if event.high is None else event.high + 0.0,
            subjects.setdefault(event.subject, len(subjects)),
            visits.setdefault(event.visit, len(visits)),
            codes.setdefault(event.code, len(codes)),
            units.setdefault(event.unit, len(units)),
            systems.setdefault(event.system, len(systems)),
            flags.setdefault(event.flag, len(flags)),
        )
        for event in itertools.islice(waiting, CHUNK)
    ]:
        for name, texts in index.items():
            if len(texts) > np.iinfo(NAMES[name]).max:
                raise ValueError(
                    f"column {name!r} has more than {np.iinfo(NAMES[name]).max} different texts, {len(texts)} by now: "
                    f"before table_of, leave out events by their {name}, or give several texts one name"
                )
        parts.append(np.array(chunk, ROW))
    if not set(flags) <= set(FLAGS):
        raise ValueError(f"a flag is none of {', '.join(map(repr, FLAGS))}: translate it with flag_of")
    rows = np.concatenate(parts) if parts else np.zeros(0, ROW)
    parts.clear()
    return _sorted(_dated(_compact(rows, {name: tuple(texts) for name, texts in index.items()})))


def _compact(rows: np.ndarray, names: dict[str, tuple[str, ...]]) -> EventTable:
    """A table of these rows, changed in place, with the texts that are used, in alphabetical order."""
    kept = {}
    for name, texts in names.items():
        used = np.zeros(len(texts), bool)
        used[rows[name]] = True
        order = sorted(np.flatnonzero(used).tolist(), key=texts.__getitem__)
        place = np.zeros(len(texts), NAMES[name])
        place[order] = np.arange(len(order))
        rows[name] = place[rows[name]]
        kept[name] = tuple(texts[i] for i in order)
    return EventTable(rows, kept)


def _dated(table: EventTable) -> EventTable:
    """Diagnoses without a time get that of the end of their visit, the last one where there are several, in place."""
    rows, at = table.rows, lambda name, text: _place(table.names[name], text)
    stay = lambda rows: rows["subject"].astype("i8") * len(table.names["visit"]) + rows["visit"]  # two may share a name
    inside = rows["visit"] != at("visit", "")
    ends = rows[inside & (rows["system"] == at("system", VISIT)) & (rows["code"] == at("code", END))]
    late = inside & (rows["time"] == UNKNOWN_TIME)
    late = np.flatnonzero(late & np.isin(rows["system"], [at("system", name) for name in DIAGNOSES]))
    stays, place = np.unique(stay(ends), return_inverse=True)
    end = np.full(len(stays), UNKNOWN_TIME)
    np.maximum.at(end, place, ends["time"])
    own = stay(rows[late])
    known = np.isin(own, stays)
    rows["time"][late[known]] = end[np.searchsorted(stays, own[known])]
    return table


def _place(texts: Sequence[str], text: str) -> int:
    return texts.index(text) if text in texts else -1


def _sorted(table: EventTable) -> EventTable:
    """The rows in ORDER, equal ones once."""
    rows = table.rows[np.lexsort([table.rows[name] for name in reversed(ORDER)])]
    words = rows.view("u8").reshape(len(rows), ROW.itemsize // 8)  # bits: NaN is equal to NaN here
    fresh = np.ones(len(rows), bool)
    fresh[1:] = (words[1:] != words[:-1]).any(axis=1)
    rows = rows if fresh.all() else rows[fresh]
    rows.flags.writeable = False
    return dataclasses.replace(table, rows=rows)


def split_by_subject(table: EventTable, fractions: Sequence[float], seed: int) -> tuple[EventTable, ...]:
    """Parts of a table, each with all events of its subjects; see part_of.

    Args:
      table: of any number of subjects.
      fractions: of each part, > 0; their sum is 1.
      seed: another one gives other parts.
    Returns:
      One table a fraction. Their sizes are random, of `fractions` in expectation.
    Raises:
      ValueError: fractions that are none.
    """
    part = np.array([part_of(subject, fractions, seed) for subject in table.subjects], int)
    owner = part[table.rows["subject"]]
    return tuple(table.where(owner == i) for i in range(len(fractions)))


def part_of(subject: str, fractions: Sequence[float], seed: int) -> int:
    """Which part a subject belongs to: a function of its name and the seed alone.

    So nobody changes parts when others join, and two files of one hospital can be split apart from each other.

    Raises:
      ValueError: fractions that are none.
    """
    if not fractions or min(fractions) <= 0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-9):
        raise ValueError(f"fractions are {tuple(fractions)}; they must be positive and add up to 1, such as (0.8, 0.2)")
    digest = hashlib.sha256(f"{seed}\0{subject}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    ends = itertools.accumulate(fractions)
    return next((i for i, end in enumerate(ends) if draw < end), len(fractions) - 1)


def completed_years(birth: int, time: int) -> int:
    """Age at a time, by the calendar, in UTC; who was born on 29 February is a year older on 1 March in other years.

    Args:
      birth, time: seconds since 1970-01-01, `time` not before `birth`.

    >>> day = 86400
    >>> completed_years(-1 * day, 364 * day - 1), completed_years(-1 * day, 364 * day)
    (0, 1)
    """
    moments = np.array([birth, time], "i8").view("M8[s]")
    years, months = moments.astype("M8[Y]"), moments.astype("M8[M]")
    (since, month), (until, now) = zip(years.astype(int), (months - years.astype("M8[M]")).astype(int), strict=True)
    first, last = (moments.astype("M8[D]") - months.astype("M8[D]")).astype(int)
    return int(until - since - ((now, last) < (month, first)))


def flag_of(text: str | None) -> str:
    """The flag of FLAGS that a source's word stands for; "" for anything else.

    HL7's observation interpretation codes (H, HH, HU, >, L, LL, LU, <, A, AA, N), and the words high, low, abnormal and
    normal.

    >>> flag_of("HH"), flag_of("abnormal"), flag_of("R"), flag_of(None)
    ('H', 'A', '', '')
    """
    return WORDS.get((text or "").strip().upper(), "")


WORDS = {
    **dict.fromkeys(("H", "HH", "HU", ">", "H>", "HIGH", "CRITICAL HIGH"), "H"),
    **dict.fromkeys(("L", "LL", "LU", "<", "L<", "LOW", "CRITICAL LOW"), "L"),
    **dict.fromkeys(("A", "AA", "ABNORMAL"), "A"),
    **dict.fromkeys(("N", "NORMAL"), "N"),
}
