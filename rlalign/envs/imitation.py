"""Demonstrations of an environment's expert, turn by turn, for the imitation that comes before reinforcement."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from rlalign.envs.prompting import Form, Turn
from rlalign.envs.protocol import TextEnvironment
from rlalign.types import Demonstration, Prompt, StopReason

LONGEST = 1000  # steps of an episode


def shown_by_expert(
    environment: TextEnvironment,
    tasks: Sequence[int],
    *,
    form: Form,
    encode: Callable[[str], np.ndarray],
    noise: float = 0.0,
    learn: Literal["action", "all"] = "action",
    seed: int = 0,
) -> tuple[Demonstration, ...]:
    """What an expert does in each task, as pairs of prompt and action.

    Args:
      environment: with `expert()`.
      tasks: task seeds.
      form: of the prompts, as in play.
      encode: action -> i32[R], the end token included.
      noise: probability in [0, 1] that a step is a random admissible action, which is then shown too.
      learn: the action alone, or every token behind the first: a model that begins with nothing learns to copy what can
        be done from prompts, which repeat their words, long before it learns that from actions.
      seed: of the noise.

    Returns:
      Demonstrations of all steps; prompt.example holds {"task", "step"}.

    Raises:
      ValueError: noise out of range; an environment without expert, or whose expert gives up.
    """
    if learn not in ("action", "all"):
        raise ValueError(f"learn must be 'action' or 'all', got {learn!r}")
    if not 0 <= noise <= 1:
        raise ValueError(f"noise is {noise}, must lie in [0, 1]")
    expert: Callable[[], str | None] | None = getattr(environment, "expert", None)
    if expert is None:
        raise ValueError(f"{type(environment).__name__} has no expert(): it cannot show how tasks are done")
    made: list[Demonstration] = []
    for task in tasks:
        rng = np.random.default_rng((seed, task))
        observation, turns = environment.reset(task), []
        for taken in range(LONGEST):
            action = expert()
            if rng.random() < noise and observation.admissible:
                action = observation.admissible[rng.integers(len(observation.admissible))]
            if action is None:
                raise ValueError(
                    f"the expert has nothing to do in task {task} after {taken} steps: leave that task out"
                )
            prompt, response = form(turns, observation), encode(action)
            first = len(prompt) if learn == "action" else 1
            whole, about = np.concatenate([prompt, response]), {"task": task, "step": taken}
            made.append(Demonstration(Prompt(len(made), whole[:first], "", about), whole[first:]))
            done = environment.step(action)
            none = np.zeros(len(response), np.float32)
            how = {"text": action, "action": action, "valid": done.info.valid, "reward": done.reward}
            turns.append(Turn(observation, prompt, response, none, none, StopReason.EOS, **how))
            observation = done.observation
            if done.terminated or done.truncated:
                break
    return tuple(made)
