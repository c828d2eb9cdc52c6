"""Synthea's CSV export: patients, encounters, conditions and observations, read row by row."""

import collections
import os
from collections.abc import Iterator, Sequence

from rlalign.clinical.events import END, LOINC, START, VISIT, Event
from rlalign.clinical.loaders.codes import code_of, person, system_of
from rlalign.clinical.loaders.files import OnError, converted, find, number, rows, seconds
from rlalign.clinical.units import canonical


def read_synthea(
    folder: str | os.PathLike[str],
    *,
    on_error: OnError = "raise",
    left_out: collections.Counter | None = None,
) -> Iterator[Event]:
    """Events of a Synthea CSV export.

    Results have neither ranges nor flags there, and those in words have no value. A condition's time is its START.

    Args:
      folder: with patients, encounters, conditions and observations, each .csv or .csv.gz; others are not read.
      on_error: "raise" at the first broken row, or "skip" all of them and count.
      left_out: counts what was left out, by reason.
    Raises:
      FileNotFoundError: one of the four is missing.
      BadRecord: a missing column, a broken row, a time or number that is none.
    """
    files = {  # what is read of each, and what may be missing: older versions give a condition no SYSTEM
        "patients.csv": (_patient, ("Id", "BIRTHDATE", "GENDER"), ()),
        "encounters.csv": (_encounter, ("Id", "START", "STOP", "PATIENT"), ()),
        "conditions.csv": (_condition, ("START", "PATIENT", "ENCOUNTER", "CODE"), ("SYSTEM",)),
        "observations.csv": (
            _observation,
            ("DATE", "PATIENT", "ENCOUNTER", "CODE", "VALUE", "UNITS", "TYPE"),
            (),
        ),
    }
    paths = {name: find(folder, name) for name in files}
    for name, (make, columns, optional) in files.items():
        yield from converted(paths[name], rows(paths[name], columns, optional), make, on_error, left_out)


def _patient(row: Sequence[str]) -> list[Event]:
    subject, birth, gender = row
    return person(subject, gender, seconds(birth, "BIRTHDATE"))


def _encounter(row: Sequence[str]) -> list[Event]:
    visit, start, stop, subject = row
    times = [(START, seconds(start, "START")), (END, seconds(stop, "STOP"))]
    return [Event(subject, time, visit, VISIT, code) for code, time in times if time is not None]


def _condition(row: Sequence[str]) -> list[Event]:
    start, subject, visit, code, name = row
    system = system_of(name or "SNOMED-CT")
    return [Event(subject, seconds(start, "START"), visit, system, code_of(system, code))]


def _observation(row: Sequence[str]) -> list[Event]:
    date, subject, visit, code, value, unit, kind = row
    found = number(value, "VALUE") if kind == "numeric" else None
    return [Event(subject, seconds(date, "DATE"), visit, LOINC, code, found, canonical(unit.strip()))]
