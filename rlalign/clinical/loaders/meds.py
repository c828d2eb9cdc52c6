"""MEDS 0.3 and 0.4: parquet files of (subject_id, time, code, numeric_value), read batch by batch with pyarrow."""

import collections
import functools
import importlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlalign.clinical.events import BIRTH, END, LOINC, PERSON, START, UNKNOWN_TIME, VISIT, Event, flag_of
from rlalign.clinical.loaders.codes import MIMIC_LABITEM, code_of, code_of_test, sex_of, system_of
from rlalign.clinical.loaders.files import BadRecord, Fault, LeftOut, OnError, converted, number
from rlalign.clinical.units import canonical

NEEDED = ("subject_id", "time", "code", "numeric_value")
TYPES = {"time": ("timestamp",), "numeric_value": ("float", "double", "halffloat", "int", "uint")}
OPTIONAL = {  # what datasets add: our column -> theirs, the first that is there
    "visit": ("hadm_id", "visit_id", "encounter_id"),
    "unit": ("unit", "valueuom"),
    "low": ("ref_range_lower", "range_low"),
    "high": ("ref_range_upper", "range_high"),
    "flag": ("flag", "interpretation"),
}
FIXED = {"MEDS_BIRTH": (PERSON, BIRTH), "HOSPITAL_ADMISSION": (VISIT, START), "HOSPITAL_DISCHARGE": (VISIT, END)}
BATCH = 1 << 15


def read_meds(
    folder: str | os.PathLike[str],
    *,
    loinc: Mapping[str, str] | None = None,
    on_error: OnError = "raise",
    left_out: collections.Counter | None = None,
) -> Iterator[Event]:
    """Events of a MEDS data set.

    Codes are those of the standard (MEDS_BIRTH), of vocabularies (LOINC/718-7, ICD10CM/E11.9, SNOMED/44054006, with one
    slash or two), or of the conversion of MIMIC-IV (GENDER//F, HOSPITAL_ADMISSION//..., DIAGNOSIS//ICD//10//E119,
    LAB//50912//mg/dL); others are counted and left out. MEDS keeps numbers in 32 bits: a value is the shortest decimal
    that is that number, 13.4 and no 13.399999.

    Args:
      folder: of *.parquet files, at any depth.
      loinc: itemid -> LOINC code, for codes LAB//itemid//unit.
      on_error: "raise" at the first broken row, or "skip" all of them and count.
      left_out: counts what was left out, by reason.
    Raises:
      ImportError: pyarrow is missing.
      FileNotFoundError: no such file.
      BadRecord: no parquet, or broken, a missing column or subject, a number that is none; `line` counts rows.
    """
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError('read_meds needs pyarrow: pip install "rlalign[clinical]"') from error
    paths = sorted(Path(folder).rglob("*.parquet"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no *.parquet file in it")
    make = functools.partial(_events, loinc=loinc or {})
    for path in paths:
        broken = ""
        file: Any = None
        try:
            file = parquet.ParquetFile(path)
        except (ValueError, OSError):  # ArrowInvalid is a ValueError
            broken = "no parquet file, or a broken one"
        if broken:
            raise BadRecord(path, 0, "", broken)
        with file:
            yield from converted(path, _rows(path, file), make, on_error, left_out)


def _rows(path: Path, file: Any) -> Iterator[tuple[int, tuple]]:
    """(row from 1, (subject, seconds, code, value, visit, unit, low, high, flag))."""
    there = file.schema_arrow.names
    for name in NEEDED:
        if name not in there:
            raise BadRecord(path, 0, name, "the file lacks this column; is it a MEDS data file?")
    for name, kinds in TYPES.items():
        if not str(file.schema_arrow.field(name).type).startswith(kinds):
            raise BadRecord(path, 0, name, f"the column is of another type than MEDS has it ({kinds[0]})")
    extra = [next((name for name in names if name in there), None) for names in OPTIONAL.values()]
    batches, count = file.iter_batches(BATCH, columns=[*NEEDED, *filter(None, extra)]), 0
    while True:
        columns, broken = None, False
        try:
            if (batch := next(batches, None)) is not None:
                columns = _columns(batch, extra)
        except (ValueError, OSError):  # such as UnicodeDecodeError, which holds the text
            broken = True
        if broken:
            raise BadRecord(path, count + 1, "", "what follows cannot be read: broken, or a text is not UTF-8")
        if columns is None:
            return
        yield from enumerate(zip(*columns, strict=True), count + 1)
        count += len(columns[0])


def _columns(batch: Any, extra: Sequence[str | None]) -> list[list[Any]]:
    subject, time, code, value = (batch.column(name) for name in NEEDED)
    columns = [subject.to_pylist(), _seconds(time), code.to_pylist(), _numbers(value)]
    return columns + [batch.column(name).to_pylist() if name else [None] * len(batch) for name in extra]


def _seconds(column: Any) -> list[int | None]:
    times = column.to_numpy(zero_copy_only=False).astype("M8[s]").view("i8").tolist()
    return [None if time == UNKNOWN_TIME else time for time in times]


def _numbers(column: Any) -> list[float | None]:
    """Those of 32 bits as the shortest decimal that they are."""
    short = (lambda x: float(str(np.float32(x)))) if str(column.type) == "float" else float
    return [None if x is None else short(x) for x in column.to_pylist()]


def _events(row: Sequence[Any], *, loinc: Mapping[str, str]) -> list[Event]:
    subject, time, code, value, visit, unit, low, high, flag = row
    if subject is None:
        raise Fault("subject_id", "is missing")
    system, found, said = _code(str(code), loinc)
    return [
        Event(
            str(subject),
            time,
            "" if visit is None else str(visit),
            system,
            found,
            number(value, "numeric_value"),
            canonical(str(unit or said).strip()),
            number(low, OPTIONAL["low"][0]),
            number(high, OPTIONAL["high"][0]),
            flag_of(flag if isinstance(flag, str) else ""),
        )
    ]


def _code(text: str, loinc: Mapping[str, str]) -> tuple[str, str, str]:
    """(system, code, unit) of a MEDS code.

    Raises:
      LeftOut: it is of no vocabulary that is read.
    """
    first, *rest = re.split("//?", text, maxsplit=1)
    rest = rest[0] if rest else ""
    if first in FIXED:
        return *FIXED[first], ""
    if first in ("GENDER", "Gender") and (sex := sex_of(rest)):
        return PERSON, sex, ""
    if first == "DIAGNOSIS" and rest.startswith("ICD//"):
        version, _, code = rest.removeprefix("ICD//").partition("//")
        system = {"9": "icd9", "10": "icd10"}.get(version)
        if system and code:
            return system, code_of(system, code), ""
    if first == "LAB" and rest:
        item, _, unit = rest.partition("//")
        return *code_of_test(MIMIC_LABITEM, item, loinc), "" if unit == "UNK" else unit
    system = system_of(first)
    if system == first or not rest:
        raise LeftOut("a code of no vocabulary that is read")
    code, _, unit = rest.partition("//")
    return system, code_of(system, code), unit if system == LOINC else ""
