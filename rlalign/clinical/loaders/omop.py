"""OMOP CDM 5: person, visit_occurrence, condition_occurrence, measurement and concept, as csv or csv.gz."""

import collections
import functools
import os
from collections.abc import Iterator, Mapping, Sequence

from rlalign.clinical.events import END, START, VISIT, Event
from rlalign.clinical.loaders.codes import code_of, person, system_of
from rlalign.clinical.loaders.files import LeftOut, OnError, converted, find, number, rows, seconds
from rlalign.clinical.units import canonical

GENDERS = {"8507": "M", "8532": "F"}  # OMOP's standard concepts
CONCEPT = ("concept_id", "vocabulary_id", "concept_code")
EXACT = ("", "0", "4172703")  # operators of a measurement that say nothing, and "="
Concepts = Mapping[str, tuple[str, str]]


def read_omop(
    folder: str | os.PathLike[str],
    *,
    on_error: OnError = "raise",
    left_out: collections.Counter | None = None,
) -> Iterator[Event]:
    """Events of OMOP tables.

    A code is the source's where its concept is in the vocabulary (ICD), else that of the standard concept (SNOMED,
    LOINC). Concepts of other vocabularies are counted and left out. A measurement with an operator other than "=" has
    no value. A gender is read where it has OMOP's standard concept.

    Args:
      folder: with person, visit_occurrence, condition_occurrence, measurement and concept, each .csv or .csv.gz, names
        of columns in lower case; commas between values, also in `concept`, which Athena writes with tabs.
      on_error: "raise" at the first broken row, or "skip" all of them and count.
      left_out: counts what was left out, by reason.
    Raises:
      FileNotFoundError: one of the five is missing.
      BadRecord: a missing column, a broken row, a time or number that is none.
    """
    paths = {name: find(folder, f"{name}.csv") for name in (*TABLES, "concept")}
    concepts = dict(converted(paths["concept"], rows(paths["concept"], CONCEPT), _concept, on_error, left_out))
    for name, (make, columns, optional) in TABLES.items():
        maker = functools.partial(make, concepts=concepts)
        yield from converted(paths[name], rows(paths[name], columns, optional), maker, on_error, left_out)


def _concept(row: Sequence[str]) -> list[tuple[str, tuple[str, str]]]:
    """concept_id and (system, code), of the vocabularies that the table has names for."""
    concept, vocabulary, code = row
    system = system_of(vocabulary)
    return [] if system == vocabulary else [(concept, (system, code_of(system, code)))]


def _code(source: str, standard: str, concepts: Concepts, table: str) -> tuple[str, str]:
    for concept in (source, standard):
        if concept in concepts:
            return concepts[concept]
    raise LeftOut(f"{table}: a concept of no vocabulary that is read")


def _time(date: str, time: str, name: str) -> int | None:
    """Of a pair of columns: the time, else the date."""
    return seconds(time, f"{name}_datetime") if time else seconds(date, f"{name}_date")


def _person(row: Sequence[str], concepts: Concepts) -> list[Event]:
    subject, gender, *birth = row
    parts = [number(part, f"{name}_of_birth") for part, name in zip(birth, ("year", "month", "day"), strict=True)]
    year, month, day = (1 if part is None else round(part) for part in parts)
    born = None if parts[0] is None else seconds(f"{year:04}-{month:02}-{day:02}", "day_of_birth")
    return person(subject, GENDERS.get(gender, ""), born)


def _visit(row: Sequence[str], concepts: Concepts) -> list[Event]:
    visit, subject, first, first_time, last, last_time = row
    stays = [(START, _time(first, first_time, "visit_start")), (END, _time(last, last_time, "visit_end"))]
    return [Event(subject, time, visit, VISIT, code) for code, time in stays if time is not None]


def _condition(row: Sequence[str], concepts: Concepts) -> list[Event]:
    subject, standard, date, visit, source, time = row
    system, code = _code(source, standard, concepts, "condition_occurrence")
    return [Event(subject, _time(date, time, "condition_start"), visit, system, code)]


def _measurement(row: Sequence[str], concepts: Concepts) -> list[Event]:
    subject, standard, date, value, unit, visit, low, high, source, time, operator = row
    system, code = _code(source, standard, concepts, "measurement")
    found = number(value, "value_as_number")
    return [
        Event(
            subject,
            _time(date, time, "measurement"),
            visit,
            system,
            code,
            found if operator in EXACT else None,
            canonical(unit.strip()),
            number(low, "range_low"),
            number(high, "range_high"),
        )
    ]


TABLES = {  # how a row becomes events, what is read of it, and what may be missing
    "person": (
        _person,
        ("person_id", "gender_concept_id", "year_of_birth"),
        ("month_of_birth", "day_of_birth"),
    ),
    "visit_occurrence": (
        _visit,
        ("visit_occurrence_id", "person_id", "visit_start_date"),
        ("visit_start_datetime", "visit_end_date", "visit_end_datetime"),
    ),
    "condition_occurrence": (
        _condition,
        ("person_id", "condition_concept_id", "condition_start_date", "visit_occurrence_id"),
        ("condition_source_concept_id", "condition_start_datetime"),
    ),
    "measurement": (
        _measurement,
        (
            *("person_id", "measurement_concept_id", "measurement_date", "value_as_number", "unit_source_value"),
            *("visit_occurrence_id", "range_low", "range_high"),
        ),
        ("measurement_source_concept_id", "measurement_datetime", "operator_concept_id"),
    ),
}
