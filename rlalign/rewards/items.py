"""The items of one call of a RewardGuard: requests as lines, and what became of them."""

import collections
import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlalign.rewards.worker import MAX_REASON, TOTAL, describe
from rlalign.types import Rewards

Decode = Callable[[list[int]], str]


class Items:
    """The items of one call: the request of each as a line, which wait, and the outcomes so far.

    Args:
      completions: N texts or lists of token ids.
      examples: N mappings of JSON values.
      decode: list of token ids -> str; None hands ids on.

    Attributes:
      lines: a request each, empty where there is none.
      pending: indices that wait for a worker.
      left: how many have no outcome.

    Raises:
      ValueError: lengths differ, or an item is not JSON; named.
    """

    def __init__(self, completions: Sequence, examples: Sequence, decode: Decode | None):
        completions, examples = list(completions), list(examples)
        if len(completions) != len(examples):
            raise ValueError(f"{len(completions)} completions but {len(examples)} examples; give one for each")
        self.lines: list[bytes] = []
        self.pending: collections.deque[int] = collections.deque()
        self.left = len(completions)
        self._reward = np.full(len(completions), np.nan)
        self._reason = [""] * len(completions)
        self._terms: dict[int, dict[str, float]] = {}
        texts: dict[int, str] = {}  # by identity: the samples of a prompt share their example
        for index, (completion, example) in enumerate(zip(completions, examples, strict=True)):
            if id(example) not in texts:
                texts[id(example)] = _example_text(example, index)
            self._add(index, _as_ids(completion, index), texts[id(example)], decode)

    def _add(self, index: int, completion: str | list[int], example: str, decode: Decode | None) -> None:
        self.lines.append(b"")
        if decode is not None and not isinstance(completion, str):
            try:
                completion = decode(completion)
            except Exception as error:  # noqa: BLE001 - a model may sample ids that its tokenizer does not know
                return self.settle(index, None, f"decode raised {describe(error, decode)}")
        self.lines[index] = f"[{index}, {json.dumps(completion)}, {example}]\n".encode()
        self.pending.append(index)

    def settle(self, index: int, value: float | dict[str, float] | None, reason: str) -> None:
        """Records the outcome of one item."""
        self._reason[index] = reason
        if isinstance(value, dict):
            self._reward[index] = value.pop(TOTAL)
            self._terms[index] = value
        elif value is not None:
            self._reward[index] = value
        self.left -= 1

    def refuse(self, reason: str) -> None:
        """Makes all items that wait invalid."""
        while self.pending:
            self.settle(self.pending.popleft(), None, reason)

    def rewards(self) -> Rewards:
        """The outcome of a finished batch."""
        terms = self._named() if self._terms else None
        valid = np.array([not reason for reason in self._reason], dtype=bool)
        return Rewards(reward=self._reward, valid=valid, reason=tuple(self._reason), terms=terms)

    def _named(self) -> dict[str, np.ndarray]:
        """Columns of the terms; an item whose terms are not those of the first that has any becomes invalid."""
        names = list(self._terms[min(self._terms)])
        columns = {name: np.full(len(self._reason), np.nan) for name in names}
        for index, reason in enumerate(self._reason):
            own = self._terms.get(index, {})
            if reason:
                continue
            if set(own) != set(names):
                told = f"gave the terms {_listed(own)}, others {_listed(names)}"
                self._reason[index], self._reward[index] = told, np.nan
                continue
            for name, value in own.items():
                columns[name][index] = value
        return columns


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)[: MAX_REASON // 2] or "none"  # a name may be as long as the function likes


def _as_ids(completion: Any, index: int) -> str | list[int]:
    if isinstance(completion, str):
        return completion
    try:
        return [operator.index(token) for token in np.asarray(completion, dtype=object).tolist()]
    except TypeError:
        raise ValueError(f"completion {index} is {completion!r:.60}, neither a text nor token ids") from None


def _example_text(example: Any, index: int) -> str:
    remedy = "a reward's example must be a mapping of JSON values (texts, numbers, lists, dicts)"
    if not isinstance(example, Mapping):
        raise ValueError(f"example {index} is a {type(example).__name__}; {remedy}")
    fields = []
    for name, value in example.items():
        try:
            if not isinstance(name, str):
                raise TypeError("its name is not a text")
            fields.append(f"{json.dumps(name)}: {json.dumps(value)}")
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"example {index}, field {name!r}: {error}; {remedy}") from None
    return "{" + ", ".join(fields) + "}"
