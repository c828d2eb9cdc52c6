"""What the scripts of experiments share: presets of flags, results that are not found twice, means over seeds."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rlalign.evaluation import interval

T = TypeVar("T")


def with_preset(flags: T, presets: Mapping[str, Mapping[str, Any]]) -> T:
    """Flags with the values of their preset, where they have their default: a flag that says something else stays.

    Args:
      flags: a dataclass whose field `preset` names one of `presets`.
      presets: name -> field -> value.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Flags:
    ...     preset: str = "smoke"
    ...     steps: int = 100
    ...     folder: str = "runs/a"
    >>> with_preset(Flags(folder="mine"), {"smoke": {"steps": 2, "folder": "runs/smoke"}})
    Flags(preset='smoke', steps=2, folder='mine')
    """
    assert dataclasses.is_dataclass(flags)
    assert not isinstance(flags, type)
    default = {field.name: field.default for field in dataclasses.fields(flags)}
    chosen = presets[getattr(flags, "preset")]  # noqa: B009  a field of whichever dataclass
    return dataclasses.replace(flags, **{k: v for k, v in chosen.items() if getattr(flags, k) == default[k]})


def earlier_result(path: Path, settings: Any, *, ignore: tuple[str, ...] = ()) -> dict[str, Any] | None:
    """The result that an earlier run with the same settings left at `path`; None where there is none.

    Args:
      path: of a JSON object that holds the settings' fields.
      settings: a dataclass.
      ignore: fields that may differ.

    Raises:
      ValueError: a result of other settings: the first that differs, and the remedy.
    """
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    asked = json.loads(json.dumps(dataclasses.asdict(settings)))
    for name, value in asked.items():
        if name not in ignore and found.get(name) != value:
            raise ValueError(
                f"{path} is the result of {name}={found.get(name)!r}, asked for is {value!r}: give another --folder, "
                "or remove the run's"
            )
    return found


def over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    """{"value", "low", "high"}: the mean and Student's 95% interval, as JSON: None for the ends of a single seed.

    >>> over_seeds([0.5])
    {'value': 0.5, 'low': None, 'high': None}
    """
    found = interval(np.asarray(values, float))
    return {name: None if np.isnan(value) else float(value) for name, value in found._asdict().items()}
