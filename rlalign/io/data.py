"""Prompts from a JSON Lines file, and the order in which training visits them.

A record of the file is refused, with file:line and the remedy, rather than repaired. The order is a function of the
seed and the step alone, so that a run that was stopped and resumed sees every prompt exactly once an epoch.
"""

import functools
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from rlalign.io.records import BadRecord, Examples, check_length, check_utf8, kind, member, read, token_ids
from rlalign.types import Prompt


def read_prompts(
    path: str | os.PathLike[str],
    tokenize: Callable[[str], Sequence[int]],
    *,
    max_tokens: int,
    field: str = "prompt",
    id_field: str | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    special_ids: Sequence[int] = (),
) -> Examples[Prompt]:
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
      Examples; a prompt's `example` is its whole record.
    Raises:
      FileNotFoundError: no such file.
      ValueError: a bad record (broken JSON, not UTF-8, not an object, a missing field, no text, an empty prompt, no
        tokens, a duplicate id); no prompt left; an argument out of range.
      TypeError: tokenize returns no list of token ids.
    """
    special = frozenset(special_ids)

    def make(record: dict[str, Any], number: int) -> Prompt:
        text = _text(member(record, field), field)
        remedy = "for a Hugging Face tokenizer pass its method encode"
        tokens = token_ids(tokenize(text), text, "tokenize", remedy)
        if special.issuperset(tokens.tolist()):
            detail = f"field {field!r} gives no tokens but special ones ({tokens.size} in all)"
            raise BadRecord("no tokens", detail, "remove the record")
        check_length(tokens.size, max_tokens)
        return Prompt(id=number, tokens=tokens, text=text, example=record)

    return read(path, make, max_tokens=max_tokens, id_field=id_field, on_error=on_error, noun="prompts")


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
    return _order(operator.index(num_prompts), operator.index(seed), (operator.index(epoch),))


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
    per_step = operator.index(per_step)
    return visits(operator.index(num_prompts), operator.index(step) * per_step, per_step, seed=operator.index(seed))


def visits(num: int, first: int, count: int, *, seed: int, stream: tuple[int, ...] = ()) -> np.ndarray:
    """i64[count]: entries `first` and on of all epochs' orders of 0 to num - 1; each `stream` has orders of its own."""
    last, parts = first + count, [np.zeros(0, np.int64)]
    for epoch in range(first // num, -(-last // num)):
        order = _order(num, seed, (epoch, *stream))
        parts.append(order[max(first - epoch * num, 0) : last - epoch * num])
    return np.concatenate(parts)


def raw_bits(count: int, seed: int, key: tuple[int, ...]) -> np.ndarray:
    """u64[count]. NumPy promises the raw stream of a bit generator for good, but not what `permutation` makes of it."""
    return np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)


@functools.lru_cache(maxsize=16)
def _order(num: int, seed: int, key: tuple[int, ...]) -> np.ndarray:
    order = np.argsort(raw_bits(num, seed, key), kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def _check(**arguments: int) -> None:
    for name, value in arguments.items():
        least = 1 if name in ("num_prompts", "per_step") else 0
        if value < least:
            raise ValueError(f"{name} is {value}, must be at least {least}")


def _text(value: Any, field: str) -> str:
    """A prompt's text, which is not blank."""
    if not isinstance(value, str):
        remedy = "a prompt is one text; apply a chat template before"
        raise BadRecord("not a text", f"field {field!r} is {kind(value)}, not a text", remedy)
    if not value.strip():
        raise BadRecord("empty prompt", f"field {field!r} is empty or blank", "remove the record")
    check_utf8(value, f"field {field!r}")
    return value
