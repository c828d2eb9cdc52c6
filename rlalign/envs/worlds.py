"""Copies of an environment side by side: in this process, or in a few worker processes with time limits.

    with Worlds(House, copies=128, arguments={"receptacles": 4}) as worlds:
        seen = worlds.reset({0: 7, 1: 7, 2: 8})                 # copy -> task seed: equal seeds start alike
        done = worlds.step({0: "go to fridge 1", 2: "look"})    # only the copies that are named; others cost nothing

What goes wrong with a copy comes back as its `Lost`: it costs its own episode, never the run.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, Self

from rlalign.envs.protocol import End, Observation, TextEnvironment, Transition, as_observation, as_transition

Make = Callable[..., TextEnvironment]


class Lost(NamedTuple):
    """What comes back of a copy that failed.

    Attributes:
      end: End.RAISED, HUNG or DIED.
      reason: one line.
    """

    end: End
    reason: str


class Copies(Protocol):
    """What episodes are played in: Worlds, or WorkerWorlds. made_from says of what, for a run's identity."""

    copies: int
    made_from: Mapping[str, Any]

    def reset(self, seeds: Mapping[int, int]) -> dict[int, Observation | Lost]: ...

    def step(self, actions: Mapping[int, str]) -> dict[int, Transition | Lost]: ...


class Worlds:
    """Copies in this process: for environments that are fast and cannot hang.

    Args:
      make: gives one copy; a class will do.
      copies: how many there are at most; each is made when it is first reset.
      arguments: of `make`, by name.

    Raises:
      ValueError: no copies, or what `make` raises for these arguments: one copy is made to see.
    """

    def __init__(self, make: Make, *, copies: int, arguments: Mapping[str, Any] | None = None):
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        self.copies, self._make, self._arguments = copies, make, dict(arguments or {})
        self.made_from: Mapping[str, Any] = {"make": make, "arguments": self._arguments}
        self._running: dict[int, TextEnvironment] = {0: make(**self._arguments)}

    def reset(self, seeds: Mapping[int, int]) -> dict[int, Observation | Lost]:
        """Begin a task in each of the copies.

        Args:
          seeds: copy in [0, copies) -> task seed >= 0.
        """
        check_copies(seeds, self.copies)
        call = lambda world, seed: as_observation(world.reset(seed))
        return {copy: self._try(copy, call, seed) for copy, seed in seeds.items()}

    def step(self, actions: Mapping[int, str]) -> dict[int, Transition | Lost]:
        """Do something in each of the copies.

        Args:
          actions: copy -> action.
        """
        check_copies(actions, self.copies)
        call = lambda world, text: as_transition(world.step(text))
        return {copy: self._try(copy, call, text) for copy, text in actions.items()}

    def _try(self, copy: int, call: Callable[[TextEnvironment, Any], Any], given: Any) -> Any:
        try:
            if copy not in self._running:
                self._running[copy] = self._make(**self._arguments)
            return call(self._running[copy], given)
        except Exception as error:  # noqa: BLE001  whatever an environment does costs its own episode
            close(self._running.pop(copy, None))  # in no known state: the next reset makes another
            return Lost(End.RAISED, f"raised {type(error).__name__}: {error}"[:300])

    def close(self) -> None:
        """Close all copies."""
        while self._running:
            close(self._running.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def close(world: TextEnvironment | None) -> None:
    """Close a copy that may be in any state, or have no `close`."""
    with contextlib.suppress(Exception):
        getattr(world, "close", lambda: None)()


def check_copies(named: Mapping[int, Any], copies: int) -> None:
    """ValueError for a copy that there is not."""
    for copy in named:
        if not 0 <= copy < copies:
            raise ValueError(f"copy {copy} is not in [0, {copies}): make the worlds with more copies")
