"""What the adapters of other packages' environments share."""

import importlib
import operator
from typing import Any


def package(module: str, extra: str) -> Any:
    """A module of an optional package.

    Raises:
      ImportError: it is not installed, with the command that does.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} cannot be imported ({error}): pip install "rlalign[{extra}]"') from error


class Clock:
    """The steps of an episode: what a copy may do when, and where its own limit is.

    Args:
      name: of the environment, for messages.
      horizon: steps until an episode is truncated.

    Raises:
      ValueError: a horizon below 1.
    """

    def __init__(self, name: str, horizon: int):
        if horizon < 1:
            raise ValueError(f"{name}: horizon is {horizon}, must be at least 1")
        self._name, self._horizon = name, horizon
        self._left = self._begun = 0

    def start(self, seed: int) -> int:
        """An episode begins; ValueError for a seed that is no int >= 0."""
        self.stop()
        if (seed := operator.index(seed)) < 0:
            raise ValueError(f"{self._name}.reset: seed is {seed}, must be at least 0")
        return seed

    def run(self) -> None:
        """Its start is there: steps count from now."""
        self._left, self._begun = self._horizon, True

    def tick(self, action: str) -> bool:
        """A step is taken; whether it is the last.

        Raises:
          RuntimeError: no episode goes on.
        """
        if not self._left:
            when = "after the end of the episode" if self._begun else "before reset"
            raise RuntimeError(f"{self._name}.step({action!r:.80}) {when}: call reset(seed) first")
        self._left -= 1
        return not self._left

    def stop(self) -> None:
        """The episode has ended."""
        self._left = 0

    @property
    def running(self) -> bool:
        """Whether a step may be taken."""
        return self._left > 0
