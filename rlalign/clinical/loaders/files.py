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
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

MAX_LINE_BYTES = 1 << 26
NOT_UTF8 = "not UTF-8; convert the file"
ESCAPED = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of bytes that are no UTF-8
CLOCKS = ("utc", "wall")
OnError = Literal["raise", "skip"]
Clock = Literal["utc", "wall"]
T = TypeVar("T")
Made = TypeVar("Made")


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
    records: Iterable[tuple[int, T | Fault]],
    make: Callable[[T], Sequence[Made]],
    on_error: str,
    left_out: collections.Counter | None,
) -> Iterator[Made]:
    """What, such as events, `make` makes of (line, record).

    Raises:
      BadRecord: a record is a Fault, or `make` raised one, and on_error is "raise".
      ValueError: on_error is neither "raise" nor "skip".
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}, must be 'raise' or 'skip'")
    counts = collections.Counter() if left_out is None else left_out
    for line, record in records:
        fault, found = record if isinstance(record, Fault) else None, ()
        try:
            found = () if isinstance(record, Fault) else make(record)
        except Fault as error:
            fault = error
        except LeftOut as error:
            counts[str(error)] += 1
        if fault is not None and on_error == "raise":  # outside `except`: what was being handled may hold a value
            raise BadRecord(path, line, fault.place + fault.field, fault.what)
        if fault is not None:
            counts[f"{fault.field}: {fault.what}".removeprefix(": ")] += 1
        yield from found


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


def rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[int, list[str] | Fault]]:
    """(line, values of `columns` and `optional`) of a CSV file with a header; "" where an optional column is missing.

    A Fault instead of the values of a row that is none: more or fewer of them than the header has, a quote that is open
    or out of place, a value of more characters than csv takes, bytes that are no UTF-8.

    Raises:
      BadRecord: no such column, a header that is no row.
    """
    found = _rows(path)
    line, header = next(found, (1, []))
    if isinstance(header, Fault) or _escaped(header) >= 0:
        raise BadRecord(path, line, "", header.what if isinstance(header, Fault) else NOT_UTF8)
    header = [name.strip() for name in header]
    for name in columns:
        if name not in header:
            raise BadRecord(path, line, name, "the header lacks this column; is this the right file?")
    places = [header.index(name) if name in header else -1 for name in (*columns, *optional)]
    for line, row in found:
        if isinstance(row, Fault):
            yield line, row
        elif len(row) != len(header):
            yield line, Fault("", f"{len(row)} values under {len(header)} columns")
        elif (bad := _escaped(row)) >= 0:
            yield line, Fault(header[bad] if bad in places else "", NOT_UTF8)
        else:
            yield line, [row[i] if i >= 0 else "" for i in places]


def _rows(path: Path) -> Iterator[tuple[int, list[str] | Fault]]:
    """(line, values) of each row that is not empty.

    A row of several lines has the number of its last one; a broken one that of its first, and what comes behind that
    line is read anew, as an open quote takes rows that are whole into its own.
    """
    source, again = lines(path), collections.deque[tuple[int, bytes]]()
    taken: list[tuple[int, bytes]] = []  # by the row that is being read

    def texts() -> Iterator[str]:
        while (one := again.popleft() if again else next(source, None)) is not None:
            taken.append(one)
            yield one[1].decode("utf-8-sig" if one[0] == 1 else "utf-8", "surrogateescape")

    reader = csv.reader(texts(), strict=True)
    while True:
        taken.clear()
        row, broken = None, False
        try:
            row = next(reader, None)
        except csv.Error:
            broken = True
        if broken:
            again.extendleft(reversed(taken[1:]))
            reader = csv.reader(texts(), strict=True)
            limit = f"a value has more than {csv.field_size_limit()} characters"
            what = f"no row of comma-separated values: a quote is open, something is out of place, or {limit}"
            yield taken[0][0], Fault("", what)
        elif row is None:
            return
        elif row:
            yield taken[-1][0], row


def _escaped(row: Sequence[str]) -> int:
    """The place of the first value that is not UTF-8; -1 for none."""
    if "".join(row).isascii():
        return -1
    return next((i for i, text in enumerate(row) if ESCAPED.search(text)), -1)


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
    with clock "wall", what the clock on the wall showed; one without is taken as it is. A leap second, of :60, is the
    first one of the next minute.

    Raises:
      Fault: anything else.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str) and len(value) >= 4 and value[4:5] in ("", "-"):
        with contextlib.suppress(ValueError, OverflowError):
            leap = value[16:19] == ":60"
            text = f"{value[:16]}:59{value[19:]}" if leap else value
            moment = datetime.datetime.fromisoformat(text + PARTIAL.get(len(text), ""))
            if clock == "wall" or moment.tzinfo is None:
                moment = moment.replace(tzinfo=datetime.UTC)
            return int((moment - EPOCH).total_seconds() // 1) + leap
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
