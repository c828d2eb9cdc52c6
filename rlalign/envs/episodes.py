"""Episodes: every live copy answers its prompt, all of them in one batch, until none is left; then rows to learn from.

    task seeds ─reset─▶ observation ─form─▶ prompt ─sample─▶ answer ─parse─▶ action ─step─▶ observation ─▶ ...

A row of the batch is one step of one episode. Rows of a group are comparable: its copies begin alike.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jax.sharding import Mesh

from rlalign.envs.prompting import Form, Parse, Turn
from rlalign.envs.protocol import End, Observation, Transition
from rlalign.envs.worlds import Copies, Lost
from rlalign.models.decoder import Decoder
from rlalign.rollout import SampleConfig, sample
from rlalign.types import Params, Prompt, Rollouts


@dataclasses.dataclass(frozen=True)
class Episodes:
    """Settings of how episodes are played and made comparable.

    Args:
      copies: episodes of one task, a group.
      max_steps: of an episode.
      max_prompt: tokens; an episode whose next prompt is longer ends there.
      sampling: of an answer, num_samples=1.
      penalty: what an invalid action costs its step (GiGPO's c).
      anchor: what makes two steps of a group comparable: "state", the environment's own anchor; "observation", its text
        alone; "history", the state with the `history` turns before it.
      similarity: None for equal anchors; a threshold in (0, 1] clusters texts, see anchor_ids; anchor="observation".
      history: turns, for anchor="history".

    Raises:
      ValueError: a setting out of range or at odds with another.
    """

    copies: int
    max_steps: int
    max_prompt: int
    sampling: SampleConfig
    penalty: float = 0.1
    anchor: Literal["state", "observation", "history"] = "state"
    similarity: float | None = None
    history: int = 2

    def __post_init__(self):
        for name in ("copies", "max_steps", "max_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sampling.num_samples != 1:
            raise ValueError(
                f"sampling.num_samples={self.sampling.num_samples}: a step has one answer; copies={self.copies} is how "
                "many episodes a task has; use num_samples=1"
            )
        if not 0 <= self.penalty < math.inf:
            raise ValueError(f"penalty must be >= 0, got {self.penalty}")
        if self.anchor not in ("state", "observation", "history"):
            raise ValueError(f"anchor must be 'state', 'observation' or 'history', got {self.anchor!r}")
        if self.similarity is not None and (self.anchor != "observation" or not 0 < self.similarity <= 1):
            raise ValueError(
                f"similarity={self.similarity} with anchor={self.anchor!r}: it compares texts, in (0, 1]; use "
                "anchor='observation'"
            )
        if self.history < 0:
            raise ValueError(f"history must be >= 0, got {self.history}")


class Episode(NamedTuple):
    """What happened in one copy.

    Attributes:
      group: its task's place among the seeds.
      seed: its task.
      turns: steps; of a lost episode those that were answered.
      end: End.
      reason: of an episode that was lost.
      score: in [0, 1], the environment's own at the end.
      last: what was seen after the last step; None where the environment gave nothing.
    """

    group: int
    seed: int
    turns: tuple[Turn, ...]
    end: End
    reason: str
    score: float
    last: Observation | None

    @property
    def reward(self) -> float:
        """Undiscounted return."""
        return sum(turn.reward for turn in self.turns)


@dataclasses.dataclass
class _Playing:
    """An episode that is not over."""

    observation: Observation
    turns: list[Turn] = dataclasses.field(default_factory=list)
    score: float = 0.0


def play(
    decoder: Decoder,
    params: Params,
    worlds: Copies,
    tasks: Sequence[int],
    *,
    form: Form,
    parse: Parse,
    decode: Callable[[np.ndarray], str],
    config: Episodes,
    seed: int,
    step: int,
    attempt: int = 0,
    sampler: Callable[..., Rollouts] = sample,
    mesh: Mesh | None = None,
) -> list[Episode]:
    """config.copies episodes of each task; a copy that has ended is not sampled from any more.

    Args:
      decoder, params, seed, step, mesh, sampler: as in sample; an answer depends on (seed, step, attempt, task, how
        often the task came before in `tasks`, copy, turn) and nothing else.
      worlds: with room for len(tasks) * config.copies copies.
      tasks: task seeds, the groups.
      form: what the policy is shown.
      parse: what its answer does.
      decode: token ids without the end token -> text.
      config: Episodes.
      attempt: tells several plays of one step apart.

    Returns:
      Episodes in the order of tasks, the copies of one beside each other. What an environment does to a copy is in its
      `end`, and raises nothing.

    Raises:
      ValueError: too few copies in `worlds`, or no first prompt that fits.
    """
    count = len(tasks) * config.copies
    if count > worlds.copies:
        raise ValueError(f"{len(tasks)} tasks x {config.copies} copies are {count}, the worlds have {worlds.copies}")
    done: dict[int, Episode] = {}
    # Live copies come in all numbers; programs for the powers of two will do.
    shape = lambda asked: (
        {"at_least": (1 << (len(asked) - 1).bit_length(), config.max_prompt)} if sampler is sample else {}
    )
    live: dict[int, _Playing] = {}

    def end(copy: int, why: End, reason: str = "") -> None:
        group, it = copy // config.copies, live.pop(copy, None)
        turns, score, last = ((), 0.0, None) if it is None else (tuple(it.turns), it.score, it.observation)
        done[copy] = Episode(group, tasks[group], turns, why, reason, score, last)

    def name(copy: int, taken: int) -> int:
        """What the keys of an answer fold."""
        group, number = divmod(copy, config.copies)
        again = sum(task == tasks[group] for task in tasks[:group])
        return zlib.crc32(f"{attempt} {tasks[group]} {again} {number} {taken}".encode())

    begun = worlds.reset({copy: tasks[copy // config.copies] for copy in range(count)})
    for copy in range(count):
        if isinstance(seen := begun[copy], Lost):
            end(copy, seen.end, seen.reason)
        else:
            live[copy] = _Playing(seen)
    for taken in range(config.max_steps):
        prompts = {copy: form(it.turns, it.observation) for copy, it in live.items()}
        too_long = [copy for copy, prompt in prompts.items() if len(prompt) > config.max_prompt]
        if not taken and too_long and len(too_long) == len(prompts):
            raise ValueError(
                f"the first prompt of task {tasks[too_long[0] // config.copies]} has {len(prompts[too_long[0]])} "
                f"tokens, those of the others are too long too, and max_prompt is {config.max_prompt}: raise it, or "
                "show less"
            )
        for copy in too_long:
            del prompts[copy]
            end(copy, End.TOO_LONG)
        if not live:
            break
        asked = [Prompt(name(copy, taken), prompt) for copy, prompt in prompts.items()]
        rollouts = sampler(
            decoder, params, asked, seed=seed, step=step, config=config.sampling, mesh=mesh, **shape(asked)
        )
        answers = {copy: _answer(rollouts, row, config.sampling.eos_ids) for row, copy in enumerate(prompts)}
        acts = {}
        for copy, (response, *_) in answers.items():
            text = decode(response[~np.isin(response, config.sampling.eos_ids)])
            acts[copy] = (text, *parse(text, live[copy].observation.admissible))
        after = worlds.step({copy: action for copy, (_, action, _) in acts.items()})
        for copy in prompts:
            it, seen = live[copy], after[copy]
            if isinstance(seen, Lost):
                end(copy, seen.end, seen.reason)
                continue
            text, action, valid = acts[copy]
            response, logp, behaviour_logp, stop = answers[copy]
            valid = valid and (bool(it.observation.admissible) or seen.info.valid)
            how = {"text": text, "action": action, "valid": valid, "reward": seen.reward}
            it.turns.append(Turn(it.observation, prompts[copy], response, logp, behaviour_logp, stop, **how))
            it.observation, it.score = seen.observation, seen.info.score
            why = _ended(seen, taken + 1 == config.max_steps)
            if why is not None:
                end(copy, why)
    return [done[copy] for copy in range(count)]


def _answer(rollouts: Rollouts, row: int, eos_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """response, logp, behaviour_logp and stop of a row."""
    keep = np.asarray(rollouts.mask[row])
    said = (x[row][keep] for x in (rollouts.tokens, rollouts.logp, rollouts.behaviour_logp))
    return *said, int(rollouts.stop[row])


def _ended(seen: Transition, limit: bool) -> End | None:
    if seen.terminated:
        return End.WON if seen.info.won else End.FAILED
    if seen.truncated:
        return End.TRUNCATED
    return End.STEP_LIMIT if limit else None
