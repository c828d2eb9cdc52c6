"""What loaders share: lines and rows of plain and gzipped files, times, numbers, and errors that hold no value.

A value of a record may be a name, a number or a date that tells who somebody is. So an error is made of constants, of
the file, the line and the field; and it is raised where no other exception, which may hold a value, is being handled.
"""

import collections
import contextlib
import csv
import datetime
import gzip
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

from rlalign.clinical.events import Event

MAX_LINE_BYTES = 1 << 26
CLOCKS = ("utc", "wall")
OnError = Literal["raise", "skip"]
Clock = Literal["utc", "wall"]
T = TypeVar("T")


class BadRecord(ValueError):
    """A record that cannot be read.

    Attributes:
      path, line: where; a line of 0 is the file as a whole.
      field: which field or column, "" where none.
    """

    def __init__(self, path: Path, line: int, field: str, what: str):
        self.path, self.line, self.field = path, line, field
        where = f"{path}:{line}" if line else f"{path}"
        super().__init__(f"{where}{', ' * bool(field)}{field}: {what}")


class Fault(Exception):
    """What is wrong with a field, without its value; becomes a BadRecord, or is counted, wherever its `place` is."""

    def __init__(self, field: str, what: str, place: str = ""):
        super().__init__(field, what)
        self.field, self.what, self.place = field, what, place


class LeftOut(Exception):
    """A record that is whole but not for us; the reason is counted."""


def converted(
    path: Path,
    records: Iterable[tuple[int, T]],
    make: Callable[[T], Sequence[Event]],
    on_error: str,
    left_out: collections.Counter | None,
) -> Iterator[Event]:
    """The events that `make` makes of (line, record).

    Raises:
      BadRecord: `make` raised Fault, and on_error is "raise".
      ValueError: on_error is neither "raise" nor "skip".
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}, must be 'raise' or 'skip'")
    counts = collections.Counter() if left_out is None else left_out
    for line, record in records:
        fault, events = None, ()
        try:
            events = make(record)
        except Fault as error:
            fault = error
        except LeftOut as error:
            counts[str(error)] += 1
        if fault is not None and on_error == "raise":  # outside `except`: what was being handled may hold a value
            raise BadRecord(path, line, fault.place + fault.field, fault.what)
        if fault is not None:
            counts[f"{fault.field}: {fault.what}".removeprefix(": ")] += 1
        yield from events


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a file; gzipped if its name ends with .gz.

    Raises:
      FileNotFoundError: no such file.
      BadRecord: a broken archive, or a line of more than 64 MiB.
    """
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        number, line, fault = 0, b"", ""
        while True:
            number += 1
            try:
                line = cast(BinaryIO, file).readline(MAX_LINE_BYTES + 1)
            except (EOFError, gzip.BadGzipFile, zlib.error):
                fault = "the archive is broken or cut off; copy it anew"
            if len(line) > MAX_LINE_BYTES:
                fault = f"longer than {MAX_LINE_BYTES} bytes; it cannot be a record"
            if fault or not line:
                break
            yield number, line
    if fault:
        raise BadRecord(path, number, "", fault)


def rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[int, list[str]]]:
    """(line, values of `columns` and `optional`) of a CSV file with a header; "" where an optional column is missing.

    Raises:
      BadRecord: no such column, a row with more or fewer values than the header, bytes that are no UTF-8.
    """
    reader = csv.reader(_texts(path), strict=True)
    header = [name.strip() for name in _next(path, reader) or ()]
    for name in columns:
        if name not in header:
            raise BadRecord(path, 1, name, "the header lacks this column; is this the right file?")
    places = [header.index(name) if name in header else -1 for name in (*columns, *optional)]
    while (row := _next(path, reader)) is not None:
        if not row:
            continue
        if len(row) != len(header):
            raise BadRecord(path, reader.line_num, "", f"{len(row)} values under {len(header)} columns")
        yield reader.line_num, [row[i] if i >= 0 else "" for i in places]


def _next(path: Path, reader: Any) -> list[str] | None:
    broken = False
    try:
        return next(reader, None)
    except csv.Error:
        broken = True
    if broken:
        raise BadRecord(path, reader.line_num, "", "no row of comma-separated values: a quote is open or out of place")


def _texts(path: Path) -> Iterator[str]:
    for number, line in lines(path):
        text = None
        with contextlib.suppress(UnicodeDecodeError):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if text is None:
            raise BadRecord(path, number, "", "not UTF-8; convert the file")
        yield text


def find(folder: str | os.PathLike[str], name: str) -> Path:
    """folder/name or folder/name.gz.

    Raises:
      FileNotFoundError: neither is there.
    """
    for candidate in (Path(folder) / name, Path(folder) / f"{name}.gz"):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"{Path(folder) / name}: no such file, nor {name}.gz")


def number(value: Any, field: str) -> float | None:
    """A finite number; None for none, "" and NaN.

    Raises:
      Fault: anything else.
    """
    if value is None or value == "":
        return None
    found = math.inf
    if not isinstance(value, bool) and isinstance(value, int | float | str) and "_" not in str(value):
        with contextlib.suppress(ValueError, OverflowError):
            found = float(value)
    if math.isinf(found):
        raise Fault(field, "is no number")
    return None if math.isnan(found) else found


def seconds(value: Any, field: str, clock: str = "utc") -> int | None:
    """Seconds since 1970-01-01 of an ISO 8601 date or time; None for none and "".

    Of a date the first second counts, of a year or month that of its first day. A time with an offset becomes UTC, or,
    with clock "wall", what the clock on the wall showed; one without is taken as it is.

    Raises:
      Fault: anything else.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str) and len(value) >= 4 and value[4:5] in ("", "-"):
        with contextlib.suppress(ValueError, OverflowError):
            moment = datetime.datetime.fromisoformat(value + PARTIAL.get(len(value), ""))
            if clock == "wall" or moment.tzinfo is None:
                moment = moment.replace(tzinfo=datetime.UTC)
            return int((moment - EPOCH).total_seconds() // 1)
    raise Fault(field, "is no ISO 8601 date or time")


EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
PARTIAL = {4: "-01-01", 7: "-01"}  # what a year, a month lack


def check_clock(clock: str) -> None:
    """
    Raises:
      ValueError: neither "utc" nor "wall".
    """
    if clock not in CLOCKS:
        raise ValueError(f"clock is {clock!r}, must be 'utc' or 'wall'")
