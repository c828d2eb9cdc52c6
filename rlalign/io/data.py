"""Prompts from a JSON Lines file, and the order in which training visits them.

A record of the file is refused, with file:line and the remedy, rather than repaired. The order is a function of the
seed and the step alone, so that a run that was stopped and resumed sees every prompt exactly once an epoch.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import operator
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from rlalign.types import Prompt

MAX_ID = 2**31  # ids are i32
MAX_LINE_BYTES = 1 << 26  # a longer line is no record: the file is not JSON Lines
TOO_LONG = "too long"


class _BadRecord(ValueError):
    """A record that cannot become a prompt: what is wrong with it, and the remedy."""

    def __init__(self, kind: str, detail: str, remedy: str):
        super().__init__(f"{detail}; {remedy}")
        self.kind = kind
        self.detail = detail


@dataclasses.dataclass(frozen=True)
class Dropped:
    """One record that became no prompt.

    Attributes:
      line: its line in the file, from 1.
      kind: "too long", or, with on_error="skip", what was wrong in a word or two.
      reason: the same in full.
    """

    line: int
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class PromptSet(Sequence[Prompt]):
    """The prompts of a file, a sequence like a list, and an account of what was left out.

    Attributes:
      prompts: in the file's order.
      dropped: in the file's order.
    """

    prompts: tuple[Prompt, ...]
    dropped: tuple[Dropped, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Prompt, ...]: ...
    def __getitem__(self, index):
        return self.prompts[index]

    def summary(self) -> str:
        """One line for the log: "98 prompts; left out: 2 too long (first at line 7)"."""
        if not self.dropped:
            return f"{len(self)} prompts"
        kinds = collections.Counter(item.kind for item in self.dropped)
        first = {item.kind: item.line for item in reversed(self.dropped)}
        parts = [f"{number} {kind} (first at line {first[kind]})" for kind, number in kinds.items()]
        return f"{len(self)} prompts; left out: {', '.join(parts)}"


@dataclasses.dataclass(frozen=True)
class _Reader:
    """How a record becomes a prompt; the arguments are those of read_prompts."""

    tokenize: Callable[[str], Sequence[int]]
    max_tokens: int
    field: str
    id_field: str | None
    special_ids: frozenset[int]

    def prompt(self, raw: bytes, line: int, seen: dict[Any, int]) -> Prompt:
        """The prompt of one line, whose id is added to `seen`; _BadRecord if it is none or too long."""
        record = _parse(raw)
        text = _member(record, self.field)
        if not isinstance(text, str):
            remedy = "a prompt is one text; apply a chat template before"
            raise _BadRecord("not a text", f"field {self.field!r} is {_kind(text)}, not a text", remedy)
        if not text.strip():
            raise _BadRecord("empty prompt", f"field {self.field!r} is empty or blank", "remove the record")
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise _BadRecord("not UTF-8", f"field {self.field!r} holds half a surrogate pair", "fix its escape \\uD...")
        name, number = (line - 1, line - 1) if self.id_field is None else _identity(_member(record, self.id_field))
        if name in seen:
            detail = f"id {name!r} was used at line {seen[name]} already"
            raise _BadRecord("duplicate id", detail, f"make field {self.id_field!r} unique")
        tokens = self.tokens(text)
        seen[name] = line
        return Prompt(id=number, tokens=tokens, text=text, example=record)

    def tokens(self, text: str) -> np.ndarray:
        """i32[P] of a text, read-only; _BadRecord where only special tokens, or too many, come out."""
        tokens = _checked(self.tokenize(text), text)
        if self.special_ids.issuperset(tokens.tolist()):
            detail = f"field {self.field!r} gives no tokens but special ones ({tokens.size} in all)"
            raise _BadRecord("no tokens", detail, "remove the record")
        if tokens.size > self.max_tokens:
            detail = f"{tokens.size} tokens, more than max_tokens={self.max_tokens}"
            raise _BadRecord(TOO_LONG, detail, "shorten it or raise max_tokens")
        return tokens


def read_prompts(
    path: str | os.PathLike[str],
    tokenize: Callable[[str], Sequence[int]],
    *,
    max_tokens: int,
    field: str = "prompt",
    id_field: str | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    special_ids: Sequence[int] = (),
) -> PromptSet:
    """Reads prompts from a JSON Lines file: UTF-8, one object a line, blank lines ignored.

    A prompt's id is the integer in `id_field`, in [0, 2**31); for a text there, the text's CRC-32 modulo 2**31;
    without an `id_field`, the line's index. Ids only feed random keys. Two of n different texts share theirs, and so
    their random numbers, in about n**2 / 2**32 cases, which does no harm.

    Args:
      path: the file.
      tokenize: text -> token ids, BOS included if the model wants one.
      max_tokens: longer prompts are left out and counted, which is no error.
      field: where a record keeps its prompt.
      id_field: where it keeps a unique integer or text; None for none.
      on_error: "raise" at the first bad record, or "skip" all of them and count.
      special_ids: a prompt of nothing but these is a bad record.
    Returns:
      PromptSet; a prompt's `example` is its whole record.
    Raises:
      FileNotFoundError: no such file.
      ValueError: a bad record (broken JSON, not UTF-8, not an object, a missing field, no text, an empty prompt, no
        tokens, a duplicate id); no prompt left; an argument out of range.
      TypeError: tokenize returns no list of token ids.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}, must be 'raise' or 'skip'")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, must be positive")
    reader = _Reader(tokenize, max_tokens, field, id_field, frozenset(special_ids))
    prompts: list[Prompt] = []
    dropped: list[Dropped] = []
    seen: dict[Any, int] = {}
    for line, raw in _lines(path):
        try:
            prompts.append(reader.prompt(raw, line, seen))
        except _BadRecord as bad:
            if bad.kind != TOO_LONG and on_error == "raise":
                raise ValueError(f"{path}:{line}: {bad}, or pass on_error='skip'") from None
            dropped.append(Dropped(line, bad.kind, bad.detail))
    found = PromptSet(tuple(prompts), tuple(dropped))
    if not prompts:
        raise ValueError(f"{path}: no prompts to train on: {found.summary()}; check the file, field and max_tokens")
    return found


def prompt_order(num_prompts: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation that depends on the arguments alone, not even on NumPy's version.

    Args:
      num_prompts: > 0.
      seed, epoch: >= 0.
    Returns:
      i64[num_prompts], read-only: each of 0 to num_prompts - 1 once.
    Raises:
      ValueError: an argument out of range.
    """
    _check(num_prompts=num_prompts, seed=seed, epoch=epoch)
    return _order(operator.index(num_prompts), operator.index(seed), operator.index(epoch))


def prompts_at_step(num_prompts: int, per_step: int, *, seed: int, step: int) -> np.ndarray:
    """The prompts of a step: entries `step * per_step` and on of all epochs' orders, one after the other.

    Steps 0, 1, 2, ... visit every prompt exactly once an epoch, whatever steps other processes or earlier runs did. A
    step may straddle two epochs, and then it may hold a prompt twice.

    Args:
      num_prompts, per_step: > 0.
      seed, step: >= 0.
    Returns:
      i64[per_step].
    Raises:
      ValueError: an argument out of range.
    """
    _check(num_prompts=num_prompts, per_step=per_step, seed=seed, step=step)
    num_prompts, per_step, step = (operator.index(number) for number in (num_prompts, per_step, step))
    first, last = step * per_step, (step + 1) * per_step
    parts = []
    for epoch in range(first // num_prompts, (last - 1) // num_prompts + 1):
        start = epoch * num_prompts
        order = prompt_order(num_prompts, seed=seed, epoch=epoch)
        parts.append(order[max(first - start, 0) : min(last - start, num_prompts)])
    return np.concatenate(parts)


@functools.lru_cache(maxsize=4)
def _order(num_prompts: int, seed: int, epoch: int) -> np.ndarray:
    # NumPy promises the raw stream of a bit generator for good, but not what `permutation` makes of it.
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(num_prompts)
    order = np.argsort(bits, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def _check(**arguments: int) -> None:
    for name, value in arguments.items():
        least = 1 if name in ("num_prompts", "per_step") else 0
        if value < least:
            raise ValueError(f"{name} is {value}, must be at least {least}")


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
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


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadRecord("not UTF-8", f"byte {error.start + 1} is not UTF-8", "convert the file") from None
    except (ValueError, RecursionError) as error:
        raise _BadRecord("broken JSON", f"broken JSON ({error})", "fix the line") from None
    if not isinstance(record, dict):
        raise _BadRecord("not an object", f"{_kind(record)}, not an object", 'write {"prompt": ...}')
    return record


def _member(record: dict[str, Any], field: str) -> Any:
    if field not in record:
        present = ", ".join(list(record)[:8]) or "none"
        raise _BadRecord("missing field", f"no field {field!r} (present: {present:.200})", "add it or name another")
    return record[field]


def _checked(tokens: Any, text: str) -> np.ndarray:
    """What tokenize returned as i32[P], read-only."""
    with contextlib.suppress(ValueError):  # ragged
        if isinstance(tokens, (Sequence, np.ndarray)) and not isinstance(tokens, str):
            array = np.asarray(tokens)
            if array.size == 0:
                return np.zeros(0, np.int32)
            if array.ndim == 1 and array.dtype.kind in "iu" and array.min() >= 0 and array.max() < MAX_ID:
                array = array.astype(np.int32)
                array.flags.writeable = False
                return array
    raise TypeError(
        f"tokenize returned {tokens!r:.80} for {text!r:.40}, which is not a list of token ids; "
        "for a Hugging Face tokenizer pass its method encode"
    )


def _identity(value: Any) -> tuple[Any, int]:
    """What is unique, and the i32 made of it."""
    if isinstance(value, str):
        return value, zlib.crc32(value.encode("utf-8", "surrogatepass")) % MAX_ID
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_ID:
        raise _BadRecord("bad id", f"id {value!r:.40} is no integer in [0, 2**31)", "write it as a text")
    return value, value


def _kind(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {str: "a text", bool: "a boolean", type(None): "null", list: "an array", dict: "an object"}
    return names.get(type(value), "a number")
