"""Files of workups: JSON Lines, one rlalign.clinical.workup.Workup a line, from any asker or model.

    {"asker": "my model", "gold": ["E11.9"], "ranked": ["E11.9", "I10"], "belief": [0.8, 0.1], "tests": ["4548-4"],
     "sex": "female", "age": "40-49"}                           # on one line; fields that are not known are left out

Errors name the file, the line and the field, and never a value or a name from the file: it may be a patient's.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlalign.clinical.workup import Workup
from rlalign.io.files import write_atomic
from rlalign.io.records import BadRecord, kind, lines_of, parse_line

NAME = "workups.jsonl"
FIELDS = tuple(field.name for field in dataclasses.fields(Workup))
_NEEDED = tuple(field.name for field in dataclasses.fields(Workup) if field.default is dataclasses.MISSING)


def read_workups(path: str | os.PathLike[str]) -> dict[int, Workup]:
    """The workups of a file, by their lines.

    Args:
      path: a file, or the folder of a workups.jsonl.

    Returns:
      line, from 1 -> Workup, in the file's order.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line that is no workup, or no line; names file, line, field and remedy.
    """
    file = Path(path) / NAME if Path(path).is_dir() else Path(path)
    found = {}
    for line, raw in lines_of(file):
        try:
            found[line] = _workup(parse_line(raw))
        except BadRecord as bad:
            raise ValueError(f"{file}:{line}: {bad.detail}; mend or remove the line") from None
        except ValueError as bad:
            raise ValueError(f"{file}:{line}: {bad}") from None
    if not found:
        raise ValueError(f"{file} has no workup: give one line of JSON a patient")
    return found


def _workup(record: dict[str, Any]) -> Workup:
    for place, name in enumerate(record, start=1):
        if name not in FIELDS:  # a name that we do not know may be anything, a patient's too
            raise ValueError(f"field {place} of the line is none of {', '.join(FIELDS)}; remove it")
    if missing := [name for name in _NEEDED if name not in record]:
        raise ValueError(f"no field {missing[0]!r}; add it")
    for name in ("gold", "ranked", "belief", "tests", "orders", "lists"):
        if name in record and record[name] is not None and not isinstance(record[name], list):
            raise ValueError(f"{name} is {kind(record[name])}, must be an array")
    return Workup(**{name: _frozen(value) for name, value in record.items()})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def write_workups(folder: str | os.PathLike[str], workups: Iterable[Workup], *, name: str = NAME) -> Path:
    """Writes a file of workups, replaced atomically; None and False are left out, beliefs have six digits.

    Args:
      folder: made if it is not there.
      workups: of any askers.
      name: of the file.

    Returns:
      Its path.
    """
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(f"{json.dumps(_record(one))}\n" for one in workups))
    return path


def _record(one: Workup) -> dict[str, Any]:
    record = {name: getattr(one, name) for name in FIELDS}
    if one.belief is not None:
        record["belief"] = [round(float(p), 6) for p in one.belief]
    return {name: value for name, value in record.items() if value is not None and value is not False}
