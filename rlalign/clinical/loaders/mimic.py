"""MIMIC-IV, module hosp: patients, admissions, diagnoses_icd and labevents, as csv or csv.gz, read row by row."""

import collections
import functools
import os
from collections.abc import Iterator, Mapping, Sequence

from rlalign.clinical.events import END, LOINC, START, VISIT, Event, flag_of
from rlalign.clinical.loaders.codes import MIMIC_LABITEM, code_of, person
from rlalign.clinical.loaders.files import Fault, OnError, converted, find, number, rows, seconds
from rlalign.clinical.units import canonical

COLUMNS = {
    "patients": ("subject_id", "gender", "anchor_age", "anchor_year"),
    "admissions": ("subject_id", "hadm_id", "admittime", "dischtime"),
    "diagnoses_icd": ("subject_id", "hadm_id", "icd_code", "icd_version"),
    "labevents": (
        *("subject_id", "hadm_id", "itemid", "charttime", "value", "valuenum", "valueuom"),
        *("ref_range_lower", "ref_range_upper", "flag"),
    ),
}
VERSIONS = {"9": "icd9", "10": "icd10"}


def read_mimic(
    folder: str | os.PathLike[str],
    *,
    loinc: Mapping[str, str] | None = None,
    on_error: OnError = "raise",
    left_out: collections.Counter | None = None,
) -> Iterator[Event]:
    """Events of MIMIC-IV's hosp folder.

    Nobody is born on a day in MIMIC: birth is the first of January of anchor_year - anchor_age. Diagnoses have no time
    (table_of dates them by their admission's end). A result below or above what the instrument can tell ("<0.01") has
    no value, whatever valuenum says.

    Args:
      folder: with patients, admissions, diagnoses_icd and labevents, each .csv or .csv.gz; others are not read.
      loinc: itemid -> LOINC code; other tests stay in system "mimic-labitem". MIMIC gives no such map itself.
      on_error: "raise" at the first broken row, or "skip" all of them and count.
      left_out: counts what was left out, by reason.
    Raises:
      FileNotFoundError: one of the four is missing.
      BadRecord: a missing column, a broken row, a time or number that is none.
    """
    makers = {
        "patients": _patient,
        "admissions": _admission,
        "diagnoses_icd": _diagnosis,
        "labevents": functools.partial(_result, loinc=loinc or {}),
    }
    paths = {name: find(folder, f"{name}.csv") for name in makers}
    for name, make in makers.items():
        yield from converted(paths[name], rows(paths[name], COLUMNS[name]), make, on_error, left_out)


def _patient(row: Sequence[str]) -> list[Event]:
    subject, gender, age, year = row
    born = number(year, "anchor_year"), number(age, "anchor_age")
    birth = None if None in born else seconds(f"{born[0] - born[1]:04.0f}", "anchor_year")  # pyright: ignore
    return person(subject, gender, birth)


def _admission(row: Sequence[str]) -> list[Event]:
    subject, visit, *times = row
    stays = [(START, seconds(times[0], "admittime")), (END, seconds(times[1], "dischtime"))]
    return [Event(subject, time, visit, VISIT, code) for code, time in stays if time is not None]


def _diagnosis(row: Sequence[str]) -> list[Event]:
    subject, visit, code, version = row
    system = VERSIONS.get(version.strip())
    if system is None:
        raise Fault("icd_version", "is neither 9 nor 10")
    return [Event(subject, None, visit, system, code_of(system, code))]


def _result(row: Sequence[str], *, loinc: Mapping[str, str]) -> list[Event]:
    subject, visit, item, time, text, value, unit, low, high, flag = row
    found = number(value, "valuenum")
    return [
        Event(
            subject,
            seconds(time, "charttime"),
            visit,
            *((LOINC, loinc[item]) if item in loinc else (MIMIC_LABITEM, item)),
            None if text.lstrip().startswith(("<", ">")) else found,
            canonical(unit.strip()),
            number(low, "ref_range_lower"),
            number(high, "ref_range_upper"),
            flag_of(flag),
        )
    ]
