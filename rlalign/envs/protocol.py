"""What an environment of texts is: two methods, two plain types. Everything an agent does here goes through them.

    observation = environment.reset(task_seed)
    observation, reward, terminated, truncated, info = environment.step("take apple 1 from countertop 2")

The shape is Gymnasium's, the action a text. An environment is deterministic: the same seed and actions give the
same observations, rewards and ends, in every process. That is what makes groups of copies comparable, and lets a copy
that lost its process to another one's crash be brought back by doing its actions again.
"""

import enum
import math
from collections.abc import Hashable
from typing import Any, NamedTuple, Protocol


class Observation(NamedTuple):
    """What an environment shows after a step.

    Attributes:
      text: what the agent reads.
      task: what it is to do; the same in the whole episode.
      admissible: the actions that would do something here, in a fixed order; empty where they are not known.
      anchor: the state for step-level groups (GiGPO): a text, a number or a tuple of them; equal anchors of one task
        are one state. None takes `text`; an environment that shows equal texts in different states says more, such as
        (text, what is carried).
    """

    text: str
    task: str
    admissible: tuple[str, ...] = ()
    anchor: Hashable = None


class Info(NamedTuple):
    """What a step says of itself besides its reward.

    Attributes:
      valid: whether the environment understood the action; False for what it answers with "Nothing happens."
      won: whether the task is done.
      score: in [0, 1], how well, where the environment has degrees; else 1.0 where it is won.
    """

    valid: bool = True
    won: bool = False
    score: float = 0.0


class Transition(NamedTuple):
    """What `step` returns.

    Attributes:
      observation: the state after the action; of an episode that has ended, the last thing it says.
      reward: of this step.
      terminated: the task is done, or cannot be done any more.
      truncated: the environment's own limit of steps.
      info: Info.
    """

    observation: Observation
    reward: float
    terminated: bool
    truncated: bool
    info: Info


def as_observation(seen: Any) -> Observation:
    """What `reset` returned, checked, with plain values: it travels as JSON.

    Raises:
      ValueError: something else than an Observation.
    """
    if not isinstance(seen, tuple) or len(seen) != 4:
        raise ValueError(f"the environment returned {seen!r:.80}, not an Observation")
    text, task, admissible, anchor = seen
    return Observation(str(text), str(task), tuple(map(str, admissible)), anchor)


def as_transition(done: Any) -> Transition:
    """What `step` returned, likewise.

    Raises:
      ValueError: something else than a Transition, or a reward that is not finite.
    """
    if not isinstance(done, tuple) or len(done) != 5 or not isinstance(done[4], tuple) or len(done[4]) != 3:
        raise ValueError(f"the environment returned {done!r:.80}, not a Transition")
    seen, reward, terminated, truncated, (valid, won, score) = done
    reward, info = float(reward), Info(bool(valid), bool(won), float(score))
    if not math.isfinite(reward) or not math.isfinite(info.score):
        raise ValueError(f"the environment gave reward {reward} and score {info.score}: both must be finite")
    return Transition(as_observation(seen), reward, bool(terminated), bool(truncated), info)


class TextEnvironment(Protocol):
    """One copy of a world. Its constructor takes what is the same for all tasks.

    It may also have `close()`, called when it is not needed any more, though not of a worker that is killed, and
    `expert() -> str | None`, the next action of somebody who knows the world, for demonstrations.
    """

    def reset(self, seed: int) -> Observation:
        """Begin the task that `seed` >= 0 names; the same seed is the same start."""
        ...

    def step(self, action: str) -> Transition:
        """Do something; any text is allowed, and what is none of the admissible actions changes nothing."""
        ...


class End(enum.IntEnum):
    """Why an episode ended."""

    WON = 0  # the task is done
    FAILED = 1  # terminated otherwise
    TRUNCATED = 2  # the environment's own limit of steps
    STEP_LIMIT = 3  # the runner's limit
    TOO_LONG = 4  # the next prompt did not fit
    RAISED = 5  # the environment raised
    HUNG = 6  # it took longer than its limit
    DIED = 7  # its process ended

    @property
    def lost(self) -> bool:
        """Whether the episode says nothing about the policy: it enters no statistic and no loss."""
        return self >= End.RAISED
