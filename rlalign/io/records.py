"""JSON Lines files: one record a line, which becomes an example, or is refused with file:line and the remedy.

Nothing is repaired, and nothing is left out silently: what became of a file is in its Examples.
"""

import collections
import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

MAX_ID = 2**31  # ids are i32
MAX_LINE_BYTES = 1 << 26  # a longer line is no record: the file is not JSON Lines
TOO_LONG = "too long"

T = TypeVar("T", covariant=True)


class BadRecord(ValueError):
    """A record that cannot become an example: what is wrong with it, and the remedy.

    Attributes:
      of_all: it says that all records were read wrongly, so that none may be skipped.
    """

    def __init__(self, kind: str, detail: str, remedy: str, *, of_all: bool = False):
        super().__init__(f"{detail}; {remedy}")
        self.kind = kind
        self.detail = detail
        self.of_all = of_all


@dataclasses.dataclass(frozen=True)
class Dropped:
    """One record that became no example.

    Attributes:
      line: its line in the file, from 1.
      kind: "too long", or, with on_error="skip", what was wrong in a word or two.
      reason: the same in full.
    """

    line: int
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Examples(Sequence[T], Generic[T]):
    """The examples of a file, a sequence like a list, and an account of what was left out.

    Attributes:
      items: in the file's order.
      dropped: in the file's order.
      noun: what they are, for the log.
    """

    items: tuple[T, ...]
    dropped: tuple[Dropped, ...] = ()
    noun: str = "examples"

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index):
        return self.items[index]

    def summary(self) -> str:
        """One line for the log: "98 prompts; left out: 2 too long (first at line 7)"."""
        if not self.dropped:
            return f"{len(self)} {self.noun}"
        kinds = collections.Counter(item.kind for item in self.dropped)
        first = {item.kind: item.line for item in reversed(self.dropped)}
        parts = [f"{number} {kind} (first at line {first[kind]})" for kind, number in kinds.items()]
        return f"{len(self)} {self.noun}; left out: {', '.join(parts)}"


def read(
    path: str | os.PathLike[str],
    make: Callable[[dict[str, Any], int], T],
    *,
    max_tokens: int,
    id_field: str | None,
    on_error: str,
    noun: str,
) -> Examples[T]:
    """The examples of a file.

    Args:
      path: UTF-8, one object a line, blank lines ignored.
      make: (record, id) -> example; raises BadRecord for a record that is none, of kind TOO_LONG for one that is left
        out and counted whatever `on_error` says, `of_all` for one that ends the reading whatever it says.
      max_tokens: checked here, kept by `make`.
      id_field: where a record keeps a unique integer or text; None takes the line's index.
      on_error: "raise" at the first bad record, or "skip" all of them and count.
      noun: what the examples are, in the plural.
    Raises:
      FileNotFoundError, ValueError: as read_prompts.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}, must be 'raise' or 'skip'")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, must be positive")
    items: list[T] = []
    dropped: list[Dropped] = []
    seen: dict[Any, int] = {}
    for line, raw in lines_of(path):
        try:
            record = parse_line(raw)
            name, number = (line - 1, line - 1) if id_field is None else _identity(member(record, id_field))
            if name in seen:
                detail = f"id {name!r} was used at line {seen[name]} already"
                raise BadRecord("duplicate id", detail, f"make field {id_field!r} unique")
            items.append(make(record, number))
            seen[name] = line
        except BadRecord as bad:
            if bad.of_all:
                raise ValueError(f"{path}:{line}: {bad}") from None
            if bad.kind != TOO_LONG and on_error == "raise":
                raise ValueError(f"{path}:{line}: {bad}, or pass on_error='skip'") from None
            dropped.append(Dropped(line, bad.kind, bad.detail))
    found = Examples(tuple(items), tuple(dropped), noun)
    if not items:
        raise ValueError(f"{path}: no {noun} to train on: {found.summary()}; check the file, field and max_tokens")
    return found


def member(record: dict[str, Any], field: str) -> Any:
    """A field of a record."""
    if field not in record:
        present = ", ".join(list(record)[:8]) or "none"
        raise BadRecord("missing field", f"no field {field!r} (present: {present:.200})", "add it or name another")
    return record[field]


def check_utf8(text: str, place: str) -> None:
    """Refuses half a surrogate pair, which JSON can escape and no tokenizer takes."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BadRecord("not UTF-8", f"{place} holds half a surrogate pair", "fix its escape \\uD...")


def check_length(count: int, limit: int, name: str = "max_tokens") -> None:
    """Leaves out what is longer than a limit."""
    if count > limit:
        raise BadRecord(TOO_LONG, f"{count} tokens, more than {name}={limit}", "shorten it or raise " + name)


def token_ids(tokens: Any, text: Any, function: str, remedy: str) -> np.ndarray:
    """What the user's `function` made of a text, as i32[P], read-only; TypeError if those are no token ids."""
    with contextlib.suppress(ValueError):  # ragged
        if isinstance(tokens, (Sequence, np.ndarray)) and not isinstance(tokens, str):
            array = np.asarray(tokens)
            if array.size == 0:
                return np.zeros(0, np.int32)
            if array.ndim == 1 and array.dtype.kind in "iu" and array.min() >= 0 and array.max() < MAX_ID:
                array = array.astype(np.int32)
                array.flags.writeable = False
                return array
    raise TypeError(f"{function} returned {tokens!r:.80} for {text!r:.40}, which is not a list of token ids; {remedy}")


def kind(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {str: "a text", bool: "a boolean", type(None): "null", list: "an array", dict: "an object"}
    return names.get(type(value), "a number")


def lines_of(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Line numbers from 1 and the lines that are not blank, one at a time."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file (looked from {os.getcwd()}); give a .jsonl file")
    with open(path, "rb") as file:
        line = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            line += 1
            if len(raw) > MAX_LINE_BYTES:
                raise ValueError(f"{path}:{line}: a line of over {MAX_LINE_BYTES} bytes; is the file JSON Lines?")
            raw = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
            if raw.strip():
                yield line, raw


def parse_line(raw: bytes) -> dict[str, Any]:
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f"byte {error.start + 1} is not UTF-8", "convert the file") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("broken JSON", f"broken JSON ({error})", "fix the line") from None
    if not isinstance(record, dict):
        raise BadRecord("not an object", f"{kind(record)}, not an object", 'write {"prompt": ...}')
    return record


def _identity(value: Any) -> tuple[Any, int]:
    """What is unique, and the i32 made of it."""
    if isinstance(value, str):
        return value, zlib.crc32(value.encode("utf-8", "surrogatepass")) % MAX_ID
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_ID:
        raise BadRecord("bad id", f"id {value!r:.40} is no integer in [0, 2**31)", "write it as a text")
    return value, value
