"""FHIR R4: bundles and bulk exports (NDJSON), of hospitals, MIMIC-IV on FHIR and Synthea, with the json module alone.

Patient, Encounter, Condition and Observation become events; other resources are counted and left out.
"""

import collections
import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlalign.clinical.events import END, START, VISIT, Event, flag_of
from rlalign.clinical.loaders.codes import PREFERENCE, code_of, code_of_test, person, system_of
from rlalign.clinical.loaders.files import (
    Clock,
    Fault,
    LeftOut,
    OnError,
    check_clock,
    converted,
    lines,
    number,
    seconds,
)
from rlalign.clinical.units import canonical

UCUM = "http://unitsofmeasure.org"
VOID = {  # resource -> (field, what of it did not happen)
    "Encounter": ("status", {"planned", "cancelled", "entered-in-error"}),
    "Observation": ("status", {"registered", "cancelled", "entered-in-error"}),
    "Condition": ("verificationStatus", {"refuted", "entered-in-error"}),
}


class Resource(NamedTuple):
    """A resource, and where it lies.

    Attributes:
      content: the JSON object.
      names: fullUrl -> id, of its Bundle.
      place: in its Bundle, for errors.
    """

    content: dict[str, Any]
    names: Mapping[str, str]
    place: str


def read_fhir(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    loinc: Mapping[str, str] | None = None,
    clock: Clock = "utc",
    on_error: OnError = "raise",
    left_out: collections.Counter | None = None,
) -> Iterator[Event]:
    """Events of FHIR R4 files, one resource at a time.

    A file whose name ends with .json or .json.gz holds one resource or Bundle; of any other each line does. A Bundle's
    urn:uuid references are followed inside it. Of several codes the event has, in this order, that of ICD-10, LOINC,
    ICD-9, SNOMED, or the first. A Condition's time is when it was recorded, else its onset. A quantity with a
    comparator ("< 0.01") has no value, as it is no number: its flag remains. Of several reference ranges that differ by
    whom they apply to, none is taken.

    Args:
      paths: a file, or files in any order; *.gz is gzipped.
      loinc: local code of a test -> LOINC code, for tests that have no LOINC code of their own.
      clock: "utc" makes times with an offset comparable; "wall" keeps what the clock showed, as MIMIC's tables do.
      on_error: "raise" at the first broken record, or "skip" all of them and count.
      left_out: counts what was left out, by reason.
    Yields:
      Event; patients' and visits' ids without "Patient/" and "Encounter/".
    Raises:
      FileNotFoundError: no such file.
      BadRecord: broken JSON, a field of another kind than FHIR has it, a time or number that is none.
      ValueError: an argument that is none of its choices.
    """
    check_clock(clock)
    make = functools.partial(_events, loinc=loinc or {}, clock=clock)
    for path in map(Path, [paths] if isinstance(paths, str | os.PathLike) else paths):
        yield from converted(path, _resources(path), make, on_error, left_out)


def _resources(path: Path) -> Iterator[tuple[int, Resource | Fault]]:
    """(line, resource) of each resource, also of those in Bundles; a Fault where there is none."""
    for line, text in _records(path):
        found: list[Resource | Fault] = []
        try:
            found += _unpacked(_parse(text))
        except Fault as fault:
            found.append(fault)
        yield from ((line, resource) for resource in found)


def _records(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line, JSON text) of each record."""
    if not path.name.removesuffix(".gz").endswith(".json"):
        return ((line, text) for line, text in lines(path) if not text.isspace())
    return iter([(1, b"".join(text for _, text in lines(path)))])


def _unpacked(record: dict[str, Any]) -> list[Resource]:
    """The resources of a Bundle, or the only one."""
    if record.get("resourceType") != "Bundle":
        return [Resource(record, {}, "")]
    entries = [_object(entry, "Bundle.entry") for entry in _list(record, "entry", "Bundle")]
    found, names = [], {}
    for i, entry in enumerate(entries):
        url, content = entry.get("fullUrl"), _member(entry, "resource", "Bundle.entry")
        if content and isinstance(url, str):
            content = {"id": _last(url)} | content  # what is to be created has no id yet
            names[url] = str(content["id"])
        if content:
            found.append(Resource(content, names, f"entry[{i}] "))
    return found


def _parse(text: bytes) -> dict[str, Any]:
    what, found = "", None
    try:
        found = json.loads(text)
    except UnicodeDecodeError:
        what = "not UTF-8; convert the file"
    except json.JSONDecodeError as error:
        what = f"broken JSON at line {error.lineno}, column {error.colno} of the record"
    except RecursionError:
        what = "nested too deeply"
    except ValueError:  # an integer of thousands of digits
        what = "broken JSON: a number that cannot be read"
    if what:
        raise Fault("", what)
    return _object(found, "")


def _events(given: Resource, *, loinc: Mapping[str, str], clock: str) -> list[Event]:
    try:
        return _of_resource(given.content, given.names, loinc, clock)
    except Fault as fault:
        raise Fault(fault.field, fault.what, given.place) from None


def _of_resource(
    resource: dict[str, Any], names: Mapping[str, str], loinc: Mapping[str, str], clock: str
) -> list[Event]:
    kind = resource.get("resourceType")
    if not isinstance(kind, str):
        raise Fault("resourceType", "is missing, or is no text")
    if kind == "Patient":
        birth = seconds(resource.get("birthDate"), "Patient.birthDate", clock)
        return person(_text(resource, "id", kind), _text(resource, "gender", kind, missing=""), birth)
    if kind not in VOID:
        raise LeftOut("other resources")
    field, void = VOID[kind]
    status = resource.get(field)
    stated = {status} if isinstance(status, str) else {code for _, code in _codings(resource, field, kind)}
    if stated & void:
        raise LeftOut(f"{kind}: entered in error, or did not happen")
    subject = _reference(resource, "subject", kind, names)
    if not subject:
        raise LeftOut(f"{kind}: of no patient")
    if kind == "Encounter":
        return _visit(resource, subject, clock)
    visit = _reference(resource, "encounter", kind, names)
    if kind == "Condition":
        return _diagnosis(resource, subject, visit, clock)
    return _results(resource, subject, visit, clock, loinc)


def _visit(resource: dict[str, Any], subject: str, clock: str) -> list[Event]:
    period, visit = _member(resource, "period", "Encounter"), _text(resource, "id", "Encounter")
    times = [(code, seconds(period.get(code), f"Encounter.period.{code}", clock)) for code in (START, END)]
    return [Event(subject, time, visit, VISIT, code) for code, time in times if time is not None]


def _diagnosis(resource: dict[str, Any], subject: str, visit: str, clock: str) -> list[Event]:
    if (found := _code(resource, "Condition")) is None:
        raise LeftOut("Condition: no code")
    time = seconds(resource.get("recordedDate"), "Condition.recordedDate", clock)
    if time is None:
        time = seconds(resource.get("onsetDateTime"), "Condition.onsetDateTime", clock)
    if time is None:
        time = seconds(_member(resource, "onsetPeriod", "Condition").get("start"), "Condition.onsetPeriod.start", clock)
    return [Event(subject, time, visit, *found)]


def _results(resource: dict[str, Any], subject: str, visit: str, clock: str, loinc: Mapping[str, str]) -> list[Event]:
    """An observation's own result, and those of its components."""
    period = _member(resource, "effectivePeriod", "Observation")
    given = (
        (resource.get("effectiveDateTime"), "Observation.effectiveDateTime"),
        (resource.get("effectiveInstant"), "Observation.effectiveInstant"),
        (period.get("start"), "Observation.effectivePeriod.start"),
        (resource.get("issued"), "Observation.issued"),
    )
    time = next((seconds(value, field, clock) for value, field in given if value is not None), None)
    parts = [_object(part, "Observation.component") for part in _list(resource, "component", "Observation")]
    own = not parts or any(key.startswith("value") for key in resource)
    found = []
    for part, place in [(resource, "Observation")] * own + [(part, "Observation.component") for part in parts]:
        if (code := _code(part, place)) is not None:
            value, unit = _quantity(part, place)
            measured = value, unit, *_range(part, place, unit), _flag(part, place)
            found.append(Event(subject, time, visit, *code_of_test(*code, loinc), *measured))
    if not found:
        raise LeftOut("Observation: no code")
    return found


def _quantity(part: dict[str, Any], place: str) -> tuple[float | None, str]:
    if "valueInteger" in part:
        return number(part["valueInteger"], f"{place}.valueInteger"), ""
    quantity = _member(part, "valueQuantity", place)
    value = number(quantity.get("value"), f"{place}.valueQuantity.value")
    return None if "comparator" in quantity else value, _unit(quantity, f"{place}.valueQuantity")


def _unit(quantity: dict[str, Any], place: str) -> str:
    coded = quantity.get("system") == UCUM and quantity.get("code")
    return canonical(_text(quantity, "code" if coded else "unit", place, missing=""))


def _range(part: dict[str, Any], place: str, unit: str) -> tuple[float | None, float | None]:
    """The only normal range, in the result's unit; (None, None) where there is none or more than one."""
    place, found = f"{place}.referenceRange", set()
    for given in _list(part, "referenceRange", place):
        given = _object(given, place)
        kinds = {code for _, code in _codings(given, "type", place)}
        ends = [_member(given, end, place) for end in ("low", "high")]
        same = all(_unit(end, place) in ("", unit) for end in ends)
        bounds = [number(end.get("value"), f"{place}.value") for end in ends]
        if same and (not kinds or "normal" in kinds) and bounds != [None, None]:
            found.add(tuple(bounds))
    return found.pop() if len(found) == 1 else (None, None)


def _flag(part: dict[str, Any], place: str) -> str:
    """The first flag that its interpretations give."""
    stated = _list(part, "interpretation", place)
    codes = [code for concept in stated for _, code in _codings({"": concept}, "", f"{place}.interpretation")]
    words = [str(concept.get("text", "")) for concept in stated if isinstance(concept, dict)]
    return next(filter(None, map(flag_of, itertools.chain(codes, words))), "")


def _code(part: dict[str, Any], place: str) -> tuple[str, str] | None:
    """(system, code) of what was found; of several, by PREFERENCE."""
    found = [(system_of(system), code) for system, code in _codings(part, "code", place)]
    if not found:
        return None
    rank = lambda pair: PREFERENCE.index(pair[0]) if pair[0] in PREFERENCE else len(PREFERENCE)
    system, code = min(found, key=rank)
    return system, code_of(system, code)


def _codings(part: dict[str, Any], name: str, place: str) -> list[tuple[str, str]]:
    """(system, code) of each coding of a CodeableConcept that has a code."""
    place = f"{place}.{name}" if name else place
    concept = part.get(name)
    codings = [
        _object(coding, place) for coding in _list(_object({} if concept is None else concept, place), "coding", place)
    ]
    return [(_text(c, "system", place, missing=""), _text(c, "code", place)) for c in codings if c.get("code")]


def _reference(resource: dict[str, Any], name: str, kind: str, names: Mapping[str, str]) -> str:
    """The id that a reference leads to; "" for none, and for one by anything but an id."""
    text = _text(_member(resource, name, kind), "reference", f"{kind}.{name}", missing="")
    if text in names:
        return names[text]
    if text.startswith("#") or "?" in text:  # contained, or by a search
        return ""
    return _last(text)


def _last(url: str) -> str:
    """The id at the end of a URL or a reference."""
    return url.partition("/_history/")[0].rpartition("/")[2].removeprefix("urn:uuid:")


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Fault(place, "is no JSON object")
    return value


def _member(holder: dict[str, Any], name: str, place: str) -> dict[str, Any]:
    found = holder.get(name)
    return {} if found is None else _object(found, f"{place}.{name}")


def _list(holder: dict[str, Any], name: str, place: str) -> list[Any]:
    found = holder.get(name)
    if found is None:
        return []
    if not isinstance(found, list):
        raise Fault(f"{place}.{name}", "is no list")
    return found


def _text(holder: dict[str, Any], name: str, place: str, *, missing: str | None = None) -> str:
    found = holder.get(name, missing)
    if not isinstance(found, str):
        raise Fault(f"{place}.{name}", "is missing, or is no text")
    return found
